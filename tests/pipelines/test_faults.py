"""What goes wrong around and inside a run: a full disk, poison documents, stages that raise, hang or die, two runs, Ctrl-C."""

import gzip
import json
import os
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from core.annotate import AnnotateRun, annotate, rejects_name
from core.dataset import open_dataset
from core.engines.local import LocalEngine
from core.lock import held
from core.manifest import Identity
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from tests.builders import make_dataset
from tests.pipelines.small_pipeline import (
    JUDGED,
    command,
    environment,
    leftovers,
    manifests,
    pipelines,
    prose,
    state,
    texts,
    write_config,
    write_jsonl,
)

POISON = """\
root: {root}
engine: {{workers: 2, memory_gb: 1}}
sources:
  files: {{kind: files, path: {source}/files}}
  lines: {{kind: jsonl, path: {source}/lines}}
  captures: {{kind: warc, path: {source}/captures}}
stages:
  extract: {{}}
  language: {{}}
  signals: {{}}
  pii: {{}}
  exact: {{}}
  minhash: {{}}
  select@final: {{duplicates: [exact, minhash]}}
"""
# One shuffle is enough where the fault is elsewhere.
EXACT = JUDGED.replace("  minhash: {{}}\n", "").replace("[exact, minhash]", "[exact]")
LONG_LINE_BYTES = 50_000_000
WAIT_S = 60.0  # for a process to reach a state; none is timed


def until(true: Any) -> None:
    """Wait for a state of another process."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def small(tmp_path) -> Path:
    """A config over 400 documents in four files."""
    write_jsonl(tmp_path / "source", texts(400), 4)
    return write_config(tmp_path / "p.yaml", EXACT, root=tmp_path / "root", workers=2, source=tmp_path / "source")


def full_at(size: int) -> None:
    """No file of this process and its workers grows beyond `size`: what a full disk says, without filling one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_one_line_and_the_next_run_ends_as_if_nothing_was(small, tmp_path):
    ran = pipelines("run", "all", "-c", small, preexec=partial(full_at, 6_000))
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1, ran.err
    assert "mend the disk or make room" in ran.err
    assert not list((tmp_path / "root").rglob("*.tmp"))
    assert pipelines("check", "-c", small, "--content").code == 0

    assert pipelines("run", "all", "-c", small).code == 0
    other = write_config(tmp_path / "o.yaml", EXACT, root=tmp_path / "other", workers=1, source=tmp_path / "source")
    assert pipelines("run", "all", "-c", other).code == 0
    assert state(tmp_path / "root") == state(tmp_path / "other")
    assert leftovers(tmp_path / "root") == []


def warc(body: bytes, url: str) -> bytes:
    """A response record, compressed by itself."""
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-05-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-4000-8000-{len(body):012d}>\r\n"
        f"Content-Type: application/http;msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + http + b"\r\n\r\n")


def write_poison(folder: Path) -> None:
    """The same evils in three kinds of source, each beside a good document."""
    good, deep = prose(1).encode(), b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000
    page = b"<html><body><main><p>" + good + b"</p></main></body></html>"
    for name in ("files", "lines", "captures"):
        (folder / name).mkdir(parents=True)
    evils = {
        "good.html": page,
        "deep.html": deep,
        "empty.html": b"",
        "nul.txt": b"A line with \0 in it. " + good,
        "broken.txt": b"\xff\xfe\xed\xa0\x80 \x80 " + good,
        "torn.pdf": b"%PDF-1.7\n1 0 obj\n<< /Type",
        "torn.epub": b"PK\x03\x04\x14\x00",
    }
    for name, data in evils.items():
        (folder / "files" / name).write_bytes(data)
    lines = [
        json.dumps({"text": prose(2)}),
        json.dumps({"text": "nul \0 " + prose(3)}),
        '{"text": "lone \\ud800 surrogate ' + prose(4) + '"}',
        json.dumps({"text": ""}),
        json.dumps({"text": 7}),
        "[" * 100_000,
        '{"text": "torn',
        json.dumps({"text": "x" * LONG_LINE_BYTES}),
    ]
    (folder / "lines" / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")
    torn = gzip.compress("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(10, 60)).encode())
    (folder / "lines" / "b.jsonl.gz").write_bytes(torn[: len(torn) // 2])
    records = [warc(page, "http://a.example/"), warc(deep, "http://a.example/deep"), warc(b"", "http://a.example/e")]
    last = warc(page + b" ", "http://a.example/torn")
    (folder / "captures" / "a.warc.gz").write_bytes(b"".join(records) + last[: len(last) // 2])


def test_poison_documents_cost_themselves_only_and_every_one_is_counted(tmp_path):
    write_poison(tmp_path / "source")
    config = write_config(tmp_path / "p.yaml", POISON, root=tmp_path / "root", source=tmp_path / "source")
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    assert pipelines("check", "-c", config, "--content").code == 0
    accounts = {
        name: manifests(tmp_path / "root")[f"datasets/{name}/manifests/documents.json"]["accounts"]
        for name in ("files", "lines", "captures")
    }
    assert accounts["files"]["records"] == 7
    assert accounts["captures"]["records"] == 4
    assert accounts["lines"]["rejects"] >= 4  # a number, an open list, a torn line, a torn file
    assert accounts["lines"]["drops.empty"] == 1
    kept = {}
    root = Root(str(tmp_path / "root"))
    for name in accounts:
        dataset = open_dataset(root, name, 0)
        assert dataset is not None
        kept[name] = [t for s in dataset.shards for t in dataset.read_table(s, ["text"]).column("text").to_pylist()]
    assert {name: any(prose(n)[:60] in t for t in kept[name]) for name, n in (("files", 1), ("lines", 2), ("captures", 1))} == {
        "files": True, "lines": True, "captures": True,
    }  # fmt: skip
    assert any("lone � surrogate" in t for t in kept["lines"])
    assert max(map(len, kept["lines"])) == LONG_LINE_BYTES
    assert any(prose(10) == t for t in kept["lines"])  # what stood before the tear


def test_more_rejects_than_the_budget_stop_the_stage_and_name_the_folder(tmp_path):
    (tmp_path / "source").mkdir()
    body = "".join(json.dumps({"text": prose(n) if n % 2 else n}) + "\n" for n in range(60))
    (tmp_path / "source" / "a.jsonl").write_text(body)
    config = write_config(tmp_path / "p.yaml", EXACT, root=tmp_path / "root", workers=1, source=tmp_path / "source")
    ran = pipelines("run", "all", "-c", config)
    assert ran.code == 1
    assert ran.err.startswith("error: extract: 30 of 60 records of notes were rejected, expected at most 20;")
    assert "datasets/notes/rejects/" in ran.err
    assert list((tmp_path / "root/datasets/notes/rejects").rglob("*.parquet"))

    (tmp_path / "source" / "a.jsonl").write_text(body.replace('"text": ', '"text": "x", "was": '))
    assert pipelines("run", "all", "-c", config).code == 0


# A stage that does what a document's text tells it to.

LENGTH = pa.schema([("length", pa.int32())])


def obedient(state: StageConfig, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Any]]:
    for text in batch.column("text").to_pylist():
        if "raise" in text:
            raise ValueError("told to")
        if "hang" in text:
            time.sleep(3600)
        if "die" in text:
            os.kill(os.getpid(), signal.SIGKILL)
    lengths = pc.utf8_length(batch.column("text")).cast(pa.int32())
    return pa.RecordBatch.from_arrays([lengths], schema=LENGTH), []


OBEDIENT = Stage(
    name="obedient", kind=Kind.ANNOTATE, config=StageConfig, fn=obedient, version=1, reads=("text",), layer=LENGTH
)


@pytest.mark.parametrize(
    ("order", "reason"), [("raise", "ValueError"), ("hang", "worker_lost"), ("die", "worker_lost")]
)
def test_a_stage_that_fails_on_one_document_loses_that_document_only(order, reason, tmp_path):
    root = Root(str(tmp_path / "root"))
    dataset = make_dataset(root, "web", [["a", "bb", f"now {order}", "dddd"], ["eeeee"]])
    engine = LocalEngine(tmp_path / "scratch", workers=2)
    try:
        annotate(engine, dataset, [AnnotateRun(OBEDIENT, "obedient", StageConfig(), {}, "code")], stall_s=1.5)
    finally:
        engine.close()
    layer = [row for s in dataset.shards for row in dataset.read_layer("obedient", s).to_pylist()]
    assert [row["length"] for row in layer] == [1, 2, None, 4, 5]
    assert [row["computed"] for row in layer] == [True, True, False, True, True]
    assert layer[2]["error"].startswith(reason)
    rejects = root.read_table(rejects_name("web", "obedient", dataset.shards[0].name)).to_pylist()
    assert [(r["reason"], r["doc_id"]) for r in rejects] == [
        (reason, dataset.read_table(dataset.shards[0], ["doc_id"]).column("doc_id")[2].as_py())
    ]
    assert not root.exists(rejects_name("web", "obedient", dataset.shards[1].name))


def test_a_second_run_on_a_root_refuses_and_names_the_first(small, tmp_path):
    with held(Root(str(tmp_path / "root")), "notes.extract", "the-first"):
        ran = pipelines("run", "all", "-c", small)
        assert ran.code == 1
        assert len(ran.err.splitlines()) == 1, ran.err
        assert f"held by run the-first (process {os.getpid()} on" in ran.err
        assert manifests(tmp_path / "root") == {}


def test_scratch_of_a_run_stopped_behind_its_manifest_goes_with_the_next_run(small, tmp_path):
    assert pipelines("run", "all", "-c", small, "--until", "extract").code == 0
    documents = Root(str(tmp_path / "root")).read_json("datasets/notes/manifests/documents.json")
    identity = Identity(**documents["identity"]).digest()
    for name in (f"extract-notes-{identity[:12]}", "ingest-notes"):
        (tmp_path / "root/exchange" / name).mkdir(parents=True)
    ran = pipelines("run", "all", "-c", small, "--until", "extract")
    assert (ran.code, ran.out) == (0, "extract [notes]: up to date\n")
    assert leftovers(tmp_path / "root") == []


def test_ctrl_c_ends_in_130_and_the_same_command_goes_on(small, tmp_path):
    process = subprocess.Popen(
        command("run", "all", "-c", small),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    until(lambda: process.poll() is not None or (tmp_path / "root/exchange").is_dir())  # it works; much is left to do
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped by Ctrl-C: ")
    ran = pipelines("run", "all", "-c", small)
    assert (ran.code, ran.err) == (0, "")
    assert pipelines("check", "-c", small, "--content").code == 0
    assert leftovers(tmp_path / "root") == []
