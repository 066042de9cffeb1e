"""Components by stars: equal to those in memory on every graph, in few rounds, without a crowded key in any shuffle."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from graphs import chain_of_cliques, clique, edges_of, path, star
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_engine import OracleEngine
from planted import pair, words
from small_corpus import layer, relation, run

from core.engines.columns import key_starts
from core.engines.local import LocalEngine
from core.errors import StageError
from core.storage import Root
from dedup import exact, labels, minhash
from dedup import relation as files
from dedup.components import census_of_graph
from dedup.labels import LABELLED, distinct_edges, label_nodes, links_of
from dedup.minhash import STAGE, components_of
from dedup.stars import CROWD, LINKS, crowded_keys, large_star, settled, small_star
from tests.builders import tree_digest

SHAPES = st.one_of(
    st.builds(path, st.integers(2, 40)),
    st.builds(star, st.integers(2, 40)),
    st.builds(clique, st.integers(2, 9)),
    st.builds(chain_of_cliques, st.integers(1, 5), st.integers(2, 5)),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda e: e[0] != e[1]), max_size=60),
)


@st.composite
def graphs(draw):
    """Several shapes side by side or grown together, some edges repeated and turned round."""
    pairs = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=4)):
        shift = draw(st.integers(0, 60))
        pairs += [(a + shift, b + shift) for a, b in shape]
    pairs += [(b, a) for a, b in pairs[: draw(st.integers(0, 10))]]
    return edges_of(pairs, draw(st.integers(0, 1 << 20)))


def in_memory(edges):
    """LABELLED and the census by the algorithm of the driver."""
    graph, ids = components_of(edges)
    rows = zip(graph.key.tolist(), ids.tolist(), graph.component.tolist(), graph.docs.tolist(), strict=True)
    return [(row, i.decode(), c.decode(), docs) for row, i, c, docs in rows], census_of_graph(graph)


def by_stars(engine, edges, crowd=CROWD):
    labelled, census = label_nodes(engine, engine.table(edges), "test", crowd)
    assert labelled.schema.equals(LABELLED)
    rows = engine.collect(labelled).to_pylist()
    return sorted(tuple(r[c] for c in LABELLED.names) for r in rows), census


@given(graphs(), st.sampled_from([1, 2, 5, CROWD]), st.integers(1, 1000), st.sampled_from([1, 3, 1000]))
def test_labels_equal_those_in_memory(edges, crowd, seed, keys):
    assert by_stars(OracleEngine(seed, keys), edges, crowd) == in_memory(edges)


@pytest.mark.parametrize("crowd", [3, CROWD])
def test_labels_on_files(crowd, tmp_path):
    """The `local` engine, in parts of a few rows."""
    pairs = [*path(70), *star(50, 100), *chain_of_cliques(6, 5, 200), *clique(8, 300), *star(40, 320)]
    edges = edges_of([*pairs, *pairs[::3]])
    engine = LocalEngine(tmp_path, workers=0, partition_bytes=2000)
    assert by_stars(engine, edges, crowd) == in_memory(edges)


@pytest.mark.parametrize("ordered", [True, False])
def test_paths_settle_in_a_round_a_doubling(ordered):
    for k in range(2, 13):
        engine, edges = OracleEngine(k), edges_of(path(1 << k), k, ordered)
        links = engine.table(links_of(edges))
        stars, rounds = settled(engine, links, "test")
        assert rounds == k + 1 if ordered else rounds <= k + 1
        made = pa.concat_tables([f.table for f in stars])
        least = min(min(edges.column(c).to_pylist()) for c in ("a_row", "b_row"))
        assert set(made.column("parent").to_pylist()) == {least}
        assert len(set(made.column("child").to_pylist())) == made.num_rows == (1 << k) - 1


def test_rounds_are_bounded():
    engine = OracleEngine()
    links = engine.table(links_of(edges_of(path(64), ordered=True)))
    with pytest.raises(StageError, match=r"did not settle in 3 rounds, [\d,]+ of 63 links moved in the last step"):
        settled(engine, links, "test", rounds=3)


def test_no_edges_have_no_components(tmp_path):
    for engine in (OracleEngine(), LocalEngine(tmp_path, workers=0)):
        assert by_stars(engine, edges_of([])) == ([], (0, 0, 0, ""))


def test_one_large_and_one_small_star_by_hand():
    """4 has the neighbours 2, 3, 6, 9: the larger ones move to 2, the smaller ones in the next step."""
    halves = pa.table({"key": [4, 4, 4, 4, 4, 5], "other": [2, 3, 6, 9, 9, 7]})
    assert large_star(halves).to_pylist() == [
        {"child": 6, "parent": 2, "moved": True},
        {"child": 9, "parent": 2, "moved": True},
        {"child": 7, "parent": 5, "moved": False},
    ]
    links = pa.table({"child": [4, 4, 4, 6], "parent": [2, 3, 3, 5], "moved": [False, True, False, True]}, schema=LINKS)
    assert small_star(links).to_pylist() == [
        {"child": 4, "parent": 2, "moved": False},
        {"child": 3, "parent": 2, "moved": True},
        {"child": 6, "parent": 5, "moved": False},
    ]


class Narrow(OracleEngine):
    """Counts the rows of the largest key that any reduce function sees, after what combines before it."""

    widest = 0

    def shuffle(self, frames, by, fn, schema, order=(), combine=None, max_rows_per_key=None, label="shuffle"):
        def seen(chunk):
            met = combine(chunk) if combine else chunk
            keys = np.flatnonzero(key_starts(met, by))
            self.widest = max(self.widest, int(np.diff(keys, append=met.num_rows).max(initial=0)))
            return fn(chunk)

        return super().shuffle(frames, by, seen, schema, order, combine, max_rows_per_key, label)


@pytest.mark.parametrize("hub_first", [True, False])
def test_no_key_holds_a_crowd(hub_first):
    """A hub with 2,000 neighbours, smallest or largest of them: the graph ends as one star either way."""
    pairs = [*star(2000), *path(300, 1000)] if hub_first else [(2000, i) for i in range(2000)]
    edges = edges_of(pairs, ordered=True)
    engine = Narrow()
    assert by_stars(engine, edges, crowd=100) == in_memory(edges)
    assert engine.widest <= 100


class Stops(LocalEngine):
    """A local engine that dies at its n-th shuffle."""

    left = 1 << 30

    def shuffle(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().shuffle(*args, **kwargs)


def test_frames_of_earlier_rounds_are_gone_and_a_killed_loop_goes_on(tmp_path):
    edges = edges_of([*path(40, 100), *star(30)], ordered=True)
    engine = Stops(tmp_path / "a", workers=0, partition_bytes=800)
    stars, rounds = settled(engine, engine.table(links_of(edges)), "test", crowd=20)
    assert rounds > 3
    kept = {part.path for frame in stars for part in (*frame.parts, *frame.exchanged)}
    assert {str(p) for p in (tmp_path / "a").rglob("*.arrow")} == kept
    wanted = by_stars(Stops(tmp_path / "b", workers=0, partition_bytes=800), edges, crowd=20)
    for shuffles in (1, 6):
        again = Stops(tmp_path / "c", workers=0, partition_bytes=800)
        again.left = shuffles
        with pytest.raises(KeyboardInterrupt):
            by_stars(again, edges, crowd=20)
    assert (
        by_stars(Stops(tmp_path / "c", workers=0, partition_bytes=800), edges, crowd=20) == wanted == in_memory(edges)
    )


@given(st.lists(st.integers(0, 12), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 1 << 20))
def test_frequent_keys_are_found(values, crowd, seed):
    engine = OracleEngine(seed)
    frames = [engine.table(pa.table({"key": v})) for v in np.array_split(np.array(values, dtype=np.int64), 3)]
    found = crowded_keys(engine, frames, "key", len(values), crowd, "test").tolist()
    assert {v for v in values if values.count(v) >= crowd} <= set(found)
    assert found == sorted(set(found))
    assert len(found) <= len(values) // crowd


@given(graphs(), st.sampled_from([1, 4, 1000]))
@settings(max_examples=20)
def test_pairs_lie_in_the_files_they_choose(edges, per_file):
    """Whoever writes them: the driver from one table, or the workers from a frame in any order with pairs repeated."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch().context() as patch:
        patch.setattr(files, "FILE_EDGES", per_file)
        engine = OracleEngine(1, keys=2)
        distinct = distinct_edges(engine, engine.table(edges), "test")
        table = engine.collect(distinct)
        labelled, _ = label_nodes(engine, distinct, "test")
        pairs = labels.label_edges(engine, distinct, labelled, files.RELATION, "test")
        here, there = (files.EdgeFiles(Root(f"{folder}/{name}"), "minhash", "unit") for name in ("here", "there"))
        wanted = files.write_here(here, engine.collect(pairs))
        assert files.write_there(engine, there, pairs, table.num_rows, "test") == wanted
        assert len(wanted) == files.files_for(table.num_rows)
        assert sum(r.docs for r in wanted) == table.num_rows
        assert tree_digest(here.root, "") == tree_digest(there.root, "")


@pytest.mark.parametrize("with_exact", [True, False])
def test_both_ways_give_the_same_bytes(with_exact, corpus, tmp_path, monkeypatch):
    rng = np.random.default_rng(21)
    base = words(rng, 120)
    texts = {
        "web": [t for s in (0.8, 0.9) for _ in range(12) for t in pair(rng, s, 80)],
        "books": [" ".join([*base, str(i)]) for i in range(60)],
    }
    texts["web"] += [*texts["web"][:5], *texts["books"][:4], "", "one two"]
    monkeypatch.setattr(files, "FILE_EDGES", 200)
    found = []
    for i, (most, crowd) in enumerate([(1 << 20, CROWD), (0, CROWD), (0, 20)]):
        monkeypatch.setattr(minhash, "CROWD", crowd)
        datasets, engine = corpus(texts), LocalEngine(tmp_path / f"{i}", workers=0)
        stages = [exact.STAGE, STAGE] if with_exact else [STAGE]
        for stage in stages:
            engine.begin(tmp_path / f"{i}" / stage.name)
            more = {"max_edges": most, "exact": "exact" if with_exact else None} if stage is STAGE else {}
            outcome = run(stage, engine, datasets, **more)
        root = datasets[0].root
        written = {name: Path(root.path(name)).read_bytes() for name in outcome.outputs}
        found.append((tree_digest(root, ""), written, outcome.outputs, outcome.observed, layer(datasets, "minhash")))
    assert relation(datasets).num_rows > 1000
    assert len(found[0][1]) > 5
    assert found[0] == found[1] == found[2]
