"""Hashes of tables, documents and values: equal exactly when the content is, whatever the chunks."""

import itertools
import math
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.hashing import TableHash, combined, digest, document_id, numbered_id, seeded, seeded_column, table_digest

SCHEMA = pa.schema(
    [
        ("i", pa.int32()),
        ("f", pa.float64()),
        ("b", pa.bool_()),
        ("s", pa.large_string()),
        ("short", pa.string()),
        ("raw", pa.large_binary()),
        ("t", pa.timestamp("us", tz="UTC")),
        ("d", pa.date32()),
        ("many", pa.large_list(pa.int64())),
        ("spans", pa.large_list(pa.struct([("start", pa.int64()), ("label", pa.large_string())]))),
        ("origin", pa.struct([("path", pa.large_string()), ("parts", pa.list_(pa.string()))])),
    ]
)
TEXT = st.text(st.sampled_from("ab\0\né中😀"), max_size=6)
SPAN = st.fixed_dictionaries({"start": st.none() | st.integers(-5, 5), "label": st.none() | TEXT})
ROW = st.fixed_dictionaries(
    {
        "i": st.none() | st.integers(-(2**31), 2**31 - 1),
        "f": st.none() | st.floats(),
        "b": st.none() | st.booleans(),
        "s": st.none() | TEXT,
        "short": st.none() | TEXT,
        "raw": st.none() | st.binary(max_size=5),
        "t": st.none() | st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC)),
        "d": st.none() | st.dates(),
        "many": st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3),
        "spans": st.none() | st.lists(st.none() | SPAN, max_size=3),
        "origin": st.none()
        | st.fixed_dictionaries(
            {"path": st.none() | TEXT, "parts": st.none() | st.lists(st.none() | TEXT, max_size=2)}
        ),
    }
)
ROWS = st.lists(ROW, max_size=12)


@settings(max_examples=25)
@given(ROWS, st.lists(st.integers(0, 12), max_size=4), st.integers(0, 5))
def test_table_hash_sees_no_chunk_borders(rows, cuts, skipped):
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    padded = pa.Table.from_pylist(rows[:1] * skipped + rows, schema=SCHEMA).slice(skipped if rows else 0)
    borders = sorted({0, len(rows), *(min(c, len(rows)) for c in cuts)})
    pieces = [padded.slice(a, b - a) for a, b in itertools.pairwise(borders)]
    running = TableHash(SCHEMA)
    for piece in pieces:
        for batch in piece.to_batches():
            running.update(batch)
    expected = table_digest(whole)
    assert running.hexdigest() == expected
    assert table_digest(padded) == expected
    assert table_digest(pa.concat_tables([*pieces, SCHEMA.empty_table()])) == expected
    assert table_digest(whole.combine_chunks()) == expected


def _plain(value):
    """A value that compares as the hash does: one NaN, one zero."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value + 0.0
    return value


@settings(max_examples=25)
@given(ROWS, ROWS)
def test_table_hash_differs_exactly_when_content_does(left, right):
    a, b = ([{k: _plain(v) for k, v in row.items()} for row in rows] for rows in (left, right))
    tables = [pa.Table.from_pylist(rows, schema=SCHEMA) for rows in (left, right)]
    assert (table_digest(tables[0]) == table_digest(tables[1])) == (a == b)


@settings(max_examples=25)
@given(ROWS.filter(bool), st.data())
def test_table_hash_differs_on_one_changed_value(rows, data):
    i, name = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.sampled_from(SCHEMA.names))
    other = data.draw(ROW)[name]
    changed = [dict(r) for r in rows]
    changed[i][name] = other
    same = _plain(other) == _plain(rows[i][name])
    digests = {table_digest(pa.Table.from_pylist(r, schema=SCHEMA)) for r in (rows, changed)}
    assert len(digests) == (1 if same else 2)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.array([["a"], []]), pa.array([[], ["a"]])),
        (pa.array([[], None]), pa.array([None, []], pa.list_(pa.null()))),
        (pa.array(["ab", "c"]), pa.array(["a", "bc"])),
        (pa.array(["", None]), pa.array([None, ""])),
        (pa.array([[[1], []]]), pa.array([[[], [1]]])),
        (pa.array([{"a": None}]), pa.array([None], pa.struct([("a", pa.null())]))),
        (pa.array([{"a": 1, "b": None}]), pa.array([{"a": None, "b": 1}])),
        (pa.array([1], pa.int32()), pa.array([1], pa.int64())),
        (pa.array(["a"]), pa.array(["a"], pa.large_string())),
        (pa.array([0, None], pa.int64()), pa.array([None, 0], pa.int64())),
        (pa.nulls(2), pa.nulls(3)),
    ],
)
def test_values_that_look_alike_differ(left, right):
    assert table_digest(pa.table({"x": left})) != table_digest(pa.table({"x": right}))


def test_column_names_and_order_count():
    one, two = pa.array([1]), pa.array([2])
    tables = [{"a": one, "b": two}, {"b": two, "a": one}, {"a": two, "b": one}, {"c": one, "b": two}]
    assert len({table_digest(pa.table(t)) for t in tables}) == 4


def test_zeros_and_nans_are_one_value_each():
    weird = np.array([0x7FF8000000000001, 0xFFF8000000000000], dtype=np.uint64).view(np.float64)
    for kind in (pa.float32(), pa.float64()):
        a = pa.table({"x": pa.array([0.0, math.nan, math.nan], pa.float64()).cast(kind)})
        b = pa.table({"x": pa.array([-0.0, *weird], pa.float64()).cast(kind)})
        assert table_digest(a) == table_digest(b)


def test_types_without_a_stable_hash_are_refused():
    for column in (pa.array(["a"]).dictionary_encode(), pa.array([[1, 2]], pa.list_(pa.int8(), 2))):
        with pytest.raises(TypeError, match="no content hash"):
            table_digest(pa.table({"x": column}))


def test_document_id_by_hand():
    import xxhash

    parts = [b"web", b"http://a/", "é".encode()]
    framed = b"".join(len(p).to_bytes(8, "little") + p for p in parts)
    plain = document_id("web", "http://a/", "é")
    assert plain == xxhash.xxh3_128_hexdigest(framed)
    assert document_id("web", "http://a/", "é", 2) == numbered_id(plain, 2) != plain
    assert document_id("webh", "ttp://a/", "é") != plain
    assert len(document_id("s", "u", "\ud800 torn")) == 32


@given(st.integers(0, 2**64 - 1), st.lists(TEXT, max_size=8))
def test_seeded_column_is_seeded(seed, keys):
    column = seeded_column(seed, pa.array(keys, pa.large_string()))
    assert column.tolist() == [seeded(seed, k) for k in keys]
    assert all(0.0 <= x < 1.0 for x in column)


def test_seeded_is_spread_and_depends_on_both():
    values = np.array([seeded(7, f"{i:032x}") for i in range(20_000)])
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 250  # 5.9 sigma of a binomial
    assert seeded(7, "a") != seeded(8, "a")
    assert seeded(0, "a") != seeded(0, "b")


def test_digest_by_key_order_and_types():
    assert digest({"b": 1, "a": [1.5, None]}) == digest({"a": [1.5, None], "b": 1})
    assert len({digest(v) for v in (1, 1.0, "1", [1], None, True)}) == 6
    assert digest("a\ud800") != digest("a\ud801")  # a file name that is not UTF-8
    assert combined({"b": "2", "a": "1"}) == combined({"a": "1", "b": "2"}) != combined(["1", "2"])
