"""Rows as Spark carries them: a *piece* is one Arrow record batch in a binary value, beside the number of its place.

Spark moves, sorts, keeps and spills pieces of some MB without looking into them. Rows of its own it would take apart value by
value at every step between Java and Python, which cost minhash five times the work itself. So any Arrow type but a dictionary
travels as it is.

Below zero a place says what a task has to say: its answer (`Said`, or an error of ours) for partition -1 - place.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows
from pyspark.sql.types import BinaryType, IntegerType, StructField, StructType

from core.engines.columns import sliced

PLACE, ROWS = "place", "rows"
PIECES = pa.schema([(PLACE, pa.int32()), (ROWS, pa.binary())])
STRUCT = StructType(
    [StructField(PLACE, IntegerType()), StructField(ROWS, BinaryType())]
)  # the same as Spark's own type
# of rows in a piece: chosen, so that Java's arrays stay small and a piece's own cost does not count
PIECE_BYTES = 4 << 20

Pieces = Iterator[tuple[int, bytes]]
_settled = 0  # modules that were imported when this process last settled


def pieces(batches: Iterable[pa.RecordBatch]) -> Pieces:
    """(place, content) of what Spark hands in. Contents are copies: Arrow wants its buffers aligned."""
    for batch in batches:
        for place, content in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
            yield place, content.as_py()


def collected(made: DataFrame) -> list[tuple[int, bytes]]:
    """(place, content) of all pieces, on the driver. By way of Arrow: `collect` takes what breaks off, because Java ends or runs
    out of memory, for the whole."""
    return list(pieces(made.toArrow().to_batches()))


def exchanged(cuts: Sequence[DataFrame], partitions: int, partition: str) -> DataFrame:
    """Pieces in their partitions, in the order of their places; what tasks have to say comes first."""
    where = f"if({PLACE} < 0, -1 - {PLACE}, {partition})"
    rows = reduce(DataFrame.union, cuts)
    return rows.repartitionById(partitions, F.expr(where)).sortWithinPartitions(PLACE)


def partition_of_shard(partitions: int, shards: int) -> str:
    """In Spark's words what `columns.shard_partition` is: the partition that writes the shard whose number is the place."""
    return f"int({PLACE} * {partitions}L / {shards})"


def settle() -> None:
    """At the end of each task: pyspark collects garbage after it, which walks through all that was ever imported, 60 ms with the
    libraries of `minhash`. What is there now stays, and is left out of it. Parallelism is the number of workers."""
    global _settled
    if _settled != len(sys.modules):
        gc.collect()
        gc.freeze()
        pa.set_cpu_count(1)
        _settled = len(sys.modules)


def said(place: int, content: bytes) -> pa.RecordBatch:
    """One piece as Spark wants it."""
    return _batch(place, pa.py_buffer(content))


def packed(table: pa.Table, place: int) -> Iterator[pa.RecordBatch]:
    """The rows of a table in pieces of about PIECE_BYTES."""
    for part in sliced(table, PIECE_BYTES):
        for batch in part.combine_chunks().to_batches():
            yield _batch(place, batch.serialize())


def opened(content: bytes, schema: pa.Schema) -> pa.Table:
    """The rows of a piece."""
    return pa.Table.from_batches([pa.ipc.read_record_batch(pa.py_buffer(content), schema)])


def _batch(place: int, content: pa.Buffer) -> pa.RecordBatch:
    offsets = pa.py_buffer(np.array([0, content.size], dtype=np.int32))
    value = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, content])
    return pa.RecordBatch.from_arrays([pa.array([place], pa.int32()), value], schema=PIECES)
