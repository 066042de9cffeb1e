"""A config file's mistakes: all at once, each with its line, what was got, and the nearest name that exists."""

import pytest

from core.errors import ConfigError
from pipelines.config import load_pipeline
from pipelines.stages import STAGES
from pipelines.yaml_lines import load

GOOD = """\
root: ./data
engine: {name: local, workers: 2, memory_gb: 1.5}
sources:
  web: {kind: files, path: ./pages}
  books: {kind: files, path: /books}
stages:
  extract:
  language: {}
  signals: {where: language.language == 'en', datasets: [web]}
  select@final: {}
policy:
  priority: [books, web]
  final:
    - {drop: language.score < 0.65, reason: language_score}
    - {use: gopher_quality}
"""


@pytest.fixture
def problems(tmp_path):
    """The problems of a config text, with the file's name as `F`."""

    def of(text, name="p.yaml"):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_pipeline(path)
        return [line.replace(str(path), "F") for line in caught.value.problems]

    return of


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_config(tmp_path):
    (tmp_path / "p.yaml").write_text(GOOD)
    pipeline = load_pipeline(tmp_path / "p.yaml")
    assert pipeline.root == str(tmp_path / "data")
    assert (pipeline.engine.name, pipeline.engine.workers, pipeline.engine.memory_gb) == ("local", 2, 1.5)
    assert list(pipeline.sources) == ["web", "books"]
    assert pipeline.sources["web"].path == str(tmp_path / "pages")
    assert pipeline.sources["books"].path == "/books"
    assert [e.instance for e in pipeline.stages] == ["extract", "language", "signals", "select@final"]
    assert pipeline.entry("signals").config.datasets == ("web",)
    assert pipeline.policy["priority"] == ("books", "web")
    assert [r.reason for r in pipeline.policy["final"]] == ["language_score", None]
    with pytest.raises(ConfigError, match="no stage 'signal' in this pipeline, did you mean 'signals'"):
        pipeline.entry("signal")


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("root: ./data", "rot: ./data\nroot: a", 1, "unknown key 'rot', did you mean 'root'?"),
        ("root: ./data\n", "", 1, "`root` is missing"),
        ("  language: {}", "  langage: {}", 8, "unknown stage 'langage', did you mean 'language'?"),
        ("  language: {}", "  language: {where_: x}", 8, "unknown key 'where_', did you mean 'where'?"),
        ("  language: {}", "  language: 5", 8, "stages.language: Input should be a valid dictionary"),
        ("  language: {}", "  language@x: {}", 8, "'language' takes no label"),
        ("select@final: {}", "select: {}", 10, "'select' takes a label, as in select@final"),
        ("workers: 2", "workers: two", 2, "got 'two'"),
        ("workers: 2", "workers: -1", 2, "greater than or equal to 0, got '-1'"),
        ("name: local", "name: sparc", 2, "got 'sparc'"),
        ("memory_gb: 1.5", "memory_gb: .inf", 2, "must be a finite number, got .inf"),
        ("memory_gb", "memry_gb", 2, "unknown key 'memry_gb', did you mean 'memory_gb'?"),
        ("kind: files, path: ./pages", "kind: file, path: ./pages", 4, "'file'"),
        ("kind: files, path: ./pages", "path: ./pages", 4, "kind"),
        ("kind: files, path: ./pages", "kind: files", 4, "'path' is missing"),
        (
            "kind: files, path: ./pages",
            "kind: files, path: x, licens: y",
            4,
            "unknown key 'licens', did you mean 'license'?",
        ),
        ("  web:", "  w b:", 4, "source name 'w b' may hold letters"),
        ("language.language == 'en'", "language.language =", 9, "invalid syntax"),
        ("language.language == 'en'", "langage == 'en'", 9, "no column 'langage'"),
        ("datasets: [web]", "datasets: [wob]", 9, "no source 'wob', did you mean 'web'?"),
        ("priority: [books, web]", "priority: [book, web]", 12, "no source 'book', did you mean 'books'?"),
        ("  final:", "  finale:", 13, "unknown key 'finale', did you mean 'final'?"),
        ("language.score < 0.65", "'language.score < '", 14, "invalid syntax"),
        (", reason: language_score", "", 14, "a `drop` needs a `reason`"),
        ("drop: language.score < 0.65, ", "", 14, "a rule needs either `drop` (with `reason`) or `use`"),
        ("use: gopher_quality", "use: gopher_qualty", 15, "no preset 'gopher_qualty'; did you mean 'gopher_quality'?"),
        ("use: gopher_quality", "use: gopher_quality, thresholds: {min_wrds: 3}", 15, "no threshold 'min_wrds'"),
        ("use: gopher_quality", "us: gopher_quality", 15, "unknown key 'us', did you mean 'use'?"),
        ("path: ./pages", "path: '${STEPWELL_NOT_SET}/pages'", 4, "environment variable STEPWELL_NOT_SET is not set"),
        ("books: {kind", "web: {kind", 5, "'web' stands twice"),
        ("engine: {name", "engine: {name: local, name", 2, "'name' stands twice"),
        ("path: ./pages}", "path: ./pages", 5, "not valid YAML"),
    ],
)
def test_one_mistake_is_told_with_its_line(problems, old, new, line, said):
    found = problems(changed(old, new))
    assert any(p.startswith(f"F:{line}: ") and said in p for p in found), found


REFUSE_WHERE = {"crawl", "harvest", "extract", "embedder", "select", "answers", "augment", "train", "evaluate"}


@pytest.mark.parametrize("line", STAGES, ids=lambda line: line.name)
def test_where_is_refused_by_stages_that_choose_no_rows(problems, line):
    """A knob that is read and means nothing would look as if it had worked. `rot` makes a config without mistakes one more."""
    instance = f"{line.name}@x" if line.name == "select" else line.name
    text = f"rot: a\nroot: a\nsources: {{w: {{kind: files, path: x}}}}\nstages:\n  {instance}: "
    text += "{where: split.split == 'train'" + (", model: m}\n" if line.name == "answers" else "}\n")
    said = [p for p in problems(text) if "chooses no rows" in p]
    expected = f"F:5: stages.{instance}.where: {line.name} chooses no rows; leave `where` out"
    assert said == ([expected] if line.name in REFUSE_WHERE else [])


def test_all_mistakes_are_told_at_once(problems):
    text = GOOD.replace("root:", "rot:").replace("workers: 2", "workers: -2").replace("language: {}", "langage: {}")
    text = text.replace("datasets: [web]", "datasets: [wob]").replace("gopher_quality", "gopher_qualty")
    text = text.replace("/books", "'${STEPWELL_NOT_SET}'")
    found = problems(text)
    for said in ("'rot'", "`root` is missing", "workers", "'langage'", "'wob'", "'gopher_qualty'", "STEPWELL_NOT_SET"):
        assert sum(said in p for p in found) == 1, (said, found)
    assert all(p.startswith("F:") for p in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "`root` is missing"),
        ("- a\n- b\n", "F:1: expected a mapping with root, sources and stages, got list"),
        ("just text", "got str"),
        ("root: a\n---\nroot: b\n", "F:2: not valid YAML"),
        ("root: a\nsources: 3\nstages: []\npolicy: hi\n", "`sources` must be a mapping, got int"),
        ("root: a\nsources: {w: {kind: files, path: x}}\nstages: {}\n", "`stages` is empty"),
    ],
)
def test_files_that_are_no_pipeline(problems, text, said):
    assert any(said in p for p in problems(text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_pipeline(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"root: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pipeline(tmp_path / "latin.yaml")


def test_variables_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPWELL_TEST_ROOT", "/srv/data")
    (tmp_path / "p.yaml").write_text(GOOD.replace("./data", "${STEPWELL_TEST_ROOT}/x"))
    assert load_pipeline(tmp_path / "p.yaml").root == "/srv/data/x"


def test_urls_are_left_alone(tmp_path):
    (tmp_path / "p.yaml").write_text(GOOD.replace("./data", "s3://bucket/data"))
    assert load_pipeline(tmp_path / "p.yaml").root == "s3://bucket/data"


def test_lines_of_every_part():
    data, lines = load("a: 1\nb:\n  - x\n  - {c: 2}\n", "F")
    assert data == {"a": 1, "b": ["x", {"c": 2}]}
    assert [lines.where(p) for p in (("a",), ("b",), ("b", 1), ("b", 1, "c"), ("b", 1, "none"), ("none",))] == [
        "F:1",
        "F:2",
        "F:4",
        "F:4",
        "F:4",
        "F:1",
    ]


@pytest.mark.parametrize("text", ["root: !foo a\n", "root: a\x01\n", "a: &x [*x]\n", "root: !!python/name:os.system\n"])
def test_strange_yaml_is_a_problem_and_no_traceback(problems, text):
    assert any("not valid YAML" in p for p in problems(text))


def test_one_broken_rule_does_not_hide_the_others(problems):
    text = changed("{use: gopher_quality}", "{use: gopher_qualty}\n    - {droop: x}")
    assert sum("gopher_qualty" in p or "'droop'" in p for p in problems(text)) == 2


def test_a_source_with_a_mistake_still_has_its_name(problems):
    assert len(problems(changed("path: ./pages", "path: ./pages, colour: red"))) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("select@final: {}", "select@final: {}\n  select@a/b: {}"),
        ("reason: language_score", "reason: language_score, datasets: [wob]"),
        ("root: ./data", "root: [a]"),
    ],
)
def test_mistakes_that_pass_or_are_told_twice(problems, old, new):
    assert len(problems(changed(old, new))) == 1
