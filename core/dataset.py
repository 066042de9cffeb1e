"""Datasets: the documents of one source and the layers beside them, read as aligned batches.

Columns are asked for by name: `text` is a column of the documents, `language.score` a column of the layer `language`. Reading
checks that a layer was made from just these documents.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from core.engines.contract import BATCH_BYTES
from core.errors import StageError
from core.manifest import read_manifest
from core.schema import DOCUMENTS, LAYER_HEAD
from core.storage import Root

DOCUMENTS_INSTANCE = "documents"  # the manifest of whichever stage made the documents


@dataclass(frozen=True)
class Shard:
    """One immutable file of documents."""

    name: str
    rows: int
    text_bytes: int
    content: str  # fingerprint; layers made from this shard carry it


@dataclass(frozen=True)
class Dataset:
    """The documents of one source. `ordinal` is its place in the config (see `core.rows`)."""

    root: Root
    name: str
    ordinal: int
    shards: tuple[Shard, ...]
    generation: int = 0
    absent: Mapping[str, pa.Schema] = field(default_factory=dict)  # layers that by config are not computed here

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(s.text_bytes for s in self.shards)

    def documents_name(self, shard: Shard) -> str:
        return f"datasets/{self.name}/documents/{shard.name}.parquet"

    def layer_name(self, layer: str, shard: Shard) -> str:
        return f"datasets/{self.name}/layers/{layer}/{shard.name}.parquet"

    def read(self, shard: Shard, columns: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[pa.RecordBatch]:
        """Batches of at most about `batch_bytes` with the named columns, in row order. Layer columns keep their dotted
        names. At least one row a batch; a shard without rows yields nothing."""
        own = [c for c in columns if c in DOCUMENTS.names]
        layers = self._layer_columns(shard, [c for c in columns if c not in DOCUMENTS.names])
        if not own:
            table = pa.table({c: layers[c] for c in columns})
            for batch in table.combine_chunks().to_batches():
                yield from _bounded(batch, batch_bytes)
            return
        start = 0
        for batch in self._documents(shard, own, batch_bytes):
            arrays = {c: layers[c].slice(start, batch.num_rows).combine_chunks() for c in layers}
            arrays.update({c: batch.column(c) for c in own})
            yield pa.RecordBatch.from_arrays([_one(arrays[c]) for c in columns], names=list(columns))
            start += batch.num_rows

    def read_table(self, shard: Shard, columns: Sequence[str]) -> pa.Table:
        """A whole shard's columns at once: for layers and short columns, not for text."""
        batches = list(self.read(shard, columns))
        if batches:
            return pa.Table.from_batches(batches)
        layers = self._layer_columns(shard, [c for c in columns if c not in DOCUMENTS.names])
        types = {c: DOCUMENTS.field(c).type if c in DOCUMENTS.names else layers[c].type for c in columns}
        return pa.table({c: pa.array([], types[c]) for c in columns})

    def _documents(self, shard: Shard, columns: list[str], batch_bytes: int) -> Iterator[pa.RecordBatch]:
        with self.root.parquet(self.documents_name(shard)) as f:
            stored = json.loads((f.metadata.metadata or {}).get(b"stepwell", b"{}"))
            if stored.get("content", shard.content) != shard.content:
                raise StageError(
                    f"{self.name}: shard {shard.name} is not the one that the documents manifest names (fingerprint "
                    f"{stored['content'][:8]}, expected {shard.content[:8]}): an ingest was stopped; run it again"
                )
            for group in range(f.num_row_groups):
                table = f.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
                for batch in table.to_batches():
                    yield from _bounded(batch, batch_bytes)

    def _layer_columns(self, shard: Shard, columns: list[str]) -> dict[str, pa.ChunkedArray]:
        wanted: dict[str, list[str]] = {}
        for dotted in columns:
            layer, _, column = dotted.rpartition(".")
            if not layer:
                raise StageError(
                    f"{self.name}: no column {dotted!r}, expected one of {DOCUMENTS.names} or layer.column"
                )
            wanted.setdefault(layer, []).append(column)
        found = {}
        for layer, names in wanted.items():
            table = self.read_layer(layer, shard, names)
            for column in names:
                found[f"{layer}.{column}"] = table.column(column)
        return found

    def read_layer(self, layer: str, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
        """One layer shard. A layer of other documents is an error, never silently joined; one that by config is not computed
        for this dataset is null in every row."""
        if layer in self.absent:
            return _uncomputed(self.absent[layer], shard.rows, columns)
        name = self.layer_name(layer, shard)
        note = self.root.note(name)
        if note is None:
            raise StageError(
                f"{self.name}: layer {layer!r} has no shard {shard.name}; run the stage that makes it first"
            )
        if note["documents"] != shard.content:
            raise StageError(
                f"{self.name}: layer {layer!r} of shard {shard.name} was made from other documents "
                f"(fingerprint {note['documents'][:8]}, expected {shard.content[:8]}); run its stage again"
            )
        missing = [c for c in columns or () if c not in note["columns"]]
        if missing:
            raise StageError(f"{self.name}: layer {layer!r} has no column {missing[0]!r}; it has {note['columns']}")
        return self.root.read_table(name, columns)

    def layer_columns(self, layer: str) -> list[str]:
        """The stage's own columns of a layer, without `computed` and `error`; empty if the layer is not there."""
        note = self.root.note(self.layer_name(layer, self.shards[0])) if self.shards else None
        head = {f.name for f in LAYER_HEAD}
        return [c for c in note["columns"] if c not in head] if note else []


def open_dataset(root: Root, name: str, ordinal: int) -> Dataset | None:
    """The dataset as its documents manifest lists it, or None if no documents were committed yet."""
    manifest = read_manifest(root, DOCUMENTS_INSTANCE, name)
    if manifest is None:
        return None
    shards = tuple(
        Shard(shard, out["rows"], out["text_bytes"], out["content"]) for shard, out in sorted(manifest.outputs.items())
    )
    return Dataset(root, name, ordinal, shards, manifest.accounts.get("generation", 0))


def _uncomputed(schema: pa.Schema, rows: int, columns: Sequence[str] | None) -> pa.Table:
    """A layer of rows that nobody computed."""
    names = list(columns or schema.names)
    arrays = [pa.repeat(False, rows) if n == "computed" else pa.nulls(rows, schema.field(n).type) for n in names]
    return pa.table(arrays, schema=pa.schema([schema.field(n) for n in names]))


def _bounded(batch: pa.RecordBatch, limit: int) -> Iterator[pa.RecordBatch]:
    """Split a batch until each part is below `limit` or has one row."""
    if batch.nbytes <= limit or batch.num_rows <= 1:
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _bounded(batch.slice(0, half), limit)
    yield from _bounded(batch.slice(half), limit)


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column
