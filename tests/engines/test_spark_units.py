"""Units on Spark that kill, hang or fail; what a worker keeps and a frame leaves; and the streams that its workers run."""

import gc
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.annotate import AnnotateRun, annotate, rejects_name
from core.engines.contract import Align, Unit
from core.engines.local import LocalEngine
from core.errors import ConfigError, RetryableError, StageError
from core.hashing import table_digest
from core.rows import pack
from core.stage import Kind, Resources, Stage, StageConfig
from core.storage import Root
from tests.builders import make_dataset, tree_digest
from tests.core import kernels
from tests.engines.conftest import made, require
from tests.engines.tasks import Raises, Rows, written

pytest.importorskip("pyspark")
from pyspark import SparkConf

from core.engines import spark_session, spark_tasks, spark_types, spark_units
from core.engines.spill import Cut

STALL_S = 15.0  # a child needs most of it to import what it needs on a slow machine
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
    assert kept(spark) == before + 3
    del frame, joined
    gc.collect()
    assert kept(spark) == before + 1
    assert spark.collect(other).num_rows == 50  # from the cache, whatever became of its source
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


# Streams and casts: no Spark below


def sliced(table, rows):
    for first in range(0, table.num_rows, rows):
        yield from spark_types.unknown(table.slice(first, rows), table.schema).to_batches()


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
    table, facts, seen = hot(20_000), spark_tasks.Facts(), Seen()
    cut = Cut(("k",), ("v",), 1, None, None, 50)
    list(spark_tasks.reduced(seen, KEYED, cut, facts, sliced(table, 100)))
    got = pa.concat_tables(seen.tables)
    sizes = Counter(table.column("k").to_pylist())
    assert Counter(got.column("k").to_pylist()) == {k: min(n, 50) for k, n in sizes.items()}
    first = {}
    for k, v in zip(*(table.column(c).to_pylist() for c in KEYED.names), strict=True):
        first.setdefault(k, []).append(v)
    assert got.column("v").to_pylist() == [v for k in sorted(first) for v in first[k][:50]]
    assert facts.lost == sum(n - min(n, 50) for n in sizes.values())


def test_a_hot_key_is_combined_as_it_comes_in():
    pairs = pa.table({"k": [7] * 5000, "s": ["a"] * 5000, "n": [1] * 5000, "sum": range(5000)}, schema=kernels.SUMS)
    handed = Seen()

    def watched(table):
        handed(table)
        return kernels.summed(table)

    cut = Cut(("k", "s"), (), 1, None, watched)
    made_tables = list(spark_tasks.reduced(lambda t: t, kernels.SUMS, cut, spark_tasks.Facts(), sliced(pairs, 100)))
    assert pa.concat_tables(made_tables).to_pylist() == [{"k": 7, "s": "a", "n": 5000, "sum": sum(range(5000))}]
    assert handed.most == 100  # batches of 100, and then their 50 sums: never the rows of the key


def test_shards_of_an_align_are_written_one_at_a_time():
    rows = pa.table({"row": np.concatenate([pack(0, s, 5) for s in (1, 2, 4)]), "x": ["x"] * 15})
    given = rows.schema
    made_shards = list(spark_tasks.aligned(given, Align(written, 6, 0, "align"), sliced(rows, 4)))
    assert [s for s, _ in made_shards] == [1, 2, 4]
    assert [r.value for _, r in made_shards] == [
        (pack(0, s, 5).tolist(), table_digest(rows.slice(i * 5, 5))) for i, s in enumerate((1, 2, 4))
    ]


numbers = {
    pa.uint16(): st.integers(0, 2**16 - 1),
    pa.uint32(): st.integers(0, 2**32 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.int8(): st.integers(-128, 127),
}
lists = st.sampled_from(sorted(numbers, key=str)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(st.none() | st.lists(st.none() | numbers[kind], max_size=5), max_size=9)
    )
)


@settings(max_examples=40)
@given(lists, st.integers(0, 3), st.booleans())
def test_lists_of_numbers_come_back_as_they_went(kind_and_lists, skipped, large):
    kind, values = kind_and_lists
    schema = pa.schema([("x", pa.large_list(kind) if large else pa.list_(kind))])
    table = pa.table({"x": pa.array(values, schema.field(0).type)}).slice(skipped)
    there = pa.Table.from_batches(list(spark_types.out(table, schema)), spark_types.for_spark(schema))
    back = spark_types.known(there, schema)
    back.validate(full=True)
    assert back.to_pylist() == table.to_pylist()
    assert spark_types.known(there.slice(1), schema).to_pylist() == table.to_pylist()[1:]


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
