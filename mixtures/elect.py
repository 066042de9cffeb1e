"""Which of several duplicates stays: the greedy choice in priority order, computed by columns.

Nodes are cliques of equal text (or single documents), edges are verified near-duplicates. Going through the nodes best first, a
node stays unless it has an edge to one that stays. The same set comes out of rounds in which every undecided node that beats
all its undecided neighbours stays and its neighbours fall; a round costs one pass over the edges, and the number of rounds is the
longest chain of falling priorities, not the number of nodes.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.contract import Frame, Unit
from core.job import Job
from core.schema import TEXT
from core.storage import Root
from dedup.minhash import edges_name

# One schema for documents and edges, so that both travel in one shuffle by `group`. An edge has `other` and no `doc_id`.
CANDIDATES = pa.schema(
    [
        ("group", TEXT),  # component, or clique where there is no component
        ("node", TEXT),  # clique, or doc_id where the text is unique
        ("doc_id", TEXT),
        ("row", pa.int64()),
        ("order", pa.list_(pa.float64())),  # ascending is better: dataset priority, `prefer`, date
        ("other", TEXT),
    ]
)
LOSERS = pa.schema([("row", pa.int64()), ("survivor", TEXT), ("through", TEXT)])


def edges_frame(job: Job) -> Frame:
    """The verified pairs of `minhash` as rows of CANDIDATES."""
    with job.root.parquet(edges_name("minhash")) as f:
        units = [Unit(str(group), group) for group in range(f.num_row_groups)]
    return job.engine.scan(partial(_scan_edges, job.root), units, CANDIDATES, f"{job.instance}: edges")


def _scan_edges(root: Root, unit: Unit) -> Iterator[pa.RecordBatch]:
    with root.parquet(edges_name("minhash")) as f:
        table = f.read_row_group(unit.payload, columns=["component", "a", "b"])
    n = table.num_rows
    arrays = [table.column("component"), table.column("a"), pa.nulls(n, TEXT), pa.nulls(n, pa.int64())]
    arrays += [pa.nulls(n, CANDIDATES.field("order").type), table.column("b")]
    yield from pa.Table.from_arrays(arrays, schema=CANDIDATES).combine_chunks().to_batches()


def elect(table: pa.Table) -> pa.Table:
    """Losers of whole groups: each with the doc_id of the document it falls to, and through which relation."""
    is_doc = np.asarray(pc.is_valid(table.column("doc_id")))
    docs, edges = table.filter(pa.array(is_doc)), table.filter(pa.array(~is_doc))
    if docs.num_rows < 2:
        return LOSERS.empty_table()
    docs = docs.take(pa.array(_best_first(docs)))
    doc_ids = docs.column("doc_id").combine_chunks()
    nodes = docs.column("node").combine_chunks().dictionary_encode()
    node = nodes.indices.to_numpy().astype(np.int64)  # numbered by first, that is best, appearance
    best = np.unique(node, return_index=True)[1]  # row of the best document of each node
    ends = _edge_ends(edges, nodes.dictionary)
    falls_to = greedy(len(best), ends)  # node -> staying neighbour, or itself
    target = best[falls_to[node]]
    lost = target != np.arange(docs.num_rows)
    through = np.where(falls_to[node] == node, "exact", "minhash")[lost]
    return pa.table(
        [docs.column("row").filter(pa.array(lost)), doc_ids.take(pa.array(target[lost])), pa.array(through, TEXT)],
        schema=LOSERS,
    )


def greedy(nodes: int, ends: np.ndarray) -> np.ndarray:
    """int64 [nodes]: for each node (numbered best first) itself if it stays, else its best neighbour that stays.

    `ends` is int64 [edges, 2]. Equals the sequential greedy choice."""
    falls_to = np.arange(nodes, dtype=np.int64)
    if len(ends) == 0:
        return falls_to
    low, high = ends.min(axis=1), ends.max(axis=1)  # low is the better end
    undecided = np.ones(nodes, dtype=bool)
    stays = np.zeros(nodes, dtype=bool)
    while undecided.any():
        live = undecided[low] & undecided[high]
        blocked = np.zeros(nodes, dtype=bool)
        blocked[high[live]] = True  # a better neighbour is still undecided
        new = undecided & ~blocked
        stays |= new
        undecided &= ~new
        falling = np.zeros(nodes, dtype=bool)
        falling[high[stays[low] & undecided[high]]] = True
        falling[low[stays[high] & undecided[low]]] = True
        undecided &= ~falling
    for a, b in ((low, high), (high, low)):  # to the best staying neighbour: the smallest number wins
        use = stays[a] & ~stays[b]
        order = np.argsort(-a[use], kind="stable")
        target, source = b[use][order], a[use][order]
        better = (falls_to[target] == target) | (source < falls_to[target])
        falls_to[target[better]] = source[better]
    return falls_to


def _best_first(docs: pa.Table) -> np.ndarray:
    """Row numbers of documents in the order of `order`, then doc_id."""
    width = pc.list_value_length(docs.column("order"))[0].as_py()
    order = pc.list_flatten(docs.column("order")).to_numpy().reshape(-1, width)
    keys = pa.table({**{f"k{i}": order[:, i] for i in range(width)}, "doc_id": docs.column("doc_id")})
    return np.asarray(pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]))


def _edge_ends(edges: pa.Table, nodes: pa.Array) -> np.ndarray:
    """Edges as node numbers, int64 [edges, 2]; those with an end that is not a candidate are left out."""
    if edges.num_rows == 0:
        return np.zeros((0, 2), dtype=np.int64)
    a = pc.index_in(edges.column("node"), value_set=nodes).combine_chunks()
    b = pc.index_in(edges.column("other"), value_set=nodes).combine_chunks()
    both = pc.and_(pc.is_valid(a), pc.is_valid(b))
    return np.column_stack([a.filter(both).to_numpy(), b.filter(both).to_numpy()]).astype(np.int64)
