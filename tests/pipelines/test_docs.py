"""The pages say what the code does: generated ones are up to date, examples load, mistakes read as printed, links lead on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from core.errors import ConfigError
from core.manifest import read_manifest, write_manifest
from core.storage import Root
from pipelines import docs
from pipelines.config import load_pipeline
from pipelines.figures import figures, fill
from pipelines.runner import Runner, RunOptions
from pipelines.stages import STAGES
from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([REPO / "README.md", *(REPO / "docs").glob("*.md")])

CONFIG = """\
root: ./data
engine: {workers: 1, memory_gb: 1}
sources:
  web: {kind: files, path: ./pages}
stages:
  extract: {}
  signals: {}
  select@final: {}
policy:
  final:
    - {drop: signals.words < 5, reason: too_short}
"""


def block(page, mark):
    """The fenced block that follows a mark."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", (REPO / "docs" / page).read_text("utf-8"), re.DOTALL)
    assert found, f"{page} has no block {mark}"
    return found.group(1)


def test_the_page_of_stages_is_up_to_date():
    assert docs.STAGES_PAGE.read_text("utf-8") == docs.stages_page(), "run `python -m pipelines.docs`"


def test_every_knob_says_what_it_does():
    silent = {
        f"{model.__name__}.{name}"
        for model in docs.documented()
        for name, f in model.model_fields.items()
        if not docs.is_tag(f) and not docs.described(f)
    }
    assert silent == set()


def test_a_table_shows_types_bounds_defaults_and_execution():
    class Part(BaseModel):
        """One part. More of it."""

    class Knobs(BaseModel):
        steps: int = Field(default=3, ge=1, description="how many")
        path: str | None = Field(default=None, description="a | b", json_schema_extra={"execution": True})
        parts: dict[str, Part] = Field(min_length=1)
        silent: float = 0.5

    assert list(docs.fields_table(Knobs))[2:] == [
        "| `steps` | integer, ≥ 1 | `3` |  | how many |",
        "| `path` | text or null | `null` | yes | a \\| b |",
        "| `parts` | mapping to Part, at least 1 | required |  | One part. See [Part](#part) |",
        "| `silent` | number | `0.5` |  |  |",
    ]
    assert list(docs.fields_table(Knobs, Knobs)) == []
    assert docs.parts_of([Knobs]) == [Part]


def test_asking_for_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom pipelines.docs import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "print('loaded:', *[m for m in 'numpy pyarrow pydantic torch fasttext'.split() if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True, timeout=BOUND_S
    ).stdout
    assert out.rstrip().endswith("loaded:"), out.splitlines()[-1]


def test_the_example_is_a_valid_pipeline(tmp_path):
    (tmp_path / "p.yaml").write_text(block("config.md", "example"))
    pipeline = load_pipeline(tmp_path / "p.yaml")
    assert {s.kind for s in pipeline.sources.values()} == {"crawl", "warc", "files", "jsonl"}
    assert [e.instance for e in pipeline.stages][-2:] == ["train", "evaluate"]


def test_mistakes_read_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.delenv("PAGES_NOT_SET", raising=False)
    (tmp_path / "p.yaml").write_text(block("config.md", "mistakes"))
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "p.yaml")
    said = "".join(f"error: {line.replace(str(tmp_path / 'p.yaml'), 'p.yaml')}\n" for line in caught.value.problems)
    assert said == block("config.md", "messages")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_that_are_there(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)[^)]*\)", page.read_text("utf-8"))
    assert [t for t in targets if t and not (page.parent / t).exists()] == []


def test_readme_can_be_read_in_one_sitting():
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) < 200


def test_readme_counts_stages_and_presets():
    from classifiers.rules import PRESETS

    text = (REPO / "README.md").read_text("utf-8")
    assert f"one command, {len(STAGES)} stages" in text
    assert f"stepwell has {len(PRESETS)} rule presets" in text
    assert f"all {len(STAGES)} stages leave equal" in (REPO / "docs" / "engines.md").read_text("utf-8")


def test_readme_names_every_extra():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    table = (REPO / "README.md").read_text("utf-8").partition("| extra | brings |")[2].partition("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert set(re.findall(r"`(\w+)`", first)) == set(extras)


def test_targets_of_make_named_in_the_pages_exist():
    """Commands and their options: test_help.py."""
    targets = set(re.findall(r"^(\w+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = "\n".join(p.read_text("utf-8") for p in PAGES)
    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", text, re.MULTILINE))
    assert named
    assert named - targets == set()


def test_every_variable_of_the_environment_that_is_read_is_in_the_table():
    code = "\n".join(p.read_text("utf-8") for f in our_folders() for p in sorted((REPO / f).rglob("*.py")))
    read = set(re.findall(r"\"((?:STEPWELL|MOE)_[A-Z_]+)\"", code))
    table = (REPO / "docs" / "config.md").read_text("utf-8").partition("| variable |")[2].partition("\n\n")[0]
    assert read
    assert read - set(re.findall(r"`([A-Z_]+)`", table)) == set()


def test_the_shapes_of_presets_are_those_of_the_code():
    from moe.flops import parameters
    from moe.presets import preset

    page = (REPO / "docs" / "model.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("| preset |")[2].partition("\n\n")[0], re.MULTILINE)
    assert len(rows) == 6
    for name, cells in rows:
        shape = preset(name, vocab_size=8192 if name in ("ci", "tiny") else 32_768, eos=0)
        whole, active, layers, width, experts = (c.strip() for c in cells.split("|"))
        shown = [str(shape.layers), f"{shape.dim:,}", f"{shape.experts}, top-{shape.top_k}"]
        assert [layers, width, experts] == shown
        for said, exact in zip((whole, active), parameters(shape), strict=True):
            number, unit = said.split()
            places = len(number.partition(".")[2])
            assert float(number) == round(exact / {"M": 1e6, "B": 1e9}[unit], places), name


def test_messages_named_in_the_pages_are_those_of_the_code():
    """Fragments between placeholders (`X`, `...`) of every message in the table of operations.md."""
    code = "\n".join(p.read_text("utf-8") for f in our_folders() for p in sorted((REPO / f).rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one message over several lines
    table = (REPO / "docs" / "operations.md").read_text("utf-8").partition("| message | cause")[2]
    first = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    messages = re.findall(r"`([^`]+)`", "".join(first))
    assert len(messages) > 25
    pieces = [p.strip(" '():") for m in messages for p in re.split(r"\.\.\.|\b[A-Z]\b|SIGKILL", m)]
    assert [p for p in pieces if p and p not in code] == []


def our_folders():
    return [f for f in ("core", "classifiers", "crawl", "dedup", "mixtures", "moe", "pipelines") if (REPO / f).is_dir()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small pipeline that has run: three pages, one of them too short."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "pages").mkdir()
    for name, text in {"a": "one two three four five six", "b": "a b c d e f g", "c": "two words"}.items():
        (folder / "pages" / f"{name}.txt").write_text(text)
    (folder / "p.yaml").write_text(CONFIG)
    pipeline = load_pipeline(folder / "p.yaml")
    Runner(pipeline, RunOptions("test")).run()
    return pipeline, Root(pipeline.root)


def test_figures_are_those_of_the_manifests(run):
    pipeline, root = run
    blocks = figures(pipeline, root)
    assert set(blocks) == {"demo", "stages", "cli"}
    counts = [line.split()[:2] for line in blocks["demo"].splitlines() if "#" in line]
    assert counts == [["records", "3"], ["documents", "3"], ["kept", "2"]]
    assert "-1: too_short 1" in blocks["demo"]
    seconds = read_manifest(root, "select@final", None).observed["seconds"]
    row = next(line for line in blocks["stages"].splitlines() if "select@final" in line)
    assert [c.strip() for c in row.split("|")][2:5] == ["3", "", f"{seconds:.2f}"]
    assert "all good: 3 manifests" in blocks["cli"]
    assert re.search(r"FALLS +too_short .*signals.words = 2", blocks["cli"])


def test_figures_of_another_config_are_refused(run, tmp_path):
    pipeline, root = run
    (tmp_path / "p.yaml").write_text(CONFIG.replace("< 5", "< 6").replace("./", f"{pipeline.path.parent}/"))
    with pytest.raises(ConfigError, match=r"select@final not up to date"):
        figures(load_pipeline(tmp_path / "p.yaml"), root)


def test_figures_of_a_root_that_is_not_finished_are_refused(run):
    pipeline, root = run
    manifest = read_manifest(root, "select@final", None)
    root.remove("manifests/select@final.json")
    try:
        with pytest.raises(ConfigError, match=r"select@final not up to date"):
            figures(pipeline, root)
    finally:
        write_manifest(root, manifest)
    assert set(figures(pipeline, root)) == {"demo", "stages", "cli"}


def test_a_block_replaces_what_stood_between_its_marks():
    page = "A\n<!-- figures: x -->\nold\n<!-- /figures: x -->\nB\n"
    once = fill(page, {"x": "new"})
    assert once == "A\n<!-- figures: x -->\n\nnew\n\n<!-- /figures: x -->\nB\n"
    assert fill(once, {"x": "new"}) == once
    with pytest.raises(ConfigError, match="no block for 'y'"):
        fill(page, {"y": "new"})
