"""Workers of Ray that die or fall silent, what a stage asks for, and blocks that bound what a task holds."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.annotate import annotate
from core.engines.contract import Align, Unit
from core.errors import ConfigError, StageError
from core.hashing import table_digest
from core.rows import pack
from core.stage import Resources
from core.storage import Root
from tests.builders import make_dataset
from tests.core.kernels import SUMS, add_pairs, count_and_sum, faulty, identity, killer_rows, ranked, summed, tell_pid
from tests.core.test_annotate import column, run_of
from tests.dedup.memory_engine import OracleEngine
from tests.engines.conftest import MEMORY_GB, require
from tests.engines.tasks import Rows, longer, squared, written
from tests.engines.test_sessions import REPO, marked
from tests.engines.test_verbs import NAMED, NAMES, PLACED, RANKED, ROWS, SCHEMA, table_of

MODEL = Resources(load_once=True)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_engine(tmp_path_factory):
    require("ray")
    from core.engines.ray import RayEngine

    engine = RayEngine(tmp_path_factory.mktemp("ray"), 2, MEMORY_GB)
    yield engine
    engine.close()


@pytest.mark.parametrize("resources", [None, MODEL], ids=["tasks", "actors"])
def test_a_row_that_kills_its_worker_is_found(ray_engine, resources):
    units = [Unit(f"u{i}", {"kills": [3] if i == 1 else []}) for i in range(4)]
    reports = ray_engine.run_units(killer_rows, units, "pii", 60, resources)
    whole = list(range(10))
    assert [r.value for r in reports] == [whole, [0, 1, 2, 4, 5, 6, 7, 8, 9], whole, whole]


def test_documents_that_kill_or_hang_cost_the_stage_they_hit(ray_engine, tmp_path):
    """The layers that `local` gives for the same texts (tests/core/test_annotate.py)."""
    root = Root(str(tmp_path / "root"))
    dataset = make_dataset(root, "web", [["a", "die", "bb", "hang"], ["fine"]], row_group=2)
    annotate(ray_engine, dataset, [run_of()], 8.0)
    lost = "worker_lost: the worker died or hung on this document"
    assert column(dataset, "length", "chars") == [1, None, 2, None, 4]
    assert column(dataset, "length", "error") == [None, lost, None, lost, None]


def test_a_unit_whose_worker_always_dies_is_named(ray_engine):
    with pytest.raises(StageError, match=r"^pii: worker was killed by SIGKILL [^\n]* of unit u0, 3 deaths[^\n]*$"):
        ray_engine.run_units(killer_rows, [Unit("u0", {"dies_after": True})], "pii", 60, MODEL)


def test_a_failure_beside_a_dying_worker_waits_for_what_runs(ray_engine, tmp_path):
    faults = [{"fault": "exit", "times": 1}, {"fault": "slow"}, {"fault": "raise"}]
    units = [Unit(f"u{i}", {"folder": str(tmp_path), **fault}) for i, fault in enumerate(faults)]
    with pytest.raises(StageError, match=r"^work: unit u2 failed: ValueError: a bad shard"):
        ray_engine.run_units(faulty, units, "work", 60)
    assert (tmp_path / "u1").exists()


def test_actors_are_kept_for_the_next_run_and_make_way_for_tasks(ray_engine):
    units = [Unit(f"u{i}", i) for i in range(12)]
    first = {r.value for r in ray_engine.run_units(tell_pid, units, "first", 60, MODEL)}
    then = {r.value for r in ray_engine.run_units(tell_pid, units, "then", 60, MODEL)}
    assert len(first | then) <= 2, "one that was still starting in the first run may work in the second"
    assert ray_engine.fold(ray_engine.table(ROWS), count_and_sum, add_pairs) == (300, sum(range(300)))
    wide = ray_engine.run_units(squared, units, "wide", 60, Resources(cpus=2, load_once=True))
    assert [r.value for r in wide] == [i * i for i in range(12)]


def test_a_demand_that_no_node_meets_is_refused_and_a_laptop_is_not(ray_engine):
    with pytest.raises(
        ConfigError, match=r"^raters: one worker needs 1 CPUs, 1 GPUs, got nodes with at most 2 CPUs, 0 GP"
    ):
        ray_engine.run_units(squared, [Unit("u", 2)], "raters", resources=Resources(gpus=1, memory_gb=2))
    modest = Resources(cpus=64, memory_gb=1000)  # on `local` it would run here as well
    assert [r.value for r in ray_engine.run_units(squared, [Unit("u", 2)], "raters", resources=modest)] == [4]


def test_nodes_that_are_gone_for_good_end_the_wait(ray_engine):
    from core.engines.ray_cluster import Place, Room

    assert Room(Place(), "work", lost_s=0.0).count() == 2
    with pytest.raises(
        StageError, match=r"^work: the nodes with 64 CPUs for a worker are gone for 0 s; bring them back"
    ):
        Room(Place(cpus=64.0), "work", lost_s=0.0).count()


@pytest.mark.parametrize(
    ("asked", "ours", "place"),
    [
        (None, False, (1.0, 0.0, 0)),
        (Resources(cpus=0.5, gpus=0.25, memory_gb=1.5), False, (0.5, 0.25, 1_500_000_000)),
        (
            Resources(cpus=2.5, gpus=1.5, memory_gb=1.0),
            False,
            (3.0, 2.0, 1_000_000_000),
        ),  # Ray wants whole ones above one
        (Resources(cpus=8, memory_gb=100.0), True, (2.0, 0.0, 0)),
    ],
)
def test_what_is_set_aside_and_how_often_it_fits(asked, ours, place):
    require("ray")
    from core.engines.ray_cluster import Place, place_for

    assert place_for(asked, ours, 2) == Place(*place)
    assert Place(2.0, 0.5, 1 << 30).fits({"CPU": 9.0, "GPU": 1.0, "memory": float(8 << 30)}) == 2
    assert Place(2.0).fits({"CPU": 9.0}) == 4
    assert Place(1.0, 1.0).fits({"CPU": 9.0}) == 0


@pytest.mark.parametrize("block", [700, 1 << 20])
def test_frames_do_not_depend_on_blocks(ray_engine, block, tmp_path):
    """Blocks smaller than a partition: several tables a unit, slices read in passes, one hot key."""
    ray_engine.begin(tmp_path)
    ray_engine.partition_bytes = 4000
    usual, ray_engine.block_bytes = ray_engine.block_bytes, block
    hot = SCHEMA.names.index("k")
    rows = ROWS.set_column(hot, "k", pa.array(np.where(np.arange(300) % 3 == 0, 4, np.arange(300) % 13)))
    pairs = pa.table([rows["k"], rows["s"], np.ones(300, np.int64), rows["v"]], schema=SUMS)
    placed = table_of([(int(pack(2, r % 5, np.array([r]))[0]), f"{r}") for r in range(200)], PLACED)
    try:
        assert outcomes(ray_engine, rows, pairs, placed) == outcomes(OracleEngine(), rows, pairs, placed)
        assert ray_engine.dropped_rows() == {"cap": 96}  # by hand: key 4 has 116 rows
    finally:
        ray_engine.block_bytes = usual


def outcomes(engine, rows, pairs, placed):
    def frame(table):
        return engine.scan(Rows(40), [Unit("u0", table.slice(0, 150)), Unit("u1", table.slice(150))], table.schema, "s")

    def digest(made):
        table = engine.collect(made)
        return table.num_rows, table_digest(table)

    mapped = engine.map(frame(rows), longer, SCHEMA)
    shuffled = engine.shuffle([frame(rows), engine.table(rows)], ["k", "s"], ranked, RANKED, ["v"])
    summed_up = engine.shuffle(frame(pairs), ["k", "s"], summed, SUMS, combine=summed)
    capped = engine.shuffle(frame(rows), ["k"], identity, SCHEMA, ["v"], max_rows_per_key=20, label="cap")
    joined = engine.join(frame(rows), engine.table(NAMES.rename_columns(NAMED.names)), ["k", "s"], "left outer")
    reports = engine.align(frame(placed), Align(written, 5, 2, "align"))
    return [digest(f) for f in (mapped, shuffled, summed_up, capped, joined)], [r.value for r in reports]


@settings(max_examples=40)
@given(
    keys=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    blocks=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    cap=st.one_of(st.none(), st.integers(1, 5)),
    combined=st.booleans(),
    passes=st.integers(1, 4),
    size=st.integers(1, 4000),
)
def test_passes_and_partial_reductions_change_nothing(keys, blocks, cap, combined, passes, size):
    """A partition cut and gathered in any pieces is what one sorted table of it gives; rows lost are counted once."""
    require("ray")
    from core.engines.ray_tasks import Fact, cut_up, reduced
    from core.engines.spill import Cut, prepared

    rows = pa.table(
        [keys, [f"s{k % 2}" for k in keys], np.ones(len(keys), np.int64), np.arange(len(keys))], schema=SUMS
    )
    cut = Cut(("k",), ("s", "sum"), 1, None, summed if combined else None, cap)
    expected, lost = prepared(rows, cut)
    slices, fact, at = [], Fact(), 0
    for i in range(len(keys)):
        step = blocks[i % len(blocks)]
        if at < len(keys):
            slices += list(cut_up(cut, SUMS, part := Fact(), rows.slice(at, step)))
            fact.told.cut_rows += part.told.cut_rows
        at += step
    got = list(reduced(identity, SUMS, SUMS, cut, size, reduce_fact := Fact(), passes, *slices))
    assert table_digest(pa.concat_tables(got).sort_by([(n, "ascending") for n in SUMS.names])) == table_digest(
        expected.sort_by([(n, "ascending") for n in SUMS.names])
    )
    assert fact.told.cut_rows + reduce_fact.told.cut_rows == lost
    assert max(t.num_rows for t in got) <= max(1, 2 * size // 20)  # about a block: a row is 30 bytes and more


def test_a_hot_key_with_a_cap_is_never_held_whole():
    """200 slices of 1000 rows of one key, capped at 10: what is held is seen through the sizes that `combine` is given."""
    require("ray")
    from core.engines.ray_tasks import Fact, reduced
    from core.engines.spill import Cut

    seen = []

    def spied(table):
        seen.append(table.num_rows)
        return summed(table)

    slices = [pa.table([np.full(1000, 7), ["s"] * 1000, np.ones(1000, np.int64), np.arange(1000)], schema=SUMS)] * 200
    cut = Cut(("k",), ("s",), 1, None, spied)
    [table] = reduced(identity, SUMS, SUMS, cut, slices[0].nbytes * 2, Fact(), 1, *slices)
    assert table.to_pylist() == [{"k": 7, "s": "s", "n": 200_000, "sum": 200 * sum(range(1000))}]
    assert max(seen) <= 6000


def test_the_left_side_of_a_join_passes_by_in_blocks():
    """64 slices of 2000 rows of one key on the left: what a task allocates is some blocks, never that key."""
    require("ray")
    from core.engines.ray_tasks import Fact, joined
    from core.engines.spill import Cut

    left = pa.table({"k": np.full(2000, 7), "x": [f"{i:0100d}" for i in range(2000)]})
    right = pa.table({"k": [7, 8], "y": [1, 2]})
    schema = pa.schema([*left.schema, right.schema.field("y")])
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        made = joined(
            right.schema, schema, Cut(("k",), (), 1), "inner", left.nbytes, Fact(), 1, 64, *[left] * 64, right
        )
        assert sum(table.num_rows for table in made) == 64 * 2000
    finally:
        pa.set_memory_pool(usual)
    assert 0 < pool.max_memory() < 16 * left.nbytes


def test_a_stream_that_is_tried_again_goes_on_where_it_was():
    require("ray")
    from core.engines.ray_tasks import streamed
    from core.errors import RetryableError

    tries = []

    def torn(fact, tables):
        tries.append(1)
        for i, table in enumerate(tables):
            if i == 2 and len(tries) == 1:
                raise RetryableError("the store is busy")
            yield table

    made = list(streamed(torn, "scan", "u0", [ROWS.slice(i, 10) for i in range(4)]))
    assert [t.column("v")[0].as_py() for t in made[:-1]] == [0, 1, 2, 3]
    assert (made[-1].sizes, len(tries)) == ([t.nbytes for t in made[:-1]], 2)


SLEEPS = """
import os, signal, sys, time
from core.engines.contract import Report, Unit
from core.engines.ray import RayEngine

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in a shell's background is deaf to it, and children too

def sleeps(unit, note):
    open(unit.payload, "w").close()
    time.sleep(600)
    return Report(unit.name)

engine = RayEngine(sys.argv[1], 1, 1.0)
try:
    engine.run_units(sleeps, [Unit("u0", os.path.join(sys.argv[1], "began"))], "sleep")
finally:
    engine.close()
"""


@pytest.fixture
def short():
    """A folder whose name leaves room for those of Ray's sockets."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_driver_that_ends_takes_its_ray_with_it(number, short, tmp_path):
    """SIGTERM ends this driver on the spot, as kill -9 would; Ctrl-C lets it say goodbye. It has a Ray of its own, whatever `ray
    start` has left a note of."""
    require("ray")
    mark = f"ray-end-{number.name}-{os.getpid()}"
    (short / "ray").mkdir()
    (short / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    env = {**os.environ, "PYTHONPATH": str(REPO), "STEPWELL_TEST_MARK": mark, "RAY_TMPDIR": str(short)}
    driver = subprocess.Popen([sys.executable, "-c", SLEEPS, str(tmp_path)], env=env, stderr=subprocess.DEVNULL)
    try:
        wait_until(partial((tmp_path / "began").exists), driver)
        assert driver.poll() is None
        driver.send_signal(number)
        assert driver.wait(60) != 0
        wait_until(lambda: not marked(mark))
    finally:
        driver.kill()
        driver.wait()
    assert marked(mark) == []


def wait_until(there, process=None, seconds=120):
    last = time.monotonic() + seconds
    while not there() and time.monotonic() < last and (process is None or process.poll() is None):
        time.sleep(0.1)
