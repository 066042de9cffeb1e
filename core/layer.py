"""The one writer of layers: same rows in the same order as the documents shard, committed by one rename.

A layer shard's file metadata names the documents it was made from (`documents`), the run that made it (`unit`), and the hash of
its logical content (`content`). That metadata is the commit record: a killed run finds it and does not compute the shard again.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from core.dataset import Dataset, Shard
from core.errors import StageError
from core.hashing import TableHash
from core.schema import LAYER_HEAD, conform


def layer_schema(own: pa.Schema) -> pa.Schema:
    """`computed` and `error`, then the stage's own columns, all nullable."""
    return pa.schema([*LAYER_HEAD, *(f.with_nullable(True) for f in own)])


def write_layer(
    dataset: Dataset,
    layer: str,
    shard: Shard,
    own: pa.Schema,
    batches: Iterable[pa.Table | pa.RecordBatch],
    unit: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one layer shard and return its note: rows, content, documents, unit, columns, and what `extra` holds."""
    schema = layer_schema(own)
    note: dict[str, Any] = {**(extra or {}), "documents": shard.content, "unit": unit, "columns": schema.names}
    running = TableHash(schema)
    counts = {"computed": 0, "rejected": 0, "rows": 0}

    def checked() -> Iterator[pa.Table]:
        for batch in batches:
            table = conform(pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch, schema)
            running.update(table)
            counts["rows"] += table.num_rows
            counts["computed"] += table.column("computed").combine_chunks().true_count
            counts["rejected"] += table.num_rows - table.column("error").null_count
            yield table
        if counts["rows"] != shard.rows:
            raise StageError(
                f"{layer}: wrote {counts['rows']} rows beside {shard.rows} documents of shard {shard.name}"
            )
        note.update(counts, content=running.hexdigest())

    dataset.root.write_table(dataset.layer_name(layer, shard), checked(), schema, note)
    return note


def committed(dataset: Dataset, layer: str, shard: Shard, unit: str) -> dict[str, Any] | None:
    """The note of a layer shard that this very unit has committed before, else None."""
    note = dataset.root.note(dataset.layer_name(layer, shard))
    return note if note and note["unit"] == unit and note["documents"] == shard.content else None


def layer_output(note: dict[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of a layer shard."""
    return {key: note[key] for key in ("rows", "content", "computed", "rejected", "documents")}


def empty_rows(own: pa.Schema, rows: int) -> pa.Table:
    """`rows` layer rows that were not computed."""
    schema = layer_schema(own)
    columns = [pa.array([False] * rows, pa.bool_()), *(pa.nulls(rows, f.type) for f in list(schema)[1:])]
    return pa.Table.from_arrays(columns, schema=schema)
