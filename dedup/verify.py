"""True Jaccard of candidate pairs from sets of shingles, on columns.

In:  groups of lines (`VERIFY`) sorted by hub, block, a, b: member lines (b = MEMBER) bring doc_id, copies, size and set of row a;
     pair lines name two members of the same group.
Out: edges (`EDGES`) of the pairs whose Jaccard reaches the threshold, a before b by doc_id. A pair found in two groups comes
     twice.

A set is the ascending distinct shingle hashes as uint32 in a binary column, at most CAP of them: a longer document keeps its CAP
smallest, and pairs with it are compared below the largest value that both sides surely hold (bottom-k, Broder 1997). Up to CAP
shingles (some 400 KB of text) the Jaccard is exact but for 32-bit collisions, at most 2e-5 at the cap and 1e-6 at 2,000 shingles;
above it has a standard error below 0.002. So a document of 10 M characters costs 256 KB here, not 6 MB.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup.candidates import MEMBER
from dedup.shingles import Shingles, compiled_available

CAP = 1 << 16
_BLOCK_VALUES = 1 << 22  # shingles gathered at once by the numpy path: 64 MB of sort keys

NODE = [("doc_id", pa.large_string()), ("copies", pa.int64()), ("size", pa.int32()), ("set", pa.large_binary())]
VERIFY = pa.schema([("hub", pa.int64()), ("block", pa.int32()), ("a", pa.int64()), ("b", pa.int64()), *NODE])
EDGES = pa.schema(
    [
        ("a", pa.large_string()),  # doc_id, the smaller one
        ("b", pa.large_string()),
        ("a_row", pa.int64()),
        ("b_row", pa.int64()),
        ("a_copies", pa.int64()),
        ("b_copies", pa.int64()),
        ("jaccard", pa.float32()),
    ]
)


def unique_sets(shingles: Shingles) -> tuple[pa.Array, np.ndarray]:
    """The set of each document as binary, and its true number of distinct shingles (int32 [n]; beyond CAP for long ones)."""
    lengths = np.diff(shingles.offsets)
    owner = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(32), lengths)
    keys = np.sort(owner | shingles.values)
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = keys[1:] != keys[:-1]
    keys = keys[fresh]
    sizes = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(lengths))
    starts = np.cumsum(sizes) - sizes
    if sizes.max(initial=0) > CAP:
        keys = keys[np.arange(len(keys)) - np.repeat(starts, sizes) < CAP]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, CAP))]).astype(np.int64) * 4
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(keys.astype(np.uint32))]
    return pa.Array.from_buffers(pa.large_binary(), len(sizes), buffers), sizes.astype(np.int32)


def verify(chunk: pa.Table, jaccard: float, compiled: bool | None = None) -> pa.Table:
    """Edges of the pairs in whole groups whose Jaccard is at least `jaccard`."""
    chunk = chunk.combine_chunks()
    is_member = chunk.column("b").to_numpy() == MEMBER
    members, pairs = chunk.filter(pa.array(is_member)), chunk.filter(pa.array(~is_member))
    hub, block = chunk.column("hub").to_numpy(), chunk.column("block").to_numpy()
    border = np.ones(len(hub), dtype=bool)
    border[1:] = (hub[1:] != hub[:-1]) | (block[1:] != block[:-1])
    group = np.cumsum(border)
    rows, member_rank = np.unique(members.column("a").to_numpy(), return_inverse=True)
    keys = group[is_member] * len(rows) + member_rank  # ascending, as the lines are
    a, b = (_find(keys, rows, group[~is_member], pairs.column(c).to_numpy()) for c in ("a", "b"))
    similarity = jaccards(members.column("set").combine_chunks(), members.column("size").to_numpy(), a, b, compiled)
    kept = similarity >= jaccard
    return _edges(members, a[kept], b[kept], similarity[kept])


def _find(keys: np.ndarray, rows: np.ndarray, group: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The member line of each (group, row)."""
    if not len(row):
        return np.empty(0, dtype=np.int64)
    wanted = group * len(rows) + np.searchsorted(rows, row)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    if not len(keys) or np.any(keys[at] != wanted):
        raise ValueError("verify: a pair names a row that is no member of its group")
    return at


def _edges(members: pa.Table, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> pa.Table:
    """Edges between member lines, turned so that a is the smaller doc_id."""
    ids = members.column("doc_id").combine_chunks()
    swap = np.asarray(pc.greater(ids.take(a), ids.take(b)))
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    row, copies = members.column("a"), members.column("copies")
    columns = [ids.take(a), ids.take(b), row.take(a), row.take(b), copies.take(a), copies.take(b)]
    return pa.Table.from_arrays([*columns, pa.array(similarity.astype(np.float32))], schema=EDGES)


def jaccards(
    sets: pa.Array, sizes: np.ndarray, a: np.ndarray, b: np.ndarray, compiled: bool | None = None
) -> np.ndarray:
    """Jaccard of the sets `a[i]` and `b[i]`, float64 [pairs]. Two empty sets have 0: they were never alike."""
    _, offset_buffer, data = sets.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[sets.offset : sets.offset + len(sets) + 1] // 4
    values = np.frombuffer(data, np.uint32) if data is not None else np.empty(0, np.uint32)
    start_a, end_a, start_b, end_b = offsets[a], offsets[a + 1], offsets[b], offsets[b + 1]
    cut = sizes > np.diff(offsets)
    for i in np.flatnonzero(cut[a] | cut[b]):
        limits = [values[end - 1] for end, is_cut in ((end_a[i], cut[a[i]]), (end_b[i], cut[b[i]])) if is_cut]
        end_a[i] = start_a[i] + np.searchsorted(values[start_a[i] : end_a[i]], min(limits), side="right")
        end_b[i] = start_b[i] + np.searchsorted(values[start_b[i] : end_b[i]], min(limits), side="right")
    shared = np.zeros(len(a), dtype=np.int64)
    if compiled_available() if compiled is None else compiled:
        from dedup.compiled import common

        common(values, start_a, end_a, start_b, end_b, shared)
    else:
        _common(values, start_a, end_a, start_b, end_b, shared)
    union = (end_a - start_a) + (end_b - start_b) - shared
    return shared / np.maximum(union, 1)


def _common(
    values: np.ndarray, start_a: np.ndarray, end_a: np.ndarray, start_b: np.ndarray, end_b: np.ndarray, out: np.ndarray
) -> None:
    """The numpy path of `dedup.compiled.common`: sort both sides of many pairs together and count equal neighbours."""
    load = np.cumsum((end_a - start_a) + (end_b - start_b))
    for pairs in np.split(np.arange(len(out)), np.flatnonzero(np.diff(load // _BLOCK_VALUES)) + 1):
        sides = [_tagged(values, start[pairs], end[pairs]) for start, end in ((start_a, end_a), (start_b, end_b))]
        keys = np.sort(np.concatenate(sides))
        twice = keys[1:][keys[1:] == keys[:-1]]
        out[pairs] = np.bincount((twice >> np.uint64(32)).astype(np.int64), minlength=len(pairs))


def _tagged(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The values of each slice with the slice's number above them, uint64."""
    lengths = end - start
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tags = np.repeat(np.arange(len(start), dtype=np.uint64) << np.uint64(32), lengths)
    return tags | values[np.repeat(start, lengths) + within]
