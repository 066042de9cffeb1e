"""The `spark` engine: units are tasks of one RDD, a frame is a DataFrame, a shuffle is `repartition` + `sortWithinPartitions`.

Needs Java 17 or newer and pyspark. Works with `local[n]`, under spark-submit, and against a master (`address`). All I/O happens
inside the tasks through the project's own writer, so no Hadoop file system is needed. Every batch is cast to the declared schema
at both edges: Spark has no unsigned, half or fixed-size list types and names list items in its own way.

Cost: a frame is computed and cached when it is made, and read once more for its size, on which the partitions of the next
shuffle depend. An exchange that breaks restarts whole; what `run_units` and `align` commit stays committed.
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.engines import spark_session, spark_tasks
from core.engines.columns import check_keys, joined_schema, sortable, sorted_table
from core.engines.contract import BATCH_BYTES, PARTITION_BYTES, Align, ChunkFn, Frame, Report, Skew, Unit, UnitFn
from core.engines.spill import Cut, align_partitions, partitions_for, shards_of
from core.errors import StageError, StepwellError
from core.progress import Display, quiet
from core.stage import Resources

# pyspark itself is imported above all by spark_session, which says what to do where it is missing
from pyspark.sql import DataFrame, SparkSession  # isort: skip
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows  # isort: skip


@dataclass(frozen=True)
class SparkFrame:
    """A cached DataFrame and the Arrow schema its rows have for us."""

    schema: pa.Schema
    rows: DataFrame
    bytes: int
    cached: DataFrame | None = None  # what Spark keeps of it


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
        self._cached: list[DataFrame] = []
        self._dropped: dict[str, int] = {}
        self.peak_memory_bytes = 0

    def begin(self, scratch: str | Path) -> None:
        self._dropped, self.peak_memory_bytes = {}, 0

    def clear(self) -> None:
        for rows in self._cached:
            rows.unpersist()
        self._cached = []

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
            tasks = self._session.sparkContext.parallelize(list(units), len(units))
            reports = [_checked(r) for r in _driver(tasks.map(partial(spark_tasks.unit, fn, label)).collect, label)]
            advance(sum(r.docs for r in reports), sum(r.bytes for r in reports), len(units))
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> SparkFrame:
        pickled = [(bytearray(pickle.dumps(u)),) for u in units]
        tasks = self._session.sparkContext.parallelize(pickled, max(1, len(pickled)))
        rows = self._session.createDataFrame(tasks, "unit binary")
        return self._frame(rows, partial(spark_tasks.scan, fn, schema, label), schema, label)

    def table(self, table: pa.Table) -> SparkFrame:
        rows = self._session.createDataFrame(spark_tasks.unknown(table, table.schema))
        return SparkFrame(table.schema, rows, table.nbytes)

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> SparkFrame:
        source = _of(frame)
        return self._frame(source.rows, partial(spark_tasks.mapped, fn, source.schema, schema), schema, label)

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
        rows = sources[0].rows
        for other in sources[1:]:
            rows = rows.unionByName(other.rows)
        keys = [*by, *order]
        if combine is not None:
            rows = _mapped(rows, partial(spark_tasks.combined, combine, given, keys), given, label)
        partitions = partitions_for(sum(f.bytes for f in sources), self.partition_bytes)
        rows = rows.repartition(partitions, *[_column(given, k) for k in by])
        rows = rows.sortWithinPartitions(*[_column(given, k).asc_nulls_last() for k in keys])
        cut = Cut(tuple(by), tuple(order), partitions, None, combine, max_rows_per_key)
        capped = max_rows_per_key is not None
        return self._frame(rows, partial(spark_tasks.reduced, fn, given, schema, cut), schema, label, capped)

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> SparkFrame:
        a, b = _of(left), _of(right)
        schema = joined_schema(a.schema, b.schema, on, label)
        check_keys(a.schema, on)
        partitions = partitions_for(max(a.bytes, b.bytes), self.partition_bytes)
        self._session.conf.set("spark.sql.shuffle.partitions", partitions)
        keys = {b.schema.names.index(k): _name(a.schema, k) for k in on}
        right_rows = b.rows.toDF(*[keys.get(i, f"r{i}") for i in range(len(b.schema))])
        rows = a.rows.join(right_rows, list(keys.values()), how.replace(" ", "_"))
        added = [f"r{i}" for i in range(len(b.schema)) if i not in keys]
        rows = rows.select(*spark_tasks.names(a.schema), *added).toDF(*spark_tasks.names(schema))
        return self._frame(rows, partial(spark_tasks.mapped, spark_tasks.same, schema, schema), schema, label)

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        partitions = align_partitions(source.bytes, self.partition_bytes, target)
        cut = Cut((), (), partitions, target)
        schema = source.schema
        tag = partial(spark_tasks.tagged, schema, cut)
        tagged = spark_tasks.with_partition(schema)
        rows = _mapped(source.rows, tag, tagged, target.label)

        def work(group: pa.Table) -> pa.Table:  # Spark reads the signature, so no partial
            return spark_tasks.aligned(schema, target, partitions, group)

        self._session.conf.set("spark.sql.shuffle.partitions", partitions)
        replies = rows.groupBy(_name(tagged, spark_tasks.PARTITION)).applyInArrow(
            work, spark_tasks.spark_struct(spark_tasks.REPLY)
        )
        made = dict(pickle.loads(reply[0]) for reply in _driver(replies.collect, target.label))
        for reply in made.values():
            _checked(reply)
        # Spark calls nothing for a partition that no row fell into.
        empty = [Unit(str(p), shards_of(p, partitions, target)) for p in range(partitions) if p not in made]
        rest = self.run_units(partial(spark_tasks.write_empty, schema, target), empty, target.label)
        made |= {int(report.unit): report.value for report in rest}
        return [report for p in sorted(made) for report in made[p]]

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        source = _of(frame)
        work = partial(spark_tasks.folded, fn, merge, source.schema)
        replies = _mapped(source.rows, work, spark_tasks.REPLY, label)
        values = [pickle.loads(r[0]) for r in _driver(replies.collect, label)]
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0] if values else None

    def persist(self, frame: Frame) -> Frame:
        return frame  # every frame is cached when it is made

    def release(self, frame: Frame) -> None:
        gone = _of(frame).cached
        if gone is not None:
            gone.unpersist()
            self._cached = [rows for rows in self._cached if rows is not gone]

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        table = spark_tasks.known(_driver(source.rows.toArrow, "collect"), source.schema)
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return dict(self._dropped)

    def skewed(self) -> dict[str, Skew]:
        """Nothing: this engine does not look at single keys."""
        return {}

    def close(self) -> None:
        self.clear()
        if self._ours:
            spark_session.end_session(self._session)

    def _frame(self, rows: DataFrame, work: Any, schema: pa.Schema, label: str, capped: bool = False) -> SparkFrame:
        """A frame that is computed here and now, together with its size and, where `work` caps, the rows that it cut."""
        whole = spark_tasks.with_lost(schema) if capped else schema
        made = _mapped(rows, work, whole, label).persist()
        self._cached.append(made)
        with self.display.task(label, 1, 0) as advance:
            facts = _driver(made.mapInArrow(partial(spark_tasks.sized, capped), "size long, lost long").collect, label)
            advance(0, 0, 1)
        if lost := sum(int(fact[1]) for fact in facts):
            self._dropped[label] = self._dropped.get(label, 0) + lost
        if capped:
            made = made.filter(_column(whole, spark_tasks.LOST).isNull()).drop(_name(whole, spark_tasks.LOST))
        return SparkFrame(schema, made, sum(int(fact[0]) for fact in facts), self._cached[-1])


def _mapped(rows: DataFrame, work: Any, schema: pa.Schema, label: str) -> DataFrame:
    """`work` over the batches of each partition, giving rows of `schema`."""
    return rows.mapInArrow(partial(spark_tasks.guarded, label, work), spark_tasks.spark_struct(schema))


def _name(schema: pa.Schema, column: str) -> str:
    """What a column is called within Spark."""
    return spark_tasks.names(schema)[schema.names.index(column)]


def _column(schema: pa.Schema, column: str) -> Any:
    return F.col(_name(schema, column))


def _of(frame: Frame) -> SparkFrame:
    assert isinstance(frame, SparkFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _checked(reply: Any) -> Any:
    if isinstance(reply, StepwellError):
        raise reply
    return reply


def _driver(call: Callable[[], Any], label: str) -> Any:
    """`call()`, with Spark's exceptions turned into ours."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return call()
    except (Py4JError, PySparkException) as e:
        ours = spark_tasks.carried(str(e))
        if ours is not None:
            raise ours from None
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise StageError(f"{label}: Spark gave up: {lines[0][:500]}; run with --debug for its whole message") from e
