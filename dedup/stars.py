"""Connected components by alternating large-star and small-star over the verbs of an engine, for graphs that no process holds.

In:  links (`LINKS`), child > parent: an edge of the graph, each end named by an int64 key.
Out: links, one for each node that is not the smallest of its component, to the node that is.

Kiveris et al., "Connected Components in MapReduce and Beyond" (SoCC 2014). A large-star moves the larger neighbours of every node
to the node's least neighbour, a small-star the smaller ones; both keep connected what is connected, and when neither moves
anything every component is a star around its least node. The paper proves O(log^2 n) rounds for a variant and sees O(log n).
Measured: a path of 2^k nodes takes at most k + 1 rounds, the last of which moves nothing; random graphs of a million nodes and
more take 7 (`test_paths_settle_in_a_round_a_doubling`, `benchmarks/components.py`).

A crowded node, one with CROWD neighbours or more, would be one key with more rows than a worker may hold: a component of a
hundred million nodes ends as such a key. At most rows / CROWD nodes are crowded, so a fold finds them (Misra and Gries's
counters, which merge: Agarwal et al., "Mergeable Summaries", PODS 2012), another finds their least neighbours, and a map that
carries this short list moves their links. All other nodes meet their neighbours in a shuffle, where no key has CROWD rows.

Cost: a round sorts some six rows of 17 bytes an edge on either side of an exchange: 2 us of CPU an edge and round (`local`, one
to 20 million edges). Memory is that of a shuffle, whatever the graph: a block of each worker, no more than CROWD rows of a key,
and 16 bytes for each crowded node. Measured: the largest worker of two with 500 MB each held 368 to 446 MB at 2.5 to 20 million
edges.
"""

from collections.abc import Sequence
from functools import partial, reduce

import numpy as np
import pyarrow as pa

from core.engines.contract import ChunkFn, Engine, Frame
from core.errors import StageError

LINKS = pa.schema([("child", pa.int64()), ("parent", pa.int64()), ("moved", pa.bool_())])
HALVES = pa.schema([("key", pa.int64()), ("other", pa.int64())])

CROWD = 1 << 20  # links of a node that are too many for one key: 18 MB of them, what a reduce function sees at once
ROUNDS = 60  # of a graph that fits in a root (2^48 rows) the paper expects no more; a bound against a loop without end

Counts = tuple[np.ndarray, np.ndarray]  # keys, ascending; how often at least


def settled(
    engine: Engine, links: Frame, label: str, crowd: int = CROWD, rounds: int = ROUNDS
) -> tuple[list[Frame], int]:
    """The links of stars, in one frame or more, and the rounds it took. `links` and the frames of each round are released.
    StageError if `rounds` do not suffice."""
    held: list[Frame] = [links]
    size, _ = _tally(engine, held, label)
    before = 1  # what the step before moved: a graph is settled when neither step of a pair moves anything
    for turn in range(1, rounds + 1):
        for name, step in (("large", _large_star), ("small", _small_star)):
            made = step(engine, held, size, crowd, f"{label}: {name} star {turn}")
            _release(engine, held)
            held = made
            size, moved = _tally(engine, held, label)
            if not (moved or before):
                return held, turn
            before = moved
    raise StageError(
        f"{label}: components did not settle in {rounds} rounds, {before:,} of {size:,} links moved in the last step, "
        "expected none; raise `max_edges` on a machine with the memory for them, or raise `jaccard`"
    )


def _large_star(engine: Engine, links: list[Frame], size: int, crowd: int, label: str) -> list[Frame]:
    crowded, least = _crowds(engine, links, "parent", size, crowd, label)
    halves = [engine.map(f, partial(both_ends, crowded=crowded), HALVES, f"{label}: ends") for f in links]
    out = [engine.shuffle(halves, ["key"], large_star, LINKS, order=["other"], combine=nearest, label=label)]
    _release(engine, halves)
    if len(crowded):
        move = partial(large_star_of_crowds, crowded=crowded, least=least)
        out.append(_of_crowds(engine, links, move, label))
    return out


def _small_star(engine: Engine, links: list[Frame], size: int, crowd: int, label: str) -> list[Frame]:
    crowded, least = _crowds(engine, links, "child", size, crowd, label)
    few = links
    if len(crowded):
        few = [engine.map(f, partial(_without, crowded=crowded), LINKS, f"{label}: without crowds") for f in links]
    out = [engine.shuffle(few, ["child"], small_star, LINKS, order=["parent"], combine=distinct, label=label)]
    if len(crowded):
        _release(engine, few)
        move = partial(small_star_of_crowds, crowded=crowded, least=least)
        out.append(_of_crowds(engine, links, move, label))
    return out


def _of_crowds(engine: Engine, links: list[Frame], move: ChunkFn, label: str) -> Frame:
    """The links that `move` makes, each once, in one frame: without this shuffle, in which every link is a key of its own, each
    step would leave one frame more than the one before."""
    moved = [engine.map(f, move, LINKS, f"{label}: crowds") for f in links]
    out = engine.shuffle(
        moved, ["child", "parent"], distinct, LINKS, combine=distinct, label=f"{label}: crowds without repeats"
    )
    _release(engine, moved)
    return out


def both_ends(links: pa.Table, crowded: np.ndarray) -> pa.Table:
    """HALVES of every link, seen from either end, but from crowded ends."""
    child, parent = links.column("child").to_numpy(), links.column("parent").to_numpy()
    key, other = np.concatenate([parent, child]), np.concatenate([child, parent])
    few = ~_among(key, crowded)[1]
    return pa.Table.from_arrays([pa.array(key[few]), pa.array(other[few])], schema=HALVES)


def nearest(halves: pa.Table) -> pa.Table:
    """Of sorted HALVES what a large-star needs: the larger neighbours of each node, once, and the least of the smaller ones."""
    key, other = (halves.column(c).to_numpy() for c in HALVES.names)
    first = _starts(key)
    return halves.filter(pa.array(first | (_starts(other) & (other > key))))


def large_star(halves: pa.Table) -> pa.Table:
    """Links of the larger neighbours of each node to its least neighbour, from HALVES of whole keys sorted by key, other."""
    near = nearest(halves)
    key, other = (near.column(c).to_numpy() for c in HALVES.names)
    first = np.flatnonzero(_starts(key))
    least = np.repeat(np.minimum(key[first], other[first]), np.diff(first, append=len(key)))
    larger = other > key
    return _links(other[larger], least[larger], least[larger] != key[larger])


def large_star_of_crowds(links: pa.Table, crowded: np.ndarray, least: np.ndarray) -> pa.Table:
    """The same for the children of crowded parents, whose least neighbours are known."""
    child, parent = links.column("child").to_numpy(), links.column("parent").to_numpy()
    at, here = _among(parent, crowded)
    to = least[at[here]]
    return _links(child[here], to, to != parent[here])


def distinct(links: pa.Table) -> pa.Table:
    """Links sorted by child, parent, each once."""
    return links.filter(
        pa.array(_starts(links.column("child").to_numpy()) | _starts(links.column("parent").to_numpy()))
    )


def small_star(links: pa.Table) -> pa.Table:
    """Links of each node and its other parents to its least parent, from whole children sorted by child, parent."""
    links = distinct(links)
    child, parent = links.column("child").to_numpy(), links.column("parent").to_numpy()
    first = np.flatnonzero(_starts(child))
    return _to_least(child, parent, np.repeat(parent[first], np.diff(first, append=len(child))))


def small_star_of_crowds(links: pa.Table, crowded: np.ndarray, least: np.ndarray) -> pa.Table:
    """The same for crowded children, whose least neighbours are known."""
    child, parent = links.column("child").to_numpy(), links.column("parent").to_numpy()
    at, here = _among(child, crowded)
    return _to_least(child[here], parent[here], least[at[here]])


def _to_least(child: np.ndarray, parent: np.ndarray, least: np.ndarray) -> pa.Table:
    moved = parent != least
    return _links(np.where(moved, parent, child), least, moved)


def _without(links: pa.Table, crowded: np.ndarray) -> pa.Table:
    return links.filter(pa.array(~_among(links.column("child").to_numpy(), crowded)[1]))


def _links(child: np.ndarray, parent: np.ndarray, moved: np.ndarray) -> pa.Table:
    return pa.Table.from_arrays([pa.array(child), pa.array(parent), pa.array(moved)], schema=LINKS)


def _starts(values: np.ndarray) -> np.ndarray:
    """bool [n]: true where a value differs from the one before."""
    out = np.ones(len(values), dtype=bool)
    out[1:] = values[1:] != values[:-1]
    return out


def _among(values: np.ndarray, ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each value in a short sorted list, and whether it is there."""
    if not len(ascending):
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return at, ascending[at] == values


def _release(engine: Engine, frames: Sequence[Frame]) -> None:
    for frame in frames:
        engine.release(frame)


def _tally(engine: Engine, links: Sequence[Frame], label: str) -> tuple[int, int]:
    """Links, and how many of them the last step moved."""
    found = [engine.fold(f, _tally_of, _added, f"{label}: tally") for f in links]
    return reduce(_added, (f for f in found if f is not None), (0, 0))


def _tally_of(links: pa.Table) -> tuple[int, int]:
    return links.num_rows, int(np.count_nonzero(links.column("moved").to_numpy()))


def _added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def crowded_keys(engine: Engine, frames: Sequence[Frame], column: str, rows: int, crowd: int, label: str) -> np.ndarray:
    """Every key that `crowd` or more of the `rows` rows have in `column`, ascending; a few others may be among them."""
    most = rows // crowd
    if not most:
        return np.empty(0, dtype=np.int64)
    count, merge = partial(frequent, column=column, most=most), partial(_summed, most=most)
    found = [engine.fold(f, count, merge, f"{label}: crowded keys") for f in frames]
    return reduce(merge, [f for f in found if f is not None])[0]


def frequent(rows: pa.Table, column: str, most: int) -> Counts:
    """At most `most` keys: all that more than 1 in `most` + 1 rows have."""
    return _fewer(*np.unique(rows.column(column).to_numpy(), return_counts=True), most)


def _summed(a: Counts, b: Counts, most: int) -> Counts:
    keys, at = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    np.add.at(counts, at, np.concatenate([a[1], b[1]]))
    return _fewer(keys, counts, most)


def _fewer(keys: np.ndarray, counts: np.ndarray, most: int) -> Counts:
    """Take from every count what the first one too many has: nothing that could reach the bound comes to zero."""
    if len(keys) <= most:
        return keys, counts
    counts = counts - np.partition(counts, len(counts) - most - 1)[len(counts) - most - 1]
    return keys[counts > 0], counts[counts > 0]


def _crowds(
    engine: Engine, links: Sequence[Frame], column: str, size: int, crowd: int, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """The nodes that are crowded in `column`, and the least of each and its smaller neighbours."""
    crowded = crowded_keys(engine, links, column, size, crowd, label)
    if not len(crowded):
        return crowded, crowded
    look = partial(_least_of, crowded=crowded)
    found = [engine.fold(f, look, np.minimum, f"{label}: least neighbours") for f in links]
    return crowded, reduce(np.minimum, [f for f in found if f is not None])


def _least_of(links: pa.Table, crowded: np.ndarray) -> np.ndarray:
    at, here = _among(links.column("child").to_numpy(), crowded)
    least = crowded.copy()
    np.minimum.at(least, at[here], links.column("parent").to_numpy()[here])
    return least
