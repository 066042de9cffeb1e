"""Who stays among near-duplicates: a row falls only to a row that stays and whose Jaccard with it is proven.

In:  verified edges between nodes 0..n-1 with their Jaccards, and the nodes' order of precedence. Out: for each node the node it
     falls to, -1 where it stays.

Nodes are taken in order of precedence; each stays unless it is alike enough to one that stayed before. Two proofs count:

- an edge to that node;
- two edges over a third node h: 1 - J is a metric, so J(x, s) >= J(x, h) + J(h, s) - 1. It is what makes one survivor out of a
  large cluster of near-equal documents, whose members were compared with the hub of their bucket and a few neighbours, not with
  all others. Without it a cluster of 3,000 kept 33 to 57 documents under a random precedence, with it 1
  (`test_a_large_cluster_leaves_one_survivor`).

An edge with a negative Jaccard joins kin (a document and its parent): neither falls to the other, by either proof.

In a chain A ~ B ~ C whose ends are unlike, B falls to A and C stays. No two rows that stay share an edge, but kin.

Cost: a sort of the edges, then some 10 us a node in the memory of the driver.
"""

import numpy as np


def elect(a: np.ndarray, b: np.ndarray, jaccard: np.ndarray, rank: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [n]: the survivor of each node, -1 for survivors. `rank` (int64 [n], a permutation) is small for those to be kept."""
    ends = np.concatenate([a, b])
    order = np.argsort(ends, kind="stable")
    bounds = np.searchsorted(ends[order], np.arange(len(rank) + 1)).tolist()
    others = np.concatenate([b, a])[order]
    alike = np.concatenate([jaccard, jaccard]).astype(np.float64)[order]
    survivor = np.full(len(rank), -1, dtype=np.int64)
    nearest = np.full(len(rank), -1, dtype=np.int64)  # the likest neighbour that stays, so far
    likeness = np.zeros(len(rank))
    for node in np.argsort(rank).tolist():
        near, like = others[bounds[node] : bounds[node + 1]], alike[bounds[node] : bounds[node + 1]]
        if nearest[node] >= 0:
            survivor[node] = nearest[node]
            continue
        proven = np.where(nearest[near] >= 0, like + likeness[near] - 1, 0)
        if like.min(initial=0) < 0:
            proven[np.isin(nearest[near], near[like < 0])] = 0
        if proven.max(initial=0) >= threshold:
            survivor[node] = nearest[near[proven.argmax()]]
            continue
        closer = like > likeness[near]
        nearest[near[closer]], likeness[near[closer]] = node, like[closer]
    return survivor
