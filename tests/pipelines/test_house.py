"""The house rules that a machine can hold: which way imports go, what loads what, sizes, words, and stage versions.

`python -m tests.pipelines.test_house --update` records the digests of stages whose version moved; `--same-output` says that a
change of code cannot change a byte of any stage's output, and records those too.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.hashing import digest, file_digest
from pipelines.stages import STAGES, load
from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
ORDER = ["core", "classifiers", "crawl", "dedup", "mixtures", "moe", "pipelines", "airflow_dags"]
FOLDERS = [f for f in ORDER if (REPO / f).is_dir()]
VERSIONS = Path(__file__).with_name("stage_versions.json")
MODULE_LINES = 350
MOE_MAY_READ = {"core.errors", "core.hashing", "core.statistics"}  # the machines that train have no pydantic


def tracked(*patterns):
    """Files that git knows or would add, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
        timeout=BOUND_S,
    )
    return sorted(Path(p) for p in listed.stdout.splitlines() if (REPO / p).exists())


def house_modules():
    """{dotted name: path} of every module of ours."""
    out = {}
    for path in tracked("*.py"):
        if path.parts[0] in FOLDERS:
            parts = path.with_suffix("").parts
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = REPO / path
    return out


def imports(name, path, modules):
    """(module of ours, whether at load) for every import in a module: `from a import b` is a.b where that is a module."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    guarded = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{module}.{a.name}" if f"{module}.{a.name}" in modules else module for a in node.names]
        else:
            continue
        for target in targets:
            if target.partition(".")[0] in FOLDERS:
                yield target, id(node) not in inside and id(node) not in guarded


MODULES = house_modules()
IMPORTS = {name: set(imports(name, path, MODULES)) for name, path in MODULES.items()}


def test_imports_go_left_only():
    wrong = [
        f"{name} imports {target}"
        for name, found in IMPORTS.items()
        for target, _ in found
        if ORDER.index(target.partition(".")[0]) > ORDER.index(name.partition(".")[0])
    ]
    assert wrong == []


def test_moe_reads_of_core_only_what_needs_no_pydantic():
    foreign = {t for n, found in IMPORTS.items() if n.startswith("moe") for t, _ in found if not t.startswith("moe")}
    assert foreign <= MOE_MAY_READ


def test_airflow_dags_import_nothing_of_ours():
    assert {
        t
        for n, found in IMPORTS.items()
        if n.startswith("airflow_dags")
        for t, _ in found
        if not t.startswith("airflow_dags")
    } == set()


def test_no_circles():
    """Among the imports that run when a module is loaded."""
    graph = {name: {t for t, at_load in found if at_load and t in MODULES} for name, found in IMPORTS.items()}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError("a circle: " + " -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)
    assert done == set(MODULES)


@pytest.mark.parametrize("arguments", [["--help"], ["stages"], ["run", "--help"], ["run", "all", "--help"]])
def test_looking_is_cheap(arguments):
    """What a person types first loads no engine, no model and no Arrow."""
    code = f"""
import sys
sys.argv = ["pipelines", *{arguments!r}]
from pipelines.cli import app
try:
    app()
except SystemExit as e:
    assert not e.code, e.code
heavy = "numpy pyarrow torch ray pyspark sklearn scipy trafilatura numba fasttext faiss lxml tokenizers".split()
print("loaded:", *[m for m in heavy if m in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True, timeout=BOUND_S
    ).stdout
    assert out.rstrip().endswith("loaded:"), out.splitlines()[-1]


@pytest.mark.parametrize("line", STAGES, ids=lambda line: line.name)
def test_every_stage_loads_and_explains_its_knobs(line):
    stage = load(line.name)
    assert (stage.name, stage.kind) == (line.name, line.kind)
    assert stage.version >= 1
    silent = [name for name, f in stage.config.model_fields.items() if not f.description]
    assert silent == []
    assert stage.config.model_config.get("extra") == "forbid"
    assert (stage.layer is not None) == (line.kind == "annotate") or line.kind != "annotate"


def test_modules_can_be_read_in_one_sitting():
    long = {n: lines for n, p in MODULES.items() if (lines := len(p.read_text("utf-8").splitlines())) > MODULE_LINES}
    assert long == {}


def test_every_module_says_what_it_is():
    """Tests and benchmarks too."""
    texts = {p: (REPO / p).read_text("utf-8") for p in tracked("*.py")}
    assert [str(p) for p, text in texts.items() if text and ast.get_docstring(ast.parse(text)) is None] == []


NAMES = re.compile(r"manager|helper|utils?$|handler|processor|^base[A-Z_]|^Base[A-Z]|_v2$|V2$|^do_", re.IGNORECASE)
NAMED_BY_OTHERS = {"do_GET", "do_POST", "do_HEAD"}  # http.server calls these


def test_names_say_what_things_are():
    wrong = []
    for path in tracked("*.py"):
        tree = ast.parse((REPO / path).read_text("utf-8"))
        names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        names += path.with_suffix("").parts
        wrong += [f"{path}: {n}" for n in names if NAMES.search(n) and n not in NAMED_BY_OTHERS]
    assert wrong == []


def test_no_path_of_one_machine():
    forbidden = re.compile(r"(?<![\w.])/(?:work|home|root)/\w", re.ASCII)
    found = []
    for path in tracked():
        if path != Path(__file__).relative_to(REPO) and (REPO / path).stat().st_size < 1 << 20:
            text = (REPO / path).read_bytes().decode("utf-8", "replace")
            found += [
                f"{path}:{i}: {line.strip()[:80]}"
                for i, line in enumerate(text.splitlines(), 1)
                if forbidden.search(line)
            ]
    assert found == []


# A stage's output may change whenever its code does: the digest of the code is recorded together with the version.


def stage_modules(module):
    """The module of a stage and, from module to module, those of the same folder that it imports."""
    folder, seen, todo = module.partition(".")[0], set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [t for t, _ in IMPORTS[name] if t.partition(".")[0] == folder and t in MODULES]
    return sorted(seen)


def code_digest(modules):
    """Hash of the code without docstrings, comments and layout, which change no output, and of the files that lie beside a
    module and are named in it, such as lists of words, which do."""
    trees = {}
    for name in modules:
        tree = ast.parse(MODULES[name].read_text("utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body[0].value = ast.Constant(None)
        beside = {p.name: p for p in MODULES[name].parent.iterdir() if p.is_file() and p.suffix != ".py"}
        named = sorted({n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in beside})
        trees[name] = [ast.dump(tree), [file_digest(beside[n]) for n in named]] if named else ast.dump(tree)
    return digest(trees)


def current_versions():
    out = {}
    for line in STAGES:
        stage = load(line.name)
        out[line.name] = {"version": stage.version, "code": code_digest(stage_modules(line.target.partition(":")[0]))}
    return out


def recorded_versions():
    return json.loads(VERSIONS.read_text("utf-8")) if VERSIONS.exists() else {}


def moved(current, recorded):
    """Stages whose code is not what was recorded for their version."""
    return [n for n, now in current.items() if n in recorded and now["code"] != recorded[n]["code"]]


def test_code_that_moved_has_a_new_version():
    current, recorded = current_versions(), recorded_versions()
    assert set(current) == set(recorded), "new or gone stages: run `python -m tests.pipelines.test_house --update`"
    silent = [n for n in moved(current, recorded) if current[n]["version"] == recorded[n]["version"]]
    assert silent == [], (
        f"the code of {silent} changed. If an output could change for the same input, raise `version` in its Stage; then run "
        "`python -m tests.pipelines.test_house --update` (with --same-output if no output can change)"
    )
    assert moved(current, recorded) == [], "versions moved: run `python -m tests.pipelines.test_house --update`"


def update(same_output):
    """Record what is there; refuse where code moved without its version."""
    current, recorded = current_versions(), recorded_versions()
    silent = [n for n in moved(current, recorded) if current[n]["version"] == recorded[n]["version"]]
    if silent and not same_output:
        return f"refused: the code of {', '.join(silent)} moved, its version did not; raise it, or say --same-output"
    fallen = [n for n in current if n in recorded and current[n]["version"] < recorded[n]["version"]]
    if fallen:
        return f"refused: the version of {', '.join(fallen)} went down"
    VERSIONS.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
    return ""


def test_the_updater_refuses_silent_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "VERSIONS", tmp_path / "versions.json")
    assert update(same_output=False) == ""
    written = recorded_versions()
    written["pii"]["code"] = "other"
    VERSIONS.write_text(json.dumps(written))
    assert update(same_output=False).startswith("refused: the code of pii moved")
    assert update(same_output=True) == ""
    written["pii"] = {"version": 0, "code": "other"}
    VERSIONS.write_text(json.dumps(written))
    assert update(same_output=False) == ""
    written["pii"] = {"version": 99, "code": "other"}
    VERSIONS.write_text(json.dumps(written))
    assert update(same_output=True).startswith("refused: the version of pii went down")


def test_layout_and_comments_do_not_count(tmp_path, monkeypatch):
    path = tmp_path / "m.py"
    monkeypatch.setitem(MODULES, "m", path)
    texts = [
        '"""A."""\nx = 1\n',
        '"""B."""\n\nx = (1)  # one\n',
        '"""B."""\nx = 2\n',
        'def f():\n    """D."""\n    return 1\n',
    ]
    texts.append(texts[-1].replace("D.", "E."))
    digests = []
    for text in texts:
        path.write_text(text)
        digests.append(code_digest(["m"]))
    assert digests[0] == digests[1] != digests[2]
    assert digests[3] == digests[4]


def test_a_list_beside_a_module_counts_as_its_code(tmp_path, monkeypatch):
    path, words = tmp_path / "m.py", tmp_path / "words.txt"
    monkeypatch.setitem(MODULES, "m", path)
    path.write_text('WORDS = "words.txt"\n')
    digests = []
    for text in ("a", "b", "b"):
        words.write_text(text)
        digests.append(code_digest(["m"]))
        (tmp_path / "other.txt").write_text(text)
    assert digests[0] != digests[1] == digests[2]


if __name__ == "__main__":
    arguments = set(sys.argv[1:])
    if "--update" not in arguments or arguments - {"--update", "--same-output"}:
        sys.exit("usage: python -m tests.pipelines.test_house --update [--same-output]")
    sys.exit(update("--same-output" in arguments) or 0)
