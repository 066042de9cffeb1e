"""Tables of ours as Spark can hold them, and back: every batch is cast at both edges.

Spark has no unsigned, half or fixed-size types, so those travel as wider ones (uint64 as decimal). Lists of numbers travel as
bytes: Spark would take them apart item by item, at every step between Java and Python. Order and equality of values are kept for
all types that may be keys. Columns are known by their place, as pyspark reads a dot in a name as a field, and ignores case here
and there.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from core.engines.spark_session import BATCH_BYTES, BATCH_ROWS

WIDER = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.float16(): pa.float32()}


def names(schema: pa.Schema) -> list[str]:
    """What the columns are called within Spark."""
    return [f"c{i}" for i in range(len(schema))]


def for_spark(schema: pa.Schema) -> pa.Schema:
    """The Arrow schema that Spark itself uses for these columns."""
    plain = pa.schema([pa.field(n, _known_type(f.type)) for n, f in zip(names(schema), schema, strict=True)])
    return to_arrow_schema(from_arrow_schema(plain), timezone="UTC")


def spark_struct(schema: pa.Schema) -> Any:
    """The same as Spark's own type."""
    return from_arrow_schema(for_spark(schema))


def _known_type(kind: pa.DataType) -> pa.DataType:
    t = pa.types
    if t.is_uint64(kind):
        return pa.decimal128(20, 0)
    if t.is_fixed_size_binary(kind) or _packs(kind):
        return pa.binary()
    if _is_list(kind):
        return pa.list_(_nested_type(kind.value_type))
    if t.is_struct(kind):
        return pa.struct([pa.field(f.name, _nested_type(f.type)) for f in kind])
    return WIDER.get(kind, kind)


def _nested_type(kind: pa.DataType) -> pa.DataType:
    """Within another type lists stay lists."""
    return pa.list_(_nested_type(kind.value_type)) if _is_list(kind) else _known_type(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _packs(kind: pa.DataType) -> bool:
    """Lists of numbers of two bytes and more: see `_packed`."""
    if not _is_list(kind):
        return False
    item = kind.value_type
    return (pa.types.is_integer(item) or pa.types.is_floating(item)) and item.bit_width >= 16


def tables(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """What Spark hands in, as the declared schema."""
    for batch in batches:
        if batch.num_rows:
            yield known(pa.Table.from_batches([batch]), schema)


def known(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of Spark's as the declared schema."""
    columns = []
    for place, field in zip(names(schema), schema, strict=True):
        column = table.column(place)
        if _packs(field.type):
            column = pa.chunked_array([_unpacked(c, field.type.value_type) for c in column.chunks], _plain(field.type))
        columns.append(column)
    return pa.Table.from_arrays(columns, names=schema.names).cast(schema)


def unknown(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of the declared schema as Spark wants it."""
    table = table.select(schema.names).cast(schema)
    columns = []
    for field in schema:
        column = table.column(field.name)
        if _packs(field.type):
            column = pa.chunked_array([_packed(c.cast(_plain(field.type))) for c in column.chunks], pa.large_binary())
        columns.append(column)
    return pa.Table.from_arrays(columns, names=names(schema)).cast(for_spark(schema))


def out(table: pa.Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The declared schema, as Spark wants it, in batches of bounded size: Spark's strings have 2 GB in each."""
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * table.num_rows // max(1, table.nbytes)))
    for first in range(0, table.num_rows, rows):
        yield from unknown(table.slice(first, rows), schema).combine_chunks().to_batches()


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.large_list(kind.value_type)


def _packed(lists: pa.LargeListArray) -> pa.Array:
    """Lists of numbers as their bytes, one after the other, without a copy. A list that holds nulls is followed by as many bytes
    that say where, and one more: an odd length tells it."""
    width = lists.type.value_type.bit_width // 8
    values = lists.flatten()
    if values.null_count:
        return pa.array([_marked(one, width) for one in lists], pa.large_binary())
    ends = np.cumsum(np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)) * width
    offsets = pa.py_buffer(np.append(np.int64(0), ends))
    data = values.buffers()[1]
    data = data.slice(values.offset * width, len(values) * width) if data is not None else pa.py_buffer(b"")
    valid = pc.is_valid(lists).buffers()[1] if lists.null_count else None
    return pa.Array.from_buffers(pa.large_binary(), len(lists), [valid, offsets, data])


def _unpacked(blobs: pa.Array, item: pa.DataType) -> pa.LargeListArray:
    """The lists that `_packed` made."""
    width = item.bit_width // 8
    blobs = blobs.cast(pa.large_binary())
    _, offsets, data = blobs.buffers()
    at = np.frombuffer(offsets, dtype=np.int64)[blobs.offset : blobs.offset + len(blobs) + 1]
    if np.any(np.diff(at) % 2):
        return pa.array([_unmarked(blob.as_py(), item) for blob in blobs], pa.large_list(item))
    first, size = int(at[0]), int(at[-1] - at[0])
    bytes_of = data.slice(first, size) if data is not None else pa.py_buffer(b"")
    values = pa.Array.from_buffers(item, size // width, [None, bytes_of])
    starts = pa.py_buffer(np.ascontiguousarray((at - first) // width))
    valid = pc.is_valid(blobs).buffers()[1] if blobs.null_count else None
    return pa.Array.from_buffers(pa.large_list(item), len(blobs), [valid, starts], children=[values])


def _marked(one: Any, width: int) -> bytes | None:
    if not one.is_valid:
        return None
    values = one.values
    plain = np.asarray(values.fill_null(0)).tobytes()
    if not values.null_count:
        return plain
    return plain + np.repeat(np.asarray(values.is_null()), width).tobytes() + b"\1"


def _unmarked(blob: bytes | None, item: pa.DataType) -> pa.Array | None:
    if blob is None:
        return None
    width, odd = item.bit_width // 8, len(blob) % 2
    half = (len(blob) - odd) // 2 if odd else len(blob)
    values = np.frombuffer(blob[:half], dtype=item.to_pandas_dtype())
    absent = np.frombuffer(blob[half : 2 * half : width], dtype=bool) if odd else np.zeros(len(values), bool)
    return pa.array(values, item, mask=absent)
