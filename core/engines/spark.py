"""The `spark` engine: units are tasks of one RDD, a frame is a DataFrame, a shuffle is `repartition` + `sortWithinPartitions`.

Needs Java 17 or newer and pyspark. Works with `local[n]`, under spark-submit, and against a master (`address`). All I/O happens
inside the tasks through the project's own writer, so no Hadoop file system is needed.

Cost: a frame is computed and cached when it is made, but for a join, which Spark runs within the verb that reads it. Spark
sorts, and spills what it sorts; a Python worker holds a few batches, and of an align one shard. A frame is freed when nothing
refers to it any more. Functions with more than 1 MB of state are broadcast, by pyspark itself. An exchange whose run is killed
starts again; what `run_units` and `align` commit stays committed.
"""

import contextlib
import pickle
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines import spark_session, spark_tasks, spark_types, spark_units
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
from core.engines.spill import Cut, align_partitions, partitions_for
from core.errors import StageError, StepwellError
from core.progress import Display, quiet
from core.rows import ROW_BITS, SHARD_BITS
from core.stage import Resources

# pyspark itself is imported above all by spark_session, which says what to do where it is missing
from py4j.protocol import Py4JError  # isort: skip
from pyspark.sql import DataFrame, SparkSession  # isort: skip
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows  # isort: skip


BROADCAST_BYTES = (
    8 << 20
)  # a right side of a join up to here is sent to every executor, whole: Spark's own limit is 10 MB


@dataclass(eq=False)
class SparkFrame:
    """A DataFrame and the Arrow schema its rows have for us. Without `bytes` it is not computed yet."""

    schema: pa.Schema
    rows: DataFrame
    bytes: int | None = None
    sources: tuple["SparkFrame", ...] = ()  # kept cached as long as this one reads them


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
        self._session = spark_session.start_session(Path(scratch), max(1, workers), memory_gb, address)
        self._watch = spark_units.Watch(self._session.sparkContext)
        self._frees: list[Any] = []
        self._dropped: dict[str, int] = {}
        self._skews = Skews()
        self.peak_memory_bytes = 0

    def begin(self, scratch: str | Path) -> None:
        self._dropped, self._skews, self.peak_memory_bytes = {}, Skews(), 0

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
            work = partial(spark_units.run, self._session.sparkContext, fn, units, label, stall_s, resources)
            reports = [_checked(r) for r in self._driver(work, label, units)]
            advance(sum(r.docs for r in reports), sum(r.bytes for r in reports), len(units))
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> SparkFrame:
        pickled = [(bytearray(pickle.dumps(u)),) for u in units]
        tasks = self._session.sparkContext.parallelize(pickled, max(1, len(pickled)))
        rows = self._session.createDataFrame(tasks, "unit binary")
        return self._frame(rows, partial(spark_tasks.scan, fn, label), schema, label)

    def table(self, table: pa.Table) -> SparkFrame:
        rows = self._session.createDataFrame(spark_types.unknown(table, table.schema))
        return SparkFrame(table.schema, rows, table.nbytes)

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> SparkFrame:
        source = _of(frame)
        return self._frame(source.rows, partial(spark_tasks.mapped, fn, source.schema), schema, label)

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
        keys = [*by, *order]
        if (
            combine is not None
        ):  # a frame of its own, which is small: its errors are answers, and its size decides below
            work = partial(spark_tasks.combined, combine, given, keys)
            sources = [self._frame(f.rows, work, given, label) for f in sources]
        partitions = partitions_for(sum(self._bytes(f) for f in sources), self.partition_bytes)
        rows = sources[0].rows
        for other in sources[1:]:
            rows = rows.unionByName(other.rows)
        rows = rows.repartition(partitions, *[_column(given, k) for k in by])
        rows = rows.sortWithinPartitions(*[_column(given, k).asc_nulls_last() for k in keys])
        cut = Cut(tuple(by), tuple(order), partitions, None, combine, max_rows_per_key, self.partition_bytes)
        return self._frame(rows, partial(spark_tasks.reduced, fn, given, cut), schema, label)

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> SparkFrame:
        a, b = _of(left), _of(right)
        schema = joined_schema(a.schema, b.schema, on, label)
        check_keys(a.schema, on)
        partitions = partitions_for(max(self._bytes(a), self._bytes(b)), self.partition_bytes)
        keys = {b.schema.names.index(k): _name(a.schema, k) for k in on}
        right_rows = b.rows.toDF(*[keys.get(i, f"r{i}") for i in range(len(b.schema))])
        left_rows = a.rows
        if self._bytes(b) <= BROADCAST_BYTES:
            right_rows = F.broadcast(right_rows)
        else:  # both sides arrive partitioned alike, so that the planner adds no exchange of its own
            left_rows, right_rows = (rows.repartition(partitions, *keys.values()) for rows in (left_rows, right_rows))
        rows = left_rows.join(right_rows, list(keys.values()), how.replace(" ", "_"))
        added = [f"r{i}" for i in range(len(b.schema)) if i not in keys]
        rows = rows.select(*spark_types.names(a.schema), *added).toDF(*spark_types.names(schema))
        return SparkFrame(schema, rows, None, (a, b))

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        partitions = align_partitions(self._bytes(source), self.partition_bytes, target)
        place = F.shiftright(_column(source.schema, "row"), ROW_BITS)  # dataset and shard
        self._check_places(source, place, target)
        rows = source.rows.repartition(partitions, place).sortWithinPartitions(_column(source.schema, "row"))
        made: dict[int, Report] = dict(
            self._replies(rows, partial(spark_tasks.aligned, source.schema, target), target.label)
        )
        empty = [s for s in range(target.shards) if s not in made]
        units = [Unit(str(p), empty[p::partitions]) for p in range(min(partitions, len(empty)))]
        for report in self.run_units(partial(spark_tasks.write_empty, source.schema, target), units, target.label):
            made |= dict(report.value)
        return [made[shard] for shard in range(target.shards)]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        source = _of(frame)
        values = self._replies(source.rows, partial(spark_tasks.folded, fn, merge, source.schema), label)
        return merged(values, merge)

    def persist(self, frame: Frame) -> Frame:
        self._bytes(_of(frame))
        return frame

    def release(self, frame: Frame) -> None:
        """Rows go when nothing refers to the frame any more."""

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        table = spark_types.known(self._driver(source.rows.toArrow, "collect"), source.schema)
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def skewed(self) -> dict[str, Skew]:
        return self._skews.by_label()

    def close(self) -> None:
        self.clear()
        self._watch.close()
        if self._ours:
            spark_session.end_session(self._session)

    def _frame(self, rows: DataFrame, work: spark_tasks.Work, schema: pa.Schema, label: str) -> SparkFrame:
        """A frame that is computed here and now, together with its size and the rows that a cap cut."""
        whole = spark_tasks.with_facts(schema)
        made = _mapped(rows, partial(spark_tasks.framed, label, work, schema), whole)
        facts = _column(whole, spark_tasks.FACTS)
        frame = self._cached(SparkFrame(schema, made))
        with self.display.task(label, 1, 0) as advance:
            replies = self._driver(made.filter(facts.isNotNull()).select(facts).collect, label)
            told = [_checked(pickle.loads(reply[0])) for reply in replies]
            advance(0, 0, 1)
        if lost := sum(fact.lost for fact in told):
            self._dropped[label] = self._dropped.get(label, 0) + lost
        self._skews.add(label, (fact.told.skew for fact in told), self.partition_bytes)
        frame.rows = made.filter(facts.isNull()).drop(_name(whole, spark_tasks.FACTS))
        frame.bytes = sum(fact.bytes for fact in told)
        return frame

    def _cached(self, frame: SparkFrame) -> SparkFrame:
        """The frame, whose rows are kept once they are computed, as long as somebody holds it."""
        free = weakref.finalize(frame, _free, frame.rows.persist())
        free.atexit = False
        self._frees = [f for f in self._frees if f.alive] + [free]
        return frame

    def _bytes(self, frame: SparkFrame) -> int:
        """The size of a frame, which is computed if it was not yet."""
        if frame.bytes is None:
            self._cached(frame)
            self._driver(frame.rows.count, "join")
            plan = frame.rows.select("*")._jdf.queryExecution().optimizedPlan()
            frame.bytes, frame.sources = int(str(plan.stats().sizeInBytes())), ()
        return frame.bytes

    def _replies(self, rows: DataFrame, work: Any, label: str) -> list[Any]:
        """The values that `work` gives for the partitions."""
        answers = _mapped(rows, partial(spark_tasks.replied, label, work), spark_tasks.REPLY)
        return [_checked(pickle.loads(answer[0])) for answer in self._driver(answers.collect, label)]

    def _check_places(self, source: SparkFrame, place: Any, target: Align) -> None:
        """StageError for rows outside the target, before anything is written."""
        first = target.dataset << SHARD_BITS
        strange = source.rows.filter(~place.between(first, first + target.shards - 1))
        row = _column(source.schema, "row")
        count, example = self._driver(strange.agg(F.count(row), F.min(row)).collect, target.label)[0]
        if count:
            raise StageError(
                f"{target.label}: {count} rows are not of dataset number {target.dataset} with {target.shards} shards, such as "
                f"row {example}; filter the frame before align"
            )

    def _driver(self, call: Callable[[], Any], label: str, units: Sequence[Unit] = ()) -> Any:
        """`call()`, with Spark's exceptions turned into ours."""
        from pyspark.errors import PySparkException

        try:
            return self._watch.call(call)
        except (Py4JError, PySparkException) as e:
            said = str(e)
            if (ours := spark_tasks.carried(said) or self._watch.lost(label)) is not None:
                raise ours from None
            if (lost := spark_units.lost_unit(said, units, label)) is not None:
                raise lost from e
            lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(e).__name__]
            raise StageError(f"{label}: Spark gave up: {lines[0][:500]}; run with --debug for its whole message") from e


def _free(rows: DataFrame) -> None:
    with contextlib.suppress(Py4JError):  # Java has ended, and the rows with it
        rows.unpersist()


def _mapped(rows: DataFrame, work: Any, schema: pa.Schema) -> DataFrame:
    """`work` over the batches of each partition, giving rows of `schema`."""
    return rows.mapInArrow(work, spark_types.spark_struct(schema))


def _name(schema: pa.Schema, column: str) -> str:
    """What a column is called within Spark."""
    return spark_types.names(schema)[schema.names.index(column)]


def _column(schema: pa.Schema, column: str) -> Any:
    return F.col(_name(schema, column))


def _of(frame: Frame) -> SparkFrame:
    assert isinstance(frame, SparkFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _checked(reply: Any) -> Any:
    if isinstance(reply, StepwellError):
        raise reply
    return reply
