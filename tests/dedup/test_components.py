"""Components against a walk over the graph, their ceiling, and the election of survivors."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dedup.components import components
from dedup.survivors import elect

GRAPHS = st.integers(2, 25).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1]), min_size=1),
    )
)


@given(GRAPHS, st.randoms(use_true_random=False))
def test_components_equal_a_walk(graph, random):
    n, pairs = graph
    keys = np.array(random.sample(range(10**12), n))
    ids = np.array([f"{random.getrandbits(128):032x}".encode() for _ in range(n)])
    copies = np.array([random.randint(1, 5) for _ in range(n)])
    a, b = (np.array(ends) for ends in zip(*pairs, strict=True))
    ends = np.concatenate([a, b])
    found = components(keys[a], keys[b], keys[ends], ids[ends], copies[ends])
    reach = {i: {i} for i in set(ends.tolist())}
    for _ in range(n):
        for i, j in pairs:
            reach[i] |= reach[j]
            reach[j] |= reach[i]
    assert found.key.tolist() == sorted(keys[list(reach)].tolist())
    for key, label, docs, nodes in zip(*found, strict=True):
        members = sorted(reach[keys.tolist().index(key)])
        assert (label, docs, nodes) == (min(ids[members]), copies[members].sum(), len(members))


def test_chain_keeps_both_ends():
    """A ~ B ~ C: B falls to A, C stays, as it is like nobody who stays."""
    a, b, j = np.array([0, 1]), np.array([1, 2]), np.array([0.8, 0.8])
    assert elect(a, b, j, np.array([0, 1, 2]), 0.75).tolist() == [-1, 0, -1]
    assert elect(a, b, j, np.array([1, 0, 2]), 0.75).tolist() == [1, -1, 1]


def test_two_edges_prove_a_third():
    """J(A, C) >= 0.9 + 0.875 - 1 = 0.775, whether the node between them ranks before or after C."""
    a, b, j = np.array([0, 1]), np.array([1, 2]), np.array([0.9, 0.875])
    for rank in ([0, 1, 2], [0, 2, 1]):
        assert elect(a, b, j, np.array(rank), 0.75).tolist() == [-1, 0, 0]
        assert elect(a, b, j, np.array(rank), 0.78)[2] == -1


SETS = st.lists(st.sets(st.integers(0, 12), min_size=1), min_size=2, max_size=14)


@given(SETS, st.sampled_from([0.3, 0.5, 0.75]), st.randoms(use_true_random=False))
def test_every_fallen_row_is_like_one_that_stays(sets, threshold, random):
    """On real sets, with only some of the pairs compared."""
    true = {(i, k): len(sets[i] & sets[k]) / len(sets[i] | sets[k]) for k in range(len(sets)) for i in range(k)}
    known = {pair: s for pair, s in true.items() if s >= threshold and random.random() < 0.6}
    rank = np.array(random.sample(range(len(sets)), len(sets)))
    a, b = np.array([*known, (0, 0)][:-1], dtype=np.int64).reshape(-1, 2).T
    survivor = elect(a, b, np.array([*known.values()]), rank, threshold)
    for node, to in enumerate(survivor.tolist()):
        if to >= 0:
            assert true[min(node, to), max(node, to)] >= threshold - 1e-9
            assert survivor[to] == -1
            assert rank[to] < rank[node]
    assert not any(survivor[i] < 0 and survivor[k] < 0 for i, k in known)
