"""The verbs of the local engine against naive oracles, whatever the workers, partitions, blocks and order of units."""

import contextlib
import itertools
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engines import columns, spill
from core.engines.columns import capped, in_order, key_starts, partition_hash, sorted_table
from core.engines.contract import Align, Report, Unit
from core.engines.local import LocalEngine
from core.errors import StageError
from core.rows import local_of, pack
from tests.core.kernels import SUMS, add_pairs, count_and_sum, doubled, identity, ranked, rows_of, summed

SCHEMA = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("v", pa.int64())])
RANKED = pa.schema([*SCHEMA, ("rank", pa.int64()), ("size", pa.int64())])
KEY = st.tuples(st.none() | st.integers(-2, 3), st.none() | st.sampled_from(["", "a", "a\0", "é" * 40, "é" * 40 + "x"]))
ROWS = st.lists(KEY, max_size=60).map(lambda keys: [(k, s, i) for i, (k, s) in enumerate(keys)])
HOW = st.fixed_dictionaries(
    {
        "cut": st.integers(1, 5),
        "partition": st.sampled_from([300, 1000, 1 << 20]),
        "block": st.sampled_from([1, 400, 1 << 20]),
    }
)


@pytest.fixture(scope="module", params=[0, 1, 2])
def pool(request, tmp_path_factory):
    engine = LocalEngine(tmp_path_factory.mktemp("scratch"), request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return LocalEngine(tmp_path_factory.mktemp("here"), 0)


STAGE = itertools.count()


def arranged(engine, how):
    """The engine at the beginning of a new stage, with the partitions and blocks that `how` forces."""
    engine.begin(engine.scratch.parent / str(next(STAGE)))
    engine.block_bytes = how["block"]
    engine.partition_bytes = how["partition"]
    return engine


def table_of(rows, schema=SCHEMA):
    return pa.Table.from_pylist([dict(zip(schema.names, r, strict=True)) for r in rows], schema=schema)


def frame_of(engine, rows, pieces, schema=SCHEMA):
    """A frame of `rows`, scanned from several units in a shuffled order."""
    units = [Unit(f"u{i}", table_of(rows[i::pieces], schema)) for i in range(pieces)]
    random.Random(pieces).shuffle(units)
    return engine.scan(rows_of, units, schema, "scan")


def got(engine, frame):
    """Rows of a frame as a sorted list of tuples."""
    table = engine.collect(frame)
    assert table.schema == frame.schema
    return sorted(zip(*(table.column(c).to_pylist() for c in table.column_names), strict=True), key=repr)


def expected_ranks(rows, most=None):
    groups = defaultdict(list)
    for row in rows:
        groups[row[:2]].append(row)
    out, lost = [], 0
    for group in groups.values():
        kept = sorted(group, key=lambda r: r[2])[:most]
        lost += len(group) - len(kept)
        out += [(*row, i, len(kept)) for i, row in enumerate(kept)]
    return sorted(out, key=repr), lost


@settings(max_examples=10)
@given(ROWS, HOW, st.none() | st.integers(1, 4))
def test_shuffle_brings_whole_sorted_keys_together(here, rows, how, most):
    engine = arranged(here, how)
    frame = frame_of(engine, rows, how["cut"])
    out = engine.shuffle(frame, ["k", "s"], ranked, RANKED, order=["v"], max_rows_per_key=most, label="rank")
    wanted, lost = expected_ranks(rows, most)
    assert got(engine, out) == wanted
    assert engine.dropped_rows() == ({"rank": lost} if lost else {})


@settings(max_examples=8)
@given(ROWS, HOW)
def test_combine_changes_nothing_but_the_traffic(here, rows, how):
    engine = arranged(here, how)
    pairs = [(k, s, 1, v) for k, s, v in rows]
    wanted = Counter(), Counter()
    for k, s, n, v in pairs:
        wanted[0][k, s] += n
        wanted[1][k, s] += v
    for combine in (None, summed):
        frame = frame_of(engine, pairs, how["cut"], SUMS)
        out = engine.shuffle(frame, ["k", "s"], summed, SUMS, combine=combine)
        assert got(engine, out) == sorted(((*key, n, wanted[1][key]) for key, n in wanted[0].items()), key=repr)


@settings(max_examples=8)
@given(ROWS, ROWS, HOW, st.sampled_from(["inner", "left outer"]))
def test_join_against_nested_loops(here, left, right, how, kind):
    engine = arranged(here, how)
    other = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("w", pa.int64())])
    frames = frame_of(engine, left, how["cut"]), frame_of(engine, right, 2, other)
    wanted = []
    for k, s, v in left:
        partners = [w for kk, ss, w in right if (kk, ss) == (k, s) and k is not None and s is not None]
        wanted += [(k, s, v, w) for w in partners] or ([(k, s, v, None)] if kind == "left outer" else [])
    assert got(engine, engine.join(*frames, ["k", "s"], kind)) == sorted(wanted, key=repr)


@settings(max_examples=8)
@given(ROWS, HOW)
def test_map_and_fold(here, rows, how):
    engine = arranged(here, how)
    frame = engine.map(frame_of(engine, rows, how["cut"]), doubled, SCHEMA)
    assert got(engine, frame) == sorted(((k, s, 2 * v) for k, s, v in rows), key=repr)
    wanted = (len(rows), 2 * sum(v for *_, v in rows)) if rows else None
    assert engine.fold(frame, count_and_sum, add_pairs) == wanted


def written(ordinal, rows):
    return Report(
        f"s{ordinal}",
        docs=rows.num_rows,
        value=(local_of(rows.column("row").to_numpy()).tolist(), rows.column("x").to_pylist()),
    )


@settings(max_examples=8)
@given(st.integers(0, 7), st.sets(st.tuples(st.integers(0, 6), st.integers(0, 30)), max_size=40), HOW)
def test_align_writes_each_shard_once_with_its_rows_in_order(here, shards, places, how):
    engine = arranged(here, how)
    places = [p for p in places if p[0] < shards]
    schema = pa.schema([("row", pa.int64()), ("x", pa.large_string())])
    rows = [(int(pack(3, s, np.array([r]))[0]), f"{s}.{r}") for s, r in places]
    reports = engine.align(frame_of(engine, rows, how["cut"], schema), Align(written, shards, 3, "align"))
    assert [r.unit for r in sorted(reports, key=lambda r: r.unit)] == [f"s{i}" for i in range(shards)]
    for report in reports:
        mine = sorted(r for s, r in places if f"s{s}" == report.unit)
        assert report.value == (mine, [f"{report.unit[1:]}.{r}" for r in mine])


def test_all_verbs_on_every_pool(pool):
    """What hypothesis shows in one process holds over processes: one fixed case, with several partitions and passes."""
    rows = [((i * 7) % 13 if i % 11 else None, f"s{i % 3}", i) for i in range(400)]
    for how in ({"cut": 4, "partition": 1000, "block": 300}, {"cut": 1, "partition": 1 << 27, "block": 1 << 27}):
        engine = arranged(pool, how)
        frame = engine.persist(frame_of(engine, rows, how["cut"]))
        wanted, lost = expected_ranks(rows, 6)
        out = engine.shuffle(
            [frame, engine.table(SCHEMA.empty_table())], ["k", "s"], ranked, RANKED, ["v"], None, 6, "rank"
        )
        assert got(engine, out) == wanted
        assert engine.dropped_rows() == {"rank": lost}
        assert engine.fold(frame, count_and_sum, add_pairs) == (400, sum(range(400)))
        small = engine.table(pa.table({"k": pa.array([1, 2, 2]), "name": ["one", "two", "zwei"]}))
        joined = got(engine, engine.join(frame, small, ["k"]))
        names = {1: ["one"], 2: ["two", "zwei"]}
        assert joined == sorted(((k, s, v, n) for k, s, v in rows for n in names.get(k, ())), key=repr)


def test_several_frames_and_several_passes_meet(here):
    engine = arranged(here, {"cut": 1, "partition": 1 << 30, "block": 100})
    frames = [frame_of(engine, [(k, "s", 10 * i + k) for k in range(8)], 3) for i in range(4)]
    out = engine.shuffle(frames, ["k", "s"], ranked, RANKED, ["v"])
    assert len(engine.collect(out)) == 32
    assert set(engine.collect(out).column("size").to_pylist()) == {4}


def test_a_stage_that_begins_again_finds_its_parts(here):
    rows = [(i % 5, "s", i) for i in range(50)]
    how = {"cut": 2, "partition": 400, "block": 200}
    engine = arranged(here, how)

    def stage(fn):
        frame = frame_of(engine, rows, 2)
        return engine.shuffle(frame, ["k", "s"], fn, RANKED, ["v"], max_rows_per_key=3, label="rank")

    first = got(engine, stage(ranked))
    assert engine.dropped_rows() == {"rank": 35}
    engine.begin(engine.scratch)
    # `identity` would fail on the schema: nothing is computed again, and what the cap cut is still known
    assert got(engine, stage(identity)) == first
    assert engine.dropped_rows() == {"rank": 35}
    engine.begin(engine.scratch)
    engine.partition_bytes = 1600  # fewer partitions: parts of the first cut hold other keys
    assert got(engine, stage(ranked)) == first
    assert engine.dropped_rows() == {"rank": 35}
    engine.clear()
    assert not engine.scratch.exists()
    engine.begin(engine.scratch)
    with pytest.raises(StageError, match="rank"):
        stage(identity)


def test_a_stage_killed_in_its_reduction_goes_on_with_other_partitions(here):
    rows = [(i % 17, "s", i) for i in range(200)]
    engine = arranged(here, {"cut": 2, "partition": 300, "block": 200})
    with pytest.raises(StageError):
        engine.shuffle(
            frame_of(engine, rows, 2), ["k", "s"], identity, RANKED, ["v"]
        )  # the wrong schema: parts are cut
    engine.begin(engine.scratch)
    engine.partition_bytes = 2400
    out = engine.shuffle(frame_of(engine, rows, 2), ["k", "s"], ranked, RANKED, ["v"])
    assert got(engine, out) == expected_ranks(rows)[0]


def test_join_refuses_columns_of_one_name(here):
    engine = arranged(here, {"cut": 1, "partition": 1 << 20, "block": 1 << 20})
    frame = engine.table(table_of([(1, "a", 2)]))
    with pytest.raises(StageError, match=r"both sides have columns \['s', 'v'\]"):
        engine.join(frame, frame, ["k"])


def test_float_keys_are_refused(here):
    engine = arranged(here, {"cut": 1, "partition": 1 << 20, "block": 1 << 20})
    frame = engine.table(pa.table({"k": [0.0, -0.0]}))
    with pytest.raises(StageError, match=r"key columns \['k'\] hold floats"):
        engine.shuffle(frame, ["k"], identity, frame.schema)


@settings(max_examples=40)
@given(
    st.lists(st.none() | st.sampled_from(["", "a", "b", "ab" * 40, "ab" * 40 + "c", "é\0"]), max_size=30),
    st.integers(0, 3),
)
def test_partition_hash_is_a_function_of_the_key(values, skip):
    kinds = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    data = [v.encode() if v is not None else None for v in values]
    hashes = []
    for kind in kinds:
        column = pa.array([b"skip"] * skip + data, pa.binary()).cast(kind).slice(skip)
        hashes.append(partition_hash(pa.table({"k": column}), ["k"]))
    assert all((h == hashes[0]).all() for h in hashes)
    by_value = defaultdict(set)
    for v, h in zip(values, hashes[0].tolist(), strict=True):
        by_value[v].add(h)
    assert all(len(h) == 1 for h in by_value.values())
    assert len({h for s in by_value.values() for h in s}) == len(by_value)


@pytest.mark.parametrize("look", [1, 7, 1 << 16])
def test_partition_hash_is_that_of_each_row(look, monkeypatch):
    texts = [None, *("é" * (i % 60) for i in range(40))]
    table = pa.table({"s": pa.array(texts, pa.large_string()), "k": [*range(40), None]}).slice(3)
    alone = [partition_hash(table.slice(i, 1), ["s", "k"])[0] for i in range(table.num_rows)]
    monkeypatch.setattr(columns, "LOOK_ROWS", look)
    assert partition_hash(table, ["s", "k"]).tolist() == alone


@pytest.mark.parametrize("look", [1, 3, 1 << 16])
def test_a_table_is_in_order_where_sorting_would_move_nothing(look, monkeypatch):
    monkeypatch.setattr(columns, "LOOK_ROWS", look)
    keys = [("k", "ascending"), ("s", "ascending")]

    @given(ROWS, st.integers(0, 60))
    def law(rows, ascending):
        table = table_of([*sorted(rows[:ascending], key=lambda r: (r[0] is None, r[0] or 0)), *rows[ascending:]])
        table = pa.concat_tables([table.slice(0, ascending), table.slice(ascending)])
        moved = pa.compute.sort_indices(table, sort_keys=keys).to_pylist() != list(range(table.num_rows))
        assert in_order(table, ["k", "s"]) != moved
        ordered = sorted_table(table, ["k", "s"])
        assert in_order(ordered, ["k", "s"])
        assert in_order(ordered, [])

    law()
    assert not in_order(pa.table({"k": [0.0, float("nan"), 1.0]}), ["k"])  # a sort puts NaN last
    assert in_order(pa.table({"k": [1, 2], "nothing": pa.nulls(2)}), ["nothing", "k"])


@given(st.lists(KEY, max_size=60), st.integers(1, 100), st.sampled_from([1, 3, 1 << 20]))
def test_split_keeps_rows_and_order(keys, partitions, chunk):
    table = table_of([(k, s, i) for i, (k, s) in enumerate(keys)])
    table = pa.Table.from_batches(table.to_batches(chunk), SCHEMA)
    cut = spill.Cut(("k", "s"), (), partitions)
    found = dict(spill.split(table, cut))
    home = (partition_hash(table, ["k", "s"]) % np.uint64(partitions)).tolist()
    wanted = defaultdict(list)
    for i, p in enumerate(home):
        wanted[p].append(i)
    assert {p: piece.column("v").to_pylist() for p, piece in found.items()} == wanted


def test_partition_hash_spreads_integers_and_strings():
    n = 20_000
    for column in (
        pa.array(range(n)),
        pa.array([f"{i:032x}" for i in range(n)]),
        pa.array([f"http://a.example/{i}" for i in range(n)]),
    ):
        counts = np.bincount((partition_hash(pa.table({"k": column}), ["k"]) % 16).astype(int), minlength=16)
        assert abs(counts - n / 16).max() < 6 * (n / 16) ** 0.5


@given(ROWS, st.integers(1, 20))
def test_chunks_hold_whole_keys_and_all_rows(rows, size):
    table = sorted_table(table_of(rows), ["k", "s", "v"])
    pieces = list(spill.chunks(table, ["k", "s"], -(-size * table.nbytes // max(1, len(rows)))))
    assert pa.concat_tables([*pieces, SCHEMA.empty_table()]).equals(table)
    keys = [set(zip(p.column("k").to_pylist(), p.column("s").to_pylist(), strict=True)) for p in pieces]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert all(p.num_rows >= size for p in pieces[:-1])


def test_every_batch_of_a_frame_is_a_sign_of_life(tmp_path):
    """Or a unit that takes longer than a silent one is given would be killed, however steadily it works."""
    signs = Counter()

    class Counts:
        @contextlib.contextmanager
        def task(self, label, units, size):
            yield lambda docs, size, units: signs.update([label] if docs == units == 0 else [])

    engine = LocalEngine(tmp_path, 0, display=Counts())
    rows = [(i % 5, "a", i) for i in range(63)]
    frame = engine.scan(rows_of, [Unit("u", table_of(rows))], SCHEMA, "scan")  # seven rows a batch
    engine.map(frame, doubled, SCHEMA, "map")
    engine.fold(frame, count_and_sum, add_pairs, "fold")
    engine.shuffle(frame, ["k"], identity, SCHEMA, ["v"], label="shuffle")
    names = engine.table(pa.table({"k": [1, 2], "name": ["x", "y"]}))
    engine.join(frame, names, ["k"], label="join")
    assert signs == {
        "scan": 9, "map": 9, "fold": 9, "shuffle": 9, "shuffle: reduce": 1, "join: left": 9, "join: right": 1, "join": 1
    }  # fmt: skip


def test_key_starts_and_caps_by_hand():
    table = sorted_table(
        table_of([(1, "b", 0), (None, "a", 1), (1, None, 2), (1, None, 3), (None, None, 4), (1, "b", 5)]),
        ["k", "s", "v"],
    )
    assert table.column("v").to_pylist() == [0, 5, 2, 3, 1, 4]
    assert key_starts(table, ["k", "s"]).tolist() == [True, False, True, False, True, True]
    kept, cut = capped(table, ["k", "s"], 1)
    assert (kept.column("v").to_pylist(), cut) == ([0, 2, 1, 4], 2)
