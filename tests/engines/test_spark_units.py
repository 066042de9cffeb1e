"""Units on Spark that kill, hang or fail; what a worker keeps and a frame leaves; and the streams that its workers run."""

import gc
import os
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.annotate import AnnotateRun, annotate, rejects_name
from core.engines.columns import blocks, shard_partition
from core.engines.contract import Align, Unit
from core.engines.local import LocalEngine
from core.errors import ConfigError, RetryableError, StageError
from core.hashing import table_digest
from core.rows import ROW_BITS, pack
from core.stage import Kind, Resources, Stage, StageConfig
from core.storage import Root
from tests.bounds import BOUND_S
from tests.builders import make_dataset, tree_digest
from tests.core import kernels
from tests.engines.conftest import made, require
from tests.engines.tasks import Raises, Rows, written
from tests.pipelines.small_pipeline import environment

pytest.importorskip("pyspark")
from pyspark import SparkConf

from core.engines import spark_pieces, spark_session, spark_tasks, spark_units
from core.engines.spill import Cut, Told

STALL_S = 5.0  # for one row; who must import first is given START_S
KEYED = pa.schema([("k", pa.int64()), ("v", pa.int64())])

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore:PySpark does not yet"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def spark(tmp_path_factory, shared_spark):
    require("spark")
    engine = made("spark", tmp_path_factory.mktemp("spark"), shared_spark)
    yield engine
    engine.close()


def test_rows_that_kill_and_rows_that_hang_are_rejected_and_nothing_else(spark):
    units = [Unit("fine", {}), Unit("kills", {"kills": [3, 7]}), Unit("hangs", {"hangs": [5]}), Unit("also", {})]
    reports = spark.run_units(kernels.killer_rows, units, "work", STALL_S)
    lost = {"kills": [3, 7], "hangs": [5]}
    assert [(r.unit, r.value) for r in reports] == [
        (u.name, [i for i in range(10) if i not in lost.get(u.name, [])]) for u in units
    ]


def test_a_unit_that_always_dies_is_named_in_one_line(spark):
    units = [Unit("fine", {}), Unit("u7", {"dies_after": True})]
    with pytest.raises(StageError, match=r"^work: worker was killed by SIGKILL .* of unit u7, 3 deaths") as raised:
        spark.run_units(kernels.killer_rows, units, "work", 60.0)
    assert "\n" not in str(raised.value)


def named(config, artifacts):
    """A model whose loading leaves a line with the worker's process."""
    with open(artifacts["opened"], "a") as f:
        f.write(f"{os.getpid()}\n")
    return "m1"


def test_killers_cost_their_layer_what_they_cost_on_local_and_a_model_is_opened_once_a_worker(spark, tmp_path):
    texts = [["a", "die", "bb"], ["fine"], ["die"], *([f"text {i}"] for i in range(20))]
    found = {}
    for name, engine in (("local", LocalEngine(tmp_path / "scratch", 2)), ("spark", spark)):
        root = Root(str(tmp_path / name))
        dataset = make_dataset(root, "web", texts)
        stage = Stage(
            name="length",
            kind=Kind.ANNOTATE,
            config=StageConfig,
            fn=kernels.lengths,
            reads=("text",),
            layer=kernels.LENGTHS,
            open=named,
        )
        run = AnnotateRun(
            stage, "length", StageConfig(), {"opened": str(tmp_path / f"{name}.pids")}, f"code {os.getpid()}"
        )
        annotate(engine, dataset, [run], 60)
        rejects = root.read_table(rejects_name("web", "length", "s000")).to_pylist()
        found[name] = tree_digest(root, ""), [(r["doc_id"], r["reason"]) for r in rejects]
    assert found["spark"] == found["local"]
    assert [reason for _, reason in found["spark"][1]] == ["worker_lost"]
    opened = Counter((tmp_path / "spark.pids").read_text().split())
    assert set(opened.values()) == {1}
    assert len(opened) < len(texts)  # two workers, one more for each that died, and the children that found the killers


def test_what_fails_in_a_verb_is_not_tried_again_but_what_may_pass_is(spark, tmp_path):
    spark.begin(tmp_path)
    for error, tries in (("stage", 1), ("value", 1), ("busy", 2)):
        seen = tmp_path / error
        work = partial(counted, error, str(seen))
        try:
            spark.scan(work, [Unit("u")], KEYED, "read")
            failed = None
        except StageError as e:
            failed = str(e)
        assert len(seen.read_text()) == tries
        assert (failed is None) == (error == "busy")
    rows = spark.scan(Rows(9), [Unit("a", hot(9))], KEYED, "read")
    with pytest.raises(StageError, match=r"^sum: unit 0 of Spark failed: ValueError: a bad shard"):
        spark.shuffle(
            rows, ["k"], kernels.identity, KEYED, combine=partial(failing, str(tmp_path / "sums")), label="sum"
        )
    assert (tmp_path / "sums").read_text() == "x"


def failing(path, table):
    with open(path, "a") as f:
        f.write("x")
    return Raises("value")(table)


def counted(error, path, unit):
    with open(path, "a") as f:
        f.write("x")
    if error != "busy":
        Raises(error)(unit)
    if len(Path(path).read_text()) == 1:
        raise RetryableError("the store is busy")
    yield from KEYED.empty_table().to_batches()


def test_a_frame_is_freed_when_nobody_holds_it(spark, tmp_path):
    spark.begin(tmp_path)
    spark.clear()
    table = pa.table({"k": np.arange(50), "v": np.arange(50)}, schema=KEYED)
    gc.collect()
    before = kept(spark)
    frame = spark.scan(Rows(7), [Unit("a", table)], KEYED, "read")
    other = spark.map(frame, kernels.doubled, KEYED)
    joined = spark.persist(spark.join(frame, spark.table(table.rename_columns(["k", "w"])), ["k"]))
    assert kept(spark) == before + 2  # a map is computed when it is read
    del frame, joined
    gc.collect()
    assert kept(spark) == before + 1  # which the map still reads
    assert spark.collect(other).num_rows == 50
    assert spark.persist(other).row_count == 50
    gc.collect()
    assert kept(spark) == before + 1  # from here on only the map
    spark.clear()
    assert kept(spark) == before


def kept(spark):
    return spark._session.sparkContext._jsc.getPersistentRDDs().size()


def test_a_large_state_reaches_every_task(spark, tmp_path):
    spark.begin(tmp_path)
    state = np.arange(1 << 20)  # 8 MB: pyspark broadcasts what is above one
    table = pa.table({"k": np.arange(9), "v": np.arange(9)}, schema=KEYED)
    frame = spark.scan(Rows(2), [Unit("a", table), Unit("b", table)], KEYED, "read")
    got = spark.collect(spark.map(frame, partial(looked_up, state), KEYED))
    assert sorted(got.column("v").to_pylist()) == sorted([(1 << 20) - 1 - i for i in range(9)] * 2)


def looked_up(state, table):
    return table.set_column(1, "v", pa.array(state[::-1][table.column("k").to_numpy()]))


def test_the_partition_that_writes_a_shard_is_the_one_that_expects_it(spark):
    """Of so many shards that the product is more than 32 bits hold."""
    shards = 100_000
    for partitions in (1, 7, shards - 1, shards):
        place = spark_pieces.partition_of_shard(partitions, shards)
        made = spark._session.range(0, shards, 1, 1).selectExpr(f"int(id) as {spark_pieces.PLACE}").selectExpr(place)
        expected = shard_partition(np.arange(shards) << ROW_BITS, shards, partitions)
        assert made.toArrow().column(0).to_pylist() == expected.tolist()


JAVA_ENDS = """
import os, pathlib, socket, sys, time
import psutil
from core.engines.contract import Report, Unit
from core.engines.spark import SparkEngine
from core.errors import ConfigError, StageError

def large(unit, note):
    return Report(unit.name, value=os.urandom(2 << 20))

def java():
    return [p for p in psutil.Process().children(recursive=True) if p.name() == "java"]

scratch = pathlib.Path(sys.argv[1])
try:
    SparkEngine(scratch, 1, 1.0, address="nowhere://at.all")
except ConfigError as e:
    print(e)
print(len(java()), [p.name for p in scratch.iterdir()])
engine = SparkEngine(scratch, 1, 1.0)
connect = socket.socket.connect

def connected(self, address):
    connect(self, address)
    time.sleep(1.0)  # Java begins to answer, with more than a socket holds
    for process in java():
        process.kill()

socket.socket.connect = connected
try:
    engine.run_units(large, [Unit(str(i)) for i in range(8)], "large")
except StageError as e:
    print(e)
engine.close()
print([p.name for p in scratch.iterdir()])
"""


@pytest.mark.soak
def test_a_java_that_ends_is_one_line_and_never_half_an_answer(tmp_path, soak):
    """Nor is one left that could not be used, or the next start in the process would speak to it."""
    require("spark")
    if soak <= 1:
        pytest.skip("two Javas of its own; `make soak` runs it")
    run = subprocess.run(
        [sys.executable, "-c", JAVA_ENDS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        env=environment(),
    )
    assert run.returncode == 0, run.stderr
    unusable, nothing, ended, files = run.stdout.splitlines()
    assert unusable.startswith("spark: cannot start on nowhere://at.all: ")
    assert nothing == "0 ['spark.log']"
    assert ended.startswith("large: Java has ended; see `spark.log` in the scratch folder")
    assert files == "['spark.log']"


# Streams and casts: no Spark below


def sliced(table, rows, place=0):
    """The pieces of a table."""
    for first in range(0, table.num_rows, rows):
        for batch in spark_pieces.packed(table.slice(first, rows), place):
            yield from spark_pieces.pieces([batch])


class Seen:
    """Counts the rows of the largest table that a reduce function was given."""

    def __init__(self):
        self.most = 0
        self.tables = []

    def __call__(self, table):
        self.most = max(self.most, table.num_rows)
        self.tables.append(table)
        return table


def hot(rows):
    """Sorted rows, three tenths of them of key 7."""
    keys = np.sort(np.where(np.arange(rows) < rows * 3 // 10, 7, np.arange(rows) % 1000))
    return pa.table({"k": keys, "v": np.arange(rows)}, schema=KEYED)


def test_a_hot_key_under_a_cap_is_cut_as_it_comes_in():
    table, told, seen = hot(20_000), Told(), Seen()
    cut = Cut(("k",), ("v",), 1, None, None, 50)
    list(spark_tasks.reduced(seen, KEYED, cut, 8000, told, sliced(table, 100)))
    got = pa.concat_tables(seen.tables)
    sizes = Counter(table.column("k").to_pylist())
    assert Counter(got.column("k").to_pylist()) == {k: min(n, 50) for k, n in sizes.items()}
    first = {}
    for k, v in zip(*(table.column(c).to_pylist() for c in KEYED.names), strict=True):
        first.setdefault(k, []).append(v)
    assert got.column("v").to_pylist() == [v for k in sorted(first) for v in first[k][:50]]
    assert told.cut_rows == sum(n - min(n, 50) for n in sizes.values())


def test_a_hot_key_is_combined_as_it_comes_in():
    pairs = pa.table({"k": [7] * 5000, "s": ["a"] * 5000, "n": [1] * 5000, "sum": range(5000)}, schema=kernels.SUMS)
    handed = Seen()

    def watched(table):
        handed(table)
        return kernels.summed(table)

    cut = Cut(("k", "s"), (), 1, None, watched)
    share = pairs.slice(0, 100).nbytes
    made_tables = list(spark_tasks.reduced(lambda t: t, kernels.SUMS, cut, share, Told(), sliced(pairs, 100)))
    assert pa.concat_tables(made_tables).to_pylist() == [{"k": 7, "s": "a", "n": 5000, "sum": sum(range(5000))}]
    assert handed.most <= 301  # twice a share, and what made it full: never the rows of the key


def test_small_shares_are_sorted_together_and_large_ones_alone():
    tables = [hot(n) for n in (40, 50, 1000, 30)]
    stream = (piece for place, table in enumerate(tables) for piece in sliced(table, 100, place))
    cut, seen = Cut(("k",), ("v",), 4), Seen()
    list(spark_tasks.reduced(seen, KEYED, cut, hot(80).nbytes, Told(), stream))
    assert [t.num_rows for t in seen.tables] == [90, 1000, 30]


def test_of_a_join_the_left_side_passes_by_in_blocks_and_may_lack_a_right_side():
    right = pa.schema([("k", pa.int64()), ("w", pa.int64())])
    sides = [hot(30).rename_columns(right.names), hot(3000), hot(200)]  # of share 0 both sides, of share 1 the left one
    stream = (piece for place, table in zip((0, 1, 3), sides, strict=True) for piece in sliced(table, 50, place))
    made_tables = list(
        spark_tasks.joined(KEYED, right, Cut(("k",), (), 2), "left outer", hot(500).nbytes, Told(), stream)
    )
    assert len(made_tables) > 6
    assert sum(t.column("w").null_count for t in made_tables[-1:]) == 200
    by_hand = Counter(sides[0].column("k").to_pylist())
    rows = sum(max(1, by_hand[k]) for k in sides[1].column("k").to_pylist())
    assert sum(t.num_rows for t in made_tables[:-1]) == rows


def test_an_error_before_an_exchange_ends_every_task_behind_it():
    def fails(told, stream):
        raise ValueError("a bad shard")
        yield

    step = spark_tasks.Step(1, "sum", KEYED, fails)
    before = list(spark_tasks.chain([step], spark_tasks.kept, "sum", 3, iter(())))
    assert sorted(place for place, _ in spark_pieces.pieces(before)) == [-3, -2, -1]
    rows = list(spark_pieces.packed(hot(9), 0))
    read = spark_tasks.Step(2, "read", KEYED, partial(spark_tasks.read, KEYED))
    after = list(spark_pieces.pieces(spark_tasks.chain([read], spark_tasks.kept, "read", 1, iter([before[0], *rows]))))
    assert [place for place, _ in after] == [-1]
    assert str(pickle.loads(after[0][1])).startswith("sum: unit 0 of Spark failed: ValueError: a bad shard")


def test_shards_of_an_align_are_written_one_at_a_time():
    rows = pa.table({"row": np.concatenate([pack(0, s, 5) for s in (1, 2, 4)]), "x": ["x"] * 15})
    given = rows.schema
    stream = (p for i, s in enumerate((1, 2, 4)) for p in sliced(rows.slice(i * 5, 5).take([4, 2, 0, 1, 3]), 2, s))
    told = spark_tasks.Said()
    list(spark_tasks.aligned(given, Align(written, 6, 0, "align"), 2, 0, told, stream))
    assert list(told.value) == [1, 2, 4, 0]  # those of the other half are the other partition's, but for what came here
    assert [r.value for r in list(told.value.values())[:3]] == [
        (pack(0, s, 5).tolist(), table_digest(rows.slice(i * 5, 5))) for i, s in enumerate((1, 2, 4))
    ]
    assert told.value[0].value[0] == []


numbers = {
    pa.uint16(): st.integers(0, 2**16 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.int8(): st.integers(-128, 127),
    pa.large_string(): st.text(max_size=3),
    pa.bool_(): st.booleans(),
}
lists = st.sampled_from(sorted(numbers, key=str)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(st.none() | st.lists(st.none() | numbers[kind], max_size=5), max_size=9)
    )
)


@settings(max_examples=40)
@given(lists, st.integers(0, 3), st.integers(1, 100))
def test_rows_come_back_from_pieces_and_blocks_as_they_went(kind_and_lists, skipped, size):
    kind, values = kind_and_lists
    schema = pa.schema([("x", pa.list_(kind))])
    table = pa.table({"x": pa.array(values, schema.field(0).type)}).slice(skipped)
    made_blocks = list(blocks([table.slice(0, 2), table.slice(2)], size))
    there = [batch for block in made_blocks for batch in spark_pieces.packed(block, 5)]
    back = [spark_pieces.opened(content, schema) for place, content in spark_pieces.pieces(there) if place == 5]
    assert [row for part in back for row in part.to_pylist()] == table.to_pylist()
    for part in back:
        part.validate(full=True)


def test_what_no_executor_has_is_refused_before_the_first_unit():
    spark_units.check_demand([(1, 0), (4, 1)], 4, 1, "rate")
    spark_units.check_demand([], 64, 8, "rate")
    with pytest.raises(
        ConfigError, match=r"^rate: a unit needs 8 cores and 0 GPUs, the largest executor has 4 cores and 1 GPUs"
    ):
        spark_units.check_demand([(1, 0), (4, 1)], 8, 0, "rate")
    with pytest.raises(ConfigError, match="2 cores and 1 GPUs, the largest executor has 4 cores and 0 GPUs"):
        spark_units.check_demand([(4, 0)], 2, 1, "rate")


@pytest.mark.parametrize(
    ("asked", "got"),
    [("local", "local[1,4]"), ("local[*]", "local[*,4]"), ("local[3]", "local[3,4]"), ("local[3,1]", "local[3,1]")],
)
def test_a_local_master_is_told_to_try_again_unless_it_says_how_often(asked, got):
    given = SparkConf(loadDefaults=False).set("spark.master", asked)
    ours = SparkConf(loadDefaults=False).set("spark.ui.enabled", "false")
    found = spark_session._defaults(given, ours)
    assert (found.get("spark.master"), found.get("spark.ui.enabled")) == (got, "false")


def test_a_local_master_reserves_nothing(spark):
    assert spark_units.task_profile(spark._session.sparkContext, Resources(cpus=64, gpus=1), "rate") is None


def test_the_unit_that_spark_gave_up_on_is_named():
    units = [Unit("a"), Unit("b")]
    said = "Job aborted due to stage failure: Task 1 in stage 3.0 failed 4 times, most recent failure: Lost task 1.3"
    assert str(spark_units.lost_unit(said, units, "work")).startswith("work: unit b lost its worker at every attempt")
    assert spark_units.lost_unit("Job 3 cancelled", units, "work") is None
