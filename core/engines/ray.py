"""The `ray` engine: units are Ray tasks, a frame is a list of tables in Ray's object store, a shuffle is a task exchange.

The object store spills to disk by itself. Every part comes with its size, so that partition counts follow the data and never the
cluster. Joins a cluster by `address` or RAY_ADDRESS, else starts one on this machine. An exchange that breaks restarts whole;
what `run_units` and `align` commit stays committed.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from core.engines.columns import join_tables, sortable, sorted_table
from core.engines.contract import Align, ChunkFn, Frame, Report, Unit, UnitFn, write_shards
from core.engines.measure import measured
from core.engines.spill import Cut, chunks, partitions_for, prepared, split
from core.errors import ConfigError, StageError, StepwellError
from core.progress import Display, quiet

IN_FLIGHT = (
    4  # tasks asked for per worker: enough to hide scheduling, few enough to bound what waits in the object store
)
RETRIES = 3  # of a task whose worker or node died; an exception from our own code is not retried
STORE_SHARE = 0.3  # of memory_gb for the object store, Ray's own default share


@dataclass(frozen=True)
class RayFrame:
    """References to tables, and the size of each."""

    schema: pa.Schema
    parts: tuple[Any, ...]
    sizes: tuple[int, ...]
    cut_rows: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


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
    ) -> None:
        self.display = display or quiet()
        self.workers = max(1, workers)
        self._dropped: dict[str, int] = {}
        self.peak_memory_bytes = 0
        self._ours = not ray.is_initialized()
        if self._ours:
            _start(address or os.environ.get("RAY_ADDRESS"), self.workers, memory_gb)
        self._task: Any = ray.remote(max_retries=RETRIES)(_call)

    def begin(self, scratch: str | Path) -> None:
        self._dropped, self.peak_memory_bytes = {}, 0

    def clear(self) -> None:
        """Frames go when the stage drops its references."""

    def run_units(self, fn: UnitFn, units: Sequence[Unit], label: str, stall_s: float = 600.0) -> list[Report]:
        reports: list[Report] = []
        shared = ray.put(fn)
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            for report in self._run(_unit, [(shared, u) for u in units], label, [u.name for u in units]):
                advance(report.docs, report.bytes, 1)
                reports.append(report)
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> RayFrame:
        return self._frame(_scan, [(fn, schema, u) for u in units], schema, label)

    def table(self, table: pa.Table) -> RayFrame:
        return RayFrame(table.schema, (ray.put(table),), (table.nbytes,))

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> RayFrame:
        return self._frame(_map, [(fn, schema, part) for part in _of(frame).parts], schema, label)

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
        cut = Cut(
            tuple(by), tuple(order), partitions_for(sum(f.bytes for f in sources)), None, combine, max_rows_per_key
        )
        slices, lost = self._exchange(sources, cut)
        out = self._frame(_reduce, [(fn, sources[0].schema, schema, cut, *s) for s in slices], schema, label)
        total = sum(ray.get(lost)) + out.cut_rows
        if total:
            self._dropped[label] = self._dropped.get(label, 0) + total
        return out

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> RayFrame:
        a, b = _of(left), _of(right)
        cut = Cut(tuple(on), (), partitions_for(max(a.bytes, b.bytes)))
        schema = pa.schema([*a.schema, *(f.with_nullable(True) for f in b.schema if f.name not in on)])
        (from_a, _), (from_b, _) = self._exchange([a], cut), self._exchange([b], cut)
        calls = [
            (a.schema, b.schema, schema, tuple(on), how, len(x), *x, *y) for x, y in zip(from_a, from_b, strict=True)
        ]
        return self._frame(_join, calls, schema, label)

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        shards = max(1, target.shards)
        cut = Cut((), (), min(partitions_for(source.bytes) * 4, shards), target)
        slices, _ = self._exchange([source], cut)
        mine = [[s for s in range(target.shards) if s * cut.partitions // shards == p] for p in range(cut.partitions)]
        calls = [(source.schema, cut, target, shard, *s) for shard, s in zip(mine, slices, strict=True)]
        names = [str(p) for p in range(cut.partitions)]
        return [r for reports in self._run(_align, calls, target.label, names) for r in reports]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        values = [v for v in self._run(_fold, [(fn, part) for part in _of(frame).parts], label) if v is not None]
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0] if values else None

    def persist(self, frame: Frame) -> Frame:
        return frame  # tables stay in the object store as long as the frame lives

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        tables = ray.get(list(source.parts))
        table = pa.concat_tables([source.schema.empty_table(), *tables])
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def close(self) -> None:
        if self._ours:
            ray.shutdown()

    def _exchange(self, frames: Sequence[RayFrame], cut: Cut) -> tuple[list[list[Any]], list[Any]]:
        """Slices by partition, and the rows cut by each part, all as references."""
        task: Any = ray.remote(max_retries=RETRIES, num_returns=cut.partitions + 1)(_cut)
        made = [task.remote(cut, part) for frame in frames for part in frame.parts]
        return [[refs[p] for refs in made] for p in range(cut.partitions)], [refs[-1] for refs in made]

    def _frame(self, fn: Any, calls: Sequence[tuple[Any, ...]], schema: pa.Schema, label: str) -> RayFrame:
        task: Any = ray.remote(max_retries=RETRIES, num_returns=2)(fn)
        parts: list[Any] = []
        facts: list[Any] = []
        with self.display.task(label, len(calls), 0) as advance:
            for i, call in enumerate(calls):
                if i >= IN_FLIGHT * self.workers:
                    _get(facts[i - IN_FLIGHT * self.workers], label, str(i))  # back-pressure: wait for an early one
                part, fact = task.remote(*call)
                parts.append(part)
                facts.append(fact)
                advance(0, 0, 1)
        known = [_get(f, label, str(i)) for i, f in enumerate(facts)]
        return RayFrame(schema, tuple(parts), tuple(size for size, _ in known), sum(lost for _, lost in known))

    def _run(
        self, fn: Any, calls: Sequence[tuple[Any, ...]], label: str, names: Sequence[str] | None = None
    ) -> Iterable[Any]:
        """Results in order, with a bounded number of tasks waiting."""
        waiting: list[Any] = []
        done = 0
        for call in calls:
            waiting.append(self._task.remote(fn, *call))
            if len(waiting) - done > IN_FLIGHT * self.workers:
                yield _get(waiting[done], label, names[done] if names else str(done))
                waiting[done] = None
                done += 1
        for i in range(done, len(waiting)):
            yield _get(waiting[i], label, names[i] if names else str(i))


def _start(address: str | None, workers: int, memory_gb: float) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no surprise network access
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            store = max(80 << 20, int(memory_gb * 1e9 * STORE_SHARE))
            ray.init(
                num_cpus=workers,
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ConfigError(
            f"ray: cannot reach a cluster at {address or 'this machine'}: {e}; check `engine.address`"
        ) from e


def _get(ref: Any, label: str, name: str) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        cause = e.cause
        if isinstance(cause, StepwellError):
            raise cause from None
        raise StageError(f"{label}: unit {name} failed: {type(cause).__name__}: {cause}") from e
    except ray.exceptions.RayError as e:
        raise StageError(f"{label}: unit {name} was lost {RETRIES + 1} times: {e}; give workers more memory_gb") from e


def _of(frame: Frame) -> RayFrame:
    assert isinstance(frame, RayFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _call(fn: Any, *arguments: Any) -> Any:
    return fn(*arguments)


def _quiet_note(docs: int = 0, bytes: int = 0, row: int | None = None) -> None:
    """Ray says for itself whether a worker lives."""


def _unit(fn: UnitFn | Any, unit: Unit) -> Report:
    work: UnitFn = ray.get(fn) if isinstance(fn, ray.ObjectRef) else fn
    return measured(work, unit, _quiet_note)


def _made(table: pa.Table, lost: int = 0) -> tuple[pa.Table, tuple[int, int]]:
    return table, (table.nbytes, lost)


def _scan(
    fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, unit: Unit
) -> tuple[pa.Table, tuple[int, int]]:
    return _made(pa.Table.from_batches([b.select(schema.names).cast(schema) for b in fn(unit)], schema))


def _map(fn: ChunkFn, schema: pa.Schema, table: pa.Table) -> tuple[pa.Table, tuple[int, int]]:
    return _made(fn(table).select(schema.names).cast(schema))


def _cut(cut: Cut, table: pa.Table) -> list[Any]:
    """One slice a partition, and the rows that were cut."""
    made, lost = prepared(table, cut)
    slices = dict(split(made, cut))
    nothing = made.schema.empty_table()
    return [*(slices.get(p, nothing) for p in range(cut.partitions)), lost]


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


def _align(schema: pa.Schema, cut: Cut, target: Align, shards: Sequence[int], *slices: pa.Table) -> list[Report]:
    table, _ = prepared(pa.concat_tables([schema.empty_table(), *slices]), cut)
    return write_shards(target, table, shards, _quiet_note)


def _fold(fn: Callable[[pa.Table], Any], table: pa.Table) -> Any:
    return fn(table) if table.num_rows else None
