"""Functions that the engine tests hand to workers; workers import this module and not the tests."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import NO_ROW, Note, Report, Unit
from core.errors import ConfigError, RetryableError, StageError

SUMS = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("n", pa.int64()), ("sum", pa.int64())])


def identity(table: pa.Table) -> pa.Table:
    return table


def ranked(table: pa.Table) -> pa.Table:
    """Each row with its rank within (k, s), and the key's size: right only if a table holds whole keys, sorted."""
    starts = np.append(np.flatnonzero(key_starts(table, ["k", "s"])), table.num_rows)
    size = np.diff(starts)
    rank = np.arange(table.num_rows) - np.repeat(starts[:-1], size)
    return table.append_column("rank", pa.array(rank)).append_column("size", pa.array(np.repeat(size, size)))


def summed(table: pa.Table) -> pa.Table:
    """Sums of (n, sum) by (k, s); associative, same schema in and out."""
    starts = np.flatnonzero(key_starts(table, ["k", "s"]))
    if not len(starts):
        return table.select(SUMS.names)
    first = table.take(pa.array(starts))
    n, total = (np.add.reduceat(table.column(c).to_numpy(), starts) for c in ("n", "sum"))
    return pa.table({"k": first.column("k"), "s": first.column("s"), "n": n, "sum": total}, schema=SUMS)


def doubled(table: pa.Table) -> pa.Table:
    return table.set_column(table.column_names.index("v"), "v", pc.multiply(table.column("v"), 2))


def count_and_sum(table: pa.Table) -> tuple[int, int]:
    return table.num_rows, pc.sum(table.column("v")).as_py() or 0


def add_pairs(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def rows_of(unit: Unit) -> Iterator[pa.RecordBatch]:
    yield from unit.payload.to_batches(max_chunksize=7)


def made_rows(unit: Unit) -> Iterator[pa.RecordBatch]:
    """`unit.payload` = (seed, batches, rows): random keys and 1 KB of payload a row."""
    seed, batches, rows = unit.payload
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        keys = rng.integers(0, 1 << 40, rows)
        filler = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(1000), rows, [None, pa.py_buffer(rng.bytes(rows * 1000))]
        )
        yield pa.record_batch({"k": keys, "filler": filler.cast(pa.large_binary())})


def key_counts(table: pa.Table) -> pa.Table:
    starts = np.append(np.flatnonzero(key_starts(table, ["k"])), table.num_rows)
    return pa.table({"k": table.column("k").take(pa.array(starts[:-1])), "n": np.diff(starts)})


def tell_pid(unit: Unit, note: Note) -> Report:
    return Report(unit.name, value=os.getpid())


def squared(unit: Unit, note: Note) -> Report:
    note(docs=1, bytes=unit.bytes)
    return Report(unit.name, docs=1, value=unit.payload**2)


def _leave(unit: Unit, value: object = None) -> Report:
    """Write the unit's name beside the others', so that a test sees what was finished."""
    Path(unit.payload["folder"], unit.name).write_text("done")
    return Report(unit.name, docs=1, value=value)


def faulty(unit: Unit, note: Note) -> Report:
    """Does what `unit.payload["fault"]` says, then leaves a file."""
    fault = unit.payload.get("fault")
    seen = Path(unit.payload["folder"], f"{unit.name}.tries")
    tries = len(seen.read_text()) if seen.exists() else 0
    seen.write_text("x" * (tries + 1))
    if fault == "raise":
        raise ValueError("a bad shard")
    if fault == "config":
        raise ConfigError("stage: a bad knob")
    if fault == "stage":
        raise StageError("stage: it must stop")
    if fault == "retry" and tries < unit.payload["times"]:
        raise RetryableError("the store is busy")
    if fault == "die" and tries < unit.payload["times"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit" and tries < unit.payload["times"]:
        os._exit(3)
    if fault == "hang" and tries < unit.payload["times"]:
        time.sleep(600)
    if fault == "unpicklable":
        return Report(unit.name, value=lambda: None)
    if fault == "slow":
        time.sleep(0.3)
    return _leave(unit, tries)


def killer_rows(unit: Unit, note: Note) -> Report:
    """Ten rows; those in `unit.payload["kills"]` end the worker (`hangs`: never return). The value names the rows done."""
    done = []
    for row in range(10):
        if row in unit.poison:
            continue
        if unit.cautious:
            note(row=row)
        if row in unit.payload.get("kills", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if row in unit.payload.get("hangs", ()):
            time.sleep(600)
        done.append(row)
    if unit.cautious:
        note(row=NO_ROW)
    if unit.payload.get("dies_after"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Report(unit.name, docs=len(done), value=done)
