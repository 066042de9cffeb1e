"""Labels of near-duplicates over the verbs of an engine: what `dedup.components` answers in memory, for any number of edges.

In:  a frame of edges (`dedup.verify.EDGES`; a pair may come several times).
Out: the distinct edges, and a frame of LABELLED, one row for each end of an edge:

- `row`, `node`      its row and doc_id
- `component`        the smallest doc_id of its component
- `component_docs`   documents in the component, copies counted

and a `Census` of the components. The graph is taken down to its rows (17 bytes a link), `dedup.stars` finds the components, and
doc_ids come back at the end, where the smallest of each component is found by a shuffle that combines. Components with more than
CROWD nodes are labelled by a map that carries their labels, as their nodes would be one key of a join.

Cost: one shuffle of 116 bytes an edge, one of 56 bytes for each end of an edge (combined before the exchange), one of 80 bytes a
node, one join of 60 bytes a node; and the rounds of `dedup.stars`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import Engine, Frame
from core.schema import TEXT
from dedup import stars
from dedup.components import Census
from dedup.stars import CROWD, LINKS
from dedup.verify import EDGES

LABELLED = pa.schema([("row", pa.int64()), ("node", TEXT), ("component", TEXT), ("component_docs", pa.int64())])
MEMBERS = pa.schema([("row", pa.int64()), ("root", pa.int64()), ("node", TEXT), ("copies", pa.int64())])
GROUPS = pa.schema([("root", pa.int64()), ("component", TEXT), ("component_docs", pa.int64()), ("nodes", pa.int64())])


def label_nodes(engine: Engine, edges: Frame, label: str, crowd: int = CROWD) -> tuple[Frame, Census]:
    """A frame of LABELLED and the census of its components. `edges` must be persisted."""
    links = engine.map(edges, links_of, LINKS, f"{label}: links")
    stars_of, _ = stars.settled(engine, links, f"{label}: components", crowd)
    ends = engine.map(edges, ends_of, MEMBERS, f"{label}: nodes")
    roots = [engine.map(f, roots_of, MEMBERS, f"{label}: roots") for f in stars_of]
    members = engine.persist(
        engine.shuffle(
            [ends, *roots],
            ["row"],
            members_of,
            MEMBERS,
            order=["root", "node"],
            combine=first_and_last,
            label=f"{label}: members",
        )
    )
    groups = engine.persist(
        engine.shuffle(
            engine.map(members, as_groups, GROUPS, f"{label}: groups"),
            ["root"],
            grouped,
            GROUPS,
            order=["component"],
            combine=grouped,
            label=f"{label}: label components",
        )
    )
    census = engine.fold(groups, census_of, Census.joined, f"{label}: count components") or Census()
    return _labelled(engine, members, groups, census, label, crowd), census


def _labelled(engine: Engine, members: Frame, groups: Frame, census: Census, label: str, crowd: int) -> Frame:
    """LABELLED from MEMBERS and the GROUPS they belong to."""
    if census.nodes < crowd:
        joined = engine.join(members, groups, ["root"], label=f"{label}: label nodes")
        return engine.map(joined, _chosen, LABELLED, f"{label}: labels")
    large = engine.collect(engine.map(groups, partial(_crowded, crowd=crowd), GROUPS, f"{label}: large components"))
    near = partial(label_crowds, large=large)
    few = engine.map(members, partial(_without, large=large), MEMBERS, f"{label}: nodes of small components")
    joined = engine.join(few, groups, ["root"], label=f"{label}: label nodes")
    both = [
        engine.map(joined, _chosen, LABELLED, f"{label}: labels"),
        engine.map(members, near, LABELLED, f"{label}: labels of large components"),
    ]
    return engine.shuffle(both, ["row"], _same, LABELLED, label=f"{label}: all labels")


def links_of(edges: pa.Table) -> pa.Table:
    """LINKS between the rows of EDGES."""
    a, b = edges.column("a_row").to_numpy(), edges.column("b_row").to_numpy()
    columns = [np.maximum(a, b), np.minimum(a, b), np.zeros(len(a), dtype=bool)]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=LINKS)


def ends_of(edges: pa.Table) -> pa.Table:
    """MEMBERS without a root, one for each end of each edge."""
    columns = [
        pa.chunked_array([*edges.column(f"a{c}").chunks, *edges.column(f"b{c}").chunks])
        for c in ("_row", "", "_copies")
    ]
    row, node, copies = columns
    return pa.Table.from_arrays([row, pa.nulls(len(row), pa.int64()), node, copies], schema=MEMBERS)


def roots_of(links: pa.Table) -> pa.Table:
    """MEMBERS that know nothing but their root."""
    n = links.num_rows
    columns = [links.column("child"), links.column("parent"), pa.nulls(n, TEXT), pa.nulls(n, pa.int64())]
    return pa.Table.from_arrays(columns, schema=MEMBERS)


def first_and_last(members: pa.Table) -> pa.Table:
    """Of whole rows sorted by row, root, node (nulls last) the one that may know the root, and one that knows the node."""
    first = key_starts(members, ["row"])
    return members.filter(pa.array(first | np.append(first[1:], True)[: len(first)]))


def members_of(members: pa.Table) -> pa.Table:
    """One row for each node; a node without a parent is its own root."""
    first = key_starts(members, ["row"])
    last = members.filter(pa.array(np.append(first[1:], True)[: len(first)]))
    root = pc.coalesce(members.column("root").filter(pa.array(first)), last.column("row"))
    return last.set_column(1, "root", root)


def as_groups(members: pa.Table) -> pa.Table:
    ones = pa.array(np.ones(members.num_rows, dtype=np.int64))
    return pa.Table.from_arrays([members.column(c) for c in ("root", "node", "copies")] + [ones], schema=GROUPS)


def grouped(groups: pa.Table) -> pa.Table:
    """Whole roots sorted by root, component: one row for each, with the smallest label and the sums."""
    if not groups.num_rows:
        return groups
    first = np.flatnonzero(key_starts(groups, ["root"]))
    sums = [np.add.reduceat(groups.column(c).to_numpy(), first) for c in ("component_docs", "nodes")]
    heads = groups.select(["root", "component"]).take(pa.array(first))
    return pa.Table.from_arrays([*heads.columns, *map(pa.array, sums)], schema=GROUPS)


def census_of(groups: pa.Table) -> Census:
    docs = groups.column("component_docs").to_numpy()
    most = int(docs.max(initial=0))
    largest = pc.min(groups.column("component").filter(pa.array(docs == most))).as_py()
    return Census(int(groups.column("nodes").to_numpy().sum()), groups.num_rows, most, largest or "")


def label_crowds(members: pa.Table, large: pa.Table) -> pa.Table:
    """LABELLED of the members of large components."""
    at = pc.index_in(members.column("root"), value_set=large.column("root").combine_chunks())
    here = pc.is_valid(at)
    mine, at = members.filter(here), at.filter(here)
    columns = [mine.column("row"), mine.column("node"), *(large.column(c).take(at) for c in LABELLED.names[2:])]
    return pa.Table.from_arrays(columns, schema=LABELLED)


def _without(members: pa.Table, large: pa.Table) -> pa.Table:
    roots = large.column("root").combine_chunks()
    return members.filter(pc.invert(pc.is_in(members.column("root"), value_set=roots)))


def _crowded(groups: pa.Table, crowd: int) -> pa.Table:
    return groups.filter(pc.greater_equal(groups.column("nodes"), crowd))


def _chosen(joined: pa.Table) -> pa.Table:
    return joined.select(LABELLED.names)


def _same(table: pa.Table) -> pa.Table:
    return table


def distinct_edges(engine: Engine, edges: Frame, label: str) -> Frame:
    """Every edge once."""
    once = ["a_row", "b_row"]
    return engine.persist(engine.shuffle(edges, once, first_of_pair, EDGES, combine=first_of_pair, label=label))


def first_of_pair(edges: pa.Table) -> pa.Table:
    return edges.filter(pa.array(key_starts(edges, ["a_row", "b_row"])))


def label_edges(engine: Engine, edges: Frame, labelled: Frame, schema: pa.Schema, label: str) -> Frame:
    """EDGES with the component of both ends. They are joined by the larger doc_id: a document is the smaller end of as many edges
    as its bucket has rows, but the larger one of at most 2 `window` + 1 a band."""
    labels = engine.map(
        labelled, _by_larger_end, pa.schema([("b_row", pa.int64()), ("component", TEXT)]), f"{label}: ends"
    )
    joined = engine.join(edges, labels, ["b_row"], label=f"{label}: label pairs")
    return engine.map(joined, partial(_columns, names=schema.names), schema, f"{label}: pairs")


def _by_larger_end(labelled: pa.Table) -> pa.Table:
    return labelled.select(["row", "component"]).rename_columns(["b_row", "component"])


def _columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.select(list(names))
