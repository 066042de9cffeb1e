"""The engine contract, verb by verb: every engine gives what a naive engine in memory gives, with several partition counts,
orders of units and batch sizes."""

import datetime
import itertools
import random
import re
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from core.engines.contract import PARTITION_BYTES, Align, Unit
from core.errors import ConfigError, StageError
from core.hashing import table_digest
from core.rows import pack
from tests.core.kernels import SUMS, add_pairs, count_and_sum, doubled, faulty, identity, ranked, summed
from tests.dedup.memory_engine import OracleEngine
from tests.engines.tasks import Raises, Rows, longer, squared, written

SCHEMA = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("v", pa.int64())])
RANKED = pa.schema([*SCHEMA, ("rank", pa.int64()), ("size", pa.int64())])
NAMED = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("a.name", pa.large_string()), ("K", pa.int32())])
PLACED = pa.schema([("row", pa.int64()), ("x", pa.large_string())])
WIDE = pa.schema(
    [
        ("u8", pa.uint8()),
        ("u64", pa.uint64()),
        ("f32", pa.float32()),
        ("flag", pa.bool_()),
        ("raw", pa.large_binary()),
        ("digest", pa.binary(4)),
        ("when", pa.timestamp("us", tz="UTC")),
        ("vector", pa.list_(pa.float32(), 2)),
        ("sets", pa.list_(pa.field("item", pa.uint32()))),
        ("place", pa.struct([("path", pa.large_string()), ("offset", pa.int64())])),
    ]
)
STAGE = itertools.count()

pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet")

# (partition_bytes, seed that orders units, rows of a batch); 300 rows here are about 10 KB
WHOLE, MANY = (PARTITION_BYTES, None, 1000), (2000, 5, 7)


def table_of(rows, schema=SCHEMA):
    return pa.Table.from_pylist([dict(zip(schema.names, r, strict=True)) for r in rows], schema=schema)


ROWS = table_of([((i * 7) % 13 if i % 11 else None, ["", "a", "a\0", "é" * 40, None][i % 5], i) for i in range(300)])
NAMES = table_of(
    [(k, s, f"{k}{s}{i}", i) for i, (k, s) in enumerate([(1, "a"), (2, ""), (2, ""), (3, None), (77, "a")])], NAMED
)


class Bench:
    """An engine at the beginning of a stage, arranged so."""

    def __init__(self, engine, tmp_path, how):
        self.engine, (engine.partition_bytes, self.seed, self.batch_rows) = engine, how
        if not isinstance(engine, OracleEngine):
            engine.begin(tmp_path / f"stage{next(STAGE)}")

    def frame(self, table, pieces=4):
        units = [Unit(f"u{i}", table.take(np.arange(i, table.num_rows, pieces))) for i in range(pieces)]
        if self.seed is not None:
            random.Random(self.seed).shuffle(units)
        return self.engine.scan(Rows(self.batch_rows), units, table.schema, "scan")

    def digest(self, frame):
        table = self.engine.collect(frame)
        assert table.schema == frame.schema
        return table.num_rows, table_digest(table)


def scanned(bench):
    return bench.digest(bench.frame(ROWS)), bench.digest(bench.engine.scan(Rows(1), [], SCHEMA, "nothing"))


def mapped(bench):
    return bench.digest(bench.engine.map(bench.frame(ROWS), longer, SCHEMA))


def shuffled(bench):
    frames = [
        bench.frame(ROWS.slice(0, 200)),
        bench.engine.table(SCHEMA.empty_table()),
        bench.frame(ROWS.slice(200), 1),
    ]
    return bench.digest(bench.engine.shuffle(frames, ["k", "s"], ranked, RANKED, ["v"], label="rank"))


def capped(bench):
    frame = bench.engine.persist(bench.frame(ROWS))
    out = bench.engine.shuffle(frame, ["k", "s"], ranked, RANKED, ["v"], max_rows_per_key=3, label="rank")
    return bench.digest(out), {label: n for label, n in bench.engine.dropped_rows().items() if n}


def combined(bench):
    pairs = pa.table([ROWS["k"], ROWS["s"], np.ones(300, np.int64), ROWS["v"]], schema=SUMS)
    return bench.digest(bench.engine.shuffle(bench.frame(pairs), ["k", "s"], summed, SUMS, combine=summed))


def joined_inner(bench):
    return bench.digest(bench.engine.join(bench.frame(ROWS), bench.engine.table(NAMES), ["k", "s"]))


def joined_outer(bench):
    return bench.digest(bench.engine.join(bench.frame(ROWS), bench.frame(NAMES, 2), ["k", "s"], "left outer"))


def joined_to_nothing(bench):
    nothing = bench.engine.table(NAMED.empty_table())
    return bench.digest(bench.engine.join(bench.frame(ROWS), nothing, ["k", "s"], "left outer"))


def chained(bench):
    """A map of a join of two shuffles, as stages do it."""
    ranks = bench.engine.shuffle(bench.frame(ROWS), ["k", "s"], ranked, RANKED, ["v"], max_rows_per_key=4, label="rank")
    known = bench.engine.join(ranks, bench.frame(NAMES, 1), ["k", "s"], "left outer")
    return bench.digest(bench.engine.map(known, doubled, known.schema))


CASES = [scanned, mapped, shuffled, capped, combined, joined_inner, joined_outer, joined_to_nothing, chained]


@pytest.mark.parametrize(
    ("case", "how"),
    [pytest.param(case, MANY, id=f"{case.__name__}-many-parts") for case in CASES]
    + [pytest.param(case, WHOLE, id=f"{case.__name__}-whole") for case in (shuffled, capped)],
)
def test_a_frame_is_what_a_naive_engine_makes_of_it(engine, how, case, tmp_path):
    expected = case(Bench(OracleEngine(), tmp_path, (0, None, 50)))
    assert case(Bench(engine, tmp_path, how)) == expected


def test_types_that_an_engine_may_lack_come_back_as_they_went(engine, tmp_path):
    when = datetime.datetime(2024, 5, 1, 12, 0, 0, 1, datetime.UTC)
    rows = [
        (i, 2**64 - 1 - i, i / 4, i % 2 == 0, b"\0\xff" * i, b"abc" + bytes([i]), when, [i, -i], [i] * i, ("é", None))
        for i in range(9)
    ]
    given = [dict(zip(WIDE.names, (*r[:-1], {"path": r[-1][0], "offset": i}), strict=True)) for i, r in enumerate(rows)]
    table = pa.Table.from_pylist([*given, dict.fromkeys(WIDE.names)], schema=WIDE)
    bench = Bench(engine, tmp_path, (200, 1, 2))
    out = engine.shuffle(bench.frame(table, 2), ["u64", "digest"], identity, WIDE)
    got = engine.collect(out)
    assert got.schema == WIDE
    assert sorted(got.to_pylist(), key=repr) == sorted(table.to_pylist(), key=repr)


def test_a_cap_counts_what_combine_left(engine, tmp_path):
    """By hand: for each k, the sums of the first two strings; how often a string came does not count."""
    pairs = pa.table([ROWS["k"], ROWS["s"], np.ones(300, np.int64), ROWS["v"]], schema=SUMS)
    bench = Bench(engine, tmp_path, MANY)
    out = engine.shuffle(
        bench.frame(pairs), ["k"], identity, SUMS, ["s"], combine=summed, max_rows_per_key=2, label="cap"
    )
    sums = defaultdict(lambda: [0, 0])
    for k, s, n, v in zip(*(pairs.column(c).to_pylist() for c in SUMS.names), strict=True):
        sums[k, s][0] += n
        sums[k, s][1] += v
    wanted, lost = [], 0
    for k in {k for k, _ in sums}:
        strings = sorted((s for kk, s in sums if kk == k), key=lambda s: (s is None, (s or "").encode()))
        wanted += [(k, s, *sums[k, s]) for s in strings[:2]]
        lost += len(strings[2:])
    assert bench.digest(out) == bench.digest(engine.table(table_of(wanted, SUMS)))
    assert lost
    assert engine.dropped_rows() == {"cap": lost}


def test_a_key_larger_than_a_partition_is_told_unless_a_cap_makes_it_small(engine, tmp_path):
    rows = table_of([(1 if i % 3 else i, "a", i) for i in range(300)])
    bench = Bench(engine, tmp_path, MANY)
    engine.shuffle(bench.frame(rows), ["k"], identity, SCHEMA, ["v"], label="hot")
    told = engine.skewed()
    assert {label: (skew.key, skew.rows) for label, skew in told.items()} == {"hot": ((1,), 200)}
    assert told["hot"].bytes > engine.partition_bytes
    bench = Bench(engine, tmp_path, MANY)
    engine.shuffle(bench.frame(rows), ["k"], identity, SCHEMA, ["v"], max_rows_per_key=3, label="capped")
    assert engine.skewed() == {}


@pytest.mark.parametrize(
    ("shards", "used", "how"), [(7, (0, 2, 5), WHOLE), (3, (), MANY), (0, (), MANY), (40, tuple(range(0, 40, 3)), MANY)]
)
def test_align_writes_every_shard_once_in_order(engine, shards, used, how, tmp_path):
    rows = [(int(pack(2, s, np.array([r]))[0]), f"{s}.{r}") for s in used for r in range(0, 40, 1 + s)]
    bench = Bench(engine, tmp_path, how)
    table = table_of(sorted(rows, key=lambda r: r[1]), PLACED)
    reports = engine.align(bench.frame(table, 3), Align(written, shards, 2, "align"))
    by_shard = [sorted(r for r in rows if r[1].startswith(f"{s}.")) for s in range(shards)]
    assert [r.unit for r in reports] == [f"s{s}" for s in range(shards)]
    assert [r.value for r in reports] == [
        ([row for row, _ in mine], table_digest(table_of(mine, PLACED))) for mine in by_shard
    ]


@pytest.mark.parametrize("place", [(1, 0), (2, 3)], ids=["another dataset", "a shard too many"])
def test_align_refuses_rows_outside_its_target(engine, place, tmp_path):
    bench = Bench(engine, tmp_path, WHOLE)
    rows = [(int(pack(*where, np.array([4]))[0]), "x") for where in ((2, 0), place)]
    with pytest.raises(StageError, match=r"align: 1 rows are not of dataset number 2 with 3 shards"):
        engine.align(bench.frame(table_of(rows, PLACED), 1), Align(written, 3, 2, "align"))


def test_fold(engine, tmp_path):
    bench = Bench(engine, tmp_path, MANY)
    assert engine.fold(bench.frame(ROWS), count_and_sum, add_pairs) == (300, sum(range(300)))
    assert engine.fold(engine.table(SCHEMA.empty_table()), count_and_sum, add_pairs) is None


def test_units_report_in_their_order(engine, tmp_path):
    Bench(engine, tmp_path, WHOLE)
    units = [Unit(f"u{i}", i, bytes=10) for i in range(20)]
    reports = engine.run_units(squared, units, "square")
    assert [(r.unit, r.value, r.docs, r.bytes) for r in reports] == [(f"u{i}", i * i, 1, 10) for i in range(20)]
    assert all(r.seconds > 0 and r.peak_memory_bytes > 0 for r in reports)
    assert engine.run_units(squared, [], "nothing") == []


def test_a_unit_that_asks_for_another_try_gets_it(engine, tmp_path):
    Bench(engine, tmp_path, WHOLE)
    payload = {"folder": str(tmp_path), "fault": "retry", "times": 1}
    assert [r.value for r in engine.run_units(faulty, [Unit("busy", payload)], "try")] == [1]


ARRIVES = {
    "config": (ConfigError, "test: a bad knob\ntest: another"),
    "stage": (StageError, "test: it must stop"),
    "input": (StageError, "work: unit [^:]+ failed: InputError: a torn record"),
    "value": (StageError, "work: unit [^:]+ failed: ValueError: a bad shard"),
}


@pytest.mark.parametrize("error", ARRIVES)
def test_what_a_function_raises_arrives_in_one_form(engine, error, tmp_path):
    bench = Bench(engine, tmp_path, WHOLE)
    frame, fn = engine.table(ROWS), Raises(error)
    kind, said = ARRIVES[error]
    calls = {
        "run_units": lambda: engine.run_units(fn, [Unit("u7")], "work"),
        "scan": lambda: engine.scan(fn, [Unit("u7")], SCHEMA, "work"),
        "map": lambda: engine.persist(engine.map(frame, fn, SCHEMA, "work")),
    }
    if error == "value":
        placed = bench.frame(table_of([(5, "x")], PLACED), 1)
        calls["combine"] = lambda: engine.shuffle(frame, ["k"], identity, SCHEMA, combine=fn, label="work")
        calls["fold"] = lambda: engine.fold(frame, fn, add_pairs, "work")
        calls["align"] = lambda: engine.align(placed, Align(fn, 1, 0, "work"))
    for verb, call in calls.items():
        with pytest.raises(kind) as raised:
            call()
        assert raised.type is kind, verb
        assert re.fullmatch(said, str(raised.value)), verb
        if verb in ("scan", "run_units") and error in ("input", "value"):
            assert "unit u7 failed" in str(raised.value)


def test_keys_and_names_that_no_two_engines_would_treat_alike_are_refused(engine, tmp_path):
    Bench(engine, tmp_path, WHOLE)
    floats = engine.table(pa.table({"k": [0.0, -0.0], "v": [1, 2]}))
    with pytest.raises(StageError, match=r"key columns \['k'\] hold floats"):
        engine.shuffle(floats, ["k"], identity, floats.schema)
    with pytest.raises(StageError, match=r"key columns \['k'\] hold floats"):
        engine.join(floats, engine.table(pa.table({"k": [0.0], "w": [1]})), ["k"])
    with pytest.raises(StageError, match=r"both sides have columns \['s', 'v'\]"):
        engine.join(engine.table(ROWS), engine.table(ROWS), ["k"])
