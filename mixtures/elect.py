"""Which of several duplicates stays: the greedy choice in the policy's order.

Nodes are cliques of equal text (or single documents), edges are verified near-duplicates. Of a clique the best document stands
for all; among nodes `dedup.survivors` goes through them best first, and a node falls only to one that stays and whose likeness
is proven. The others of a clique fall to where their best one falls, or to it. An edge between a document and its parent does not
count, where it joins them by their own ids; equal texts fall whatever their kinship.

Cost: one shuffle of some 200 bytes a document in a component and 100 an edge. The choice within a component is sequential: one
worker holds it whole and takes 10 us a node, so a component of five million documents is a minute of one core.
"""

import json
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset
from core.engines.contract import Frame, Unit
from core.errors import StageError
from core.job import Job
from core.manifest import read_manifest
from core.rows import pack
from core.schema import TEXT
from core.storage import Root
from dedup import survivors
from dedup.relation import edges_folder
from mixtures.policy import EXACT, MINHASH, Judge

# One schema for documents and edges, so that both travel in one shuffle by `group`. An edge has `other` and no `doc_id`.
CANDIDATES = pa.schema(
    [
        ("group", TEXT),  # component, or clique where there is no component
        ("node", TEXT),  # clique, or doc_id where the text is unique
        ("doc_id", TEXT),
        ("row", pa.int64()),
        ("order", pa.list_(pa.float64())),  # ascending is better: dataset priority, `prefer`, date
        ("other", TEXT),
        ("jaccard", pa.float32()),
    ]
)
KIN = pa.schema([("node", TEXT), ("other", TEXT), ("kin", pa.bool_())])
LOSERS = pa.schema([("row", pa.int64()), ("survivor", TEXT), ("through", TEXT)])


def candidates(judge: Judge, datasets: dict[int, Dataset], unit: Unit) -> Iterator[pa.RecordBatch]:
    """Rows of one shard that passed everything else and have a possible duplicate."""
    ordinal, number = unit.payload
    dataset = datasets[ordinal]
    shard = dataset.shards[number]
    orders = [p.lstrip("-") for p in judge.config.prefer]
    exact, minhash = judge.config.through(EXACT), judge.config.through(MINHASH)
    groups = [f"{exact}.clique"] * bool(exact) + [f"{minhash}.component"] * bool(minhash)
    fate, table, _ = judge.judge(dataset, shard, [*groups, *orders, "doc_id", "fetched_at"])
    doc_id = table.column("doc_id").combine_chunks()
    nothing = pa.nulls(shard.rows, TEXT)
    clique = table.column(f"{exact}.clique").combine_chunks() if exact else nothing
    component = table.column(f"{minhash}.component").combine_chunks() if minhash else nothing
    group = pc.coalesce(component, clique)
    live = np.asarray(fate.column("keep")) & np.asarray(pc.is_valid(group))
    rank = judge.priority.index(dataset.name) if dataset.name in judge.priority else len(judge.priority)
    order = [np.full(shard.rows, rank, dtype=np.float64)]
    for name, given in zip(orders, judge.config.prefer, strict=True):
        values = np.asarray(pc.fill_null(table.column(name).cast(pa.float64()), np.nan))
        order.append(-values if given.startswith("-") else values)
    dates = table.column("fetched_at").cast(pa.int64()).cast(pa.float64(), safe=False)
    order.append(np.asarray(pc.fill_null(dates, np.inf)))
    arrays = [
        group,
        pc.coalesce(clique, doc_id),
        doc_id,
        pa.array(pack(ordinal, number, shard.rows)),
        pa.FixedSizeListArray.from_arrays(pa.array(np.column_stack(order).ravel()), len(order)).cast(
            pa.list_(pa.float64())
        ),
        nothing,
        pa.nulls(shard.rows, pa.float32()),
    ]
    yield pa.RecordBatch.from_arrays(arrays, schema=CANDIDATES).filter(pa.array(live))


def edges_frame(job: Job) -> Frame:
    """The verified pairs of `minhash` as rows of CANDIDATES; the Jaccard of a document and its parent is negative."""
    instance = job.config.through(MINHASH)
    manifest = read_manifest(job.root, instance, None)
    if manifest is None:
        raise StageError(f"{job.instance}: {instance} has left no manifest in {job.root.url}; run {instance} first")
    folder = edges_folder(instance)
    units = [Unit(name, name) for name in sorted(manifest.outputs) if name.startswith(folder)]
    edges = job.engine.scan(partial(_scan_edges, job.root), units, CANDIDATES, f"{job.instance}: edges")
    made = {d.ordinal: d for d in job.datasets if d.generation}
    if not made:
        return edges
    births = [Unit(f"{d.name}/{s.name}", (d.ordinal, i)) for d in made.values() for i, s in enumerate(d.shards)]
    kin = job.engine.scan(partial(_scan_kin, made), births, KIN, f"{job.instance}: parents")
    joined = job.engine.join(edges, kin, ["node", "other"], "left outer", f"{job.instance}: parents")
    return job.engine.map(joined, _marked, CANDIDATES, f"{job.instance}: kin")


def _scan_kin(datasets: dict[int, Dataset], unit: Unit) -> Iterator[pa.RecordBatch]:
    """Every child with each of its parents, both ways round."""
    ordinal, number = unit.payload
    dataset = datasets[ordinal]
    for batch in dataset.read(dataset.shards[number], ["doc_id", "metadata"]):
        pairs = {
            pair
            for child, metadata in zip(*(c.to_pylist() for c in batch.columns), strict=True)
            for parent in json.loads(metadata).get("parents", ())
            for pair in ((child, parent), (parent, child))
        }
        ordered = sorted(pairs)
        ends = [pa.array([pair[i] for pair in ordered], TEXT) for i in range(2)]
        yield pa.RecordBatch.from_arrays([*ends, pa.repeat(True, len(ordered))], schema=KIN)


def _marked(joined: pa.Table) -> pa.Table:
    """Edges of kin with a negative Jaccard, by which `dedup.survivors` knows them."""
    jaccard = joined.column("jaccard")
    jaccard = pc.if_else(pc.is_valid(joined.column("kin")), pc.negate(jaccard), jaccard)
    at = joined.schema.get_field_index("jaccard")
    return joined.set_column(at, "jaccard", jaccard).select(CANDIDATES.names).cast(CANDIDATES)


def _scan_edges(root: Root, unit: Unit) -> Iterator[pa.RecordBatch]:
    table = root.read_table(unit.payload, ["component", "a", "b", "jaccard"])
    n = table.num_rows
    arrays = [table.column("component"), table.column("a"), pa.nulls(n, TEXT), pa.nulls(n, pa.int64())]
    arrays += [pa.nulls(n, CANDIDATES.field("order").type), table.column("b"), table.column("jaccard")]
    yield from pa.Table.from_arrays(arrays, schema=CANDIDATES).combine_chunks().to_batches()


def elect(table: pa.Table, threshold: float) -> pa.Table:
    """Losers of whole groups: each with the doc_id of the document it falls to, and through which relation.

    `threshold` is the least Jaccard of an edge."""
    is_doc = np.asarray(pc.is_valid(table.column("doc_id")))
    docs, edges = table.filter(pa.array(is_doc)), table.filter(pa.array(~is_doc))
    if docs.num_rows < 2:
        return LOSERS.empty_table()
    docs = docs.take(pa.array(_best_first(docs)))
    doc_ids = docs.column("doc_id").combine_chunks()
    nodes = docs.column("node").combine_chunks().dictionary_encode()
    node = nodes.indices.to_numpy().astype(np.int64)  # numbered by first, that is best, appearance
    best = np.unique(node, return_index=True)[1]  # row of the best document of each node
    falls_to = _falls_to(edges, nodes.dictionary, threshold)
    target = best[falls_to[node]]
    lost = target != np.arange(docs.num_rows)
    through = np.where(falls_to[node] == node, "exact", "minhash")[lost]
    return pa.table(
        [docs.column("row").filter(pa.array(lost)), doc_ids.take(pa.array(target[lost])), pa.array(through, TEXT)],
        schema=LOSERS,
    )


def _best_first(docs: pa.Table) -> np.ndarray:
    """Row numbers of documents in the order of `order`, then doc_id."""
    width = pc.list_value_length(docs.column("order"))[0].as_py()
    order = pc.list_flatten(docs.column("order")).to_numpy().reshape(-1, width)
    keys = pa.table({**{f"k{i}": order[:, i] for i in range(width)}, "doc_id": docs.column("doc_id")})
    return np.asarray(pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]))


def _falls_to(edges: pa.Table, nodes: pa.Array, threshold: float) -> np.ndarray:
    """int64 [nodes]: the node that each node falls to, itself if it stays. Edges to documents that fell before are left out."""
    own = np.arange(len(nodes), dtype=np.int64)
    if edges.num_rows == 0:
        return own
    a = pc.index_in(edges.column("node"), value_set=nodes).combine_chunks()
    b = pc.index_in(edges.column("other"), value_set=nodes).combine_chunks()
    live = pc.and_(pc.is_valid(a), pc.is_valid(b))
    left, right = (x.filter(live).to_numpy().astype(np.int64) for x in (a, b))
    jaccard = edges.column("jaccard").combine_chunks().filter(live).to_numpy()
    survivor = survivors.elect(left, right, jaccard, own, threshold)
    return np.where(survivor < 0, own, survivor)
