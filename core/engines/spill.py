"""The exchange of the local engine: rows in files, cut by partition, so that memory holds one partition at a time.

Map side: a part is read in blocks, each block sorted by (partition, key, order) and written as one run; a sidecar says where in
the file each partition lies. Reduce side: the slices of one partition from all runs are sorted together and handed to `fn` in
tables that never split a key. A sidecar is written last and is the commit record, so a killed shuffle resumes per file.

Cost: every row is written twice (lz4 Arrow) and sorted twice. Memory: about 3 x the larger of a block and a partition.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.columns import capped, partition_hash, shard_partition, sorted_table
from core.engines.contract import PARTITION_BYTES, ChunkFn, key_aligned

SLICE_ROWS = 65_536  # rows of one record batch within a run
IPC = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Part:
    """One committed file of rows. `cuts[p]` = (run, first batch, batches) triples of partition p, for exchange files."""

    path: str
    rows: int
    bytes: int
    cut_rows: int = 0
    cuts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(self.path) as source:
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)

    def partition(self, p: int) -> Iterator[pa.RecordBatch]:
        if p not in self.cuts:
            return
        with pa.memory_map(self.path) as source:
            reader = pa.ipc.open_file(source)
            for _, first, count in self.cuts[p]:
                for i in range(first, first + count):
                    yield reader.get_batch(i)


def slices(parts: Sequence[Part], p: int) -> tuple[Part, ...]:
    """The parts that hold rows of partition `p`, each knowing that partition only: what one reduce unit carries."""
    return tuple(replace(part, cuts={p: part.cuts[p]}) for part in parts if p in part.cuts)


def committed_part(path: str) -> Part | None:
    """The part whose sidecar is there, else None."""
    try:
        stored = json.loads(Path(path + ".json").read_bytes())
    except FileNotFoundError:
        return None
    cuts = {int(p): [tuple(c) for c in where] for p, where in stored.pop("cuts").items()}
    return Part(path, cuts=cuts, **stored)


def write_part(path: str, batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema) -> Part:
    """Write rows as one part."""
    rows = size = 0
    with (
        _whole_file(path) as temporary,
        pa.OSFile(temporary, "wb") as sink,
        pa.ipc.new_file(sink, schema, options=IPC) as out,
    ):
        for batch in batches:
            table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
            table = table.select(schema.names).cast(schema)
            rows, size = rows + table.num_rows, size + table.nbytes
            out.write_table(table, max_chunksize=SLICE_ROWS)
    return _commit(Part(path, rows, size))


@dataclass(frozen=True)
class Cut:
    """How rows are sent to partitions: by key hash, or (shards > 0) by the shard of their `row`."""

    by: tuple[str, ...]
    order: tuple[str, ...]
    partitions: int
    shards: int = 0
    combine: ChunkFn | None = None
    max_rows_per_key: int | None = None

    def partition_of(self, table: pa.Table) -> np.ndarray:
        if self.shards:
            return shard_partition(table.column("row").to_numpy(), self.shards, self.partitions)
        return (partition_hash(table, self.by) % np.uint64(self.partitions)).astype(np.int64)


def write_exchange(path: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema, cut: Cut, block_bytes: int) -> Part:
    """The map side: one file of sorted runs."""
    rows = size = cut_rows = written = 0
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    with (
        _whole_file(path) as temporary,
        pa.OSFile(temporary, "wb") as sink,
        pa.ipc.new_file(sink, schema, options=IPC) as out,
    ):
        for run, block in enumerate(_blocks(batches, schema, block_bytes)):
            table, lost = _prepared(block, cut)
            cut_rows += lost
            partition = cut.partition_of(table)
            by_partition = np.argsort(partition, kind="stable")  # keeps the key order within a partition
            table = table.take(pa.array(by_partition))
            borders = np.searchsorted(partition[by_partition], np.arange(cut.partitions + 1))
            for p in np.flatnonzero(np.diff(borders)):
                piece = table.slice(int(borders[p]), int(borders[p + 1] - borders[p]))
                parts = piece.combine_chunks().to_batches(max_chunksize=SLICE_ROWS)
                for batch in parts:
                    out.write_batch(batch)
                cuts.setdefault(int(p), []).append((run, written, len(parts)))
                written += len(parts)
            rows, size = rows + table.num_rows, size + table.nbytes
    return _commit(Part(path, rows, size, cut_rows, cuts))


def read_partition(
    parts: Sequence[Part], p: int, schema: pa.Schema, cut: Cut, memory_bytes: int
) -> Iterator[tuple[pa.Table, int]]:
    """The reduce side: (table, rows cut) pairs; tables are sorted by `by` + `order` and hold whole keys.

    A partition larger than `memory_bytes` (skew) is read several times, each pass keeping one share of its keys. One key cannot
    be shared out: `combine` or `max_rows_per_key` is what bounds it.
    """
    total = sum(b.nbytes for part in parts for b in part.partition(p)) if _may_be_large(parts, memory_bytes) else 0
    passes = 1 if cut.shards else max(1, -(-total // memory_bytes))
    for turn in range(passes):
        kept = []
        for part in parts:
            for batch in part.partition(p):
                if passes > 1:
                    share = (partition_hash(batch, cut.by) // np.uint64(cut.partitions)) % np.uint64(passes)
                    batch = batch.filter(pa.array(share == np.uint64(turn)))
                if batch.num_rows:
                    kept.append(batch)
        if not kept:
            continue
        table, lost = _prepared(pa.Table.from_batches(kept, schema), cut)
        yield table, lost


def chunks(table: pa.Table, by: Sequence[str]) -> Iterator[pa.Table]:
    """A sorted table in key-aligned pieces."""
    return key_aligned(iter([table]), by)


def _prepared(table: pa.Table, cut: Cut) -> tuple[pa.Table, int]:
    """Sorted by key and order, combined, and capped per key."""
    table = sorted_table(table, ["row"] if cut.shards else [*cut.by, *cut.order])
    if cut.combine is not None:
        table = sorted_table(cut.combine(table), [*cut.by, *cut.order])
    if cut.max_rows_per_key is not None and not cut.shards:
        return capped(table, cut.by, cut.max_rows_per_key)
    return table, 0


def _may_be_large(parts: Sequence[Part], memory_bytes: int) -> bool:
    return sum(part.bytes for part in parts) > memory_bytes


def _blocks(batches: Iterable[pa.RecordBatch], schema: pa.Schema, block_bytes: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= block_bytes:
            yield pa.Table.from_batches(held, schema)
            held, size = [], 0
    if held:
        yield pa.Table.from_batches(held, schema)


def _commit(part: Part) -> Part:
    stored = {"rows": part.rows, "bytes": part.bytes, "cut_rows": part.cut_rows, "cuts": part.cuts}
    with _whole_file(part.path + ".json") as temporary:
        Path(temporary).write_text(json.dumps(stored))
    return part


class _whole_file:  # noqa: N801 - reads as a verb in `with`
    """A temporary name that becomes `path` if the block ends well."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"

    def __enter__(self) -> str:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        return self.temporary

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        elif os.path.exists(self.temporary):
            os.unlink(self.temporary)


def partitions_for(size: int) -> int:
    """ceil(bytes / 128 MB): a property of the rows, not of the cluster."""
    return max(1, -(-size // PARTITION_BYTES))
