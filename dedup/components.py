"""Connected components of verified edges, in the memory of the driver, below a stated ceiling.

In:  edges as two int64 arrays of node keys, and for each node its doc_id and copies. Out: per node the component's label, its
     smallest doc_id, and its documents (copies counted).

Memory: some 540 bytes an edge from the collected frame to the labels (two ids, rows and copies, their sorted copy, the graph) and
2.4 us of CPU, measured at 0.5 to 4 million edges (`benchmarks/components.py`). So the default ceiling of 4 million edges is
2.2 GB; beyond it `dedup.stars` works in as much memory as the engine gives a worker, at five times the CPU or more.

Components only name who might replace whom: nothing is dropped because of a component, only because of edges
(`dedup.survivors`), so a chain of likenesses cannot take unrelated documents along.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

MAX_EDGES = 4_000_000
# of all nodes; a component above it is reported as suspicious. Chosen: marin's false merges were 1 to 97%.
GIANT_FRACTION = 0.01


class Components(NamedTuple):
    """One entry for each node that has an edge, in ascending order of `key`."""

    key: np.ndarray  # int64 [n]
    component: np.ndarray  # str [n], smallest doc_id of the component
    docs: np.ndarray  # int64 [n], documents in the component, copies counted
    nodes: np.ndarray  # int64 [n], nodes in the component


class Census(NamedTuple):
    """Counts over components."""

    nodes: int = 0
    components: int = 0
    largest_docs: int = 0
    largest: str = ""  # its label; of several that large the smallest one

    def joined(self, other: "Census") -> "Census":
        largest_docs, largest = min((-c.largest_docs, c.largest) for c in (self, other))
        return Census(self.nodes + other.nodes, self.components + other.components, -largest_docs, largest)


def components(a: np.ndarray, b: np.ndarray, keys: np.ndarray, doc_id: np.ndarray, copies: np.ndarray) -> Components:
    """Components of the graph of edges `a[i] - b[i]`. `keys` (any order, repeats allowed) holds every end of an edge; `doc_id`
    and `copies` belong to `keys`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    key, where = np.unique(keys, return_index=True)
    ids, weight = doc_id[where], copies[where]
    ends = np.searchsorted(key, a).astype(np.int32), np.searchsorted(key, b).astype(np.int32)
    graph = coo_array((np.ones(len(a), dtype=np.int8), ends), shape=(len(key), len(key)))
    count, label = connected_components(graph, directed=False)
    order = np.lexsort((ids, label))
    first = order[np.searchsorted(label[order], np.arange(count))]
    docs = np.bincount(label, weights=weight, minlength=count).astype(np.int64)  # exact below 2^53
    return Components(key, ids[first][label], docs[label], np.bincount(label, minlength=count)[label])


def census_of_graph(found: Components) -> Census:
    if not len(found.key):
        return Census()
    most = int(found.docs.max())
    largest = np.sort(found.component[found.docs == most])[0].decode()
    return Census(len(found.key), len(np.unique(found.component)), most, largest)


def id_bytes(doc_id: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """doc_ids as 32 bytes each, [n]; they have just so many (`core.hashing.document_id`)."""
    chunks = doc_id.chunks if isinstance(doc_id, pa.ChunkedArray) else [doc_id]
    return np.concatenate([np.empty(0, "S32"), *(_bytes_of(c) for c in chunks)])


def _bytes_of(doc_id: pa.Array) -> np.ndarray:
    _, offsets, data = doc_id.buffers()
    if not len(doc_id):
        return np.empty(0, "S32")
    at = np.frombuffer(offsets, np.int64)[doc_id.offset : doc_id.offset + len(doc_id) + 1]
    return np.frombuffer(data, np.uint8)[at[0] : at[-1]].view("S32")
