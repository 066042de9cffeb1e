"""The stage `rebalance`: a quota for each cluster, and for each document whether it is within.

In: the clusters of `cluster`, for rows where `where` holds; a column that orders documents (`tier`) and one that says how much a
document counts (`amount`), both optional. Out: the layer `rebalance`, null for documents without a cluster or outside `where`,

- `within_quota`     bool   whether the document and those before it in its cluster fit the cluster's quota
- `rank_in_cluster`  int64  0 for the first: by tier, then by hash of doc_id, then by doc_id
- `cluster_docs`     int64  documents of the cluster

and below `relations/<instance>/` what was trimmed (`mixtures.trim`). Nothing is dropped here: a rule of the policy does that,
`{drop: rebalance.within_quota == false, reason: over_quota}`, in a later select. Near-duplicates should have fallen before
(`where: fate@...`), or they fill quotas with copies of each other.

The rule that Step 3.5 Flash (arXiv 2602.10604, App. C) trims "clusters with disproportionate mass" by is not published; the two
here are in `mixtures.quotas`. A larger target never drops a document that a smaller one keeps.

Cost: one shuffle of some 80 bytes a document. A cluster of more than `block_docs` documents is ranked in blocks of the hash, with
the counts of earlier blocks added, so no process holds a whole cluster, however skewed.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from core.engines.columns import key_starts
from core.engines.contract import Engine, Frame, Unit
from core.errors import ConfigError, StageError
from core.hashing import seeded_column
from core.job import Job, Outcome
from core.schema import TEXT
from core.stage import Kind, Stage, StageConfig, execution
from dedup.scopes import Source, align_all, read_rows
from mixtures.quotas import power_law, water_fill
from mixtures.trim import write_trim

LAYER = pa.schema([("within_quota", pa.bool_()), ("rank_in_cluster", pa.int64()), ("cluster_docs", pa.int64())])
MEMBERS = pa.schema(
    [
        ("cluster", pa.int32()),
        ("tier", pa.int64()),  # ascending is better
        ("draw", pa.int64()),
        ("doc_id", TEXT),
        ("row", pa.int64()),
        ("amount", pa.int64()),
    ]
)
# `block_tier` and `block` are zero in clusters that are ranked at once; together with `cluster` they name a block, in order.
BLOCK = ("cluster", "block_tier", "block")
BLOCKED = pa.schema([*MEMBERS, ("block_tier", pa.int64()), ("block", pa.int64())])
SIZES = pa.schema([*((name, BLOCKED.field(name).type) for name in BLOCK), ("docs", pa.int64()), ("amount", pa.int64())])
RANKED = pa.schema([("row", pa.int64()), *LAYER, ("cluster", pa.int32()), ("amount", pa.int64())])
NO_TIER = 1 << 62  # documents without a tier come last
DRAWS = 1 << 53  # seeded_column has so many values
SALT = pa.scalar("rebalance", TEXT)
BATCH_BYTES = 16 << 20


class RebalanceConfig(StageConfig):
    """How much stays of which cluster, and which documents first."""

    cluster: str = Field(default="cluster.cluster", description="column of cluster numbers")
    rule: Literal["water", "power"] = Field(
        default="water", description="`water`: one cap for all clusters; `power`: quotas in proportion to size^alpha"
    )
    keep_fraction: float = Field(default=0.7, gt=0, le=1, description="target as a share of all that has a cluster")
    target: int | None = Field(default=None, ge=0, description="target in the unit of `amount`, in place of a share")
    amount: str | None = Field(
        default=None, description="integer column that a document counts by, as `signals.chars`; null: each counts one"
    )
    alpha: float = Field(
        default=0.6, gt=0, le=1, description="rule `power`: 1 keeps proportions, near 0 makes all equal"
    )
    floor: int = Field(
        default=0, ge=0, description="rule `power`: the least quota of a cluster, in the unit of `amount`"
    )
    tier: str | None = Field(
        default=None,
        description="integer column, best first within a cluster: `tiers.rank`, or `-tiers.rank` descending",
    )
    seed: int = Field(default=0, ge=0, description="draws another order within clusters")
    block_docs: int = execution(1 << 20, "documents of one cluster that are ranked at once")

    @model_validator(mode="after")
    def _floor_needs_power(self) -> "RebalanceConfig":
        if self.floor and self.rule == "water":
            raise ConfigError(f"rebalance: floor means nothing for rule water, got {self.floor}; a cap has no floor")
        return self

    def quotas(self, amounts: np.ndarray) -> np.ndarray:
        """int64 [k] from the clusters' amounts."""
        target = math.floor(self.keep_fraction * int(amounts.sum())) if self.target is None else self.target
        if self.rule == "water":
            return water_fill(amounts, target, self.seed)
        return power_law(amounts, target, self.alpha, self.floor, self.seed)


def reads(config: RebalanceConfig) -> tuple[str, ...]:
    more = [config.amount, config.tier.lstrip("-") if config.tier else None]
    return ("doc_id", config.cluster, *(c for c in more if c))


def read_members(config: RebalanceConfig, unit: Unit) -> Iterator[pa.RecordBatch]:
    """MEMBERS of a shard: documents that have a cluster."""
    for rows, batch in read_rows(unit.payload, reads(config), config.where, BATCH_BYTES):
        there = batch.column(config.cluster).is_valid()
        batch, rows = batch.filter(there), rows[np.asarray(there)]
        if not batch.num_rows:
            continue
        keys = pc.binary_join_element_wise(SALT, batch.column("doc_id"), pa.scalar(" ", TEXT))
        amount = pa.array(np.ones(len(rows), np.int64))
        if config.amount:
            amount = pc.fill_null(integers(batch, config.amount), 0)
            if pc.min(amount).as_py() < 0:
                raise StageError(
                    f"rebalance: {config.amount} is negative somewhere; name a column of sizes as `amount`"
                )
        columns = [
            batch.column(config.cluster).cast(pa.int32()),
            tier_column(config, batch),
            pa.array((seeded_column(config.seed, keys) * DRAWS).astype(np.int64)),
            batch.column("doc_id"),
            pa.array(rows),
            amount,
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=MEMBERS)


def tier_column(config: RebalanceConfig, batch: pa.RecordBatch) -> pa.Array:
    """int64: ascending is better, nulls last."""
    if not config.tier:
        return pa.array(np.zeros(batch.num_rows, np.int64))
    values = integers(batch, config.tier.lstrip("-"))
    return pc.fill_null(pc.negate(values) if config.tier.startswith("-") else values, NO_TIER)


def integers(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column as int64. StageError for other types than integers."""
    column = batch.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise StageError(f"rebalance: {name} is of type {column.type}, expected integers; name another column")
    return column.cast(pa.int64())


def sizes_of(clusters: int, members: pa.Table) -> np.ndarray:
    """int64 [clusters, 2]: documents and amount by cluster."""
    cluster = members.column("cluster").to_numpy()
    out = np.zeros((clusters, 2), dtype=np.int64)
    out[:, 0] = np.bincount(cluster, minlength=clusters)
    np.add.at(out[:, 1], cluster, members.column("amount").to_numpy())
    return out


def largest_number(members: pa.Table) -> int:
    return int(pc.max(members.column("cluster")).as_py())


def cut_blocks(docs: np.ndarray, block_docs: int, members: pa.Table) -> pa.Table:
    """BLOCKED: rows of clusters with more than `block_docs` documents by tier and a part of the hash's range."""
    cluster = members.column("cluster").to_numpy()
    blocks = -(-docs[cluster] // block_docs)
    large = blocks > 1
    block = (members.column("draw").to_numpy() / DRAWS * blocks).astype(np.int64)  # both powers of two: exact, monotone
    tier = members.column("tier").to_numpy()
    columns = [pa.array(np.where(large, values, 0)) for values in (tier, block)]
    return pa.Table.from_arrays([*members.columns, *columns], schema=BLOCKED)


def block_rows(docs: np.ndarray, block_docs: int, blocked: pa.Table) -> pa.Table:
    """SIZES of each row of a large cluster, to be summed."""
    large = blocked.filter(pa.array(docs[blocked.column("cluster").to_numpy()] > block_docs))
    ones = pa.array(np.ones(large.num_rows, np.int64))
    return pa.Table.from_arrays([*large.select(list(BLOCK)).columns, ones, large.column("amount")], schema=SIZES)


def sum_blocks(chunk: pa.Table) -> pa.Table:
    """One row a block, from rows sorted by block."""
    first = np.flatnonzero(key_starts(chunk, list(BLOCK)))
    if not len(first):
        return SIZES.empty_table()
    sums = [pa.array(np.add.reduceat(chunk.column(c).to_numpy(), first)) for c in ("docs", "amount")]
    return pa.Table.from_arrays([*chunk.select(list(BLOCK)).take(pa.array(first)).columns, *sums], schema=SIZES)


Before = dict[tuple[int, int, int], tuple[int, int]]


def before_blocks(sizes: pa.Table) -> Before:
    """Documents and amount of a cluster that come before each of its blocks; `sizes` sorted by block."""
    out: Before = {}
    here, docs, amount = -1, 0, 0
    for row in zip(*(sizes.column(c).to_pylist() for c in SIZES.names), strict=True):
        if row[0] != here:
            here, docs, amount = row[0], 0, 0
        out[row[0], row[1], row[2]] = docs, amount
        docs, amount = docs + row[3], amount + row[4]
    return out


@dataclass(frozen=True)
class Rank:
    """RANKED from whole blocks sorted by block, then tier, draw and doc_id."""

    docs: np.ndarray  # int64 [k]
    quotas: np.ndarray  # int64 [k]
    before: Before

    def __call__(self, chunk: pa.Table) -> pa.Table:
        first = np.flatnonzero(key_starts(chunk, list(BLOCK)))
        length = np.diff(first, append=chunk.num_rows)
        keys = zip(*(chunk.column(c).take(pa.array(first)).to_pylist() for c in BLOCK), strict=True)
        offset = np.array([self.before.get(key, (0, 0)) for key in keys], dtype=np.int64).reshape(-1, 2)
        cluster, amount = chunk.column("cluster").to_numpy(), chunk.column("amount").to_numpy()
        rank = np.arange(chunk.num_rows) + np.repeat(offset[:, 0] - first, length)
        run = np.cumsum(amount)
        through = run + np.repeat(offset[:, 1] - (run[first] - amount[first]), length)
        columns = [through <= self.quotas[cluster], rank, self.docs[cluster], cluster, amount]
        return pa.Table.from_arrays([chunk.column("row"), *map(pa.array, columns)], schema=RANKED)


def rank_members(
    engine: Engine, members: Frame, docs: np.ndarray, quotas: np.ndarray, config: RebalanceConfig
) -> Frame:
    """RANKED of every member."""
    blocked = engine.map(members, partial(cut_blocks, docs, config.block_docs), BLOCKED, "rebalance: blocks")
    before: Before = {}
    if docs.max(initial=0) > config.block_docs:
        rows = engine.map(blocked, partial(block_rows, docs, config.block_docs), SIZES, "rebalance: large clusters")
        sizes = engine.shuffle(rows, BLOCK, sum_blocks, SIZES, combine=sum_blocks, label="rebalance: block sizes")
        before = before_blocks(engine.collect(sizes))
    rank = Rank(docs, quotas, before)
    return engine.shuffle(blocked, BLOCK, rank, RANKED, order=["tier", "draw", "doc_id"], label="rebalance: rank")


def rebalance(job: Job) -> Outcome:
    """Write the layer of every dataset and the account of what was trimmed."""
    config: RebalanceConfig = job.config
    engine, label = job.engine, job.instance
    units = [Unit(f"{d.name}/{s.name}", Source(d, i, 0), s.rows) for d in job.datasets for i, s in enumerate(d.shards)]
    members = engine.persist(engine.scan(partial(read_members, config), units, MEMBERS, f"{label}: members"))
    most = engine.fold(members, largest_number, max, f"{label}: clusters")
    clusters = 0 if most is None else most + 1
    sizes = engine.fold(members, partial(sizes_of, clusters), operator.add, f"{label}: sizes")
    sizes = np.zeros((0, 2), np.int64) if sizes is None else sizes
    quotas = config.quotas(sizes[:, 1])
    ranked = engine.persist(rank_members(engine, members, sizes[:, 0], quotas, config))
    outcome = Outcome(layers=align_all(job, ranked, LAYER))
    report = write_trim(job, ranked, sizes, quotas, outcome)
    docs = sum(d.rows for d in job.datasets)
    outcome.accounts = {"docs": docs, "clustered": report["docs"], "within_quota": report["kept_docs"]}
    outcome.observed = {
        "docs": docs,
        "unclustered_docs": docs - report["docs"],
        **{key: report[key] for key in ("clusters", "gini", "kept_gini", "effective", "kept_effective")},
    }
    return outcome


STAGE = Stage(
    name="rebalance",
    kind=Kind.RELATE,
    config=RebalanceConfig,
    fn=rebalance,
    reads=reads,
    layer=LAYER,
    libraries=("numpy", "pyarrow"),
)
