"""The verbs on random tables, schemas and arrangements, against the naive engine in memory: every engine, the same laws.

How many examples an engine is given follows what one costs: a millisecond in this process, a second on Spark.
"""

import datetime
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engines.contract import Align, Unit
from core.hashing import table_digest
from core.rows import pack
from tests.conformance.law_functions import RANKS, Pieces, Ranked, Summed, added, halved, totals, written
from tests.dedup.memory_engine import OracleEngine
from tests.engines.conftest import NAMES, made, require

EXAMPLES = {"local-0": 40, "local-1": 3, "local-2": 10, "ray": 4, "spark": 2}
STAGE = itertools.count()
UTC = datetime.UTC
MOMENTS = [datetime.datetime(1969, 12, 31, 23, 59, 59, 999999, UTC), datetime.datetime(2024, 5, 1, 12, tzinfo=UTC)]
TEXTS = ["", "a", "a\0", "\0", "A", "é" * 40, "é" * 40 + "x", "\U0001f600", "\ufffd"]
KEYS = {
    pa.int64(): st.integers(-2, 2) | st.sampled_from([2**63 - 1, -(2**63)]),
    pa.int16(): st.integers(-2, 2),
    pa.uint64(): st.sampled_from([0, 1, 2**64 - 1, 2**63]),
    pa.bool_(): st.booleans(),
    pa.large_string(): st.sampled_from(TEXTS),
    pa.large_binary(): st.sampled_from([b"", b"\0", b"\xff\0", b"\xff" * 70]),
    pa.timestamp("us", tz="UTC"): st.sampled_from(MOMENTS),
}
VALUES = KEYS | {
    pa.float32(): st.sampled_from([0.5, -0.0, float("inf"), float("nan")]),
    pa.list_(pa.field("item", pa.int32())): st.lists(st.integers(0, 2), max_size=2),
}
COLUMNS = ["k", "K", "a.b", "two words", "é"]

pytestmark = [pytest.mark.filterwarnings("ignore:PySpark does not yet"), pytest.mark.timeout(900)]


@dataclass(frozen=True)
class How:
    """What must not matter."""

    partition_bytes: int
    block_bytes: int
    batch_rows: int
    units: int
    seed: int


@dataclass(frozen=True)
class Given:
    """A table whose first columns are keys and whose `n` differs from row to row."""

    table: pa.Table
    by: tuple[str, ...]
    how: How


HOW = st.builds(
    How,
    st.sampled_from([150, 600, 1 << 20]),
    st.sampled_from([1, 200, 1 << 20]),
    st.sampled_from([1, 3, 1000]),
    st.integers(1, 3),
    st.integers(0, 5),
)


@st.composite
def tables(draw: Any, rows: int = 24) -> Given:
    """Any table with one to three key columns."""
    keys = draw(st.lists(st.sampled_from([*KEYS]), min_size=1, max_size=3))
    values = draw(st.lists(st.sampled_from([*VALUES]), max_size=2))
    size = draw(st.integers(0, rows))
    columns = {}
    for name, kind in zip(COLUMNS, [*keys, *values], strict=False):
        cells = draw(st.lists(st.none() | VALUES[kind], min_size=size, max_size=size))
        columns[name] = pa.array(cells, kind)
    columns["n"] = pa.array(draw(st.permutations(range(size))), pa.int64())
    return Given(pa.table(columns), tuple(COLUMNS[: len(keys)]), draw(HOW))


@pytest.fixture(scope="module", autouse=True)
def _unwarned():
    """Partitions are so small here that most keys are larger, which `local` would say each time."""
    log = logging.getLogger("stepwell")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


@pytest.fixture(scope="module", params=NAMES)
def engine(request, tmp_path_factory, shared_spark):
    require(request.param)
    found = made(request.param, tmp_path_factory.mktemp(request.param), shared_spark)
    yield found, request.param, tmp_path_factory.mktemp("stages")
    found.close()


def framed(engine, table, how):
    """The table as a frame, in units and batches and an order that `how` says."""
    units = [Unit(f"u{i}", table.take(np.arange(i, table.num_rows, how.units))) for i in range(how.units)]
    order = np.random.default_rng(how.seed).permutation(how.units)
    return engine.scan(Pieces(how.batch_rows), [units[i] for i in order], table.schema, "scan")


def seen(engine, frame):
    """Everything a reader of a frame could see; rows as text, for NaN equals NaN."""
    table = engine.collect(frame)
    assert table.schema == frame.schema
    return table.num_rows, table_digest(table), str(table.to_pylist())


def lost(engine):
    return {label: rows for label, rows in engine.dropped_rows().items() if rows}


def maps(engine, case, pick):
    return seen(engine, engine.map(framed(engine, case.table, case.how), halved, case.table.schema))


def shuffles(engine, case, pick):
    frame = framed(engine, case.table, case.how)
    out = engine.shuffle(
        [frame, engine.table(case.table.schema.empty_table())],
        case.by,
        Ranked(case.by),
        pa.schema([*case.table.schema, *RANKS]),
        ["n"],
        label="rank",
    )
    return seen(engine, out)


def caps(engine, case, pick):
    out = engine.shuffle(
        framed(engine, case.table, case.how),
        case.by,
        Ranked(case.by),
        pa.schema([*case.table.schema, *RANKS]),
        ["n"],
        max_rows_per_key=1 + pick % 3,
        label="rank",
    )
    return seen(engine, out), lost(engine)


def combines(engine, case, pick):
    """Sums by all keys on the way, and by the first key a cap of what is left of it."""
    table = case.table.select([*case.by, "n"])
    out = engine.shuffle(
        framed(engine, table, case.how),
        case.by[:1],
        Ranked(case.by[:1]),
        pa.schema([*table.schema, *RANKS]),
        [*case.by[1:], "n"],
        combine=Summed(case.by),
        max_rows_per_key=(None, 1, 2)[pick % 3],
        label="sum",
    )
    return seen(engine, out), lost(engine)


def joins(engine, case, pick):
    """With rows of its own keys, some of them twice, and with one key that the left side may lack."""
    right = case.table.select([*case.by, "n"]).slice(0, 1 + case.table.num_rows // 2).rename_columns([*case.by, "m"])
    right = pa.concat_tables([right, right.slice(0, 2)])
    left = framed(engine, case.table.slice(case.table.num_rows // 4), case.how)
    how = ("inner", "left outer")[pick % 2]
    return seen(engine, engine.join(left, framed(engine, right, case.how), list(case.by), how))


def aligns(engine, case, pick):
    shards = 1 + pick
    place = np.random.default_rng(pick).permutation(case.table.num_rows)
    rows = pa.array([int(pack(3, i % shards, np.array([i]))[0]) for i in place.tolist()], pa.int64())
    table = case.table.append_column("row", rows)
    reports = engine.align(framed(engine, table, case.how), Align(written, shards, 3, "align"))
    return [(r.unit, r.docs, r.value) for r in reports]


def folds(engine, case, pick):
    frame = engine.persist(framed(engine, case.table, case.how))
    return engine.fold(frame, totals, added), seen(engine, frame)


def arranged(engine, folder, how):
    engine.begin(folder / str(next(STAGE)))
    engine.partition_bytes = how.partition_bytes
    if hasattr(engine, "block_bytes"):
        engine.block_bytes = how.block_bytes
    return engine


@pytest.mark.parametrize("law", [maps, shuffles, caps, combines, joins, aligns, folds])
def test_a_verb_gives_what_a_naive_engine_gives(engine, law):
    under_test, name, folder = engine

    @settings(max_examples=EXAMPLES[name], database=None, suppress_health_check=[*HealthCheck])
    @given(tables(), st.integers(0, 5))
    def holds(case, pick):
        oracle = OracleEngine(seed=case.how.seed, keys=1 + case.how.units)
        wanted = law(oracle, case, pick)
        try:
            assert law(arranged(under_test, folder, case.how), case, pick) == wanted
        finally:
            under_test.clear()

    holds()


@settings(max_examples=25, database=None, suppress_health_check=[*HealthCheck])
@given(tables(), st.sampled_from([1, 60, 400]))
def test_a_large_key_is_reported_as_it_is(here, case, partition_bytes):
    """On `local`: the largest key beyond the size of a partition, its rows counted; none where there is none."""
    engine, folder = here
    arranged(engine, folder, How(partition_bytes, 1 << 20, case.how.batch_rows, case.how.units, case.how.seed))
    shuffles(engine, case, 0)
    found = engine.skewed()
    engine.begin(engine.scratch)  # a stage that goes on finds its parts made, and says the same of them
    shuffles(engine, case, 0)
    assert engine.skewed() == found
    engine.clear()
    keys = list(zip(*(case.table.column(k).to_pylist() for k in case.by), strict=True))
    groups = [case.table.filter(pa.array([k == key for k in keys], pa.bool_())) for key in {*keys}]
    sizes = {(g.num_rows, g.nbytes) for g in groups if g.num_rows > 1}
    if not any(size > partition_bytes // 2 for _, size in sizes):
        assert found == {}
    if any(size > 2 * partition_bytes for _, size in sizes):
        assert {*found} == {"rank"}
    for skew in found.values():
        assert skew.rows in {rows for rows, _ in sizes}
        assert skew.bytes > partition_bytes
        assert len(skew.key) == len(case.by)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    from core.engines.local import LocalEngine

    return LocalEngine(tmp_path_factory.mktemp("here"), 0), tmp_path_factory.mktemp("stages")
