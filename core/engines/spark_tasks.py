"""What the `spark` engine runs in Spark's Python workers: one chain of steps from the pieces that come in to those that go out.

A task's last piece says how many rows cap and `combine` cut, which key was large, how much it made, or what went wrong: errors of
ours are answers, or Spark would run again what can only fail again. A RetryableError does go through Spark as an exception,
inside its message, as Spark keeps nothing else of it. What a task says before an exchange arrives behind it, first of all.

Memory: a worker holds one share of a partition (its sorted copy, and what `fn` makes of it), or while it cuts one block.
"""

import base64
import pickle
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark import TaskContext

from core.engines.columns import blocks, join_tables
from core.engines.contract import Align, ChunkFn, Report, Unit
from core.engines.pool import FIRST_WAIT_S, attempted, failed_unit
from core.engines.spark_pieces import PIECE_BYTES, Pieces, opened, packed, pieces, said, settle
from core.engines.spill import Cut, Told, chunks, gathered, prepared, shards_of, split
from core.errors import ConfigError, RetryableError, StageError, StepwellError

Batches = Iterator[pa.RecordBatch]
Tables = Iterator[pa.Table]

SHARE_BYTES = 32 << 20  # of a partition that a worker sorts at once; it holds about four times that
BLOCK_BYTES = 64 << 20  # that are cut for an exchange at once, so that its pieces do not become small
CARRIED = re.compile(r"stepwell-error:([A-Za-z0-9+/=]+);")


@dataclass
class Said:
    """What the driver must know of a task: by step what it found, and the size of what came out, or its value."""

    told: dict[int, Told] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0
    value: Any = None

    def add(self, other: "Said") -> None:
        """What another task said of its steps."""
        for step, there in other.told.items():
            here = self.told.setdefault(step, Told())
            here.cut_rows += there.cut_rows
            here.skew = max((s for s in (here.skew, there.skew) if s), key=lambda s: s.bytes, default=None)


@dataclass(frozen=True)
class Step:
    """Tables from tables; the first step of a chain makes them from pieces. `number` is the driver's name for it."""

    number: int
    label: str
    schema: pa.Schema
    work: Callable[[Told, Any], Tables]


End = Callable[[Said, Tables], Iterator[pa.RecordBatch]]


class EndedError(Exception):
    """Carries an error of ours past the steps that follow."""

    def __init__(self, error: StepwellError) -> None:
        super().__init__(str(error))
        self.error = error


class CarriedError(RuntimeError):
    """Carries a RetryableError through Spark, which tries the task again."""


def chain(steps: Sequence[Step], end: End, label: str, copies: int, batches: Batches) -> Batches:
    """What `end` makes of the rows of the last step, and the answer. An error is said to `copies` partitions."""
    told: Any = Said()
    try:
        stream: Any = _arrived(told, pieces(batches))
        for step in steps:
            stream = _stepped(step, told.told.setdefault(step.number, Told()), stream)
        yield from end(told, stream)
    except EndedError as e:
        told = e.error
    except CarriedError:
        raise
    except Exception as e:  # noqa: BLE001 - the driver decides what an exception means
        told = ours(label, e)
    for partition in range(copies if isinstance(told, StepwellError) else 1):
        yield said(-1 - partition, pickle.dumps(told))
    settle()


def _arrived(told: Said, stream: Pieces) -> Pieces:
    """The pieces that hold rows. What tasks before the exchange have to say comes first; an error ends this task too."""
    for place, content in stream:
        if place >= 0:
            yield place, content
            continue
        before = pickle.loads(content)
        if isinstance(before, StepwellError):
            raise EndedError(before)
        told.add(before)


def _stepped(step: Step, told: Told, stream: Any) -> Tables:
    try:
        for made in step.work(told, stream):
            yield made.select(step.schema.names).cast(step.schema)
    except (EndedError, CarriedError):
        raise
    except Exception as e:
        raise EndedError(ours(step.label, e)) from e


def ours(label: str, error: Exception) -> StepwellError:
    """An exception in the form that the contract gives to errors; one that may pass is raised, for Spark to try again."""
    if isinstance(error, ConfigError | StageError):
        return error
    context = TaskContext.get()
    failure = failed_unit(label, f"{context.partitionId() if context else 0} of Spark", error, traceback.format_exc())
    if isinstance(error, RetryableError):
        time.sleep(FIRST_WAIT_S * 2 ** (context.attemptNumber() if context else 0))
        raise CarriedError(f"stepwell-error:{base64.b64encode(pickle.dumps(failure)).decode()};") from None
    return failure


def carried(message: str) -> StepwellError | None:
    """The error of ours that a message of Spark's carries."""
    found = CARRIED.search(message)
    return pickle.loads(base64.b64decode(found[1])) if found else None


# First steps: tables from pieces


def read(given: pa.Schema, told: Told, stream: Pieces) -> Tables:
    for _, content in stream:
        yield opened(content, given)


def scan(
    fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[bytes], label: str, told: Told, stream: Pieces
) -> Tables:
    """The rows of the units that the places name."""
    for place, _ in stream:
        unit: Unit = pickle.loads(units[place])
        try:
            for made in fn(unit):
                yield pa.Table.from_batches([made])
        except (ConfigError, StageError, RetryableError):
            raise
        except Exception as e:
            raise failed_unit(label, unit.name, e, traceback.format_exc()) from e


def reduced(fn: ChunkFn, given: pa.Schema, cut: Cut, share_bytes: int, told: Told, stream: Pieces) -> Tables:
    """`fn` over whole keys of one partition, share by share. A key that `combine` or a cap makes small is made small as it comes
    in: a worker never holds all its rows."""
    for share in _shares(stream, given, share_bytes):
        table, lost = prepared(gathered(share, given, cut, 2 * share_bytes, told), cut)
        told.cut_rows += lost
        told.large(table, cut, cut.partition_bytes)
        for piece in chunks(table, cut.by) if table.num_rows else ():
            yield fn(piece)
            del piece
        del table  # before the next share is read


def joined(
    left: pa.Schema, right: pa.Schema, cut: Cut, how: str, share_bytes: int, told: Told, stream: Pieces
) -> Tables:
    """Places are twice the share, and one more on the left. Of each share the right side comes first and is held; the left side
    passes by in blocks, so its keys may be of any size."""
    held, at = right.empty_table(), -1
    for place, tables in _by_place(stream, {0: right, 1: left}):
        if place % 2 == 0:
            held, at = pa.concat_tables(tables).combine_chunks(), place
            told.large(held, cut, cut.partition_bytes, is_sorted=False)
            continue
        if at != place - 1:
            held = right.empty_table()
        for block in blocks(tables, share_bytes):
            yield join_tables(block, held, cut.by, how)


def _by_place(stream: Pieces, schemas: dict[int, pa.Schema]) -> Iterator[tuple[int, Tables]]:
    """Runs of equal places, each of which must be read before the next is asked for."""
    head = next(stream, None)

    def run(place: int) -> Tables:
        nonlocal head
        while head is not None and head[0] == place:
            yield opened(head[1], schemas[place % len(schemas)])
            head = next(stream, None)

    while head is not None:
        yield head[0], run(head[0])


def _shares(stream: Pieces, given: pa.Schema, share_bytes: int) -> Iterator[Tables]:
    """The tables of one or more places that follow each other, `share_bytes` or more; read as `_by_place` is."""
    places = _by_place(stream, {0: given})
    ahead = next(places, None)

    def some() -> Tables:
        nonlocal ahead
        size = 0
        while ahead is not None and size < share_bytes:
            for table in ahead[1]:
                size += table.nbytes
                yield table
            ahead = next(places, None)

    while ahead is not None:
        yield some()


# Steps that treat every row by itself


def mapped(fn: ChunkFn, told: Told, tables: Tables) -> Tables:
    for table in tables:
        yield fn(table)


def looked_up(
    held: pa.Table, on: Sequence[str], how: str, held_is_left: bool, share_bytes: int, told: Told, tables: Tables
) -> Tables:
    """A join with a side that every worker carries."""
    for block in blocks(tables, share_bytes):
        yield join_tables(held, block, on, how) if held_is_left else join_tables(block, held, on, how)


# Ends: pieces, or a value, from tables


def kept(told: Said, tables: Tables) -> Batches:
    """A frame as it is."""
    for block in blocks(tables, PIECE_BYTES):
        told.rows += block.num_rows
        told.bytes += block.nbytes
        yield from packed(block, 0)


def cut_up(cut: Cut, step: int, side: int, sides: int, told: Said, tables: Tables) -> Batches:
    """A frame for an exchange: each piece belongs to one of the places that `cut` knows. It is made smaller here already by what
    `combine` or a cap leaves."""
    smaller = cut.before_exchange()
    shrinks = smaller.combine is not None or smaller.max_rows_per_key is not None
    for block in blocks(tables, BLOCK_BYTES):
        if shrinks:
            block, lost = prepared(block, smaller)
            told.told.setdefault(step, Told()).cut_rows += lost
        for place, rows in split(block, cut) if cut.partitions > 1 or cut.target else [(0, block)]:
            yield from packed(rows, place * sides + side)
        del block


def folded(fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], told: Said, tables: Tables) -> Batches:
    """One value for a partition that has rows."""
    for table in tables:
        if table.num_rows:
            here = fn(table)
            told.value = here if told.value is None else merge(told.value, here)
    yield from ()


def aligned(
    given: pa.Schema, target: Align, partitions: int, partition: int | None, told: Said, batches: Any
) -> Batches:
    """Write the shards of this partition, one in memory at a time, also those without a row."""
    context = TaskContext.get()
    here = context.partitionId() if partition is None and context else partition or 0
    mine = shards_of(here, partitions, target)
    told.value = {}
    for shard, tables in _by_place(batches, {0: given}):
        told.value[shard] = _written(target, shard, prepared(pa.concat_tables(tables), _in_order(target))[0])
    for shard in mine:
        if shard not in told.value:
            told.value[shard] = _written(target, shard, given.empty_table())
    yield from ()


def _in_order(target: Align) -> Cut:
    return Cut((), (), 1, target)


def _written(target: Align, shard: int, rows: pa.Table) -> Report:
    report: Report = attempted(partial(target.write, shard, rows.combine_chunks()), target.label, str(shard))
    return report
