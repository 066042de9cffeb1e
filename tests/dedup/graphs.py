"""Graphs as `verify` would leave them: EDGES between nodes with random rows, doc_ids and copies."""

import numpy as np
import pyarrow as pa

from core.schema import TEXT
from dedup.verify import EDGES

Pairs = list[tuple[int, int]]


def edges_of(pairs: Pairs, seed: int = 0, ordered: bool = False) -> pa.Table:
    """EDGES of (node, node) pairs, repeats and both directions kept. `ordered`: rows ascend with the nodes' numbers."""
    rng = np.random.default_rng(seed)
    n = 1 + max((max(p) for p in pairs), default=0)
    row = np.sort(rng.choice(1 << 40, n, replace=False)) if ordered else rng.choice(1 << 40, n, replace=False)
    ids = np.array([rng.bytes(16).hex() for _ in range(n)])
    copies = rng.integers(1, 6, n)
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    turned = ids[ends[:, 0]] > ids[ends[:, 1]]
    a, b = np.where(turned, ends[:, 1], ends[:, 0]), np.where(turned, ends[:, 0], ends[:, 1])
    jaccard = ((a * 31 + b * 7) % 100 / 400 + 0.75).astype(np.float32)
    columns = [pa.array(ids[a], TEXT), pa.array(ids[b], TEXT), row[a], row[b], copies[a], copies[b], jaccard]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=EDGES)


def path(n: int, first: int = 0) -> Pairs:
    return [(first + i, first + i + 1) for i in range(n - 1)]


def star(n: int, first: int = 0) -> Pairs:
    return [(first, first + i) for i in range(1, n)]


def clique(n: int, first: int = 0) -> Pairs:
    return [(first + i, first + j) for i in range(n) for j in range(i)]


def chain_of_cliques(count: int, size: int, first: int = 0) -> Pairs:
    """Cliques of which each shares one node with the next."""
    return [pair for k in range(count) for pair in clique(size, first + k * (size - 1))]
