"""The engine contract: the verbs that every engine implements, with the same bytes out.

A *unit* is a picklable piece of work fixed by the input (a shard, a range, a group of files), never by the number of workers.
A *frame* is a distributed table of rows in no promised order; each engine keeps it in its own way. Functions handed to a verb
must be picklable (module-level functions, `functools.partial`, frozen dataclasses with `__call__`), pure, and free of
per-row Python where columns will do.

Order is promised in one place only: inside `shuffle`, `fn` sees rows sorted by `by` then `order`. Together they must be a
total order, or two engines may disagree. Iteration (k-means rounds, stars) is a plain loop over these verbs.

A shuffle or join of n bytes has ceil(n / `partition_bytes`) partitions: a property of the data, never of the cluster. It decides
where a key is worked on, never what comes out. A key cannot be cut: one that is larger than a partition is reported (`skewed`).

What goes wrong has one form everywhere: ConfigError and StageError arrive as they were raised; any other exception of a function
given to a verb arrives as a StageError that names the label, and the unit where there is one.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from core.rows import shard_of
from core.stage import Resources

PARTITION_BYTES = 128 << 20  # an engine's default for the size of a partition
NO_ROW = -1  # note(row=NO_ROW): the row named last is done, what follows concerns none
BATCH_BYTES = 64 << 20  # an engine's default for the documents handed to a kernel at once, in bytes of text


@dataclass(frozen=True)
class Unit:
    """A piece of work with a stable name, used in messages, progress and commits."""

    name: str
    payload: Any = None
    bytes: int = 0  # input bytes, for progress
    poison: tuple[int, ...] = ()  # rows (record ordinals) that killed a worker before: reject them unread
    cautious: bool = False  # report every row before it is touched, so that a killer can be named


@dataclass
class Report:
    """What one finished unit says. `value` goes back to the driver, so it must be small."""

    unit: str
    docs: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    resumed: bool = False  # found committed, not computed
    value: Any = None


@dataclass(frozen=True)
class Skew:
    """One key that is larger than a partition, or than a worker's share of memory, and that nothing made smaller."""

    key: tuple[Any, ...]  # values of `by`, as JSON can hold them
    rows: int
    bytes: int


Note = Callable[..., None]  # note(docs=, bytes=, row=): progress of the running unit; also its sign of life
UnitFn = Callable[[Unit, Note], Report]
ChunkFn = Callable[[pa.Table], pa.Table]


@runtime_checkable
class Frame(Protocol):
    """A distributed table, which an engine may compute when it is first read: what goes wrong in it arrives then. Only its schema
    is public."""

    @property
    def schema(self) -> pa.Schema: ...


@dataclass(frozen=True)
class Align:
    """Where `align` writes: one layer of the shards of one dataset, through the one layer writer."""

    write: Callable[
        [int, pa.Table], Report
    ]  # (shard ordinal, rows of that shard sorted by `row`) -> committed layer shard
    shards: int  # number of shards; each is written, those without rows all null
    dataset: int  # ordinal of the dataset within `row`
    label: str = ""


def write_shards(target: Align, table: pa.Table, shards: Sequence[int], note: Note) -> list[Report]:
    """Write the given shards of a target from rows sorted by `row`: where every engine's `align` ends."""
    at = shard_of(table.column("row").to_numpy())
    reports = []
    for shard in shards:
        first, last = np.searchsorted(at, shard), np.searchsorted(at, shard, side="right")
        reports.append(target.write(shard, table.slice(int(first), int(last - first))))
        note(docs=reports[-1].docs)
    return reports


def merged(values: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
    """`merge` over `values` in a tree, as every engine's `fold` ends; None if there are none."""
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0] if values else None


class Engine(Protocol):
    """The verbs."""

    name: str
    batch_bytes: int  # of documents handed to a kernel at once; decides memory, never what comes out

    def begin(self, scratch: str | Path) -> None:
        """Start a stage. `scratch` is a local folder whose files belong to one stage identity and survive a kill."""

    def clear(self) -> None:
        """The stage is committed: drop its scratch files and frames."""

    def run_units(
        self,
        fn: UnitFn,
        units: Sequence[Unit],
        label: str,
        stall_s: float = 600.0,
        resources: Resources | None = None,
    ) -> list[Report]:
        """Run `fn` on each unit; reports in the order of `units`. `fn` commits its own output and recognises it when it
        finds it. A worker that dies, or gives no sign of life for `stall_s`, is replaced, and its unit tried again where its
        death can be watched; a row that keeps killing is passed in `Unit.poison` (see `core.engines.guard`). A RetryableError
        is tried again a few times; any other exception from `fn` stops the run after the other running units have finished.
        `resources` is what a worker needs; more than any node has is a ConfigError."""

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> Frame:
        """The rows that `fn` yields for all units."""

    def table(self, table: pa.Table) -> Frame:
        """A small table of the driver as a frame."""

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> Frame:
        """`fn` over pieces of the frame of any size: it must treat every row by itself."""

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
    ) -> Frame:
        """Rows with equal `by` meet; `fn` sees tables sorted by `by` + `order` that hold whole keys only (many at once).

        Several frames must share a schema. `combine` (associative, same schema in and out, key-aligned) runs before the
        exchange as well. `max_rows_per_key` keeps the first rows by `order` and counts the rest in `dropped_rows`; with
        `combine`, those that are left after it. Null keys meet each other like any value. Keys are not floats."""

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> Frame:
        """Equi-join ('inner' or 'left outer'); columns of `right` other than `on` are appended, and must not be in
        `left`. Null keys never match. Keys are not floats."""

    def align(self, frame: Frame, target: Align) -> list[Report]:
        """Rows with a `row` column (int64, see `core.rows`) become one layer shard per document shard, written once. Reports
        in the order of shards. StageError for a row outside the target."""

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        """`merge` over `fn(piece)` in a tree; results must be small and `merge` associative and commutative. None if empty."""

    def persist(self, frame: Frame) -> Frame:
        """A frame that is computed once even if read twice."""

    def release(self, frame: Frame) -> None:
        """The frame is not read again: what holds its rows may go now, not only at `clear`. A loop calls it for the frames
        of earlier rounds; a stage that is killed and run again computes them anew."""

    def collect(self, frame: Frame) -> pa.Table:
        """All rows on the driver, sorted by all columns that can be sorted: small frames only."""

    def dropped_rows(self) -> dict[str, int]:
        """Rows cut by `max_rows_per_key`, by label, since the stage began."""

    def skewed(self) -> dict[str, Skew]:
        """The largest key, by label, that one worker had to hold whole although it is larger than a partition should be or than
        its memory is meant for, since the stage began. What `combine` or a cap made small enough is not among them."""

    def close(self) -> None:
        """Stop workers and free scratch memory. Committed files stay."""


def rows_in(engine: Engine, frame: Frame, label: str) -> int:
    """Rows of a frame: as the engine knows them (`row_count`), or counted where they are."""
    if (known := getattr(frame, "row_count", None)) is not None:
        return int(known)
    return engine.fold(frame, _rows_of, operator.add, label) or 0


def _rows_of(piece: pa.Table) -> int:
    return piece.num_rows


def told_by(engine: Engine) -> dict[str, Any]:
    """What an engine has to say of a stage besides its reports, for `observed` in a manifest; empty where nothing stood out."""
    dropped = {label: rows for label, rows in engine.dropped_rows().items() if rows}
    told = {"dropped_rows": dropped, "skew": {label: asdict(key) for label, key in engine.skewed().items()}}
    return {name: what for name, what in told.items() if what}
