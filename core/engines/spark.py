"""The `spark` engine: units are tasks of one RDD, a frame is a DataFrame, a shuffle is `repartition` + `sortWithinPartitions`.

Needs Java 17 or newer and pyspark. Works with `local[n]`, under spark-submit, and against a master (`address`). All I/O happens
inside the tasks through the project's own writer, so no Hadoop file system is needed. Every batch is cast to the declared schema
at both edges: Spark has no unsigned, half or fixed-size list types and names list items in its own way.
"""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from core.engines.columns import capped, shard_partition, sortable, sorted_table
from core.engines.contract import Align, ChunkFn, Frame, Report, Unit, UnitFn, key_aligned, write_shards
from core.engines.measure import measured
from core.engines.spill import partitions_for
from core.errors import ConfigError, StageError, StepwellError
from core.progress import Display, quiet

REPLY = pa.schema([("reply", pa.binary())])
BATCH_ROWS = 20_000  # rows of one Arrow batch between Spark and Python; frames hold short rows, documents never travel


@dataclass(frozen=True)
class SparkFrame:
    """A cached DataFrame and the Arrow schema its rows have for us."""

    schema: pa.Schema
    rows: DataFrame
    bytes: int


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
    ) -> None:
        self.display = display or quiet()
        self._ours = SparkSession.getActiveSession() is None
        self._session = _start(scratch, max(1, workers), memory_gb, address)
        self._context = self._session.sparkContext
        self._cached: list[DataFrame] = []
        self._lost: dict[str, Any] = {}
        self.peak_memory_bytes = 0

    def begin(self, scratch: str | Path) -> None:
        self._lost, self.peak_memory_bytes = {}, 0

    def clear(self) -> None:
        for rows in self._cached:
            rows.unpersist()
        self._cached = []

    def run_units(self, fn: UnitFn, units: Sequence[Unit], label: str, stall_s: float = 600.0) -> list[Report]:
        if not units:
            return []
        with self.display.task(label, len(units), sum(u.bytes for u in units)) as advance:
            found = self._driver(
                self._context.parallelize(list(units), len(units)).map(partial(_unit, fn)).collect, label
            )
            reports: list[Report] = [_report(f, label) for f in found]
            advance(sum(r.docs for r in reports), sum(r.bytes for r in reports), len(units))
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(r.peak_memory_bytes for r in reports)])
        return reports

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> SparkFrame:
        pickled = [(bytearray(pickle.dumps(u)),) for u in units]
        rows = self._session.createDataFrame(self._context.parallelize(pickled, max(1, len(pickled))), "reply binary")
        return self._frame(rows, partial(_scan, fn, schema), schema, label)

    def table(self, table: pa.Table) -> SparkFrame:
        rows = self._session.createDataFrame(table.cast(_for_spark(table.schema)))
        return SparkFrame(table.schema, rows, table.nbytes)

    def map(self, frame: Frame, fn: ChunkFn, schema: pa.Schema, label: str = "map") -> SparkFrame:
        source = _of(frame)
        return self._frame(source.rows, partial(_map, fn, source.schema, schema), schema, label)

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
        lost = self._lost.setdefault(label, self._context.accumulator(0))
        rows = sources[0].rows
        for other in sources[1:]:
            rows = rows.unionByName(other.rows)
        keys = [*by, *order]
        if combine is not None:
            rows = rows.mapInArrow(partial(_combine, combine, given, keys), from_arrow_schema(_for_spark(given)))
        partitions = partitions_for(sum(f.bytes for f in sources))
        rows = rows.repartition(partitions, *by).sortWithinPartitions(*[F.asc_nulls_last(k) for k in keys])
        work = partial(_reduce, fn, given, schema, tuple(by), keys, combine, max_rows_per_key, lost)
        return self._frame(rows, work, schema, label)

    def join(self, left: Frame, right: Frame, on: Sequence[str], how: str = "inner", label: str = "join") -> SparkFrame:
        a, b = _of(left), _of(right)
        added = [f.with_nullable(True) for f in b.schema if f.name not in on]
        schema = pa.schema([*a.schema, *added])
        self._session.conf.set("spark.sql.shuffle.partitions", partitions_for(max(a.bytes, b.bytes)))
        rows = a.rows.join(b.rows, list(on), how.replace(" ", "_")).select(*schema.names)
        return self._frame(rows, partial(_map, _same, schema, schema), schema, label)

    def align(self, frame: Frame, target: Align) -> list[Report]:
        source = _of(frame)
        shards = max(1, target.shards)
        partitions = min(partitions_for(source.bytes) * 4, shards)
        tagged = pa.schema([*source.schema, ("partition", pa.int64())])
        rows = source.rows.mapInArrow(
            partial(_tag, source.schema, tagged, shards, partitions), from_arrow_schema(_for_spark(tagged))
        )
        schema = source.schema

        def work(group: pa.Table) -> pa.Table:  # Spark reads the signature, so no partial
            return _align(schema, target, partitions, group)

        self._session.conf.set("spark.sql.shuffle.partitions", partitions)
        replies = rows.groupBy("partition").applyInArrow(work, from_arrow_schema(REPLY))
        reports: list[Report] = []
        written: set[int] = set()
        for reply in self._driver(replies.collect, target.label):
            partition, made = pickle.loads(reply[0])
            written.add(partition)
            reports += made
        return reports + self._empty_partitions(source.schema, target, partitions, written)

    def fold(
        self, frame: Frame, fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], label: str = "fold"
    ) -> Any:
        source = _of(frame)
        replies = source.rows.mapInArrow(partial(_fold, fn, merge, source.schema), from_arrow_schema(REPLY))
        values = [pickle.loads(r[0]) for r in self._driver(replies.collect, label)]
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0] if values else None

    def persist(self, frame: Frame) -> Frame:
        return frame  # every frame is cached when it is made

    def collect(self, frame: Frame) -> pa.Table:
        source = _of(frame)
        table = self._driver(source.rows.toArrow, "collect").cast(source.schema)
        return sorted_table(table, sortable(source.schema))

    def dropped_rows(self) -> dict[str, int]:
        return {label: int(a.value) for label, a in self._lost.items() if a.value}

    def close(self) -> None:
        self.clear()
        if self._ours:
            self._session.stop()

    def _frame(self, rows: DataFrame, work: Any, schema: pa.Schema, label: str) -> SparkFrame:
        """A cached frame; computing it once also tells its size, on which the next shuffle's partitions depend."""
        made = rows.mapInArrow(work, from_arrow_schema(_for_spark(schema))).persist()
        self._cached.append(made)
        with self.display.task(label, 1, 0) as advance:
            sizes = self._driver(made.mapInArrow(_size, "size long").collect, label)
            advance(0, 0, 1)
        return SparkFrame(schema, made, sum(int(s[0]) for s in sizes))

    def _empty_partitions(self, schema: pa.Schema, target: Align, partitions: int, written: set[int]) -> list[Report]:
        """The shards of partitions that no row fell into: Spark calls nothing for an empty group."""
        units = [Unit(str(p), _shards_of(p, partitions, target)) for p in range(partitions) if p not in written]
        reports = self.run_units(partial(_write_empty, schema, target), units, target.label)
        return [r for report in reports for r in report.value]

    def _driver(self, call: Callable[[], Any], label: str) -> Any:
        from py4j.protocol import Py4JJavaError
        from pyspark.errors import PySparkException

        try:
            return call()
        except (Py4JJavaError, PySparkException) as e:
            raise StageError(f"{label}: Spark gave up: {_cause(str(e))}; run with --debug for its whole message") from e


def _start(scratch: str | Path, workers: int, memory_gb: float, address: str | None) -> SparkSession:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise ConfigError("spark: no Java found, expected 17 or newer; install a JRE (Debian: openjdk-17-jre-headless)")
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = (
        sys.executable
    )  # or workers start another Python
    paths = os.pathsep.join(p for p in sys.path if p)
    os.environ["PYTHONPATH"] = paths
    builder = (
        SparkSession.builder.appName("stepwell")
        .config("spark.driver.memory", f"{max(1, round(memory_gb * 512))}m")
        .config("spark.driver.bindAddress", "127.0.0.1" if address is None else "0.0.0.0")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.adaptive.enabled", "false")  # the partition count is ours
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH_ROWS)
        .config("spark.executorEnv.PYTHONPATH", paths)
        .config("spark.local.dir", str(scratch))
        .config("spark.sql.session.timeZone", "UTC")
    )
    if address is not None:
        builder = builder.master(address)
    elif "spark.master" not in os.environ.get("PYSPARK_SUBMIT_ARGS", ""):
        builder = builder.master(f"local[{workers}]").config("spark.driver.host", "127.0.0.1")
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _for_spark(schema: pa.Schema) -> pa.Schema:
    """The Arrow schema that Spark itself uses for these columns."""
    return to_arrow_schema(from_arrow_schema(schema))


def _of(frame: Frame) -> SparkFrame:
    assert isinstance(frame, SparkFrame), f"a frame of another engine: {type(frame).__name__}"
    return frame


def _cause(message: str) -> str:
    """The last line of a Spark message that names a Python exception, or its first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "Error: " in line and not line.startswith(("at ", "py4j", "org."))]
    return (ours or lines)[-1 if ours else 0][:500]


def _unit(fn: UnitFn, unit: Unit) -> Any:
    try:
        return measured(fn, unit, _quiet_note)
    except StepwellError as e:
        return unit.name, e


def _report(found: Any, label: str) -> Report:
    if isinstance(found, Report):
        return found
    _, error = found
    raise error


def _quiet_note(docs: int = 0, bytes: int = 0, row: int | None = None) -> None:
    """Spark says for itself whether a worker lives."""


def _tables(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    for batch in batches:
        if batch.num_rows:
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def _out(table: pa.Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches as Spark wants them."""
    yield from table.select(schema.names).cast(schema).cast(_for_spark(schema)).combine_chunks().to_batches(BATCH_ROWS)


def _scan(
    fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for pickled in batch.column(0).to_pylist():
            for made in fn(pickle.loads(pickled)):
                yield from _out(pa.Table.from_batches([made]), schema)


def _same(table: pa.Table) -> pa.Table:
    return table


def _map(
    fn: ChunkFn, given: pa.Schema, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for table in _tables(batches, given):
        yield from _out(fn(table), schema)


def _combine(
    combine: ChunkFn, given: pa.Schema, keys: Sequence[str], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for table in _tables(batches, given):
        yield from _out(combine(sorted_table(table, keys)), given)


def _reduce(
    fn: ChunkFn,
    given: pa.Schema,
    schema: pa.Schema,
    by: tuple[str, ...],
    keys: Sequence[str],
    combine: ChunkFn | None,
    most: int | None,
    lost: Any,
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    for piece in key_aligned(_tables(batches, given), by):
        table = sorted_table(combine(piece), keys) if combine is not None else piece
        if most is not None:
            table, cut = capped(table, by, most)
            lost.add(cut)
        yield from _out(fn(table), schema)


def _tag(
    given: pa.Schema, tagged: pa.Schema, shards: int, partitions: int, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for table in _tables(batches, given):
        partition = shard_partition(table.column("row").to_numpy(), shards, partitions)
        yield from _out(table.append_column("partition", pa.array(partition)), tagged)


def _align(schema: pa.Schema, target: Align, partitions: int, group: pa.Table) -> pa.Table:
    partition = group.column("partition")[0].as_py()
    table = sorted_table(group.select(schema.names).cast(schema), ["row"])
    reports = write_shards(target, table, _shards_of(partition, partitions, target), _quiet_note)
    return pa.table([pa.array([pickle.dumps((partition, reports))], pa.binary())], schema=REPLY)


def _shards_of(partition: int, partitions: int, target: Align) -> list[int]:
    return [s for s in range(target.shards) if s * partitions // max(1, target.shards) == partition]


def _write_empty(schema: pa.Schema, target: Align, unit: Unit, note: Any) -> Report:
    return Report(unit.name, value=write_shards(target, schema.empty_table(), unit.payload, note))


def _fold(
    fn: Callable[[pa.Table], Any],
    merge: Callable[[Any, Any], Any],
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    value = None
    for table in _tables(batches, schema):
        here = fn(table)
        value = here if value is None else merge(value, here)
    if value is not None:
        yield pa.record_batch([pa.array([pickle.dumps(value)], pa.binary())], schema=REPLY)


def _size(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    total = sum(b.nbytes for b in batches)
    yield pa.record_batch([pa.array([total], pa.int64())], names=["size"])
