"""Ingest of a made-up source: numbering, idempotence, growth, bad records, budgets, and kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from core import ingest as ingest_module
from core.dataset import DOCUMENTS_INSTANCE, open_dataset
from core.engines.local import LocalEngine
from core.errors import StageError
from core.hashing import document_id
from core.ingest import Reader, check_budget, ingest, side_name
from core.manifest import read_manifest
from core.schema import DOCUMENTS
from core.storage import Root
from tests.bounds import BOUND_S
from tests.builders import make_job, strays, tree_digest
from tests.core.kernels import mended_parse, source_digest, source_parse, source_records
from tests.core.sources import Listed, run

REPO = Path(__file__).resolve().parents[2]
BASIC = {
    "a-00": [("a/1", "one", "http://x/1"), ("a/2", "two", None), ("a/3", "one", "http://x/1"), ("a/4", "skip", None)],
    "b-00": [("b/1", "one", "http://x/1"), ("b/2", "empty", None), ("b/3", "three \ud800", "http://x/\udfff")],
    "c-00": [("c/1", "one", "http://x/1"), ("c/2", "torn", None), ("c/3", "raise", None), ("c/4", "unordered", None)],
    "d-00": [("d/1", "skip", None)],
}


def rows(root):
    dataset = open_dataset(root, "src", 0)
    return [r for s in dataset.shards for b in dataset.read(s, DOCUMENTS.names) for r in b.to_pylist()]


def state(root):
    """All that another stage may see: documents, drops, rejects, and the manifest's outputs and accounts."""
    manifest = read_manifest(root, DOCUMENTS_INSTANCE, "src")
    return tree_digest(root, "datasets/src"), manifest.outputs, manifest.accounts


@pytest.fixture
def root(tmp_path):
    return Root(str(tmp_path / "root"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    engine = LocalEngine(tmp_path_factory.mktemp("scratch"), 2)
    yield engine
    engine.close()


def test_records_become_documents_drops_and_rejects(root):
    outcome = run(root, BASIC)
    assert outcome.accounts == {
        "records": 12,
        "drops": 3,
        "rejects": 3,
        "documents": 6,
        "drops.empty": 1,
        "drops.unsupported_type": 2,
    }
    assert outcome.accounts["records"] == sum(map(len, BASIC.values()))
    found = rows(root)
    assert [(r["origin"]["path"], r["text"], r["url"]) for r in found] == [
        ("a/1", "one", "http://x/1"),
        ("a/2", "two", None),
        ("a/3", "one", "http://x/1"),
        ("b/1", "one", "http://x/1"),
        ("b/3", "three \ufffd", "http://x/\ufffd"),
        ("c/1", "one", "http://x/1"),
    ]
    assert {r["metadata"] for r in found} == {'{"a": "2024-05-01", "b": 1}'}
    assert outcome.observed["surrogates_replaced"] == 1
    rejects = root.read_table(side_name("rejects", "src", "c-00")).to_pylist()
    assert [(r["origin"]["path"], r["reason"], r["detail"]) for r in rejects] == [
        ("c/2", "torn_record", "it ends \ufffd early"),
        ("c/3", "ValueError", "no text in \ufffd it"),
        ("c/4", "TypeError", "metadata may hold JSON values and dates only, got set"),
    ]
    drops = root.read_table(side_name("drops", "src", "d-00")).to_pylist()
    assert [(d["reason"], d["detail"]) for d in drops] == [("unsupported_type", "image/\ufffd")]
    assert open_dataset(root, "src", 0).rows == 6
    assert strays(root) == []
    assert not root.exists("exchange/ingest-src")


def test_captures_are_numbered_and_the_first_keeps_its_id(root):
    run(root, BASIC)
    ids = {r["origin"]["path"]: r["doc_id"] for r in rows(root)}
    same = [ids[p] for p in ("a/1", "a/3", "b/1", "c/1")]
    assert len(set(same)) == 4
    assert same[0] == document_id("src", "http://x/1", "one")
    assert same[1] == document_id("src", "http://x/1", "one", 1)
    assert ids["a/2"] == document_id("src", "a/2", "two")


def test_running_again_changes_nothing(root):
    run(root, BASIC)
    before = state(root)
    outcome = run(root, BASIC)
    assert outcome.observed["resumed_units"] == 4
    assert state(root) == before


def test_the_order_of_units_and_the_workers_change_nothing(root, pool, tmp_path):
    run(root, BASIC)
    other = Root(str(tmp_path / "other"))
    run(other, dict(reversed(BASIC.items())), pool)
    assert state(other) == state(root)


@pytest.mark.parametrize("extra", ["0-new", "z-new"])
def test_growing_and_shrinking_is_as_if_from_scratch(root, tmp_path, extra):
    new = [("n/1", "one", "http://x/1"), ("n/2", "fresh", None)]
    fresh = Root(str(tmp_path / "fresh"))
    run(root, BASIC)
    small = state(root)
    grown = {**BASIC, extra: new}
    run(fresh, grown)
    outcome = run(root, grown)
    assert outcome.observed["resumed_units"] == 4
    assert state(root)[1:] == state(fresh)[1:]
    assert rows(root) == rows(fresh)
    run(root, BASIC)
    assert state(root)[1:] == small[1:]
    assert not root.exists(f"datasets/src/documents/{extra}-00000.parquet")


def test_a_new_unit_without_equal_captures_touches_no_other_shard(root):
    run(root, BASIC)
    before = {p: p.stat().st_mtime_ns for p in Path(root.path("datasets/src/documents")).iterdir()}
    run(root, {**BASIC, "0-new": [("n/1", "fresh", None)]})
    renumbered = {
        "b-00-00000.parquet",
        "c-00-00000.parquet",
    }  # rewritten each time: their numbers come from the shuffle
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.name not in renumbered)


def test_changed_input_or_code_reads_the_unit_anew(root):
    run(root, BASIC)
    changed = {**BASIC, "a-00": [("a/1", "changed", None), ("a/9", "die-hard", None)]}
    outcome = run(root, changed)
    assert outcome.observed["resumed_units"] == 3
    assert [r["text"] for r in rows(root)][:2] == ["changed", "die-hard"]
    assert run(root, changed, code="code-2").observed["resumed_units"] == 0


def test_small_shards_are_closed_and_lose_nothing(root, monkeypatch):
    monkeypatch.setattr(ingest_module, "SHARD_TEXT_BYTES", 20)
    monkeypatch.setattr(ingest_module, "SHARD_ROWS", 3)
    monkeypatch.setattr(ingest_module, "ROW_GROUP_ROWS", 2)
    texts = ["x" * 15, "y" * 15, *"abcdefg", "z" * 50]
    outcome = run(root, {"u": [(f"u/{i}", t, None) for i, t in enumerate(texts)]})
    assert [r["text"] for r in rows(root)] == texts
    assert [o["rows"] for o in outcome.outputs.values()] == [1, 3, 3, 2, 1]
    assert sum(o["text_bytes"] for o in outcome.outputs.values()) == sum(map(len, texts))


def test_a_record_that_kills_the_worker_is_one_reject(root, pool):
    units = {"a": [("a/0", "one", None), ("a/1", "die", None), ("a/2", "two", None)], "b": [("b/0", "three", None)]}
    outcome = run(root, units, pool)
    assert outcome.accounts["rejects"] == 1
    assert [r["text"] for r in rows(root)] == ["one", "two", "three"]
    assert root.read_table(side_name("rejects", "src", "a")).to_pylist()[0]["reason"] == "worker_lost"


def test_too_many_rejects_stop_the_stage_and_are_tried_again(root):
    bad = {"a": [(f"a/{i}", "raise", None) for i in range(21)], "b": [("b", "fine", None)]}
    with pytest.raises(StageError, match=r"test: 21 of 22 records of src were rejected, expected at most 20"):
        run(root, bad)
    assert read_manifest(root, DOCUMENTS_INSTANCE, "src") is None
    # the same unit with the same identity, its cause mended: read anew, while the clean unit is not
    source = Reader("src", Listed(bad), source_records, mended_parse, source_digest)
    outcome = ingest(make_job(root, LocalEngine(root.path("exchange/x"), 0)), source)
    assert outcome.accounts["rejects"] == 0
    assert outcome.observed["resumed_units"] == 1


@pytest.mark.parametrize(
    ("rejects", "records", "stops"), [(20, 21, False), (21, 20_000, True), (100, 100_000, False), (101, 100_000, True)]
)
def test_budget(rejects, records, stops):
    if stops:
        with pytest.raises(StageError, match="mend the cause"):
            check_budget("extract", "web", rejects, records)
    else:
        check_budget("extract", "web", rejects, records)


def test_a_stopped_publication_of_other_input_is_undone(root):
    """Killed after publishing, before the manifest; then the input goes back to what the old manifest knows."""
    run(root, BASIC)
    before = state(root)
    changed = {**BASIC, "a-00": [("a/1", "changed", None)], "b-00": [("b/1", "other", None)]}
    reader = Reader("src", Listed(changed), source_records, source_parse, source_digest)
    engine = LocalEngine(root.path("exchange/x"), 0)
    ingest(make_job(root, engine), reader)  # and no manifest
    with pytest.raises(StageError, match="not the one that the documents manifest names"):
        rows(root)
    outcome = run(root, BASIC)
    assert outcome.observed["resumed_units"] == 2
    assert state(root) == before


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from core import ingest as ingest_module
from core.engines.local import LocalEngine
from core.storage import Root
from tests.core.sources import kill_input, run

if __name__ == "__main__":
    ingest_module.SHARD_ROWS = 20
    root = Root(sys.argv[2])
    engine = LocalEngine(root.path("exchange/test"), 0)
    run(root, kill_input(int(sys.argv[3])), engine)
    engine.close()
"""


def test_killed_at_random_moments_the_result_is_the_same(tmp_path, soak):
    """Three generations of input; each is killed a few times on its way and must end as an undisturbed run does."""
    rng = random.Random(20)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    root = Root(str(tmp_path / "root"))
    how = Counter()
    for generation in range(max(2, int(soak / 5))):
        undisturbed = Root(str(tmp_path / f"fresh-{generation}"))
        command = [sys.executable, str(driver), str(REPO)]
        begin = time.monotonic()
        subprocess.run([*command, undisturbed.url, str(generation)], check=True, timeout=BOUND_S)
        whole = time.monotonic() - begin
        for _ in range(2):
            process = subprocess.Popen([*command, root.url, str(generation)], start_new_session=True)
            try:
                process.wait(whole * rng.uniform(0.15, 0.6))
                how["ended"] += 1
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                how["killed"] += 1
        subprocess.run([*command, root.url, str(generation)], check=True, timeout=BOUND_S)
        assert json.dumps(state(root)[1:]) == json.dumps(state(undisturbed)[1:])
        assert rows(root) == rows(undisturbed)
    assert how["killed"] >= 1
