"""Functions that the law tests hand to engines, for any schema; workers import this module and not the tests."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import Report, Unit
from core.hashing import table_digest

RANKS = [pa.field("rank", pa.int64()), pa.field("size", pa.int64())]


@dataclass(frozen=True)
class Pieces:
    """Yields the table that a unit carries, `rows` rows at a time."""

    rows: int

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        yield from unit.payload.to_batches(max_chunksize=self.rows)


@dataclass(frozen=True)
class Ranked:
    """Each row with its rank within its key and the key's size: right only if a table holds whole keys, sorted."""

    by: tuple[str, ...]

    def __call__(self, table: pa.Table) -> pa.Table:
        starts = np.append(np.flatnonzero(key_starts(table, self.by)), table.num_rows)
        size = np.diff(starts)
        rank = np.arange(table.num_rows) - np.repeat(starts[:-1], size)
        return table.append_column(RANKS[0], pa.array(rank)).append_column(RANKS[1], pa.array(np.repeat(size, size)))


@dataclass(frozen=True)
class Summed:
    """One row a key with the sum of `n`: associative, same columns in and out."""

    by: tuple[str, ...]

    def __call__(self, table: pa.Table) -> pa.Table:
        starts = np.flatnonzero(key_starts(table, self.by))
        if not len(starts):
            return table
        total = np.add.reduceat(table.column("n").to_numpy(), starts)
        i = table.schema.get_field_index("n")
        return table.take(pa.array(starts)).set_column(i, table.schema.field(i), pa.array(total))


def halved(table: pa.Table) -> pa.Table:
    """Rows with an even `n`, their strings grown."""
    table = table.filter(pc.equal(pc.bit_wise_and(table.column("n"), 1), 0))
    for i, column in enumerate(table.schema):
        if pa.types.is_large_string(column.type):
            longer = pc.binary_join_element_wise(table.column(i), *(pa.scalar(x, column.type) for x in ("\0é", "")))
            table = table.set_column(i, column, longer)
    return table


def totals(table: pa.Table) -> tuple[int, int]:
    return table.num_rows, pc.sum(table.column("n")).as_py() or 0


def added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def written(ordinal: int, rows: pa.Table) -> Report:
    """What a layer writer would see of one shard."""
    return Report(f"s{ordinal}", docs=rows.num_rows, value=(rows.column("row").to_pylist(), table_digest(rows)))
