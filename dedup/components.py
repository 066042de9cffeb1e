"""Connected components of verified edges, in the memory of the driver, below a stated ceiling.

In:  edges as two int64 arrays of node keys, and for each node its doc_id and copies. Out: per node the component's label, its
     smallest doc_id, and its documents (copies counted).

Memory: 37 bytes an edge above the inputs (`benchmarks/minhash.py components`: 4 M random edges, 2 M nodes, 6.6 CPU s). The edges
themselves take some 350 bytes each on the way here (two ids, rows, copies; one sorted copy; computed, not measured), so
the default ceiling of 20 M edges is 8 GB.

Components only name who might replace whom: nothing is dropped because of a component, only because of edges
(`dedup.survivors`), so a chain of likenesses cannot take unrelated documents along.
"""

from typing import NamedTuple

import numpy as np

from core.errors import StageError

MAX_EDGES = 20_000_000
GIANT_FRACTION = (
    0.01  # of all nodes; a component above it is reported as suspicious. Chosen: marin's false merges were 1 to 97%.
)


class Components(NamedTuple):
    """One entry for each node that has an edge, in ascending order of `key`."""

    key: np.ndarray  # int64 [n]
    component: np.ndarray  # str [n], smallest doc_id of the component
    docs: np.ndarray  # int64 [n], documents in the component, copies counted
    nodes: np.ndarray  # int64 [n], nodes in the component


def check_ceiling(stage: str, edges: int, most: int = MAX_EDGES) -> None:
    """StageError if `edges` are more than one machine is trusted with."""
    if edges > most:
        raise StageError(
            f"{stage}: too many edges for components in memory, got {edges:,}, expected at most {most:,}; "
            "raise `max_edges` on a machine with 400 bytes of memory for each, or raise `jaccard`"
        )


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
