"""The `ray` engine: units are Ray tasks, a frame is a list of tables in Ray's object store, a shuffle is a task exchange.

The object store spills to disk by itself. Every part comes with its size, so that partition counts follow the data and never the
cluster. Joins a cluster by `address` or RAY_ADDRESS, else starts one on this machine. An exchange that breaks restarts whole;
what `run_units` and `align` commit stays committed.

Cost: an exchange of n parts into p partitions makes n x p objects, small ones in the driver's memory. A task holds one part or
one partition whole, so a worker wants about 6 x `partition_bytes`.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines.columns import join_tables, joined_schema, sortable, sorted_table
from core.engines.contract import (
    BATCH_BYTES,
    PARTITION_BYTES,
    Align,
    ChunkFn,
    Frame,
    Report,
    Skew,
    Unit,
    UnitFn,
    write_shards,
)
from core.engines.environment import environment
from core.engines.measure import measured
from core.engines.pool import attempted, quiet_note
from core.engines.spill import Cut, align_partitions, chunks, partitions_for, prepared, shards_of, split
from core.errors import ConfigError, StageError, StepwellError
from core.progress import Display, quiet
from core.stage import Resources

try:
    import ray
except ImportError as e:
    raise ConfigError(
        f"ray: cannot be imported here ({e}); install this project with the extra `ray`, or use --engine local"
    ) from e

IN_FLIGHT = 4  # tasks asked for per worker: enough to hide scheduling, few enough to bound what waits for one; untested
RETRIES = 3  # of a task whose worker or node died; an exception from our own code is not retried
STORE_SHARE = 0.3  # of memory_gb for the object store, Ray's own default share
KNOCK_S = 10.0  # for a cluster's head to take a connection: chosen, untested
STORE_BYTES = 80 << 20  # Ray refuses a store below 75 MB


@dataclass(frozen=True)
class RayFrame:
    """References to tables, and the size of each. The tables live as long as the references."""

    schema: pa.Schema
    parts: tuple[Any, ...]
    bytes: int
    cut_rows: int = 0


class RayEngine:
    """`workers` tasks at once on a Ray of its own, or whatever the cluster at `address` offers."""

    name = "ray"

    def __init__(
        self,
        scratch: str | Path,
        workers: int = 1,
        memory_gb: float = 4.0,
        display: Display | None = None,
        address: str | None = None,
        partition_bytes: int = PARTITION_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self.display = display or quiet()
        self.partition_bytes, self.batch_bytes = partition_bytes, batch_bytes
        self._dropped: dict[str, int] = {}
        self.peak_memory_bytes = 0
        self._ours = not ray.is_initialized()
        if self._ours:
            _start(address or os.environ.get("RAY_ADDRESS"), Path(scratch), max(1, workers), memory_gb)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", workers)))
        self._task: Any = ray.remote(max_retries=RETRIES)(_call)

    def begin(self, scratch: str | Path) -> None:
        self._dropped, self.peak_memory_bytes = {}, 0

    def clear(self) -> None:
        """Frames go when the stage drops its references."""

    def run_units(
        self,
        fn: UnitFn,
        units: Sequence[Unit],
        label: str,
        stall_s: float = 600.0,
        resources: Resources | None = None,
    ) -> list[Report]:
        names = [u.name for u in units]
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            done = self._run(
                partial(_unit, fn), [(u,) for u in units], label, names, lambda r: advance(r.docs, r.bytes, 1)
            )
        reports: list[Report] = [report for _, report in done]
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> RayFrame:
        return self._frame(partial(_scan, fn, schema), [(u,) for u in units], schema, label, [u.name for u in units])

    def table(self, table: pa.Table) -> RayFrame:
        return RayFrame(table.schema, (ray.put(table),), table.nbytes)

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> RayFrame:
        return self._frame(partial(_map, fn, schema), [(part,) for part in _of(frame).parts], schema, label)

    def shuffle(
        self,
        frames: Frame | Sequence[Frame],
        by: Sequence[str],
        fn: ChunkFn,
        schema: pa.Schema,
        order: Sequence[str] = (),
        combine: ChunkFn | None = None,
        max_rows_per_key: int | None = None,
        label: str = "shuffle",
    ) -> RayFrame:
        sources = [_of(f) for f in ([frames] if isinstance(frames, RayFrame) else list(frames))]  # type: ignore[arg-type]
        partitions = partitions_for(sum(f.bytes for f in sources), self.partition_bytes)
        cut = Cut(tuple(by), tuple(order), partitions, None, combine, max_rows_per_key)
        slices, lost = self._exchange(sources, cut, label)
        out = self._frame(
            partial(_reduce, fn, sources[0].schema, schema, cut), _taken(slices), schema, label, units=partitions
        )
        if lost + out.cut_rows:
            self._dropped[label] = self._dropped.get(label, 0) + lost + out.cut_rows
        return out

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> RayFrame:
        a, b = _of(left), _of(right)
        schema = joined_schema(a.schema, b.schema, on, label)
        cut = Cut(tuple(on), (), partitions_for(max(a.bytes, b.bytes), self.partition_bytes))
        (from_a, _), (from_b, _) = self._exchange([a], cut, label), self._exchange([b], cut, label)
        work = partial(_join, a.schema, b.schema, schema, tuple(on), how, len(a.parts))
        both = [[*x, *y] for x, y in zip(from_a, from_b, strict=True)]
        from_a.clear()
        from_b.clear()
        return self._frame(work, _taken(both), schema, label, units=cut.partitions)

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        cut = Cut((), (), align_partitions(source.bytes, self.partition_bytes, target), target)
        slices, _ = self._exchange([source], cut, target.label)
        calls = ((p, *s) for p, s in enumerate(_taken(slices)))
        names = [str(p) for p in range(cut.partitions)]
        done = self._run(partial(_align, source.schema, cut, target), calls, target.label, names)
        return [report for _, reports in done for report in reports]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        calls = [(part,) for part in _of(frame).parts]
        names = [str(i) for i in range(len(calls))]
        values = [v for _, v in self._run(partial(_fold, fn), calls, label, names) if v is not None]
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0] if values else None

    def persist(self, frame: Frame) -> Frame:
        return frame  # tables stay in the object store as long as the frame lives

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        tables = [_get(part, "collect", str(i)) for i, part in enumerate(source.parts)]
        table = pa.concat_tables([source.schema.empty_table(), *tables])
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def skewed(self) -> dict[str, Skew]:
        """Nothing: this engine does not look at single keys."""
        return {}

    def close(self) -> None:
        if self._ours:
            ray.shutdown()

    def _exchange(self, frames: Sequence[RayFrame], cut: Cut, label: str) -> tuple[list[list[Any]], int]:
        """References to the slices of each partition, and the rows that were cut."""
        calls = [(part,) for frame in frames for part in frame.parts]
        names = [str(i) for i in range(len(calls))]
        done = self._run(partial(_cut, cut), calls, label, names, keep=cut.partitions)
        return [[refs[p] for refs, _ in done] for p in range(cut.partitions)], sum(lost for _, lost in done)

    def _frame(
        self,
        work: Any,
        calls: Iterable[tuple[Any, ...]],
        schema: pa.Schema,
        label: str,
        names: Sequence[str] | None = None,
        units: int = 0,
    ) -> RayFrame:
        """A frame of the tables that `work` makes, one a call."""
        if names is None:
            calls = calls if units else list(calls)
            names = [str(i) for i in range(units or len(calls))]  # type: ignore[arg-type]
        with self.display.task(label, len(names), 0) as advance:
            done = self._run(work, calls, label, names, lambda fact: advance(0, 0, 1), keep=1)
        parts = tuple(refs[0] for refs, _ in done)
        return RayFrame(schema, parts, sum(size for _, (size, _) in done), sum(lost for _, (_, lost) in done))

    def _run(
        self,
        work: Any,
        calls: Iterable[tuple[Any, ...]],
        label: str,
        names: Sequence[str],
        progress: Callable[[Any], None] = lambda fact: None,
        keep: int = 0,
    ) -> list[tuple[list[Any], Any]]:
        """`work(*call)` for each call, in order: references to its first `keep` results, and the last one, which is small.

        At most IN_FLIGHT tasks per worker are asked for; a call that is taken from `calls` late holds its memory no longer than
        its task runs. After a failure the tasks that were asked for come to their end before it is raised."""
        shared = ray.put(work)  # once, and not with every task
        task = self._task.options(num_returns=keep + 1)
        kept: list[list[Any]] = []
        facts: list[Any] = []
        waiting: dict[Any, int] = {}
        named = zip(calls, names, strict=True)
        try:
            while True:
                while len(waiting) < IN_FLIGHT * self.workers and (todo := next(named, None)) is not None:
                    made = task.remote(shared, label, todo[1], *todo[0])
                    *refs, fact = made if keep else [made]
                    waiting[fact] = len(kept)
                    kept.append(refs)
                    facts.append(None)
                if not waiting:
                    return list(zip(kept, facts, strict=True))
                for ref in ray.wait(list(waiting))[0]:
                    i = waiting.pop(ref)
                    facts[i] = _get(ref, label, names[i])
                    progress(facts[i])
        except StepwellError:
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting))
            raise


def _start(address: str | None, scratch: Path, workers: int, memory_gb: float) -> None:
    quiet_logs: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    paths = os.pathsep.join(p for p in sys.path if p)  # workers import what this process can
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the new behaviour, without its warning
    try:
        if address:
            _knock(address)
            ray.init(address=address, **quiet_logs)
            return
        scratch.mkdir(parents=True, exist_ok=True)
        with environment(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=paths):  # no network access that nobody asked for
            ray.init(
                num_cpus=workers,
                object_store_memory=max(STORE_BYTES, int(memory_gb * 1e9 * STORE_SHARE)),
                object_spilling_directory=str(scratch.resolve()),
                include_dashboard=False,
                **quiet_logs,
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as e:
        raise ConfigError(
            f"ray: cannot reach a cluster at {address or 'this machine'}: {e}; check `engine.address` and RAY_ADDRESS"
        ) from e


def _knock(address: str) -> None:
    """OSError if nobody listens at HOST:PORT: Ray would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_S).close()


def _get(ref: Any, label: str, name: str) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, StepwellError):
            raise e.cause from None
        raise StageError(f"{label}: unit {name} failed: {type(e.cause).__name__}: {e.cause}") from e
    except ray.exceptions.RayError as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise StageError(
            f"{label}: unit {name} was lost {RETRIES + 1} times: {reason}; give the engine more memory_gb or fewer workers"
        ) from e


def _of(frame: Frame) -> RayFrame:
    assert isinstance(frame, RayFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _taken(slices: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """The slices of each partition, which are let go as they are handed out."""
    slices.reverse()
    while slices:
        yield tuple(slices.pop())


def _call(work: Any, label: str, name: str, *arguments: Any) -> Any:
    """What every task runs."""
    return attempted(partial(work, *arguments), label, name)


def _unit(fn: UnitFn, unit: Unit) -> Report:
    return measured(fn, unit, quiet_note)


def _made(table: pa.Table, lost: int = 0) -> tuple[pa.Table, tuple[int, int]]:
    return table, (table.nbytes, lost)


def _scan(
    fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, unit: Unit
) -> tuple[pa.Table, tuple[int, int]]:
    return _made(pa.Table.from_batches([b.select(schema.names).cast(schema) for b in fn(unit)], schema))


def _map(fn: ChunkFn, schema: pa.Schema, table: pa.Table) -> tuple[pa.Table, tuple[int, int]]:
    return _made(fn(table).select(schema.names).cast(schema))


def _cut(cut: Cut, table: pa.Table) -> Any:
    """One slice a partition, then the rows that were cut."""
    made, lost = prepared(table, cut.before_exchange())
    slices = dict(split(made, cut))
    nothing = made.schema.empty_table()
    return *(slices.get(p, nothing) for p in range(cut.partitions)), lost


def _reduce(
    fn: ChunkFn, schema_in: pa.Schema, schema: pa.Schema, cut: Cut, *slices: pa.Table
) -> tuple[pa.Table, tuple[int, int]]:
    table, lost = prepared(pa.concat_tables([schema_in.empty_table(), *slices]), cut)
    out = [fn(piece).select(schema.names).cast(schema) for piece in chunks(table, cut.by)] if table.num_rows else []
    return _made(pa.concat_tables([schema.empty_table(), *out]).combine_chunks(), lost)


def _join(
    left: pa.Schema, right: pa.Schema, schema: pa.Schema, on: tuple[str, ...], how: str, count: int, *slices: pa.Table
) -> tuple[pa.Table, tuple[int, int]]:
    a = pa.concat_tables([left.empty_table(), *slices[:count]]).combine_chunks()
    b = pa.concat_tables([right.empty_table(), *slices[count:]]).combine_chunks()
    return _made(join_tables(a, b, on, how).cast(schema) if a.num_rows else schema.empty_table())


def _align(schema: pa.Schema, cut: Cut, target: Align, p: int, *slices: pa.Table) -> list[Report]:
    table, _ = prepared(pa.concat_tables([schema.empty_table(), *slices]), cut)
    return write_shards(target, table, shards_of(p, cut.partitions, target), quiet_note)


def _fold(fn: Callable[[pa.Table], Any], table: pa.Table) -> Any:
    return fn(table) if table.num_rows else None
