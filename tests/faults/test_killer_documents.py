"""Documents on which a real stage's process dies, through the command: named, rejected, counted, and too many stop the stage."""

import json
import subprocess
import sys
from pathlib import Path

from core.annotate import rejects_name
from core.storage import Root
from tests.bounds import BOUND_S
from tests.faults.crashing import MARK
from tests.pipelines.small_pipeline import Ran, environment, manifests, prose, write_config

SIGNALS = """\
root: {root}
engine: {{workers: 2, memory_gb: 1, stall_s: 60}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
"""


def crashing(config: Path) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crashing", "run", "all", "-c", str(config)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=BOUND_S,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def marked(tmp_path: Path, documents: int, killers: set[int]) -> Path:
    """A config over two files with every second document."""
    (tmp_path / "source").mkdir()
    for part in (0, 1):
        rows = [
            {"text": prose(i) + (f" Now {MARK}." if i in killers else ""), "url": f"https://notes.example/{i}"}
            for i in range(part, documents, 2)
        ]
        (tmp_path / f"source/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_config(tmp_path / "p.yaml", SIGNALS, root=tmp_path / "root", source=tmp_path / "source")


def test_documents_that_crash_a_stage_are_named_and_rejected(tmp_path):
    ran = crashing(marked(tmp_path, 40, killers={4, 17}))
    assert ran.code == 0, ran.err
    accounts = manifests(tmp_path / "root")["datasets/notes/manifests/signals.json"]["accounts"]
    assert accounts == {"rows": 40, "computed": 38, "rejected": 2}
    root = Root(str(tmp_path / "root"))
    shards = manifests(tmp_path / "root")["datasets/notes/manifests/documents.json"]["outputs"]
    rejects = [row for shard in shards for row in root.read_table(rejects_name("notes", "signals", shard)).to_pylist()]
    assert sorted(row["reason"] for row in rejects) == ["worker_lost", "worker_lost"]
    assert "was killed by SIGSEGV" in ran.err
    for row in rejects:
        assert f"signals: document {row['doc_id']} ended its worker and is rejected" in ran.err


def test_more_than_the_budget_stop_the_stage_with_the_reason(tmp_path):
    ran = crashing(marked(tmp_path, 50, killers=set(range(0, 46, 2))))
    assert ran.code == 1
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("error: notes: signals: worker was killed by SIGSEGV at row "), ran.err
    assert "deaths in this unit; look at the documents named above" in last
    assert ran.err.count("ended its worker and is rejected") == 20
    assert "datasets/notes/manifests/signals.json" not in manifests(tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.tmp"))
