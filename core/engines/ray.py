"""The `ray` engine: units are tasks or actors, a frame is a list of tables in Ray's object store, a shuffle is a task exchange.

The object store spills to disk by itself. Every table is about a block and comes with its size, so that partition counts follow
the data and never the cluster, and a task holds a few blocks whatever it reads. Joins a cluster by `address` or RAY_ADDRESS, else
starts one on this machine. Tables that were lost with a node are made again from the units they came from; an exchange that
cannot be mended ends the stage, and what `run_units` and `align` committed stays committed.

Cost: an exchange of n bytes makes (n / block) x (n / `partition_bytes`) objects, of which the driver keeps count at 1-2 KB each;
slices below 100 KB, at most 10 MB a block, lie in its memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines.columns import joined_schema, sortable, sorted_table
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
    merged,
)
from core.engines.ray_calls import STREAM, called, fetched
from core.engines.ray_cluster import Place, Room, block_bytes, check, place_for, places, ray, start
from core.engines.ray_tasks import Fact, aligned, cut_up, folded, handed, joined, mapped, reduced, scanned
from core.engines.ray_units import Crew, UnitRun
from core.engines.skew import Skews
from core.engines.spill import Cut, align_partitions, partitions_for
from core.engines.spills import Spills
from core.progress import Display, quiet
from core.stage import Resources

GROUP_BYTES = 4 << 20  # smaller tables are worked on together: a task costs about 5 ms
TASKS = 4  # per worker where a frame is small, so that the last ones end about together


@dataclass(frozen=True, slots=True)
class Part:
    """A table in the object store. It lives as long as a reference to it."""

    ref: Any
    bytes: int


@dataclass(frozen=True)
class RayFrame:
    """Tables, and what the driver must keep for Ray to make them again: functions and tables that it put there itself."""

    schema: pa.Schema
    parts: tuple[Part, ...]
    roots: tuple[Any, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


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
        self._skews = Skews()
        self._crew: Crew | None = None
        self.peak_memory_bytes = 0
        self.workers = max(1, workers)
        address = address or os.environ.get("RAY_ADDRESS")
        self._started = not ray.is_initialized()
        self._ours = self._started and not address
        self._spills = Spills(Path(scratch), self.name) if self._ours else None
        if self._started:
            start(address, self._spills, self.workers, memory_gb)
        self.block_bytes = block_bytes(self._ours, self.workers, memory_gb)

    def begin(self, scratch: str | Path) -> None:
        self._release()
        self._dropped, self._skews, self.peak_memory_bytes = {}, Skews(), 0

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
        place = place_for(resources, self._ours, self.workers)
        check(place, label)
        lives_on = resources is not None and (resources.load_once or resources.gpus > 0)
        if self._crew is not None and (not lives_on or self._crew.place != place):
            self._release()
        if lives_on and self._crew is None:
            self._crew = Crew(place)
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            try:
                reports = UnitRun(fn, units, label, stall_s, place, self._crew, advance).finish()
            except BaseException:
                self._release()
                raise
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> RayFrame:
        calls = ((u.name, (u,)) for u in units)
        return self._frame(partial(scanned, fn, schema, self.block_bytes), calls, len(units), schema, label)

    def table(self, table: pa.Table) -> RayFrame:
        if not table.num_rows:
            return RayFrame(table.schema, ())
        ref = ray.put(table)
        return RayFrame(table.schema, (Part(ref, table.nbytes),), (ref,))

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> RayFrame:
        source = _of(frame)
        groups = self._groups([source])
        calls = ((str(i), group) for i, group in enumerate(groups))
        work = partial(mapped, fn, schema, self.block_bytes)
        return self._frame(work, calls, len(groups), schema, label, source.roots)

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
        cut = Cut(tuple(by), tuple(order), partitions, None, combine, max_rows_per_key, self.partition_bytes)
        exchanged = self._exchange(sources, cut, label)
        work = partial(reduced, fn, sources[0].schema, schema, cut, self.block_bytes)
        calls = ((str(p), (passes, *refs)) for p, passes, refs in self._handed(exchanged))
        return self._frame(work, calls, exchanged.count, schema, label, exchanged.roots)

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> RayFrame:
        a, b = _of(left), _of(right)
        schema = joined_schema(a.schema, b.schema, on, label)
        partitions = partitions_for(max(a.bytes, b.bytes), self.partition_bytes)
        cut = Cut(tuple(on), (), partitions, partition_bytes=self.partition_bytes)
        from_a, from_b = self._exchange([a], cut, label), self._exchange([b], cut, label)
        counts = [len(parts) for parts in from_a.slices]
        for p in range(cut.partitions):
            from_a.slices[p] += from_b.slices[p] if counts[p] else []  # without a left side nothing comes out
        del from_b.slices
        work = partial(joined, b.schema, schema, cut, how, self.block_bytes)
        calls = ((str(p), (passes, counts[p], *refs)) for p, passes, refs in self._handed(from_a))
        return self._frame(work, calls, from_a.count, schema, label, (*from_a.roots, *from_b.roots))

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        cut = Cut((), (), align_partitions(source.bytes, self.partition_bytes, target), target)
        exchanged = self._exchange([source], cut, target.label)
        work = partial(aligned, source.schema, cut, target)
        calls = ((str(p), (p, *refs)) for p, _, refs in self._handed(exchanged, empty=True))
        with self.display.task(target.label, cut.partitions, 0) as advance:
            done, _ = self._called(work, calls, target.label, lambda fact: advance(0, 0, 1))
        return [report for _, fact in done for report in fact.value]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        calls = ((str(i), group) for i, group in enumerate(self._groups([_of(frame)])))
        done, _ = self._called(partial(folded, fn, merge), calls, label)
        values = [fact.value for _, fact in done]
        return merged(values, merge)

    def persist(self, frame: Frame) -> Frame:
        return frame  # tables stay in the object store as long as the frame lives

    def release(self, frame: Frame) -> None:
        """Tables go when the stage drops its references."""

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        tables = [fetched(part.ref, "collect", str(i)) for i, part in enumerate(source.parts)]
        table = pa.concat_tables([source.schema.empty_table(), *tables])
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def skewed(self) -> dict[str, Skew]:
        return self._skews.by_label()

    def close(self) -> None:
        self._release()
        if self._started:
            ray.shutdown()
        if self._spills is not None:
            self._spills.remove()

    def _release(self) -> None:
        """End the actors: they hold CPUs that tasks would wait for."""
        if self._crew is not None:
            self._crew.release()
            self._crew = None

    def _groups(self, frames: Sequence[RayFrame]) -> list[tuple[Any, ...]]:
        """References to tables that one task works on together: a block at most, less where workers would have nothing to do.
        No result depends on it."""
        size = sum(frame.bytes for frame in frames)
        most = min(self.block_bytes, max(GROUP_BYTES, size // (TASKS * self._workers())))
        groups: list[list[Any]] = []
        held = most + 1
        for part in (part for frame in frames for part in frame.parts):
            if held + part.bytes > most:
                groups.append([])
                held = 0
            groups[-1].append(part.ref)
            held += part.bytes
        return [tuple(group) for group in groups]

    def _workers(self) -> int:
        return max(1, places(Place()))

    def _exchange(self, frames: Sequence[RayFrame], cut: Cut, label: str) -> "_Exchange":
        """The slices of each partition. Rows that a cap cut on the way are counted."""
        calls = ((str(i), group) for i, group in enumerate(self._groups(frames)))
        work = partial(cut_up, cut, frames[0].schema)
        done, root = self._called(work, calls, label, returns=cut.partitions + 1)
        slices: list[list[Part]] = [[] for _ in range(cut.partitions)]
        for refs, fact in done:
            for p, (ref, size) in enumerate(zip(refs, fact.sizes, strict=True)):
                if size:
                    slices[p].append(Part(ref, size))
        self._count_dropped(label, sum(fact.told.cut_rows for _, fact in done))
        return _Exchange(slices, (*(r for frame in frames for r in frame.roots), root))

    def _handed(self, exchanged: "_Exchange", empty: bool = False) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """(partition, passes, arguments); what is handed out is let go, so that Ray frees it when its task has ended."""
        for p, parts in enumerate(exchanged.slices):
            exchanged.slices[p] = []
            if parts or empty:
                yield p, *handed([part.ref for part in parts], sum(part.bytes for part in parts), self.block_bytes)

    def _frame(
        self,
        work: Any,
        calls: Iterable[tuple[str, tuple[Any, ...]]],
        count: int,
        schema: pa.Schema,
        label: str,
        roots: tuple[Any, ...] = (),
    ) -> RayFrame:
        """A frame of all tables that `count` calls of `work` make."""
        with self.display.task(label, count, 0) as advance:
            done, root = self._called(work, calls, label, lambda fact: advance(0, 0, 1))
        parts = [Part(*made) for refs, fact in done for made in zip(refs, fact.sizes, strict=True)]
        self._count_dropped(label, sum(fact.told.cut_rows for _, fact in done))
        self._skews.add(label, (fact.told.skew for _, fact in done), min(self.partition_bytes, self.block_bytes))
        return RayFrame(schema, tuple(parts), tuple(dict.fromkeys((*roots, root))))

    def _count_dropped(self, label: str, rows: int) -> None:
        if rows:
            self._dropped[label] = self._dropped.get(label, 0) + rows

    def _called(
        self,
        work: Any,
        calls: Iterable[tuple[str, tuple[Any, ...]]],
        label: str,
        progress: Callable[[Fact], None] = lambda fact: None,
        returns: int | str = STREAM,
    ) -> tuple[list[tuple[list[Any], Fact]], Any]:
        """References to the tables of each call and its fact, in order, and to `work`, without which none can be made again."""
        self._release()
        root = ray.put(work)
        done = called(root, calls, label, Room(Place(), label), progress, returns)
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(fact.peak_memory_bytes for _, fact in done)])
        return done, root


@dataclass
class _Exchange:
    """The slices of each partition that have rows, and what the driver must keep for Ray to make them again."""

    slices: list[list[Part]]
    roots: tuple[Any, ...]

    @property
    def count(self) -> int:
        return sum(1 for parts in self.slices if parts)


def _of(frame: Frame) -> RayFrame:
    assert isinstance(frame, RayFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame
