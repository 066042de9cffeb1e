"""Functions that the conformance tests hand to engines; workers import this module and not the tests."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from core.engines.contract import Note, Report, Unit
from core.errors import ConfigError, InputError, StageError
from core.hashing import table_digest

ERRORS = {"config": ConfigError("test: a bad knob", "test: another"), "stage": StageError("test: it must stop")}
ERRORS |= {"input": InputError("a torn record"), "value": ValueError("a bad shard")}


@dataclass(frozen=True)
class Rows:
    """Yields the table that a unit carries, a few rows at a time."""

    batch_rows: int

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        yield from unit.payload.to_batches(max_chunksize=self.batch_rows)


@dataclass(frozen=True)
class Raises:
    """Fails as asked, whatever verb calls it."""

    error: str

    def __call__(self, given: object, note: object = None) -> pa.Table:
        raise ERRORS[self.error]


def longer(table: pa.Table) -> pa.Table:
    """Strings grown, and rows with an odd `v` left out: a map may change how many rows there are."""
    table = table.filter(pc.equal(pc.bit_wise_and(table.column("v"), 1), 0))
    return table.set_column(
        1,
        "s",
        pc.binary_join_element_wise(table.column("s"), *(pa.scalar(x, pa.large_string()) for x in ("\x00é", ""))),
    )


def squared(unit: Unit, note: Note) -> Report:
    note(docs=1, bytes=unit.bytes)
    return Report(unit.name, docs=1, bytes=unit.bytes, value=unit.payload**2)


def written(ordinal: int, rows: pa.Table) -> Report:
    """What a layer writer would see of one shard."""
    return Report(f"s{ordinal}", docs=rows.num_rows, value=(rows.column("row").to_pylist(), table_digest(rows)))
