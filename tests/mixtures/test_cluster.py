"""k-means: separated blobs come back, assignment is exact, and vectors that are missing, equal, few or of odd lengths."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import StageError
from core.schema import LAYER_HEAD
from mixtures import cluster
from mixtures.embed import vector_column
from mixtures.kmeans import Tree, allot, fit, nearest, unpack
from mixtures.static_vectors import to_int8
from tests.mixtures.conftest import documents

VECTORS = pa.schema([("vector", pa.large_binary())])


def blobs(centres, points, seed=0, dims=32, noise=0.08):
    """int8 [centres * points, dims] around random directions, and which one each is from."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(centres, dims))
    label = np.repeat(np.arange(centres), points)
    return to_int8(1e4 * (centre[label] + noise * rng.normal(size=(len(label), dims)))), label


def pure(found, label):
    """Whether both divisions are the same up to numbering."""
    pairs = set(zip(found.tolist(), label.tolist(), strict=True))
    return len(pairs) == len(set(found.tolist())) == len(set(label.tolist()))


def test_fit_finds_blobs():
    vectors, label = blobs(6, 50)
    centroids = fit(vectors, 6, 20, seed=3)
    assert centroids.shape == (6, 32)
    assert centroids.dtype == np.int8
    assert pure(nearest(vectors, centroids), label)


def test_fewer_directions_than_clusters():
    vectors = np.array([[127, 0], [127, 0], [0, 127]], np.int8)
    assert fit(vectors, 5, 10, 0).tolist() == [[0, 127], [127, 0]]
    assert fit(vectors[:2], 1, 10, 0).tolist() == [[127, 0]]


def test_nearest_by_hand():
    centroids = np.array([[100, 0], [1, 1], [1, 1]], np.int8)
    assert nearest(np.array([[127, 20], [50, 60], [-127, 3]], np.int8), centroids).tolist() == [0, 1, 1]


def test_distance_by_hand():
    tree = Tree(np.array([[127, 0]], np.int8), np.array([[3, 4], [-127, 0]], np.int8), np.array([0, 2]))
    found, distance = tree.assign(np.array([[0, 127], [-5, 0], [6, 8]], np.int8))
    assert found.tolist() == [0, 1, 0]
    np.testing.assert_allclose(distance, [0.2, 0, 0], atol=1e-7)  # cos((0,1), (3,4)/5) = 0.8


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 60), st.sampled_from([1, 7, 256, 1040]))
def test_assignment_is_brute_force_over_the_leaves_of_the_parent(seed, parents, docs, dims):
    rng = np.random.default_rng(seed)
    first = np.append(0, np.cumsum(rng.integers(1, 5, parents)))

    def some(n):
        return np.where(rng.random((n, dims)) < 0.1, 127, rng.integers(-127, 128, (n, dims))).astype(np.int8)

    tree, vectors = Tree(some(parents), some(int(first[-1])), first), some(docs)
    tree.parents[:, 0] = tree.leaves[:, 0] = vectors[:, 0] = 1  # none is all zeros
    found, _ = tree.assign(vectors)

    def best(v, among):
        dots = among.astype(object) @ v.astype(object)
        squares = (among.astype(object) ** 2).sum(axis=1)
        scores = [float(d) / float(q) ** 0.5 for d, q in zip(dots, squares, strict=True)]
        return scores, int(np.argmax(scores))

    for v, got in zip(vectors, found, strict=True):
        scores, parent = best(v, tree.parents)
        if np.sort(scores)[::-1][:2].size == 2 and np.diff(np.sort(scores)[-2:])[0] < 1e-4 * abs(scores[parent]):
            continue  # as near to two as float32 can tell
        here = slice(int(first[parent]), int(first[parent + 1]))
        scores, _ = best(v, tree.leaves[here])
        assert here.start <= got < here.stop
        assert scores[got - here.start] >= max(scores) - 1e-4 * abs(max(scores))
    again = [tree.assign(v)[0] for v in np.array_split(vectors, 3)]
    assert np.concatenate(again).tolist() == found.tolist()


def test_allot_by_hand():
    assert allot(np.array([10, 5, 1]), 8, 100).tolist() == [5, 2, 1]
    assert allot(np.array([10, 5, 0]), 8, 5).tolist() == [5, 3, 0]
    assert allot(np.array([3, 2]), 8, 100).tolist() == [3, 2]  # no more than points


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.integers(1, 300), st.integers(1, 50))
def test_allot_keeps_its_bounds(counts, total, most):
    counts = np.array(counts)
    got = allot(counts, total, most)
    assert np.all(got <= np.minimum(counts, most))
    assert np.all(got >= (counts > 0))
    if (counts > 0).sum() <= total:
        assert got.sum() == min(total, np.minimum(counts, most).sum())


def test_unpack_takes_slices_nulls_and_zeros():
    column = pa.array([b"zz", None, b"\x01\xff", b"\0\0", b"\x7f\0"], pa.large_binary()).slice(1)
    vectors, there = unpack(column, "cluster")
    assert vectors.tolist() == [[1, -1], [127, 0]]
    assert there.tolist() == [False, True, False, True]
    assert unpack(pa.nulls(2, pa.large_binary()), "cluster")[0].shape == (0, 0)


@pytest.mark.parametrize("values", [[b"abc", b"ab"], [b"a" * 1041], [b""]])
def test_vectors_of_odd_lengths_are_refused(values):
    with pytest.raises(StageError, match="run stage embed again"):
        unpack(pa.array(values, pa.large_binary()), "cluster")
    with pytest.raises(StageError, match="expected 7"):
        unpack(pa.array([b"abc"], pa.large_binary()), "cluster", 7)


def vector_house(house, vectors, shards=1):
    """Documents `t0`, `t1` ... with the given vectors (None: null) as the layer `embed`, cut into shards."""
    texts = [f"t{i}" for i in range(len(vectors))]
    table = documents("web", texts)
    at = np.array_split(np.arange(len(texts)), shards)
    house.add("web", {f"s{k}": table.take(pa.array(part)) for k, part in enumerate(at)})
    by_text = dict(zip(texts, vectors, strict=True))
    house.layer("web", "embed", VECTORS, lambda d: {"vector": by_text[d["text"]]})
    return house


def found_in(house):
    """Text -> (cluster, distance)."""
    dataset, out = house.dataset("web"), {}
    for shard in dataset.shards:
        texts = house.root.read_table(dataset.documents_name(shard), ["text"]).column("text").to_pylist()
        rows = dataset.read_layer("cluster", shard).to_pylist()
        out |= {t: (r["cluster"], r["distance"]) for t, r in zip(texts, rows, strict=True)}
    return [out[f"t{i}"] for i in range(len(out))]


def test_the_stage_finds_blobs_in_two_levels(house):
    vectors, label = blobs(9, 30, seed=5)
    vector_house(house, [v.tobytes() for v in vectors], 3)
    outcome = house.run(cluster.STAGE, clusters=9, seed=1, iterations=20)
    found = np.array([c for c, _ in found_in(house)])
    assert outcome.accounts["clusters"] == 9
    assert outcome.accounts["parents"] == 3
    parts = {c: set(label[found == c].tolist()) for c in set(found.tolist())}
    assert len(parts) >= 6
    assert sum(len(p) == 1 for p in parts.values()) >= 5  # most clusters hold one blob
    assert max(d for _, d in found_in(house)) < 1


def test_shards_workers_and_names_change_nothing(make_house):
    vectors, _ = blobs(12, 20, seed=8)
    rows = [None if i % 17 == 3 else v.tobytes() for i, v in enumerate(vectors)]
    one, two = (vector_house(make_house(name), rows, shards) for name, shards in (("one", 1), ("two", 4)))
    knobs = {"clusters": 10, "points": 8}
    a = one.run(cluster.STAGE, **knobs)
    b = two.run(cluster.STAGE, workers=2, **knobs)
    assert a.observed["sampled_fraction"] < 0.5
    assert a.outputs == b.outputs
    assert found_in(one) == found_in(two)
    assert [c is None for c, _ in found_in(one)] == [r is None for r in rows]


def test_centroids_lie_as_the_format_says(house):
    vectors, _ = blobs(12, 20, seed=8)
    vector_house(house, [v.tobytes() for v in vectors])
    house.run(cluster.STAGE, clusters=10)
    parents, leaves, first = (
        np.load(house.root.local_path(f"models/cluster/{part}.npy")) for part in ("parents", "leaves", "first")
    )
    assert parents.dtype == leaves.dtype == np.int8
    assert (first[0], first[-1]) == (0, len(leaves))
    assert all(a < b for a, b in pairwise(first.tolist()))
    tree = Tree(parents, leaves, first)
    assert tree.assign(vectors)[0].tolist() == [c for c, _ in found_in(house)]


@pytest.mark.parametrize(
    ("rows", "clusters"),
    [
        ([b"\x05\x06"], [0]),
        ([b"\x05\x06"] * 7, [0] * 7),
        ([None, b"\0\0", b"\x01\0"], [None, None, 0]),
        ([None, None], [None, None]),
    ],
)
def test_few_equal_and_missing_vectors(house, rows, clusters):
    vector_house(house, rows)
    outcome = house.run(cluster.STAGE, clusters=100)
    assert [c for c, _ in found_in(house)] == clusters
    assert outcome.accounts["clusters"] == len({c for c in clusters if c is not None})


def test_more_clusters_than_documents(house):
    vectors, _ = blobs(5, 4, seed=2, noise=0.5)
    vector_house(house, [v.tobytes() for v in vectors])
    outcome = house.run(cluster.STAGE, clusters=400)
    assert outcome.accounts["clusters"] == 20
    assert len({c for c, _ in found_in(house)}) == 20
    assert max(d for _, d in found_in(house)) == pytest.approx(0, abs=1e-6)


def test_rows_outside_where_are_not_computed(house):
    vectors, _ = blobs(2, 10)
    vector_house(house, [v.tobytes() for v in vectors])
    house.judge("web", drop=["t1"])  # t1 and t10 to t19
    house.run(cluster.STAGE, clusters=2, where="fate@final")
    dataset = house.dataset("web")
    layer = dataset.read_layer("cluster", dataset.shards[0])
    assert layer.column("computed").to_pylist() == [f"t{i}"[:2] != "t1" for i in range(20)]
    assert [c is not None for c, _ in found_in(house)] == [f"t{i}"[:2] != "t1" for i in range(20)]
    assert layer.schema.names[: len(LAYER_HEAD)] == [f.name for f in LAYER_HEAD]


def test_vectors_of_two_lengths_stop_the_stage(house):
    vector_house(house, [b"ab", b"abc"])
    with pytest.raises(StageError, match="vectors have 2, 3 bytes"):
        house.run(cluster.STAGE, clusters=2)


def test_vector_column_is_the_bytes():
    assert vector_column(np.array([[1, -1], [0, 5]], np.int8)).to_pylist() == [b"\x01\xff", b"\0\x05"]
