"""The `local` engine: worker processes on this machine, frames as files below `scratch`. The default; nothing to start.

A frame is a list of committed parts (see `core.engines.spill`). Every verb numbers itself within its stage, so a stage that is
killed and run again finds the parts of the verbs it had finished and goes on from there.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from core.engines.columns import join_tables, joined_schema, sortable, sorted_table
from core.engines.contract import (
    BATCH_BYTES,
    PARTITION_BYTES,
    Align,
    ChunkFn,
    Frame,
    Note,
    Report,
    Skew,
    Unit,
    UnitFn,
    merged,
    write_shards,
)
from core.engines.pool import Pool, run_here
from core.engines.skew import Skews
from core.engines.spill import (
    Cut,
    Part,
    Told,
    align_partitions,
    blocks,
    chunks,
    committed_part,
    emptied,
    partitions_for,
    passes_for,
    read_partition,
    shards_of,
    share_batches,
    slices,
    write_exchange,
    write_part,
)
from core.progress import Display, quiet
from core.stage import Resources

WORKER_BYTES = 100_000_000  # of a worker that holds no row: Python, Arrow and NumPy; measured 94 MB, models come on top
# blocks that a verb holds at its peak: measured 3.2 of narrow rows (see `core.engines.spill`), 0.8 to spare
MEMORY_SHARE = 4

T = TypeVar("T")

log = logging.getLogger("stepwell")


@dataclass(frozen=True)
class LocalFrame:
    """Rows in committed files."""

    schema: pa.Schema
    parts: tuple[Part, ...]
    exchanged: tuple[Part, ...] = ()  # what a shuffle or join read to make them

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parts)


class LocalEngine:
    """Runs units in `workers` processes (0: in this one, for debugging). `memory_gb` is shared by all workers."""

    name = "local"

    def __init__(
        self,
        scratch: str | Path,
        workers: int = 1,
        memory_gb: float = 4.0,
        display: Display | None = None,
        partition_bytes: int = PARTITION_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self.scratch = Path(scratch)
        self.workers = workers
        self.block_bytes = block_bytes(int(memory_gb * 1e9) // max(1, workers))
        self.display = display or quiet()
        self.partition_bytes, self.batch_bytes = partition_bytes, batch_bytes
        self._pool = Pool(workers) if workers else None
        self._step = 0
        self._dropped: dict[str, int] = {}
        self._skews = Skews()
        self.peak_memory_bytes = 0

    def begin(self, scratch: str | Path) -> None:
        """Start a stage: verbs count from zero below this folder."""
        self.scratch, self._step, self.peak_memory_bytes = Path(scratch), 0, 0
        self._dropped, self._skews = {}, Skews()

    def run_units(
        self,
        fn: UnitFn,
        units: Sequence[Unit],
        label: str,
        stall_s: float = 600.0,
        resources: Resources | None = None,
    ) -> list[Report]:
        units = list(units)
        if not units:
            return []
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            if self._pool is None:
                reports = run_here(fn, units, label, advance)
            else:
                reports = self._pool.run(fn, units, label, stall_s, advance)
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> LocalFrame:
        return self._make(partial(_scan, fn, schema), list(units), schema, label)

    def table(self, table: pa.Table) -> LocalFrame:
        path = self._folder("table") / "0.arrow"
        return LocalFrame(table.schema, (committed_part(str(path)) or write_part(str(path), [table], table.schema),))

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> LocalFrame:
        units = [Unit(str(i), part, part.bytes) for i, part in enumerate(_parts(frame))]
        return self._make(partial(_map, fn, schema), units, schema, label)

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
    ) -> LocalFrame:
        sources = [frames] if isinstance(frames, LocalFrame) else list(frames)  # type: ignore[arg-type]
        size = sum(f.bytes for f in sources if isinstance(f, LocalFrame))
        partitions = partitions_for(size, self.partition_bytes)
        cut = Cut(tuple(by), tuple(order), partitions, None, combine, max_rows_per_key, self.partition_bytes)
        exchanged = self._exchange(sources, cut, label)
        work = partial(_reduce, fn, exchanged.schema, schema, cut, self.block_bytes)
        made = self._make(work, self._partition_units(exchanged, cut), schema, f"{label}: reduce", cut_by=label)
        return replace(made, exchanged=exchanged.parts)

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> LocalFrame:
        assert isinstance(left, LocalFrame)
        assert isinstance(right, LocalFrame)
        schema = joined_schema(left.schema, right.schema, on, label)
        partitions = partitions_for(max(left.bytes, right.bytes), self.partition_bytes)
        cut = Cut(tuple(on), (), partitions, partition_bytes=self.partition_bytes)
        a, b = self._exchange([left], cut, f"{label}: left"), self._exchange([right], cut, f"{label}: right")
        units = [Unit(str(p), (slices(a.parts, p), slices(b.parts, p), p)) for p in range(cut.partitions)]
        work = partial(_join, a.schema, b.schema, schema, cut, how, self.block_bytes)
        return replace(self._make(work, units, schema, label), exchanged=(*a.parts, *b.parts))

    def align(self, frame: Frame, target: Align) -> list[Report]:
        size = sum(p.bytes for p in _parts(frame))
        cut = Cut((), (), align_partitions(size, self.partition_bytes, target), target)
        exchanged = self._exchange([frame], cut, f"{target.label}: exchange")
        units = []
        for p in range(cut.partitions):
            units.append(Unit(str(p), (slices(exchanged.parts, p), p, shards_of(p, cut.partitions, target))))
        work = partial(_align, exchanged.schema, cut, target)
        return [r for report in self.run_units(work, units, target.label) for r in report.value]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        units = [Unit(str(i), part, part.bytes) for i, part in enumerate(_parts(frame)) if part.rows]
        values = [r.value for r in self.run_units(partial(_fold, fn, merge), units, label)]
        return merged(values, merge)

    def persist(self, frame: Frame) -> Frame:
        return frame  # parts are files already

    def release(self, frame: Frame) -> None:
        assert isinstance(frame, LocalFrame)
        for part in (*frame.parts, *frame.exchanged):
            for path in (f"{part.path}.json", part.path):  # first what says that the part is whole
                Path(path).unlink(missing_ok=True)

    def collect(self, frame: Frame) -> pa.Table:
        table = pa.Table.from_batches([b for part in _parts(frame) for b in part.batches()], frame.schema)
        return sorted_table(table, sortable(frame.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def skewed(self) -> dict[str, Skew]:
        return self._skews.by_label()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def clear(self) -> None:
        """Remove the scratch files of the current stage: its outputs are committed elsewhere."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _exchange(self, frames: Sequence[Frame], cut: Cut, label: str) -> LocalFrame:
        schema = frames[0].schema
        parts = [part for frame in frames for part in _parts(frame)]
        units = [Unit(str(i), part, part.bytes) for i, part in enumerate(parts)]
        # The size of a frame, and so the number of partitions, may move by some bytes with the blocks it was made in.
        place = f"{cut.partitions} {label}"
        return self._make(partial(_cut, schema, cut, self.block_bytes), units, schema, label, label, place)

    def _partition_units(self, exchanged: LocalFrame, cut: Cut) -> list[Unit]:
        share = exchanged.bytes // max(1, cut.partitions)
        return [Unit(str(p), (slices(exchanged.parts, p), p), share) for p in range(cut.partitions)]

    def _make(
        self,
        work: Any,
        units: Sequence[Unit],
        schema: pa.Schema,
        label: str,
        cut_by: str | None = None,
        place: str | None = None,
    ) -> LocalFrame:
        """Run `work(path, unit, note) -> Part` for units whose part is not committed yet."""
        folder = self._folder(place or f"{len(units)} {label}")
        paths = [str(folder / f"{i:06d}.arrow") for i in range(len(units))]
        found = [committed_part(path) for path in paths]
        todo = [replace(u, payload=(paths[i], u.payload)) for i, u in enumerate(units) if found[i] is None]
        made = iter(self.run_units(partial(_part_unit, work), todo, label))
        parts = tuple(part if part is not None else next(made).value for part in found)
        if cut_by is not None and (lost := sum(p.cut_rows for p in parts)):
            self._dropped[cut_by] = self._dropped.get(cut_by, 0) + lost
        expected = min(self.partition_bytes, self.block_bytes)
        self._skews.add(cut_by or label, (part.skew for part in parts), expected)
        return LocalFrame(schema, parts)

    def _folder(self, label: str) -> Path:
        self._step += 1
        words = "".join(c if c.isalnum() else "-" for c in label.lower())
        # Parts that were cut for partitions of another size hold other keys: a stage that goes on with them must not find these.
        return self.scratch / str(self.partition_bytes) / f"{self._step:03d}-{words[:40]}"


def block_bytes(part: int) -> int:
    """The largest block for a worker whose part of memory is `part` bytes. Where the worker itself takes more than half of it,
    blocks of half the part are the lesser evil: a partition is read once for every block that it fills."""
    return max(1 << 20, max(part - WORKER_BYTES, part // 2) // MEMORY_SHARE)


def _parts(frame: Frame) -> tuple[Part, ...]:
    assert isinstance(frame, LocalFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame.parts


def _part_unit(work: Callable[[str, Unit, Note], Part], unit: Unit, note: Note) -> Report:
    path, payload = unit.payload
    part = work(path, replace(unit, payload=payload), note)
    note(docs=part.rows, bytes=unit.bytes)
    return Report(unit.name, docs=part.rows, bytes=unit.bytes, value=part)


def _signed(items: Iterable[T], note: Note) -> Iterator[T]:
    """The same items, each a sign of life: a unit of a frame may take longer than a silent one is given."""
    for item in items:
        note()
        yield item
        del item  # before the next one is made


def _scan(fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, path: str, unit: Unit, note: Note) -> Part:
    return write_part(path, _signed(fn(unit), note), schema)


def _map(fn: ChunkFn, schema: pa.Schema, path: str, unit: Unit, note: Note) -> Part:
    return write_part(path, (fn(pa.Table.from_batches([b])) for b in _signed(unit.payload.batches(), note)), schema)


def _cut(schema: pa.Schema, cut: Cut, block_bytes: int, path: str, unit: Unit, note: Note) -> Part:
    return write_exchange(path, _signed(unit.payload.batches(), note), schema, cut, block_bytes)


def _reduce(
    fn: ChunkFn, schema_in: pa.Schema, schema: pa.Schema, cut: Cut, memory_bytes: int, path: str, unit: Unit, note: Note
) -> Part:
    parts, p = unit.payload
    told = Told()

    def results() -> Iterator[pa.Table]:
        for table in read_partition(parts, p, schema_in, cut, memory_bytes, told):
            for piece in chunks(table, cut.by):
                yield fn(piece)
            del table, piece  # before the next share of the partition is read

    return write_part(path, _signed(results(), note), schema, told)


def _join(
    left: pa.Schema,
    right: pa.Schema,
    schema: pa.Schema,
    cut: Cut,
    how: str,
    memory_bytes: int,
    path: str,
    unit: Unit,
    note: Note,
) -> Part:
    """The right side is held, share by share of its keys; the left side passes by in blocks, so its keys may be of any size."""
    parts_left, parts_right, p = unit.payload
    told, half = Told(), max(1, memory_bytes // 2)  # for each side

    def results() -> Iterator[pa.Table]:
        passes = passes_for(parts_right, p, half)
        for turn in range(passes):
            held = pa.Table.from_batches(share_batches(parts_right, p, cut, turn, passes), right)
            told.large(held, cut, half, is_sorted=False)
            for block in blocks(share_batches(parts_left, p, cut, turn, passes), half):
                yield join_tables(emptied(block, left), held, cut.by, how)
                pa.default_memory_pool().release_unused()
            del held

    return write_part(path, _signed(results(), note), schema, told)


def _align(schema: pa.Schema, cut: Cut, target: Align, unit: Unit, note: Note) -> Report:
    parts, p, shards = unit.payload
    table = next(read_partition(parts, p, schema, cut, 1 << 62, Told()), schema.empty_table())
    reports = write_shards(target, table, shards, note)
    return Report(unit.name, docs=sum(r.docs for r in reports), value=reports)


def _fold(fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], unit: Unit, note: Note) -> Report:
    value = None
    for batch in _signed(unit.payload.batches(), note):
        here = fn(pa.Table.from_batches([batch]))
        value = here if value is None else merge(value, here)
    return Report(unit.name, docs=unit.payload.rows, bytes=unit.bytes, value=value)
