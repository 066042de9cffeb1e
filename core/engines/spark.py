"""The `spark` engine: a unit is a task, a frame is a DataFrame of pieces, a shuffle is their repartition and sort.

Needs Java 17 or newer and pyspark. Works with `local[n]`, under spark-submit, and against a master (`address`). All I/O happens
inside the tasks through the project's own writer, so no Hadoop file system is needed.

Cost: Spark moves pieces, some MB of Arrow each, and never a row (`core.engines.spark_pieces`). Maps, and joins with a small side,
run within the verb that reads them; whatever else makes a frame runs when it is called, and its rows are cached. A Python worker
holds one share of a partition, which Spark has brought together and spilled as it had to. A frame is freed when nothing refers to
it any more. Functions with more than 1 MB of state are broadcast, by pyspark itself. An exchange whose run is killed starts
again; what `run_units` and `align` commit stays committed.
"""

import contextlib
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines import spark_session  # before the others: it says what to do where pyspark is missing

# isort: split
from core.engines import spark_pieces, spark_tasks, spark_units
from core.engines.columns import check_keys, joined_schema, sortable, sorted_table
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
from core.engines.skew import Skews
from core.engines.spark_tasks import SHARE_BYTES, Said, Step
from core.engines.spill import Cut, align_partitions, partitions_for
from core.engines.spills import Spills
from core.errors import StageError, StepwellError
from core.progress import Display, quiet
from core.stage import Resources

from pyspark.errors import PySparkException  # isort: skip
from pyspark.sql import DataFrame, SparkSession  # isort: skip
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows  # isort: skip

BROADCAST_BYTES = 8 << 20  # a side of a join up to here goes to every task, whole: Spark's own limit is 10 MB
READ = -1  # the number of the step that reads pieces, which finds nothing
SHARES = 4  # of a partition for each SHARE_BYTES of it: small ones are sorted together, those that maps made larger fit


@dataclass(eq=False)
class SparkFrame:
    """Pieces, and the steps that make its rows of them. Without steps they are its rows."""

    schema: pa.Schema
    pieces: DataFrame
    bytes: int  # of its rows; with steps, of the pieces they read
    steps: tuple[Step, ...] = ()
    sources: tuple["SparkFrame", ...] = ()  # kept cached as long as this one reads them
    row_count: int | None = None  # once it is computed
    read_before: bool = False


class SparkEngine:
    """`workers` threads of a local Spark, or the executors of the master at `address`."""

    name = "spark"

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
        self._ours = SparkSession.getActiveSession() is None
        self._spills = Spills(Path(scratch), self.name)
        where = Path(scratch), self._spills.path
        self._session = spark_session.start_session(*where, max(1, workers), memory_gb, address)
        self._watch = spark_units.Watch(self._session.sparkContext)
        self._frees: list[Any] = []
        self._numbers = itertools.count()
        self._labels: dict[int, str] = {}  # of steps
        self._cut_rows: dict[int, tuple[str, int]] = {}  # by step, as one that runs twice is counted once
        self._skews = Skews()
        self.peak_memory_bytes = 0

    def begin(self, scratch: str | Path) -> None:
        self._cut_rows, self._skews, self.peak_memory_bytes = {}, Skews(), 0

    def clear(self) -> None:
        for free in self._frees:
            free()
        self._frees = []

    def run_units(
        self,
        fn: UnitFn,
        units: Sequence[Unit],
        label: str,
        stall_s: float = 600.0,
        resources: Resources | None = None,
    ) -> list[Report]:
        if not units:
            return []
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            work = partial(spark_units.run, self._session, fn, units, label, stall_s, resources)
            reports = [_checked(r) for r in self._driver(work, label, units)]
            advance(sum(r.docs for r in reports), sum(r.bytes for r in reports), len(units))
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> SparkFrame:
        pickled = [pickle.dumps(u) for u in units]
        rows = spark_units.places(self._session, len(pickled))
        step = self._step(label, schema, partial(spark_tasks.scan, fn, pickled, label))
        return self._computed(SparkFrame(schema, rows, sum(u.bytes for u in units), (step,)))

    def table(self, table: pa.Table) -> SparkFrame:
        batches = list(spark_pieces.packed(table, 0))
        rows = self._session.createDataFrame(pa.Table.from_batches(batches, spark_pieces.PIECES))
        return SparkFrame(table.schema, rows, table.nbytes, row_count=table.num_rows)

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> SparkFrame:
        return self._then(_of(frame), self._step(label, schema, partial(spark_tasks.mapped, fn)))

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
    ) -> SparkFrame:
        sources = [_of(f) for f in ([frames] if isinstance(frames, SparkFrame) else list(frames))]  # type: ignore[arg-type]
        given = sources[0].schema
        check_keys(given, by)
        size = sum(f.bytes for f in sources)
        partitions, shares, share_bytes = self._shares(size)
        cut = Cut(tuple(by), tuple(order), partitions * shares, None, combine, max_rows_per_key, self.partition_bytes)
        step = self._step(label, schema, partial(spark_tasks.reduced, fn, given, cut, share_bytes))
        cuts = [self._cut(f, cut, label, step.number, partitions) for f in sources]
        rows = spark_pieces.exchanged(cuts, partitions, f"int({spark_pieces.PLACE} / {shares})")
        return self._computed(SparkFrame(schema, rows, size, (step,), tuple(sources)))

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> SparkFrame:
        a, b = _of(left), _of(right)
        schema = joined_schema(a.schema, b.schema, on, label)
        check_keys(a.schema, on)
        a_goes = how == "inner" and not a.steps and a.bytes <= BROADCAST_BYTES
        b = b if a_goes else self._computed(b)
        if a_goes or b.bytes <= BROADCAST_BYTES:
            small, large = (a, b) if a_goes else (b, a)
            held = self._rows(small, label).combine_chunks()
            work = partial(spark_tasks.looked_up, held, tuple(on), how, a_goes, SHARE_BYTES)
            made = self._then(large, self._step(label, schema, work))
            made.bytes *= max(
                1, held.num_rows // max(1, held.group_by(list(on)).aggregate([]).num_rows)
            )  # as keys repeat
            return made
        a = self._computed(a)
        size = max(a.bytes, b.bytes)
        partitions, shares, share_bytes = self._shares(size)
        cut = Cut(tuple(on), (), partitions * shares, partition_bytes=self.partition_bytes)
        step = self._step(label, schema, partial(spark_tasks.joined, a.schema, b.schema, cut, how, share_bytes))
        cuts = [self._cut(f, cut, label, step.number, partitions, side, 2) for side, f in enumerate((b, a))]
        rows = spark_pieces.exchanged(cuts, partitions, f"int({spark_pieces.PLACE} / {2 * shares})")
        return self._computed(SparkFrame(schema, rows, size, (step,), (a, b)))

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        partitions, shards = align_partitions(source.bytes, self.partition_bytes, target), max(1, target.shards)
        cut = Cut((), (), shards, target)
        cuts = [self._cut(source, cut, target.label, next(self._numbers), partitions)]
        rows = spark_pieces.exchanged(cuts, partitions, spark_pieces.partition_of_shard(partitions, shards))
        end = partial(spark_tasks.aligned, source.schema, target, partitions, None)
        made: dict[int, Report] = {}
        for answer in self._answers(_mapped(rows, (), end, target.label), target.label):
            made |= answer.value
        return [made[shard] for shard in range(target.shards)]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        source = self._read(_of(frame))
        made = _mapped(source.pieces, _steps(source), partial(spark_tasks.folded, fn, merge), label)
        answers = self._answers(made, label)
        return merged([a.value for a in answers if a.value is not None], merge)

    def persist(self, frame: Frame) -> Frame:
        return self._computed(_of(frame))

    def release(self, frame: Frame) -> None:
        """Rows go when nothing refers to the frame any more."""

    def collect(self, frame: Frame) -> pa.Table:
        return sorted_table(self._rows(_of(frame), "collect"), sortable(frame.schema))

    def dropped_rows(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for label, rows in self._cut_rows.values():
            found[label] = found.get(label, 0) + rows
        return {label: rows for label, rows in found.items() if rows}

    def skewed(self) -> dict[str, Skew]:
        return self._skews.by_label()

    def close(self) -> None:
        self.clear()
        self._watch.close()
        if self._ours:
            spark_session.end_session(self._session)
        self._spills.remove()

    def _step(self, label: str, schema: pa.Schema, work: Any) -> Step:
        step = Step(next(self._numbers), label, schema, work)
        self._labels[step.number] = label
        return step

    def _shares(self, size: int) -> tuple[int, int, int]:
        """(partitions, shares of each, bytes of what a worker sorts at once) of an exchange of `size` bytes."""
        partitions = partitions_for(size, self.partition_bytes)
        share_bytes = max(1, min(SHARE_BYTES, self.partition_bytes // SHARES))
        return partitions, max(1, SHARES * size // (partitions * share_bytes)), share_bytes

    def _read(self, frame: SparkFrame) -> SparkFrame:
        """The frame; computed if it was read before, as it seems to be read often."""
        if frame.steps and frame.read_before:
            self._computed(frame)
        frame.read_before = True
        return frame

    def _then(self, frame: SparkFrame, step: Step) -> SparkFrame:
        """A frame that is made of another by a step more, when somebody reads it."""
        source = self._read(frame)
        return SparkFrame(step.schema, source.pieces, source.bytes, (*_steps(source), step), (source,))

    def _cut(
        self, frame: SparkFrame, cut: Cut, label: str, step: int, partitions: int, side: int = 0, sides: int = 1
    ) -> DataFrame:
        """The pieces of a frame for an exchange."""
        source = self._read(frame)
        end = partial(spark_tasks.cut_up, cut, step, side, sides)
        return _mapped(source.pieces, _steps(source), end, label, partitions)

    def _computed(self, frame: SparkFrame) -> SparkFrame:
        """The frame, computed here and now, and cached as long as somebody holds it."""
        if not frame.steps:
            return frame
        label = frame.steps[-1].label
        made = _mapped(frame.pieces, frame.steps, spark_tasks.kept, label).persist()
        free = weakref.finalize(frame, _free, made)
        free.atexit = False
        self._frees = [f for f in self._frees if f.alive] + [free]
        answers = self._answers(made, label)
        frame.pieces, frame.steps, frame.sources = made.filter(F.col(spark_pieces.PLACE) >= 0), (), ()
        frame.bytes, frame.row_count = sum(a.bytes for a in answers), sum(a.rows for a in answers)
        return frame

    def _rows(self, frame: SparkFrame, label: str) -> pa.Table:
        """All rows of a frame, in no order."""
        source = self._read(frame)
        made = source.pieces
        if source.steps:
            label = source.steps[-1].label
            made = _mapped(made, source.steps, spark_tasks.kept, label)
        got = self._driver(partial(spark_pieces.collected, made), label)
        self._heard([pickle.loads(content) for place, content in got if place < 0])
        tables = [spark_pieces.opened(content, source.schema) for place, content in got if place >= 0]
        return pa.concat_tables([source.schema.empty_table(), *tables])

    def _answers(self, made: DataFrame, label: str) -> list[Said]:
        """What the tasks that make these pieces have to say."""
        with self.display.task(label, 1, 0) as advance:
            replies = self._driver(partial(spark_pieces.collected, made.filter(F.col(spark_pieces.PLACE) < 0)), label)
            answers = [pickle.loads(reply) for _, reply in replies]
            advance(0, 0, 1)
        return self._heard(answers)

    def _heard(self, answers: Sequence[Any]) -> list[Said]:
        """The same without errors of ours, which are raised; cut rows and large keys are remembered."""
        whole = Said()
        for answer in answers:
            whole.add(_checked(answer))
        for number, told in whole.told.items():
            if (label := self._labels.get(number)) is not None:
                self._cut_rows[number] = label, told.cut_rows
                self._skews.add(label, [told.skew], self.partition_bytes)
        return list(answers)

    def _driver(self, call: Callable[[], Any], label: str, units: Sequence[Unit] = ()) -> Any:
        """`call()`, with Spark's exceptions turned into ours."""
        try:
            return self._watch.call(call)
        except (PySparkException, *spark_session.JAVA_ENDED) as e:
            said = str(e)
            if (ours := spark_tasks.carried(said) or self._watch.lost(label)) is not None:
                raise ours from None
            if (lost := spark_units.lost_unit(said, units, label) or spark_session.ended_early(e, label)) is not None:
                raise lost from e
            lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(e).__name__]
            raise StageError(f"{label}: Spark gave up: {lines[0][:500]}; run with --debug for its whole message") from e


def _free(rows: DataFrame) -> None:
    with contextlib.suppress(*spark_session.JAVA_ENDED):  # and the rows with it
        rows.unpersist()


def _mapped(rows: DataFrame, steps: Sequence[Step], end: spark_tasks.End, label: str, copies: int = 1) -> DataFrame:
    """The pieces that a chain of steps makes of others."""
    return rows.mapInArrow(partial(spark_tasks.chain, tuple(steps), end, label, copies), spark_pieces.STRUCT)


def _steps(frame: SparkFrame) -> tuple[Step, ...]:
    """The steps of a frame, or the one that reads its pieces."""
    return frame.steps or (Step(READ, "read", frame.schema, partial(spark_tasks.read, frame.schema)),)


def _of(frame: Frame) -> SparkFrame:
    assert isinstance(frame, SparkFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _checked(reply: Any) -> Any:
    if isinstance(reply, StepwellError):
        raise reply
    return reply
