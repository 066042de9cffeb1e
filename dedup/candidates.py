"""Candidate pairs from band keys: rows that share a bucket, paired linearly in the size of the bucket.

In:  band rows (`BANDS`): bucket int64 (a band key), next int64 (the key of the following band), tie int64 (the first 64 bits of
     doc_id, in its order), row int64, size int32 (distinct shingles).
Out: wants (`WANTS`): hub int64, block int32, a int64, b int64: rows a and b of the group (hub, block) are to be compared, a
     before b in doc_id order. `group_up` adds a line for each row of a group, with `b = MEMBER`.

A bucket of at most `window` + 1 rows gives all its pairs, so a pair is compared with the probability 1-(1-s^r)^b of theory. In a
larger bucket each row meets its next `window` rows in the order of `next`, where rows that also agree in the following band lie
side by side, and the row with the smallest doc_id, the hub. What that misses is a pair of equals among thousands of rows that
share a band by boilerplate; thirteen other bands with other neighbours each have a chance at it (`test_recall_survives_a_crowd`).

Pairs travel under their hub: the bands that two near-equal documents share all name the same hub, so each document's shingles
are moved about once for verification and not once for each band. Blocks bound what is in memory at once. Pairs whose sizes
alone rule out the threshold (J <= smaller / larger) are not made.

Cost: 36 bytes a band row, at most `window` + 1 pairs a band row.
"""

from typing import Any

import numpy as np
import pyarrow as pa

MEMBER = -1
BLOCK_ROWS = 1024  # rows of a large bucket that are verified together; chosen: 14 bands x 1024 sets of 6 KB is 86 MB

BANDS = pa.schema([(name, pa.int64()) for name in ("bucket", "next", "tie", "row")] + [("size", pa.int32())])
WANTS = pa.schema([("hub", pa.int64()), ("block", pa.int32()), ("a", pa.int64()), ("b", pa.int64())])


def tie_of(doc_id: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The first 16 of the 32 hex digits of doc_id as int64 [n], in the same order as the ids."""
    ids = doc_id.to_numpy(zero_copy_only=False).astype("S32")
    digits = np.frombuffer(ids.tobytes(), np.uint8).reshape(-1, 32)[:, :16].astype(np.uint64)
    nibbles = np.where(digits >= ord("a"), digits - np.uint64(ord("a") - 10), digits - np.uint64(ord("0")))
    shifts = np.arange(60, -1, -4, dtype=np.uint64)
    return ((nibbles << shifts).sum(axis=1, dtype=np.uint64) ^ np.uint64(1 << 63)).view(np.int64)


def band_rows(nodes: pa.Table) -> pa.Table:
    """One line for each band of each node that has shingles. `nodes`: row, doc_id, size, bands (int64 keys as binary)."""
    nodes = nodes.select(["row", "doc_id", "size", "bands"]).combine_chunks()
    size = nodes.column("size").to_numpy()
    some = np.flatnonzero(size)
    if not len(some):
        return BANDS.empty_table()
    keys = np.frombuffer(b"".join(nodes.column("bands").take(some).to_pylist()), np.int64).reshape(len(some), -1)
    bands = keys.shape[1]
    columns = [
        keys.ravel(),
        np.roll(keys, -1, axis=1).ravel(),
        np.repeat(tie_of(nodes.column("doc_id").take(some)), bands),
        np.repeat(nodes.column("row").to_numpy()[some], bands),
        np.repeat(size[some], bands),
    ]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=BANDS)


def pair_up(chunk: pa.Table, window: int, jaccard: float) -> pa.Table:
    """Wants from whole buckets sorted by bucket, next, tie, row."""
    bucket, tie, row, size = (chunk.column(c).to_numpy() for c in ("bucket", "tie", "row", "size"))
    first = np.flatnonzero(np.diff(bucket, prepend=bucket[:1] - 1 if len(bucket) else 0) != 0)
    lengths = np.diff(first, append=len(bucket))
    start, length = np.repeat(first, lengths), np.repeat(lengths, lengths)
    rank = np.arange(len(bucket)) - start
    hub = np.lexsort((row, tie, start))[start]  # index of the smallest doc_id in each row's bucket
    block = rank // BLOCK_ROWS
    pairs = [np.stack([hub, np.arange(len(bucket))])[:, (np.arange(len(bucket)) != hub)]]
    for step in range(1, min(window, int(lengths.max(initial=0)) - 1) + 1):
        i = np.flatnonzero((rank + step < length) & (block == (rank + step) // BLOCK_ROWS))
        pairs.append(np.stack([i, i + step]))
    i, j = np.concatenate(pairs, axis=1)
    large, small = np.maximum(size[i], size[j]), np.minimum(size[i], size[j])
    fits = small >= jaccard * large
    i, j = i[fits], j[fits]
    where = block[j]  # of the star's ray, or of both ends
    swap = (tie[i] > tie[j]) | ((tie[i] == tie[j]) & (row[i] > row[j]))
    a, b = row[np.where(swap, j, i)], row[np.where(swap, i, j)]
    return _table(row[hub[i]], where, a, b, _distinct_places(row[hub[i]], where, a, b))


def group_up(chunk: pa.Table) -> pa.Table:
    """The distinct pairs of whole groups sorted by hub, block, a, b, and one member line for each row that they name."""
    hub, block, a, b = (chunk.column(c).to_numpy() for c in WANTS.names)
    fresh = np.ones(len(hub), dtype=bool)
    fresh[1:] = (hub[1:] != hub[:-1]) | (block[1:] != block[:-1]) | (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    hub, block, a, b = hub[fresh], block[fresh], a[fresh], b[fresh]
    hubs, blocks, ends = np.tile(hub, 2), np.tile(block, 2), np.concatenate([a, b])
    none = np.full(len(ends), MEMBER)
    members = _table(hubs, blocks, ends, none, _distinct_places(hubs, blocks, ends, none))
    return pa.concat_tables([members, _table(hub, block, a, b, slice(None))])


def _table(hub: np.ndarray, block: np.ndarray, a: np.ndarray, b: np.ndarray, places: Any) -> pa.Table:
    return pa.Table.from_arrays([pa.array(c[places]) for c in (hub, block.astype(np.int32), a, b)], schema=WANTS)


def _distinct_places(*columns: np.ndarray) -> np.ndarray:
    """Places of one of each set of equal rows. Rows are sorted by a 64-bit hash, four times as fast as by their columns; a
    collision can at worst leave a row in twice, which costs time and changes nothing."""
    h = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        h = (h ^ column.astype(np.int64).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    order = np.argsort(h, kind="stable")
    fresh = np.ones(len(order), dtype=bool)
    if len(order):
        fresh[1:] = np.any([c[order][1:] != c[order][:-1] for c in columns], axis=0)
    return order[fresh]
