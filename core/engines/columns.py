"""Column kernels that the engines share: sorting, key borders, caps per key, and the hash that sends a key to its partition."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.contract import Skew
from core.errors import StageError
from core.rows import ROW_BITS, SHARD_MASK

LOOK_ROWS = 1 << 16  # of a table that is asked whether it is in order, and of one whose keys are hashed: chosen
KEY_CHARS = 80  # of a text in the report of a large key: one line
# bytes of a string key that enter its partition hash, besides the last 8 and the length: chosen, untested
HEAD_BYTES = 64


def sorted_table(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Rows in ascending order of `keys`, nulls last, contiguous in memory. Rows that are in order are not copied."""
    if in_order(table, keys):
        return table.combine_chunks()
    return table.take(pc.sort_indices(table, sort_keys=[(k, "ascending") for k in keys]))


def in_order(table: pa.Table, keys: Sequence[str]) -> bool:
    """Whether a stable sort by `keys`, nulls last, would leave every row where it is. It looks at LOOK_ROWS rows at a time, so
    that a "no" costs next to nothing where rows lie at random."""
    keys = [k for k in keys if not pa.types.is_null(table.schema.field(k).type)]
    table = table.select(keys)
    for first in range(0, table.num_rows - 1, LOOK_ROWS) if keys else ():
        piece = table.slice(first, LOOK_ROWS + 1)  # its last row is the first of the next
        undecided = np.ones(piece.num_rows - 1, dtype=bool)
        for name in keys:
            column = piece.column(name).combine_chunks()
            above, below = column.slice(0, piece.num_rows - 1), column.slice(1)
            rises = pc.or_(pc.fill_null(pc.less(above, below), False), pc.and_not(pc.is_null(below), pc.is_null(above)))
            same = pc.or_(pc.fill_null(pc.equal(above, below), False), pc.and_(pc.is_null(above), pc.is_null(below)))
            if np.any(undecided & ~np.asarray(pc.or_(rises, same))):  # it falls, or a NaN does not compare
                return False
            undecided &= np.asarray(same)
    return True


def key_starts(table: pa.Table, by: Sequence[str]) -> np.ndarray:
    """bool [n]: true where a row of a sorted table begins a new key. Nulls equal nulls."""
    n = table.num_rows
    starts = np.zeros(n, dtype=bool)
    if n == 0:
        return starts
    starts[0] = True
    for name in by:
        column = table.column(name).combine_chunks()
        here, before = column.slice(1), column.slice(0, n - 1)
        differs = np.asarray(pc.fill_null(pc.not_equal(here, before), False))
        if column.null_count:
            differs = differs | (np.asarray(pc.is_null(here)) != np.asarray(pc.is_null(before)))
        starts[1:] |= differs
    return starts


def capped(table: pa.Table, by: Sequence[str], most: int) -> tuple[pa.Table, int]:
    """The first `most` rows of each key of a sorted table, and how many rows were cut."""
    starts = key_starts(table, by)
    first = np.flatnonzero(starts)
    rank = np.arange(table.num_rows) - np.repeat(first, np.diff(np.append(first, table.num_rows)))
    keep = rank < most
    cut = int(table.num_rows - keep.sum())
    return (table.filter(pa.array(keep)) if cut else table), cut


def largest_key(table: pa.Table, by: Sequence[str]) -> Skew | None:
    """The key of a sorted table that takes most bytes, or None of an empty one. Rows of a key count at their own width."""
    first = np.flatnonzero(key_starts(table, by))
    if not len(first):
        return None
    rows = np.diff(np.append(first, table.num_rows))
    most = [int(i) for i in np.argsort(-rows, kind="stable")[:8]]  # rows are of one width, more or less
    pieces = [(table.slice(int(first[i]), int(rows[i])).nbytes, i) for i in most]
    size, i = max(pieces)
    key = tuple(_plain(table.column(name)[int(first[i])].as_py()) for name in by)
    return Skew(key, int(rows[i]), size)


def _plain(value: Any) -> Any:
    """A key's value for a message: numbers as they are, texts of at most KEY_CHARS."""
    if value is None or isinstance(value, bool | int):
        return value
    return (value.hex() if isinstance(value, bytes) else str(value))[:KEY_CHARS]


def partition_hash(table: pa.Table | pa.RecordBatch, by: Sequence[str]) -> np.ndarray:
    """uint64 [n]: equal keys get equal values. Any deterministic spread will do: it decides where a key is worked on,
    never what comes out."""
    check_keys(table.schema, by)
    h = np.full(table.num_rows, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for first in range(0, table.num_rows, LOOK_ROWS):  # mixing holds five words a row, and is faster near the cache
        here, piece = h[first : first + LOOK_ROWS], table.slice(first, LOOK_ROWS)
        for name in by:
            column = piece.column(name)
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            here[:] = _mix(here ^ _column_words(array))
    return h


def check_keys(schema: pa.Schema, by: Sequence[str]) -> None:
    """StageError if a key column holds floats: 0.0 and -0.0 are equal, NaN is not, and no two engines agree on either."""
    floats = [name for name in by if pa.types.is_floating(schema.field(name).type)]
    if floats:
        raise StageError(
            f"shuffle: key columns {floats} hold floats, expected integers or strings; keys must compare exactly"
        )


def joined_schema(left: pa.Schema, right: pa.Schema, on: Sequence[str], label: str) -> pa.Schema:
    """`left` followed by the columns of `right` besides the keys, which may be null. StageError for a name on both sides."""
    added = [f.with_nullable(True) for f in right if f.name not in on]
    if twice := sorted({f.name for f in added} & set(left.names)):
        raise StageError(f"{label}: both sides have columns {twice} besides the keys; rename them before the join")
    return pa.schema([*left, *added])


def shard_partition(rows: np.ndarray, shards: int, partitions: int) -> np.ndarray:
    """int64 [n]: the partition that writes the shard of each `row`: contiguous ranges of shards."""
    return ((rows >> ROW_BITS) & SHARD_MASK) * partitions // max(1, shards)


def join_tables(left: pa.Table, right: pa.Table, on: Sequence[str], how: str) -> pa.Table:
    """Equi-join of two tables by row numbers, so that payload columns may have any type."""
    places = ["__left", "__right"]
    keys = [
        side.select(list(on)).append_column(p, _numbers(side)) for side, p in zip((left, right), places, strict=True)
    ]
    matched = keys[0].join(keys[1], keys=list(on), join_type=how, use_threads=False).select(places)
    del keys
    matched = matched.sort_by([(place, "ascending") for place in places])
    out = left.take(matched.column("__left"))
    for name in right.column_names:
        if name not in on:
            out = out.append_column(
                right.schema.field(name).with_nullable(True), right.column(name).take(matched.column("__right"))
            )
    return out


def _numbers(table: pa.Table) -> pa.Array:
    """The places of rows, in the narrowest type that a join carries them in."""
    return pa.array(np.arange(table.num_rows, dtype=np.int32 if table.num_rows < 1 << 31 else np.int64))


def sortable(schema: pa.Schema) -> list[str]:
    """Columns that can be ordered, in schema order."""
    t = pa.types
    return [f.name for f in schema if not (t.is_nested(f.type) or t.is_null(f.type))]


def _mix(h: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Vigna, public domain)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _column_words(array: pa.Array) -> np.ndarray:
    """uint64 [n] from one key column; nulls become one fixed word."""
    kind = array.type
    if pa.types.is_string(kind):
        array = array.cast(pa.large_string())
    elif pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        array = array.cast(pa.large_binary())
    if pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
        words = _string_words(array)
    else:
        plain = array.cast(pa.int64()) if pa.types.is_temporal(kind) or pa.types.is_boolean(kind) else array
        values = pc.fill_null(plain, 0).to_numpy(zero_copy_only=False)
        words = values.astype(np.int64).view(np.uint64)
    if array.null_count:
        words[np.asarray(pc.is_null(array))] = np.uint64(0x6E756C6C)
    return words


def _string_words(array: pa.Array) -> np.ndarray:
    """Mix length, the first HEAD_BYTES in words of 8, and the last 8 bytes, for all strings at once."""
    _, offsets, data = array.buffers()
    at = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    begin, length = at[:-1] - at[0], np.diff(at)
    chars = np.frombuffer(data, dtype=np.uint8)[at[0] : at[-1]] if data else np.zeros(0, np.uint8)
    padded = np.concatenate([chars, np.zeros(8, np.uint8)])
    words = np.lib.stride_tricks.sliding_window_view(padded, 8)
    h = length.astype(np.uint64)
    longest = min(HEAD_BYTES, int(length.max(initial=0)))
    for step in range(0, longest, 8):
        live = np.flatnonzero(length > step)
        h[live] = _mix(h[live] ^ _masked(words, begin[live] + step, length[live] - step))
    tail = np.flatnonzero(length > HEAD_BYTES)
    if len(tail):
        h[tail] = _mix(h[tail] ^ _masked(words, begin[tail] + length[tail] - 8, np.full(len(tail), 8)))
    return h


def _masked(words: np.ndarray, begin: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Eight bytes from each position as one uint64, those past the string's end zeroed."""
    value = np.ascontiguousarray(words[begin]).view(np.uint64).ravel()
    spare = np.clip(8 - left, 0, 7).astype(np.uint64) * np.uint64(8)
    return (value << spare) >> spare


def blocks(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in contiguous tables of about `size` bytes; none is empty."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        for part in sliced(table, size):
            held.append(part)
            count += part.nbytes
            if count >= size:
                yield pa.concat_tables(held).combine_chunks()
                held, count = [], 0
        del table
    if held:
        yield pa.concat_tables(held).combine_chunks()


def sliced(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """Slices of about `size` bytes, by the mean width of the rows; none is empty."""
    rows = table.num_rows
    count = max(1, min(rows, table.nbytes // size))
    for first, end in pairwise(i * rows // count for i in range(count + 1)):
        if end > first:
            yield table.slice(first, end - first)
