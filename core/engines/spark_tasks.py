"""What the `spark` engine runs in Spark's Python workers: functions over Arrow batches, cast at both edges, and replies.

A reply is a pickled value in a binary column. Errors of ours travel inside the message of the exception that Spark reports, as
Spark keeps nothing else of it.
"""

import base64
import pickle
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from core.engines.columns import capped, sorted_table
from core.engines.contract import Align, ChunkFn, Report, Unit, UnitFn, key_aligned, write_shards
from core.engines.measure import measured
from core.engines.pool import attempted, failed_unit, quiet_note
from core.engines.spark_session import BATCH_ROWS
from core.engines.spill import Cut, shards_of
from core.errors import ConfigError, StageError, StepwellError

Batches = Iterator[pa.RecordBatch]

REPLY = pa.schema([("reply", pa.binary())])
PARTITION = "partition of align"
LOST = "rows lost to the cap"  # a column whose only non-null value says how many rows of its partition were cut
CARRIED = re.compile(r"stepwell-error:([A-Za-z0-9+/=]+);")


def for_spark(schema: pa.Schema) -> pa.Schema:
    """The Arrow schema that Spark itself uses for these columns; order and equality of values are kept. Columns are known by
    their place, as pyspark reads a dot in a name as a field of a struct and ignores case here and there."""
    plain = pa.schema([pa.field(n, _known_type(f.type)) for n, f in zip(names(schema), schema, strict=True)])
    return to_arrow_schema(from_arrow_schema(plain), timezone="UTC")


def names(schema: pa.Schema) -> list[str]:
    """What the columns are called within Spark."""
    return [f"c{i}" for i in range(len(schema))]


def spark_struct(schema: pa.Schema) -> Any:
    """The same as Spark's own type."""
    return from_arrow_schema(for_spark(schema))


def _known_type(kind: pa.DataType) -> pa.DataType:
    """Spark has no unsigned, half or fixed-size types."""
    t = pa.types
    wider = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.float16(): pa.float32()}
    if t.is_uint64(kind):
        return pa.decimal128(20, 0)
    if t.is_fixed_size_binary(kind):
        return pa.binary()
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return pa.list_(_known_type(kind.value_type))
    if t.is_struct(kind):
        return pa.struct([pa.field(f.name, _known_type(f.type)) for f in kind])
    return wider.get(kind, kind)


def guarded(label: str, work: Callable[[Batches], Batches], batches: Batches) -> Batches:
    """`work(batches)`; what it raises is made to survive the way through Spark."""
    try:
        yield from work(batches)
    except Exception as e:  # noqa: BLE001 - the driver decides what an exception means
        if not isinstance(e, ConfigError | StageError):
            e = failed_unit(label, "of Spark", e, traceback.format_exc())
        raise RuntimeError(f"stepwell-error:{base64.b64encode(pickle.dumps(e)).decode()};") from None


def carried(message: str) -> StepwellError | None:
    """The error of ours that a message of Spark's carries."""
    found = CARRIED.search(message)
    return pickle.loads(base64.b64decode(found[1])) if found else None


def unit(fn: UnitFn, label: str, unit: Unit) -> Report | StepwellError:
    """A unit's report, or why there is none: other units go on."""
    try:
        return attempted(partial(measured, fn, unit, quiet_note), label, unit.name)
    except StepwellError as e:
        return e


def tables(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """What Spark hands in, as the declared schema."""
    for batch in batches:
        if batch.num_rows:
            yield known(pa.Table.from_batches([batch]), schema)


def known(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of Spark's as the declared schema."""
    return table.select(names(schema)).rename_columns(schema.names).cast(schema)


def unknown(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of the declared schema as Spark wants it."""
    return table.select(schema.names).cast(schema).rename_columns(names(schema)).cast(for_spark(schema))


def out(table: pa.Table, schema: pa.Schema) -> Batches:
    """The declared schema, as Spark wants it."""
    yield from unknown(table, schema).combine_chunks().to_batches(BATCH_ROWS)


def scan(fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, label: str, batches: Batches) -> Batches:
    for batch in batches:
        for pickled in batch.column(0).to_pylist():
            unit: Unit = pickle.loads(pickled)
            try:
                for made in fn(unit):
                    yield from out(pa.Table.from_batches([made]), schema)
            except (ConfigError, StageError):
                raise
            except Exception as e:
                raise failed_unit(label, unit.name, e, traceback.format_exc()) from e


def same(table: pa.Table) -> pa.Table:
    return table


def mapped(fn: ChunkFn, given: pa.Schema, schema: pa.Schema, batches: Batches) -> Batches:
    for table in tables(batches, given):
        yield from out(fn(table), schema)


def combined(combine: ChunkFn, given: pa.Schema, keys: Sequence[str], batches: Batches) -> Batches:
    for table in tables(batches, given):
        yield from out(combine(sorted_table(table, keys)), given)


def reduced(fn: ChunkFn, given: pa.Schema, schema: pa.Schema, cut: Cut, batches: Batches) -> Batches:
    """Sorted rows of one partition. With a cap, a last row says how many rows were cut."""
    lost = 0
    most = cut.max_rows_per_key
    marked = with_lost(schema)
    for piece in key_aligned(tables(batches, given), cut.by):
        table = sorted_table(cut.combine(piece), [*cut.by, *cut.order]) if cut.combine is not None else piece
        if most is None:
            yield from out(fn(table), schema)
            continue
        table, here = capped(table, cut.by, most)
        lost += here
        made = fn(table).select(schema.names).cast(schema)
        yield from out(made.append_column(LOST, pa.nulls(made.num_rows, pa.int64())), marked)
    if most is not None:
        note = [*(pa.nulls(1, f.type) for f in schema), pa.array([lost])]
        yield from out(pa.Table.from_arrays(note, schema=marked), marked)


def with_lost(schema: pa.Schema) -> pa.Schema:
    """`schema`, nullable throughout, with the column LOST."""
    return pa.schema([*(f.with_nullable(True) for f in schema), (LOST, pa.int64())])


def tagged(given: pa.Schema, cut: Cut, batches: Batches) -> Batches:
    """Rows with the number of the align partition that writes them."""
    schema = with_partition(given)
    for table in tables(batches, given):
        yield from out(table.append_column(PARTITION, pa.array(cut.partition_of(table))), schema)


def with_partition(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, (PARTITION, pa.int64())])


def aligned(schema: pa.Schema, target: Align, partitions: int, group: pa.Table) -> pa.Table:
    """Write the shards of one partition; the reply is (partition, reports or an error)."""
    group = known(group, with_partition(schema))
    partition = group.column(PARTITION)[0].as_py()
    table = sorted_table(group.select(schema.names), ["row"])
    shards = shards_of(partition, partitions, target)
    reply: Any
    try:
        reply = attempted(partial(write_shards, target, table, shards, quiet_note), target.label, str(partition))
    except StepwellError as e:
        reply = e
    return pa.table([pa.array([pickle.dumps((partition, reply))], pa.binary())], schema=for_spark(REPLY))


def write_empty(schema: pa.Schema, target: Align, unit: Unit, note: Any) -> Report:
    return Report(unit.name, value=write_shards(target, schema.empty_table(), unit.payload, note))


def folded(
    fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], schema: pa.Schema, batches: Batches
) -> Batches:
    value = None
    for table in tables(batches, schema):
        here = fn(table)
        value = here if value is None else merge(value, here)
    if value is not None:
        yield pa.record_batch([pa.array([pickle.dumps(value)], pa.binary())], schema=for_spark(REPLY))


def sized(capped: bool, batches: Batches) -> Batches:
    """One row: bytes, and the rows that were cut, which the last column of a capped frame tells."""
    size = lost = 0
    for batch in batches:
        size += batch.nbytes
        if capped:
            lost += sum(batch.column(batch.num_columns - 1).drop_null().to_pylist())
    yield pa.record_batch([pa.array([size], pa.int64()), pa.array([lost], pa.int64())], names=["size", "lost"])
