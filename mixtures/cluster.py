"""The stage `cluster`: two-level spherical k-means over the vectors of `embed`, to any number of clusters.

In: the vectors, for rows where `where` holds. Out: the layer `cluster`, and below `models/<instance>/` the centroids
(`parents.npy` int8 [k1, d], `leaves.npy` int8 [k, d], `first.npy` int64 [k1 + 1]; see `mixtures.kmeans.Tree`):

- `cluster`   int32    0 to k - 1; null: no vector, or outside `where`
- `distance`  float32  one minus the cosine to the cluster's centroid

k1 is about the square root of `clusters`. Each level is fitted on at most `points` vectors a centroid, drawn by hash of doc_id:
the first on the driver, the second by parent in a shuffle, so that nobody holds more than `points` x (leaves of a parent) of
them. Then every vector goes to its nearest parent and on to the nearest leaf of that parent: 2 (k1 + k / k1) d operations a
vector in place of 2 k d. A vector near a border between parents may lie nearer to a leaf of the other one: that is the price
of two levels.

There are fewer clusters than asked for where there are fewer distinct vectors; some may stay empty. The number of a cluster means
nothing and changes with every fit. Step 3.5 Flash (arXiv 2602.10604, App. C) clusters into 100k+ for down-sampling;
two levels are a small case of the hierarchy of Vo et al. 2024 (arXiv 2405.15613). Memory and seconds: `benchmarks/clusters.py`.
"""

import io
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.dataset import Dataset, Shard
from core.engines.contract import Frame, Note, Report, Unit
from core.hashing import digest, seeded_column
from core.job import Job, Outcome, total
from core.layer import committed, layer_output, layer_schema, write_layer
from core.predicate import Predicate
from core.schema import TEXT
from core.stage import Kind, Resources, Stage, StageConfig
from core.storage import Root
from dedup.scopes import Source, read_rows
from mixtures.embed import vector_column
from mixtures.kmeans import Tree, allot, fit, nearest, unpack

LAYER = pa.schema([("cluster", pa.int32()), ("distance", pa.float32())])
SAMPLE = pa.schema([("draw", pa.int64()), ("doc_id", TEXT), ("vector", pa.large_binary())])
PLACED = pa.schema([("parent", pa.int32()), *SAMPLE])
LEAVES = pa.schema([("parent", pa.int32()), ("leaf", pa.int32()), ("vector", pa.large_binary())])
DRAWS = 1 << 53  # seeded_column has so many values
SALT = pa.scalar("cluster", TEXT)  # `split` and `tokenizer` draw by other hashes of doc_id
BATCH_BYTES = 16 << 20
SKEW = 2  # times the mean number of leaves that one parent may get: bounds the longest fit. Chosen, untested
FILES = ("parents", "leaves", "first")


class ClusterConfig(StageConfig):
    """How many clusters, and how they are fitted."""

    vector: str = Field(default="embed.vector", description="column of int8 vectors")
    clusters: int = Field(default=100_000, ge=1, le=10_000_000, description="clusters asked for")
    points: int = Field(default=256, ge=1, description="vectors a centroid is fitted on, at most")
    iterations: int = Field(default=10, ge=1, description="rounds of k-means on each level")
    seed: int = Field(default=0, ge=0, description="draws another sample and other starting points")

    @property
    def parents(self) -> int:
        """Centroids of the first level."""
        return math.ceil(math.sqrt(self.clusters))


@dataclass(frozen=True)
class Draw:
    """Scans a shard for the vectors of the sample."""

    config: ClusterConfig
    fraction: float

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        config = self.config
        for _, batch in read_rows(unit.payload, ["doc_id", config.vector], config.where, BATCH_BYTES):
            vectors, there = unpack(batch.column(config.vector), "cluster")
            ids = batch.column("doc_id").filter(pa.array(there))
            keys = pc.binary_join_element_wise(SALT, ids, pa.scalar(" ", TEXT))
            draw = seeded_column(config.seed, keys)
            at = np.flatnonzero(draw < self.fraction)
            columns = [
                pa.array((draw[at] * DRAWS).astype(np.int64)),
                ids.take(pa.array(at)),
                vector_column(vectors[at]),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=SAMPLE)


def first_level(draws: int, sample: pa.Table) -> pa.Table:
    """The part of the sample that the first level is fitted on."""
    return sample.filter(pc.less(sample.column("draw"), draws))


def place(parents: np.ndarray, sample: pa.Table) -> pa.Table:
    """Each sampled vector with its nearest parent."""
    vectors, _ = unpack(sample.column("vector"), "cluster", parents.shape[1])
    parent = pa.array(nearest(vectors, parents).astype(np.int32))
    return pa.Table.from_arrays([parent, *sample.columns], schema=PLACED)


def count_parents(parents: int, placed: pa.Table) -> np.ndarray:
    return np.bincount(placed.column("parent").to_numpy(), minlength=parents)


def fit_leaves(config: ClusterConfig, leaves: np.ndarray, chunk: pa.Table) -> pa.Table:
    """Leaf centroids of whole parents, sorted by parent, then by draw."""
    parent = chunk.column("parent").to_numpy()
    edges = np.flatnonzero(np.diff(parent, prepend=-1))
    out = []
    for first, end in zip(edges.tolist(), [*edges[1:].tolist(), len(parent)], strict=True):
        number = int(parent[first])
        rows = chunk.slice(first, min(end - first, config.points * int(leaves[number])))
        vectors, _ = unpack(rows.column("vector"), "cluster")
        found = fit(vectors, int(leaves[number]), config.iterations, config.seed + 1 + number)
        columns = [np.full(len(found), number, np.int32), np.arange(len(found), dtype=np.int32)]
        out.append(pa.Table.from_arrays([*map(pa.array, columns), vector_column(found)], schema=LEAVES))
    return pa.concat_tables(out) if out else LEAVES.empty_table()


def fit_tree(job: Job, sample: Frame, live: int) -> Tree:
    """Both levels. Without a single vector: a tree without clusters."""
    config: ClusterConfig = job.config
    engine, label = job.engine, job.instance
    most = int(DRAWS * min(1.0, config.points * config.parents / max(1, live)))
    top = engine.collect(engine.map(sample, partial(first_level, most), SAMPLE, f"{label}: first level"))
    if top.num_rows == 0:
        top = engine.collect(sample)  # so few that none was drawn for the first level
    if top.num_rows == 0:
        return Tree(np.zeros((0, 0), np.int8), np.zeros((0, 0), np.int8), np.zeros(1, np.int64))
    vectors = unpack(top.column("vector"), label)[0][: config.points * config.parents]  # sorted by draw and doc_id
    parents = fit(vectors, config.parents, config.iterations, config.seed)
    placed = engine.persist(engine.map(sample, partial(place, parents), PLACED, f"{label}: place"))
    counts = engine.fold(placed, partial(count_parents, len(parents)), operator.add, f"{label}: count")
    leaves = allot(counts, config.clusters, SKEW * math.ceil(config.clusters / len(parents)))
    fitted = engine.shuffle(
        placed,
        ["parent"],
        partial(fit_leaves, config, leaves),
        LEAVES,
        order=["draw", "doc_id"],
        max_rows_per_key=config.points * int(leaves.max()),
        label=f"{label}: second level",
    )
    found = engine.collect(fitted)  # sorted by parent and leaf
    first = np.searchsorted(found.column("parent").to_numpy(), np.arange(len(parents) + 1))
    return drop_childless(Tree(parents, unpack(found.column("vector"), label, vectors.shape[1])[0], first))


def drop_childless(tree: Tree) -> Tree:
    """Without the parents to which no sampled vector is nearest: a vector sent there would find no leaf."""
    kept = np.flatnonzero(np.diff(tree.first))
    return Tree(tree.parents[kept], tree.leaves, np.append(tree.first[kept], tree.first[-1]).astype(np.int64))


def write_tree(job: Job, tree: Tree) -> dict[str, dict[str, Any]]:
    """Commit the centroids; their manifest outputs."""
    outputs = {}
    for name in FILES:
        array = getattr(tree, name)
        buffer = io.BytesIO()
        np.save(buffer, array)
        job.root.write_bytes(tree_name(job.instance, name), buffer.getvalue())
        outputs[tree_name(job.instance, name)] = {"rows": len(array), "content": digest(buffer.getvalue().hex())}
    return outputs


def tree_name(instance: str, part: str) -> str:
    return f"models/{instance}/{part}.npy"


@dataclass(frozen=True)
class AssignUnits:
    """Writes the layer of one shard. `value` = its manifest output and how many documents went to each cluster."""

    dataset: Dataset
    instance: str
    config: ClusterConfig
    unit: str  # identity of the stage with its centroids

    def __call__(self, unit: Unit, note: Note) -> Report:
        ordinal: int = unit.payload
        shard: Shard = self.dataset.shards[ordinal]
        done = committed(self.dataset, self.instance, shard, self.unit)
        if done is not None:
            return Report(unit.name, docs=shard.rows, resumed=True, value=layer_output(done))
        tree = open_tree(self.dataset, self.instance, self.unit)
        pieces = []
        predicate = Predicate(self.config.where) if self.config.where else None
        columns = [self.config.vector, *(predicate.columns if predicate else ())]
        for batch in self.dataset.read(shard, list(dict.fromkeys(columns)), BATCH_BYTES):
            live = predicate.holds(batch) if predicate else np.ones(batch.num_rows, bool)
            pieces.append(assign(tree, batch.column(self.config.vector), live))
            note(docs=batch.num_rows)
        table = pa.concat_tables(pieces) if pieces else layer_schema(LAYER).empty_table()
        made = write_layer(self.dataset, self.instance, shard, LAYER, [table], self.unit)
        return Report(unit.name, docs=shard.rows, value=layer_output(made))


def assign(tree: Tree, column: pa.Array, live: np.ndarray) -> pa.Table:
    """Layer rows of a batch of vectors; rows that are not `live` are not computed."""
    vectors, there = unpack(column, "cluster", tree.leaves.shape[1] or None)
    chosen = live & there
    cluster, distance = np.zeros(len(live), np.int32), np.zeros(len(live), np.float32)
    if len(tree.leaves):
        cluster[chosen], distance[chosen] = tree.assign(vectors[live[there]])
    else:
        chosen[:] = False
    own = [pa.array(values, mask=~chosen) for values in (cluster, distance)]
    return pa.Table.from_arrays([pa.array(live), pa.nulls(len(live), TEXT), *own], schema=layer_schema(LAYER))


def open_tree(dataset: Dataset, instance: str, unit: str) -> Tree:
    """The committed centroids, loaded once per worker and fit."""
    return _open_tree(dataset.root.url, instance, unit)


@lru_cache(maxsize=1)
def _open_tree(url: str, instance: str, unit: str) -> Tree:
    root = Root(url)
    return Tree(*(np.load(io.BytesIO(root.read_bytes(tree_name(instance, part)))) for part in FILES))


def cluster(job: Job) -> Outcome:
    """Fit, then assign every document."""
    config: ClusterConfig = job.config
    units = [Unit(f"{d.name}/{s.name}", Source(d, i, 0), s.rows) for d in job.datasets for i, s in enumerate(d.shards)]
    live = sum(r.value for r in job.engine.run_units(CountUnits(config.where), units, f"{job.instance}: count"))
    fraction = min(1.0, config.clusters * config.points / max(1, live))
    sample = job.engine.persist(job.engine.scan(Draw(config, fraction), units, SAMPLE, f"{job.instance}: sample"))
    tree = fit_tree(job, sample, live)
    outcome = Outcome(outputs=write_tree(job, tree))
    identity = digest([job.identity, outcome.outputs])
    reports = []
    for dataset in job.datasets:
        shards = [Unit(s.name, i, s.rows) for i, s in enumerate(dataset.shards)]
        work = AssignUnits(dataset, job.instance, config, identity)
        made = job.engine.run_units(work, shards, f"{job.instance}: assign {dataset.name}")
        outcome.layers[dataset.name, job.instance] = {r.unit: r.value for r in made}
        reports += made
    outcome.accounts = {"clusters": len(tree.leaves), "parents": len(tree.parents), "docs": live}
    outcome.observed = {**total(reports), "sampled_fraction": round(fraction, 6)}
    return outcome


@dataclass(frozen=True)
class CountUnits:
    """`value` = rows of a shard for which `where` holds."""

    where: str | None

    def __call__(self, unit: Unit, note: Note) -> Report:
        source: Source = unit.payload
        shard = source.dataset.shards[source.shard]
        if not self.where:
            return Report(unit.name, docs=shard.rows, value=shard.rows)
        predicate = Predicate(self.where)
        holds = predicate.holds(source.dataset.read_table(shard, predicate.columns))
        note(docs=shard.rows)
        return Report(unit.name, docs=shard.rows, value=int(holds.sum()))


STAGE = Stage(
    name="cluster",
    kind=Kind.RELATE,
    config=ClusterConfig,
    fn=cluster,
    reads=lambda c: ("doc_id", c.vector),
    layer=LAYER,
    libraries=("numpy", "faiss-cpu"),
    resources=Resources(memory_gb=4.0),
)
