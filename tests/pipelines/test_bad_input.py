"""Wrong input of every kind, given to the command: one exit code, one line that says what is wrong and what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.small_pipeline import pipelines, prose

CONFIG = """\
root: ./root
engine: {workers: 1, memory_gb: 1}
sources:
  web: {kind: files, path: ./pages}
stages:
  extract: {}
  signals: {}
  exact: {}
  select@final: {duplicates: [exact]}
policy:
  final:
    - {drop: signals.words < 3, reason: too_short}
"""
ALL = ("run", "all")


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder in which the pipeline has run."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "pages").mkdir()
    for i in range(3):
        (folder / "pages" / f"{i}.txt").write_text(prose(i))
    (folder / "p.yaml").write_text(CONFIG)
    assert pipelines(*ALL, "-c", folder / "p.yaml").code == 0
    return folder


@pytest.fixture
def folder(ready, tmp_path) -> Path:
    shutil.copytree(ready, tmp_path / "work")
    return tmp_path / "work"


Change = Callable[[Path], object]


def edit(old: str, new: str) -> Change:
    """Another config."""

    def change(folder: Path) -> None:
        text = (folder / "p.yaml").read_text()
        assert text.count(old) == 1
        (folder / "p.yaml").write_text(text.replace(old, new))

    return change


def source(line: str) -> Change:
    return edit("{kind: files, path: ./pages}", line)


def stage(line: str) -> Change:
    return edit("  signals: {}\n", f"  signals: {{}}\n  {line}\n")


def crawled(line: str) -> Change:
    return both(source(line), edit("stages:\n", "stages:\n  crawl: {}\n"))


def manifest(name: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "root" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def put(name: str, data: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def parquet(folder: Path) -> None:
    pq.write_table(pa.table({"body": ["a text"], "id": [1]}), folder / "pages" / "t.parquet")


def other_documents(folder: Path) -> None:
    """New documents under layers of the old ones."""
    (folder / "pages" / "0.txt").write_text(prose(99))
    assert pipelines("run", "stage", "extract", "-c", folder / "p.yaml").code == 0


NOTHING: Change = lambda folder: None  # noqa: E731
DOCUMENTS = "datasets/web/manifests/documents.json"
CASES = {
    # Files and sources
    "no config": (lambda f: (f / "p.yaml").unlink(), ALL, 2, r"p\.yaml: no such config file; see configs/"),
    "config of bytes": (put("p.yaml", b"\xff\xfe\x00"), ALL, 2, r"p\.yaml: cannot be read: .*utf-8"),
    "missing folder": (source("{kind: files, path: ./absent}"), ALL, 2, r"source: .*absent.*; check the path"),
    "missing file": (source("{kind: jsonl, path: ./absent.jsonl}"), ALL, 2, r"source: .*absent\.jsonl.*; check the path"),
    "empty source": (source("{kind: warc, path: ./pages}"), ALL, 2, r"source: no file matches, got .*; check the path"),
    "wrong column": (
        both(parquet, source("{kind: parquet, path: ./pages}")), ALL, 2,
        r"source: t\.parquet lacks columns \['text'\], got \['body', 'id'\]; name existing ones",
    ),
    "no seeds file": (
        crawled('{kind: crawl, seeds_file: ./seeds.txt, user_agent: "t/1 (+https://example.org)"}'),
        ALL, 2, r"crawl: seeds_file cannot be read, got .*seeds\.txt.*; expected UTF-8 text",
    ),
    "no list of takedowns": (edit("policy:\n", "policy:\n  withdrawn: ./gone.txt\n"), ALL, 2, r"withdrawn.*gone\.txt"),
    "no such file to extract": (NOTHING, ("extract", "/nowhere/a.html"), 2, r"extract: /nowhere/a\.html: no such file"),
    "no checkpoint": (
        NOTHING, ("generate", "--checkpoint", "/nowhere", "--prompt", "a"), 2, r"moe: no checkpoint here, got /nowhere",
    ),
    "no language model": (stage("language: {model: ./lid.bin}"), ALL, 2, r"language: no model at .*; set `model`"),
    # Typos
    "not YAML": (put("p.yaml", b"root: [\n"), ALL, 2, r"p\.yaml:2: not valid YAML: .*"),
    "unknown stage": (edit("  signals:", "  signal:"), ALL, 2, r"p\.yaml:7: .*unknown stage 'signal', did you mean 'signals'\?"),
    "unknown key": (edit("workers: 1", "worker: 1"), ALL, 2, r"p\.yaml:2: .*unknown key 'worker', did you mean 'workers'\?"),
    "unknown kind of source": (source("{kind: flies, path: ./pages}"), ALL, 2, r"p\.yaml:4: sources\.web.*flies"),
    "unknown relation": (edit("[exact]", "[exatc]"), ALL, 2, r"p\.yaml:9: stages\.select@final\.duplicates.*'exatc'"),
    "unknown variable": (source('{kind: files, path: "${NOWHERE_SET}/pages"}'), ALL, 2, r".*variable NOWHERE_SET is not set"),
    "unknown preset": (
        edit("{drop: signals.words < 3, reason: too_short}", "{use: gofer}"), ALL, 2, r"p\.yaml:12: .*gofer.*gopher_quality",
    ),
    "broken predicate": (edit("words < 3", "words <"), ALL, 2, r"p\.yaml:12: policy\.final\.0\.drop: .*signals\.words <"),
    "wrong type": (edit("memory_gb: 1", "memory_gb: much"), ALL, 2, r"p\.yaml:2: engine\.memory_gb: .*got 'much'"),
    "rule without a reason": (edit(", reason: too_short", ""), ALL, 2, r"p\.yaml:12: .*needs a `reason`"),
    # Columns and layers that nothing makes
    "unknown layer": (edit("signals.words", "sygnals.words"), ALL, 2, r"reads sygnals of dataset web, which is not there"),
    "unknown column of a layer": (
        edit("signals.words", "signals.wordz"), ALL, 2,
        r"p\.yaml:12: policy\.final\.0\.drop: layer 'signals' has no column 'wordz', did you mean 'words'\?",
    ),
    "unknown column to prefer": (
        edit("{duplicates: [exact]}", "{duplicates: [exact], prefer: [-signals.wordz]}"), ALL, 2,
        r"p\.yaml:9: stages\.select@final\.prefer: layer 'signals' has no column 'wordz'",
    ),
    "relation not in the pipeline": (
        edit("duplicates: [exact]", "duplicates: [minhash]"), ALL, 2, r"reads minhash of dataset web, which is not there",
    ),
    "a fate not in the pipeline": (
        edit("duplicates: [exact]", "after: fate@first"), ALL, 2, r"reads fate@first of dataset web, which is not there",
    ),
    # Roots
    "root below a file": (edit("./root", "./pages/0.txt/root"), ALL, 2, r"root: cannot write below .*; name another root"),
    "root without permission": (edit("./root", "/proc/stepwell"), ALL, 2, r"root: cannot write below /proc/stepwell: .*"),
    "root of an unknown protocol": (edit("./root", "gopher://x/y"), ALL, 2, r"root: cannot open 'gopher://x/y'"),
    "manifest of a newer version": (
        manifest(DOCUMENTS, format=99), ALL, 2, r"documents\.json: written in format 99, expected 1; upgrade stepwell",
    ),
    "manifest cut short": (put(f"root/{DOCUMENTS}", b'{"format": 1, "acc'), ALL, 2, r"documents\.json: not a manifest"),
    "manifest that is a list": (put(f"root/{DOCUMENTS}", b"[]"), ALL, 2, r"documents\.json: not a manifest"),
    "layer of other documents": (
        other_documents, ("run", "stage", "select@final"), 1, r"signals.*made from other documents .*; run its stage again",
    ),
    "a shard that is gone": (
        lambda f: [p.unlink() for p in (f / "root/datasets/web/layers/signals").iterdir()],
        ("check",), 1, r"layers/signals/.*parquet: named by a manifest and not there; ",
    ),
    "lock that is not ours": (
        both(put("root/locks/web.signals.json", b"{}"), edit("signals: {}", "signals: {where: kind != 'web'}")),
        ALL, 1, r"locks/web\.signals\.json: not a lock of ours; remove the file",
    ),
    # Usage
    "nothing to forget": (NOTHING, ("forget",), 2, r"forget: nothing named; give --doc-id, --url or --host"),
    "a takedown of no id": (NOTHING, ("forget", "--doc-id", "5909fb24"), 2, r"--doc-id: got '5909fb24', expected 32 hex"),
    "a takedown of a URL as a host": (NOTHING, ("forget", "--host", "http://a.org/"), 2, r"--host: got .*, expected a name"),
    "a takedown of a port": (NOTHING, ("forget", "--host", "a.org:80"), 2, r"--host: got 'a.org:80', expected a name"),
    "no such document": (NOTHING, ("explain", "ffffffff"), 2, r"explain: no document 'ffffffff' in .*"),
    "phase that nobody mixed": (stage("train: {phase: later}"), ALL, 2, r"train: reads mix, which is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_and_one_exit_code(name, folder):
    change, arguments, code, said = CASES[name]
    change(folder)
    config = () if arguments[0] in ("extract", "generate") else ("-c", folder / "p.yaml")
    ran = pipelines(*arguments, *config)
    assert len(ran.err.splitlines()) == 1, ran.err
    assert re.match(f"error: .*{said}", ran.err), ran.err
    assert ran.code == code


def test_a_source_without_a_document_goes_through_every_stage(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "none.jsonl").write_bytes(b"")
    (folder / "p.yaml").write_text(
        CONFIG.replace("./root", "./second").replace("{kind: files, path: ./pages}", "{kind: jsonl, path: ./empty}")
    )
    ran = pipelines(*ALL, "-c", folder / "p.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert "extract [web]: records 0, drops 0, rejects 0, documents 0" in ran.out
    assert "select@final: documents 0, kept 0, dropped 0" in ran.out
    assert pipelines("check", "-c", folder / "p.yaml", "--content").code == 0
