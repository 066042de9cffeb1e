"""Functions that the engine tests hand to workers; workers import this module and not the tests."""

import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import NO_ROW, Note, Report, Unit
from core.errors import ConfigError, RetryableError, StageError
from core.hashing import digest
from core.records import Dropped, Failed, Found, Origin, Raw
from core.stage import Reject

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


def narrow_rows(unit: Unit) -> Iterator[pa.RecordBatch]:
    """The same rows with 8 bytes beside the key: sort indices are as wide as half a row."""
    seed, batches, rows = unit.payload
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        yield pa.record_batch({"k": rng.integers(0, 1 << 40, rows), "filler": np.arange(rows)})


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


# Annotate stages

LENGTHS = pa.schema([("chars", pa.int64()), ("label", pa.large_string())])
FLAGS = pa.schema([("long", pa.bool_())])


def lengths(state: object, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Does what a text says: `raise`, `reject`, `die`, `hang`; else its length. Whole batches, like a real kernel."""
    texts = batch.column("text").to_pylist()
    if "die" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in texts:
        time.sleep(600)
    if "raise" in texts:
        raise ValueError("bad \ud800 text" if "surrogate" in texts else "bad text")
    if "stop" in texts:
        raise StageError("length: no licence")
    rejects = [Reject(i, "odd", f"row says {t}") for i, t in enumerate(texts) if t == "reject"]
    columns = [
        pa.array([len(t) for t in texts], pa.int64()),
        pa.array([f"{state}:{t[:3]}" for t in texts], pa.large_string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LENGTHS), rejects


def flags(state: object, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Reads the layer of `lengths`: true above 5 characters, null where that layer is null."""
    if state == "dies" and "die later" in batch.column("text").to_pylist():
        os.kill(os.getpid(), signal.SIGKILL)
    return pa.RecordBatch.from_arrays([pc.greater(batch.column("length.chars"), 5)], schema=FLAGS), []


def too_few(state: object, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    return lengths(state, batch.slice(1))


def open_named(config: Any, artifacts: Any) -> str:
    return str(artifacts["name"])


def open_nothing(config: Any, artifacts: Any) -> str:
    raise FileNotFoundError("model.bin")


# Sources for ingest: each unit is a list of (path, text, url); a text may say what goes wrong with it


def source_records(unit: Unit) -> Iterator[Raw | Dropped | Failed]:
    for i, (path, text, url) in enumerate(unit.payload):
        origin = Origin(path, i * 10, 10)
        if text == "skip":
            yield Dropped(origin, "unsupported_type", "image/\ud800", url)
        elif text == "torn":
            yield Failed(origin, "torn_record", "it ends \udc80 early")
        else:
            yield Raw(origin, text, url)


def source_parse(raw: Raw) -> Found | Dropped:
    if raw.payload == "raise":
        raise ValueError("no text in \ud800 it")
    if raw.payload == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if raw.payload == "empty":
        return Dropped(raw.origin, "empty")
    if raw.payload == "unordered":
        return Found(raw.origin, "x", raw.url, "web", metadata={"tags": {"a", "b"}})
    when = datetime(2024, 5, 1, tzinfo=UTC)
    return Found(raw.origin, raw.payload, raw.url, "web", fetched_at=when, metadata={"b": 1, "a": date(2024, 5, 1)})


def source_digest(unit: Unit) -> str:
    return digest(unit.payload)


def mended_parse(raw: Raw) -> Found:
    return Found(raw.origin, raw.payload, raw.url, "web")
