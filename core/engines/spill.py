"""The exchange of the local engine: rows in files, cut by partition, so that memory holds one partition at a time.

Map side: a part is read in blocks, each block sorted by (partition, key, order) and written as one run; a sidecar says where in
the file each partition lies. Reduce side: the slices of one partition from all runs are sorted together and handed to `fn` in
tables that never split a key. A sidecar is written last and is the commit record, so a killed shuffle resumes per file.

Cost: every row is written twice (lz4 Arrow) and sorted twice. Memory: at most 3.2 x a block, where a row is two integers: the
rows, their order in 8 bytes each, the sorted rows. A partition that is aligned is held whole, as a block. A key with many rows
costs no more where `combine` or a cap makes it small: that happens whenever a share of memory is full. Where nothing does, the
key is held whole and reported.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.columns import capped, key_starts, largest_key, partition_hash, shard_partition, sorted_table
from core.engines.contract import PARTITION_BYTES, Align, ChunkFn, Skew
from core.errors import StageError
from core.rows import dataset_of, shard_of
from core.stores import DISK_FAULTS, replacing

SLICE_ROWS = 65_536  # rows of one record batch within a run, fewer where rows are wide
# that a reduce function sees at once, rounded up to whole keys; it holds some six times as much: chosen
CHUNK_BYTES = 8 << 20
SLICE_BYTES = 4 << 20  # a reader holds one batch of every run it reads: chosen, untested
IPC = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Part:
    """One committed file of rows. `cuts[p]` = (first batch, batches) of each run of partition p, for exchange files."""

    path: str
    rows: int
    bytes: int
    cut_rows: int = 0
    cuts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    skew: Skew | None = None  # the largest key that had to be held whole, of a part that was reduced

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(self.path) as source:  # mapped pages would count as this worker's memory
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)

    def partition(self, p: int) -> Iterator[pa.RecordBatch]:
        if p not in self.cuts:
            return
        with pa.OSFile(self.path) as source:  # mapped pages would count as this worker's memory
            reader = pa.ipc.open_file(source)
            for first, count in self.cuts[p]:
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
    skew = stored.pop("skew", None)
    return Part(path, cuts=cuts, skew=Skew(**{**skew, "key": tuple(skew["key"])}) if skew else None, **stored)


def write_part(
    path: str, batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, told: "Told | None" = None
) -> Part:
    """Write rows as one part. `told` is read after the last batch."""
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
            out.write_table(table, max_chunksize=_slice_rows(table))
    return _commit(Part(path, rows, size, told.cut_rows, skew=told.skew) if told else Part(path, rows, size))


def _slice_rows(table: pa.Table) -> int:
    """Rows of one record batch, so that it holds about SLICE_BYTES."""
    width = max(1, table.nbytes // max(1, table.num_rows))
    return max(1, min(SLICE_ROWS, SLICE_BYTES // width))


@dataclass(frozen=True)
class Cut:
    """How rows are sent to partitions: by key hash, or (with `target`) by the shard of their `row`."""

    by: tuple[str, ...]
    order: tuple[str, ...]
    partitions: int
    target: Align | None = None
    combine: ChunkFn | None = None
    max_rows_per_key: int | None = None
    partition_bytes: int = PARTITION_BYTES  # beyond which one key is skew

    def partition_of(self, table: pa.Table) -> np.ndarray:
        """The partition of each row, in 16 bits where they suffice: numpy sorts those by counting."""
        small = np.uint16 if self.partitions <= 1 << 16 else np.int64
        if self.target is not None:
            rows = table.column("row").to_numpy()
            strange = (dataset_of(rows) != self.target.dataset) | (shard_of(rows) >= self.target.shards)
            if np.any(strange):
                raise StageError(
                    f"{self.target.label}: {int(strange.sum())} rows are not of dataset number {self.target.dataset} with "
                    f"{self.target.shards} shards, such as row {int(rows[strange][0])}; filter the frame before align"
                )
            return shard_partition(rows, self.target.shards, self.partitions).astype(small)
        hashed = partition_hash(table, self.by)
        hashed %= np.uint64(self.partitions)
        return hashed.astype(small)

    def before_exchange(self) -> "Cut":
        """This cut on the map side. A cap waits for `combine` to have seen all rows, or how many it cuts would depend on
        how they were split into blocks; without `combine` it makes the traffic smaller already there."""
        return self if self.combine is None else replace(self, max_rows_per_key=None)


@dataclass
class Told:
    """What a reduction finds on its way, read when its last row is written."""

    cut_rows: int = 0
    skew: Skew | None = None

    def large(self, table: pa.Table, cut: Cut, memory_bytes: int, is_sorted: bool = True) -> None:
        """Remember the largest key of a table that is held whole, if it is larger than a partition or `memory_bytes`."""
        limit = min(memory_bytes, cut.partition_bytes)
        if table.nbytes <= limit:
            return
        found = largest_key(table if is_sorted else sorted_table(table, cut.by), cut.by)
        if found is not None and found.rows > 1 and found.bytes > max(limit, self.skew.bytes if self.skew else 0):
            self.skew = found


def write_exchange(path: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema, cut: Cut, block_bytes: int) -> Part:
    """The map side: one file of sorted runs."""
    rows = size = cut_rows = written = 0
    cuts: dict[int, list[tuple[int, int]]] = {}
    with (
        _whole_file(path) as temporary,
        pa.OSFile(temporary, "wb") as sink,
        pa.ipc.new_file(sink, schema, options=IPC) as out,
    ):
        for block in blocks(batches, block_bytes):
            table, lost = prepared(emptied(block, schema), cut.before_exchange())
            cut_rows += lost
            rows, size = rows + table.num_rows, size + table.nbytes
            pieces = split(table, cut)
            del table  # the last of the pieces lets go of it
            for p, first, count in _write_pieces(out, pieces, written):
                cuts.setdefault(p, []).append((first, count))
                written = first + count
            del pieces
            pa.default_memory_pool().release_unused()
    return _commit(Part(path, rows, size, cut_rows, cuts))


def _write_pieces(out: Any, pieces: Iterator[tuple[int, pa.Table]], first: int) -> list[tuple[int, int, int]]:
    """Write one run and say where in the file each partition lies: (partition, first batch, batches)."""
    places = []
    for p, piece in pieces:
        batches = piece.to_batches(max_chunksize=_slice_rows(piece))
        for batch in batches:
            out.write_batch(batch)
        places.append((p, first, len(batches)))
        first += len(batches)
    return places


def split(table: pa.Table, cut: Cut) -> Iterator[tuple[int, pa.Table]]:
    """(partition, its rows) for every partition that has any, each keeping the order of `table`."""
    partition = cut.partition_of(table)
    rows = np.bincount(partition, minlength=cut.partitions)
    filled = np.flatnonzero(rows)
    if len(filled) == 1:
        yield int(filled[0]), table
        return
    by_partition = np.argsort(partition, kind="stable")
    borders = np.append(0, np.cumsum(rows))
    for p in filled:
        yield int(p), table.take(pa.array(by_partition[borders[p] : borders[p + 1]]))


def read_partition(
    parts: Sequence[Part], p: int, schema: pa.Schema, cut: Cut, memory_bytes: int, told: Told
) -> Iterator[pa.Table]:
    """The reduce side: tables sorted by `by` + `order` that hold whole keys.

    A partition larger than `memory_bytes` is read several times, each pass keeping one share of its keys. One key cannot be
    shared out: `combine` or `max_rows_per_key` is what bounds it, and `told` names the largest that neither did.
    """
    passes = 1 if cut.target is not None else passes_for(parts, p, memory_bytes)
    for turn in range(passes):
        share = (pa.Table.from_batches([batch]) for batch in share_batches(parts, p, cut, turn, passes))
        table, lost = prepared(gathered(share, schema, cut, memory_bytes, told), cut)
        told.cut_rows += lost
        if cut.target is None:
            told.large(table, cut, memory_bytes)
        if table.num_rows:
            yield table
        del table  # or it would stay while the next one is read
        pa.default_memory_pool().release_unused()


def gathered(tables: Iterable[pa.Table], schema: pa.Schema, cut: Cut, memory_bytes: int, told: Told) -> pa.Table:
    """One share of a partition, contiguous but unsorted; combined or capped on the way as often as it fills memory again."""
    smaller = cut.before_exchange()
    shrinks = smaller.combine is not None or smaller.max_rows_per_key is not None
    held: list[pa.RecordBatch] = []
    size, full = 0, memory_bytes
    for table in tables:
        held += table.to_batches()
        size += table.nbytes
        del table
        if shrinks and size > full:
            table, lost = prepared(emptied(held, schema), smaller)
            told.cut_rows += lost
            held, size = table.to_batches(), table.nbytes
            full = max(memory_bytes, 2 * size)  # twice: what did not shrink is not sorted again for every table
    return emptied(held, schema) if held else schema.empty_table()


def passes_for(parts: Sequence[Part], p: int, memory_bytes: int) -> int:
    """Into how many shares the keys of partition `p` must be cut to fit."""
    if sum(part.bytes for part in parts) <= memory_bytes:
        return 1
    size = sum(b.nbytes for part in parts for b in part.partition(p))
    return max(1, -(-size // memory_bytes))


def share_batches(parts: Sequence[Part], p: int, cut: Cut, turn: int, passes: int) -> Iterator[pa.RecordBatch]:
    """The rows of partition `p` whose keys belong to share `turn` of `passes`."""
    for part in parts:
        for batch in part.partition(p):
            if passes > 1:
                share = (partition_hash(batch, cut.by) // np.uint64(cut.partitions)) % np.uint64(passes)
                batch = batch.filter(pa.array(share == np.uint64(turn)))
            if batch.num_rows:
                yield batch


def chunks(table: pa.Table, by: Sequence[str], size: int = CHUNK_BYTES) -> Iterator[pa.Table]:
    """A sorted table in pieces of about `size` bytes, or a key more, that never split a key."""
    rows = max(1, size * table.num_rows // max(1, table.nbytes))
    at = 0
    while at < table.num_rows:
        end = _next_key(table, by, at + rows)
        yield table.slice(at, end - at)
        at = end


def _next_key(table: pa.Table, by: Sequence[str], at: int) -> int:
    """The first row from `at` on that begins a key; the number of rows where none does."""
    step = 1024
    while at < table.num_rows:
        found = np.flatnonzero(key_starts(table.slice(at - 1, step + 1), by)[1:])
        if len(found):
            return at + int(found[0])
        at, step = at + step, 2 * step
    return table.num_rows


def prepared(table: pa.Table, cut: Cut) -> tuple[pa.Table, int]:
    """Sorted by key and order, combined, and capped per key."""
    table = sorted_table(table, ["row"] if cut.target is not None else [*cut.by, *cut.order])
    if cut.combine is not None:
        table = sorted_table(cut.combine(table), [*cut.by, *cut.order])
    if cut.max_rows_per_key is not None:
        return capped(table, cut.by, cut.max_rows_per_key)
    return table, 0


def blocks(batches: Iterable[pa.RecordBatch], block_bytes: int) -> Iterator[list[pa.RecordBatch]]:
    """Batches of at least `block_bytes` together, the last ones apart. They come in a list so that who takes them can empty it
    (`emptied`): what a generator yields and a loop names stays for as long as they do."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        del batch
        if size >= block_bytes:
            yield held
            held, size = [], 0
    if held:
        yield held


def emptied(held: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """One contiguous table of the batches, which go; handed on in a call, only the function that is called holds it."""
    table = pa.Table.from_batches(held, schema).combine_chunks()
    held.clear()
    return table


def _commit(part: Part) -> Part:
    stored = {"rows": part.rows, "bytes": part.bytes, "cut_rows": part.cut_rows, "cuts": part.cuts}
    stored["skew"] = asdict(part.skew) if part.skew else None
    with _whole_file(part.path + ".json") as temporary:
        Path(temporary).write_text(json.dumps(stored))
    return part


@contextlib.contextmanager
def _whole_file(path: str) -> Iterator[str]:
    """A temporary name that becomes `path` if the block ends well. A full or failing disk is a StageError."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as e:
        if e.errno not in DISK_FAULTS:
            raise
        raise StageError(
            f"exchange: cannot write {path}: {e}; make room there, or name another folder in `engine.scratch`, then run again"
        ) from e


def partitions_for(size: int, partition_bytes: int) -> int:
    """ceil(bytes / partition_bytes): a property of the rows, not of the cluster."""
    return max(1, -(-size // partition_bytes))


def align_partitions(size: int, partition_bytes: int, target: Align) -> int:
    """Partitions of an align: four times those of a shuffle, as each sorts its rows whole, but no more than there are shards."""
    return min(partitions_for(size, partition_bytes) * 4, max(1, target.shards))


def shards_of(p: int, partitions: int, target: Align) -> list[int]:
    """The shards that partition `p` of an align writes: those that `shard_partition` sends to it."""
    return [s for s in range(target.shards) if s * partitions // target.shards == p]
