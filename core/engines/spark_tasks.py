"""What the `spark` engine runs in Spark's Python workers: streams of tables, of which a worker holds a few batches at a time.

A frame's partition ends with one row more, whose last column says how large it is, how many rows a cap cut, or what went wrong:
errors of ours are answers, or Spark would run again what can only fail again. A RetryableError does go through Spark as an
exception, inside its message, as Spark keeps nothing else of it.
"""

import base64
import itertools
import pickle
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import TaskContext

from core.engines.columns import capped, key_starts, sorted_table
from core.engines.contract import Align, ChunkFn, Note, Report, Unit, key_aligned, key_at
from core.engines.pool import FIRST_WAIT_S, attempted, failed_unit
from core.engines.spark_types import for_spark, out, tables
from core.engines.spill import CHUNK_ROWS, Cut, Told
from core.errors import ConfigError, RetryableError, StageError, StepwellError
from core.rows import shard_of

Batches = Iterator[pa.RecordBatch]
Tables = Iterator[pa.Table]

REPLY = pa.schema([("reply", pa.binary())])
FACTS = "facts of the partition"  # a column that is null but in a partition's last row
CHUNK_BYTES = (
    32 << 20
)  # that a reduce function sees at once, rounded up to whole keys; a worker holds about four times that
CARRIED = re.compile(r"stepwell-error:([A-Za-z0-9+/=]+);")


@dataclass
class Facts:
    """What the driver must know of a partition that was made."""

    bytes: int = 0
    lost: int = 0
    told: Told = field(default_factory=Told)  # the largest key


Work = Callable[[Facts, Batches], Tables]


def with_facts(schema: pa.Schema) -> pa.Schema:
    """`schema`, nullable throughout, with the column FACTS."""
    return pa.schema([*(f.with_nullable(True) for f in schema), (FACTS, pa.binary())])


def framed(label: str, work: Work, schema: pa.Schema, batches: Batches) -> Batches:
    """The rows that `work` makes, and a last one: pickled Facts, or the error that ended it."""
    facts: Any = Facts()
    whole = with_facts(schema)
    try:
        for made in work(facts, batches):
            table = made.select(schema.names).cast(schema)
            facts.bytes += table.nbytes
            yield from out(table.append_column(FACTS, pa.nulls(table.num_rows, pa.binary())), whole)
    except Exception as e:  # noqa: BLE001 - the driver decides what an exception means
        facts = ours(label, e)
    last = [*(pa.nulls(1, f.type) for f in schema), pa.array([pickle.dumps(facts)], pa.binary())]
    yield from out(pa.Table.from_arrays(last, schema=whole), whole)


def replied(label: str, work: Callable[[Batches], Iterator[Any]], batches: Batches) -> Batches:
    """The values that `work` gives, pickled, in REPLY; an error of ours is one of them."""
    values: list[Any] = []
    try:
        values += work(batches)
    except Exception as e:  # noqa: BLE001 - the driver decides what an exception means
        values = [ours(label, e)]
    for value in values:
        yield pa.record_batch([pa.array([pickle.dumps(value)], pa.binary())], schema=for_spark(REPLY))


def ours(label: str, error: Exception) -> StepwellError:
    """An exception in the form that the contract gives to errors; one that may pass is raised, for Spark to try again."""
    if isinstance(error, ConfigError | StageError):
        return error
    context = TaskContext.get()
    failure = failed_unit(label, f"{context.partitionId() if context else 0} of Spark", error, traceback.format_exc())
    if isinstance(error, RetryableError):
        time.sleep(FIRST_WAIT_S * 2 ** (context.attemptNumber() if context else 0))
        raise RuntimeError(f"stepwell-error:{base64.b64encode(pickle.dumps(failure)).decode()};") from None
    return failure


def carried(message: str) -> StepwellError | None:
    """The error of ours that a message of Spark's carries."""
    found = CARRIED.search(message)
    return pickle.loads(base64.b64decode(found[1])) if found else None


def scan(fn: Callable[[Unit], Iterable[pa.RecordBatch]], label: str, facts: Facts, batches: Batches) -> Tables:
    for batch in batches:
        for pickled in batch.column(0).to_pylist():
            unit: Unit = pickle.loads(pickled)
            try:
                for made in fn(unit):
                    yield pa.Table.from_batches([made])
            except (ConfigError, StageError, RetryableError):
                raise
            except Exception as e:
                raise failed_unit(label, unit.name, e, traceback.format_exc()) from e


def mapped(fn: ChunkFn, given: pa.Schema, facts: Facts, batches: Batches) -> Tables:
    for table in tables(batches, given):
        yield fn(table)


def combined(combine: ChunkFn, given: pa.Schema, keys: Sequence[str], facts: Facts, batches: Batches) -> Tables:
    for table in tables(batches, given):
        yield combine(sorted_table(table, keys))


def reduced(fn: ChunkFn, given: pa.Schema, cut: Cut, facts: Facts, batches: Batches) -> Tables:
    """`fn` over whole keys of the sorted rows of one partition. A key that `combine` or a cap makes small is made small as it
    comes in: a worker never holds all its rows."""
    keys = [*cut.by, *cut.order]
    if cut.combine is None:
        stream = tables(batches, given)
        if cut.max_rows_per_key is not None:
            stream = first_rows(stream, cut.by, cut.max_rows_per_key, facts)
        for piece in whole_keys(stream, cut.by):
            facts.told.large(piece, cut, cut.partition_bytes)
            yield fn(piece)
        return
    for piece in whole_keys(combined(cut.combine, given, keys, facts, batches), cut.by):
        table = sorted_table(cut.combine(sorted_table(piece, keys)), keys)
        if cut.max_rows_per_key is not None:
            table, lost = capped(table, cut.by, cut.max_rows_per_key)
            facts.lost += lost
        facts.told.large(table, cut, cut.partition_bytes)
        yield fn(table)


def whole_keys(stream: Tables, by: Sequence[str]) -> Tables:
    """Tables of whole keys of about CHUNK_BYTES, by the width of the first rows."""
    first = next(stream, None)
    if first is None:
        return
    width = max(1, first.nbytes // max(1, first.num_rows))
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // width))
    yield from key_aligned(itertools.chain([first], stream), by, rows)


def first_rows(stream: Tables, by: Sequence[str], most: int, facts: Facts) -> Tables:
    """The first `most` rows of each key of a sorted stream; the others are counted."""
    last: list[Any] | None = None
    seen = 0  # rows of the key `last`, which may go on in the next table
    for table in stream:
        n = table.num_rows
        first = np.append(np.flatnonzero(key_starts(table, by)), n)
        rank = np.arange(n) - np.repeat(first[:-1], np.diff(first))
        if key_at(table, 0, by) == last:
            rank[: first[1]] += seen
        last, seen = key_at(table, n - 1, by), int(rank[-1]) + 1
        keep = rank < most
        facts.lost += n - int(keep.sum())
        yield table if keep.all() else table.filter(pa.array(keep))


def aligned(given: pa.Schema, target: Align, batches: Batches) -> Iterator[tuple[int, Report]]:
    """Write the shards whose rows come in, sorted by `row`, one in memory at a time."""
    held: list[pa.Table] = []
    at = -1
    for table in tables(batches, given):
        shards = shard_of(table.column("row").to_numpy())
        borders = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), table.num_rows]
        for first, end in itertools.pairwise(borders):
            if held and int(shards[first]) != at:
                yield at, _written(target, at, pa.concat_tables(held))
                held = []
            at = int(shards[first])
            held.append(table.slice(first, end - first))
    if held:
        yield at, _written(target, at, pa.concat_tables(held))


def _written(target: Align, shard: int, rows: pa.Table) -> Report:
    report: Report = attempted(partial(target.write, shard, rows.combine_chunks()), target.label, str(shard))
    return report


def write_empty(given: pa.Schema, target: Align, unit: Unit, note: Note) -> Report:
    """Write shards without a row."""
    reports = []
    for shard in unit.payload:
        reports.append((shard, _written(target, shard, given.empty_table())))
        note(docs=reports[-1][1].docs)
    return Report(unit.name, value=reports)


def folded(
    fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], given: pa.Schema, batches: Batches
) -> Iterator[Any]:
    """One value for a partition that has rows."""
    value = None
    for table in tables(batches, given):
        here = fn(table)
        value = here if value is None else merge(value, here)
    if value is not None:
        yield value
