"""Near-duplicates: MinHash finds candidate pairs, their true Jaccard decides, components say who is connected.

In:  text, and the cliques of `exact`: one document of each clique, the one with the smallest doc_id, stands for all.
Out: the relation `relations/minhash/edges/` (`dedup.relation`: a < b by doc_id, Jaccard of the word 5-gram sets at least the
     threshold, the component), from which `select` elects survivors; and the layer `minhash`:

- `component`       large_string  smallest doc_id of the documents connected to this one by equal text or edges; null: alone
- `component_docs`  int64         documents in the component, copies counted; null: alone

Settings are FineWeb's: word 5-grams, 14 bands of 8 rows, so a pair with Jaccard s is compared with probability 1-(1-s^8)^14:
0.211 at 0.6, 0.565 at 0.7, 0.772 at 0.75, 0.924 at 0.8, 0.988 at 0.85. The threshold of 0.75 is chosen from that curve, just
above its knee at (1/14)^(1/8) = 0.72: further down the luck of the permutations decides more and more which pairs are found.

Traffic per document: 504 bytes of bands; and for those that share a bucket, which `dedup.row_filter` picks out up to 16 million
of them, 4 bytes for each distinct shingle and some 100 more, twice. Text is read once. Measured (`benchmarks/shuffles.py`): over
2,386 files of 10.5 KB 1.5 KB a document enter an exchange (5.8 KB when every document's shingles did), over 18,379 with more
near-copies among them 2.6 KB.

Up to `max_edges` verified pairs are collected by the driver, which finds the components in its memory (`dedup.components`); above
it the workers find them (`dedup.labels`, `dedup.stars`) and write the relation, with the same bytes in the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.engines.contract import Engine, Frame, Report, Unit, rows_in
from core.job import Job, Outcome
from core.schema import TEXT
from core.stage import Kind, Stage, StageConfig, execution
from dedup.candidates import BANDS, MEMBER, WANTS, band_rows, group_up, pair_up
from dedup.components import GIANT_FRACTION, MAX_EDGES, Components, census_of_graph, components, id_bytes
from dedup.labels import LABELLED, Census, distinct_edges, label_edges, label_nodes
from dedup.relation import RELATION, EdgeFiles, outputs, write_here, write_there
from dedup.row_filter import passed, row_filter
from dedup.scopes import Scopes, align_all, read_rows, scope_numbers, source_units
from dedup.shingles import shingle
from dedup.signatures import band_keys, signatures
from dedup.stars import CROWD
from dedup.verify import EDGES, NODE, VERIFY, unique_sets, verify

BATCH_BYTES = 4 << 20  # of text: its shingles and sort keys stay near the cache

LAYER = pa.schema([("component", TEXT), ("component_docs", pa.int64())])
NODES = pa.schema([("row", pa.int64()), *NODE, ("bands", pa.large_binary())])
SETS = pa.schema([("row", pa.int64()), *NODE])
MEMBERS = pa.schema([("row", pa.int64()), ("hub", pa.int64()), ("block", pa.int32())])
COPIES = pa.schema([("row", pa.int64()), ("node", TEXT), ("copies", pa.int64())])
LABELS = pa.schema([("node", TEXT), ("component", TEXT), ("component_docs", pa.int64())])
FOUND = pa.schema([("row", pa.int64()), *LAYER])


class MinHashConfig(StageConfig):
    """Knobs of `minhash`. `bands` x `rows` and `jaccard` belong together: see the module."""

    scopes: Scopes = Field(
        default=(),
        description="lists of datasets that are deduplicated against each other; none: all datasets together",
    )
    exact: str | None = Field(default="exact", description="layer that names copies; null: compare every document")
    ngram: int = Field(default=5, ge=1, le=50, description="words in a shingle")
    bands: int = Field(default=14, ge=1, description="chances of a pair to be compared")
    rows: int = Field(default=8, ge=1, description="minima that must agree in a band")
    seed: int = Field(default=1, ge=0, lt=1 << 32, description="of the permutations (datasketch's affine32 scheme)")
    jaccard: float = Field(default=0.75, gt=0, le=1, description="least true Jaccard of an edge")
    window: int = Field(default=32, ge=1, description="neighbours each row of a large bucket is compared with")
    max_bucket_rows: int = Field(
        default=1 << 20, ge=2, description="rows of a bucket beyond this are not paired in it, and counted"
    )
    max_edges: int = execution(MAX_EDGES, "edges that the driver may hold for components; more go to the workers")


def read_nodes(config: MinHashConfig, unit: Unit) -> Iterator[pa.RecordBatch]:
    """Rows, shingle sets and band keys of a shard's documents, copies left out."""
    layer = [f"{config.exact}.clique", f"{config.exact}.copies"] if config.exact else []
    for rows, batch in read_rows(unit.payload, ["doc_id", "text", *layer], config.where, BATCH_BYTES):
        copies = np.ones(batch.num_rows, dtype=np.int64)
        if layer:
            clique = batch.column(layer[0]).cast(TEXT)
            alone = pc.fill_null(pc.equal(clique, batch.column("doc_id")), True)
            copies = np.asarray(pc.fill_null(batch.column(layer[1]).cast(pa.int64()), 1))[np.asarray(alone)]
            rows, batch = rows[np.asarray(alone)], batch.filter(alone)
        if batch.num_rows:
            yield nodes(config, unit.payload.scope, rows, copies, batch)


def nodes(
    config: MinHashConfig, scope: int, rows: np.ndarray, copies: np.ndarray, batch: pa.RecordBatch
) -> pa.RecordBatch:
    """NODES from doc_id and text."""
    shingles = shingle(batch.column("text"), config.ngram)
    signature = signatures(shingles, config.bands * config.rows, config.seed)
    keys = band_keys(signature, config.bands, config.rows, scope)
    width = config.bands * 8
    buffers = [
        None,
        pa.py_buffer(np.arange(len(keys) + 1, dtype=np.int64) * width),
        pa.py_buffer(np.ascontiguousarray(keys)),
    ]
    bands = pa.Array.from_buffers(pa.large_binary(), len(keys), buffers)
    sets, sizes = unique_sets(shingles)
    columns = [pa.array(rows), batch.column("doc_id"), pa.array(copies), pa.array(sizes), sets, bands]
    return pa.RecordBatch.from_arrays(columns, schema=NODES)


def find_edges(engine: Engine, found: Frame, config: MinHashConfig, label: str) -> Frame:
    """Verified edges of a persisted frame of NODES; a pair may come several times."""
    buckets = engine.map(found, band_rows, BANDS, f"{label}: bands")
    wants = engine.shuffle(
        buckets,
        ["bucket"],
        partial(pair_up, window=config.window, jaccard=config.jaccard),
        WANTS,
        order=["next", "tie", "row"],
        max_rows_per_key=config.max_bucket_rows,
        label=f"{label}: pair",
    )
    wants = engine.shuffle(wants, ["hub", "block"], group_up, WANTS, order=["a", "b"], label=f"{label}: group")
    wants = engine.persist(wants)
    members = engine.persist(engine.map(wants, _members, MEMBERS, f"{label}: members"))
    wanted = row_filter(engine, members, f"{label}: rows to bring")
    if wanted is not None:
        found = engine.map(found, partial(_wanted, wanted=wanted), SETS, f"{label}: shingles to bring")
    members = engine.join(members, found, ["row"], label=f"{label}: bring shingles")
    members = engine.map(members, _member_lines, VERIFY, f"{label}: members with shingles")
    pairs = engine.map(wants, _pair_lines, VERIFY, f"{label}: pairs")
    check = partial(verify, jaccard=config.jaccard)
    return engine.shuffle([members, pairs], ["hub", "block"], check, EDGES, order=["a", "b"], label=f"{label}: verify")


def _members(wants: pa.Table) -> pa.Table:
    lines = wants.filter(pc.equal(wants.column("b"), MEMBER))
    return lines.select(["a", "hub", "block"]).rename_columns(MEMBERS.names)


def _wanted(nodes: pa.Table, wanted: np.ndarray) -> pa.Table:
    return nodes.select(SETS.names).filter(pa.array(passed(nodes.column("row").to_numpy(), wanted)))


def _member_lines(joined: pa.Table) -> pa.Table:
    mark = pa.array(np.full(joined.num_rows, MEMBER))
    named = joined.append_column("a", joined.column("row")).append_column("b", mark)
    return named.select(VERIFY.names)


def _pair_lines(wants: pa.Table) -> pa.Table:
    lines = wants.filter(pc.not_equal(wants.column("b"), MEMBER))
    for field in list(VERIFY)[4:]:
        lines = lines.append_column(field, pa.nulls(lines.num_rows, field.type))
    return lines


def collect_edges(engine: Engine, edges: Frame) -> pa.Table:
    """The distinct edges on the driver."""
    table = engine.collect(edges).combine_chunks()
    a, b = table.column("a_row").to_numpy(), table.column("b_row").to_numpy()
    fresh = np.ones(len(a), dtype=bool)
    fresh[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])  # sorted by a, b
    return table.filter(pa.array(fresh)).combine_chunks()


def components_of(edges: pa.Table) -> tuple[Components, np.ndarray]:
    """Components over the rows of `edges`, and the doc_id of each row in them."""
    keys = np.concatenate([edges.column(c).to_numpy() for c in ("a_row", "b_row")])
    ids = np.concatenate([id_bytes(edges.column(c)) for c in ("a", "b")])
    copies = np.concatenate([edges.column(c).to_numpy() for c in ("a_copies", "b_copies")])
    half = len(keys) // 2
    found = components(keys[:half], keys[half:], keys, ids, copies)
    return found, ids[np.unique(keys, return_index=True)[1]]


@dataclass(frozen=True)
class Found:
    """What became of the edges: the files of the relation, every node's label (LABELLED), and the census."""

    files: list[Report]
    labelled: Frame
    census: Census


def found_here(job: Job, edges: Frame, write: EdgeFiles) -> Found:
    """Components in the memory of the driver."""
    table = collect_edges(job.engine, edges)
    graph, ids = components_of(table)
    component = pa.array(graph.component.astype(str), TEXT)
    of_edge = component.take(pa.array(np.searchsorted(graph.key, table.column("a_row").to_numpy())))
    files = write_here(write, table.append_column("component", of_edge).select(RELATION.names))
    columns = [pa.array(graph.key), pa.array(ids.astype(str), TEXT), component, pa.array(graph.docs)]
    return Found(files, job.engine.table(pa.table(columns, schema=LABELLED)), census_of_graph(graph))


def found_there(job: Job, edges: Frame, write: EdgeFiles) -> Found:
    """Components by the workers."""
    edges = distinct_edges(job.engine, edges, f"{job.instance}: distinct pairs")
    labelled, census = label_nodes(job.engine, edges, job.instance, CROWD)
    labelled = job.engine.persist(labelled)
    count = rows_in(job.engine, edges, f"{job.instance}: count pairs")
    pairs = label_edges(job.engine, edges, labelled, RELATION, job.instance)
    return Found(write_there(job.engine, write, pairs, count, job.instance), labelled, census)


def read_copies(config: MinHashConfig, unit: Unit) -> Iterator[pa.RecordBatch]:
    """Rows that have copies, with the doc_id that stands for them."""
    columns = ["doc_id", f"{config.exact}.clique", f"{config.exact}.copies"]
    for rows, batch in read_rows(unit.payload, columns, config.where, BATCH_BYTES):
        copied = pc.is_valid(batch.column(1))
        chosen = [pa.array(rows).filter(copied), *(c.filter(copied) for c in batch.columns[1:])]
        yield pa.RecordBatch.from_arrays([chosen[0], chosen[1].cast(TEXT), chosen[2].cast(pa.int64())], schema=COPIES)


def _labelled_copies(joined: pa.Table) -> pa.Table:
    component = pc.coalesce(joined.column("component"), joined.column("node"))
    docs = pc.coalesce(joined.column("component_docs"), joined.column("copies"))
    return pa.Table.from_arrays([joined.column("row"), component, docs], schema=FOUND)


def label_rows(job: Job, labelled: Frame, units: list[Unit]) -> Frame:
    """FOUND for every row that is not alone: nodes by their row, copies through the node that stands for them."""
    engine, config = job.engine, job.config
    by_row = engine.map(labelled, partial(_columns, names=FOUND.names), FOUND, f"{job.instance}: labels of nodes")
    if not config.exact:
        return by_row
    labels = engine.map(labelled, partial(_columns, names=LABELS.names), LABELS, f"{job.instance}: labels of texts")
    copies = engine.scan(partial(read_copies, config), units, COPIES, f"{job.instance}: copies")
    joined = engine.join(copies, labels, ["node"], "left outer", f"{job.instance}: label copies")
    by_node = engine.map(joined, _labelled_copies, FOUND, f"{job.instance}: labels")
    # A node with copies comes both ways, with the same label.
    return engine.shuffle(
        [by_row, by_node], ["row"], _first_of_row, FOUND, order=list(LAYER.names), label=f"{job.instance}: rows"
    )


def _columns(table: pa.Table, names: list[str]) -> pa.Table:
    return table.select(names)


def _first_of_row(chunk: pa.Table) -> pa.Table:
    row = chunk.column("row").to_numpy()
    return chunk.filter(pa.array(np.diff(row, prepend=row[:1] - 1 if len(row) else 0) != 0))


def minhash(job: Job) -> Outcome:
    """Write the relation and the layer of every dataset."""
    config: MinHashConfig = job.config
    scopes = scope_numbers(job.instance, config.scopes, [d.name for d in job.datasets])
    units = source_units(job.datasets, scopes)
    nodes = job.engine.persist(job.engine.scan(partial(read_nodes, config), units, NODES, f"{job.instance}: sign"))
    edges = job.engine.persist(find_edges(job.engine, nodes, config, job.instance))
    many = rows_in(job.engine, edges, f"{job.instance}: count edges")
    write = EdgeFiles(job.root, job.instance, job.identity)
    found = (found_here if many <= config.max_edges else found_there)(job, edges, write)
    labels = job.engine.persist(label_rows(job, found.labelled, units))
    layers = align_all(job, labels, LAYER)
    return Outcome(outputs=outputs(found.files), layers=layers, observed=_observed(job, found))


def _observed(job: Job, found: Found) -> dict[str, Any]:
    """Counts, and the largest component: one above GIANT_FRACTION of all documents is listed under `warnings`."""
    docs = sum(d.rows for d in job.datasets)
    nodes, count, largest_docs, largest = found.census
    observed: dict[str, Any] = {
        "docs": docs,
        "edges": sum(r.docs for r in found.files),
        "connected_docs": nodes,
        "components": count,
        "largest_component_docs": largest_docs,
        "unpaired_bucket_rows": sum(job.engine.dropped_rows().values()),
    }
    if largest_docs > max(1000, GIANT_FRACTION * docs):
        observed["warnings"] = [
            f"component {largest} holds {largest_docs:,} of {docs:,} documents; look at it before `select` runs"
        ]
    return observed


STAGE = Stage(
    name="minhash",
    kind=Kind.RELATE,
    config=MinHashConfig,
    fn=minhash,
    version=2,
    reads=lambda c: ("doc_id", "text", *((f"{c.exact}.clique", f"{c.exact}.copies") if c.exact else ())),
    layer=LAYER,
    libraries=("pyarrow", "scipy"),
)
