"""True Jaccard: by hand, against Python sets, numpy against compiled, long documents by their smallest hashes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engines.columns import sorted_table
from dedup import verify as module
from dedup.candidates import MEMBER
from dedup.shingles import Shingles, compiled_available
from dedup.verify import VERIFY, jaccards, unique_sets, verify

KERNELS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not compiled_available(), reason="numba is not installed")),
]


def flat(docs) -> Shingles:
    values = np.concatenate([np.empty(0, np.uint32), *(np.asarray(d, dtype=np.uint32) for d in docs)])
    return Shingles(values, np.cumsum([0] + [len(d) for d in docs]).astype(np.int64))


@pytest.mark.parametrize("compiled", KERNELS)
@given(docs=st.lists(st.lists(st.integers(0, 30), max_size=40), min_size=1, max_size=6))
def test_jaccard_equals_python_sets(compiled, docs):
    sets, sizes = unique_sets(flat(docs))
    assert sizes.tolist() == [len(set(d)) for d in docs]
    assert [np.frombuffer(s, np.uint32).tolist() for s in sets.to_pylist()] == [sorted(set(d)) for d in docs]
    a, b = (i.ravel() for i in np.meshgrid(range(len(docs)), range(len(docs))))
    want = [
        len(set(docs[i]) & set(docs[j])) / max(1, len(set(docs[i]) | set(docs[j]))) for i, j in zip(a, b, strict=True)
    ]
    assert jaccards(sets, sizes, a, b, compiled).tolist() == want


@pytest.mark.parametrize("compiled", KERNELS)
def test_many_pairs_in_blocks(compiled, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VALUES", 50)
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 60, rng.integers(1, 40)).tolist() for _ in range(30)]
    sets, sizes = unique_sets(flat(docs))
    a, b = rng.integers(0, 30, 200), rng.integers(0, 30, 200)
    want = [len(set(docs[i]) & set(docs[j])) / len(set(docs[i]) | set(docs[j])) for i, j in zip(a, b, strict=True)]
    assert jaccards(sets, sizes, a, b, compiled).tolist() == want


@pytest.mark.parametrize("compiled", KERNELS)
def test_long_documents_are_compared_by_their_smallest_hashes(compiled, monkeypatch):
    monkeypatch.setattr(module, "CAP", 4000)
    rng = np.random.default_rng(1)
    pool = rng.choice(1 << 32, 60_000, replace=False).astype(np.uint32)
    docs = [pool[:40_000], pool[5_000:45_000], pool[:3_000], pool[:40_000]]
    sets, sizes = unique_sets(flat(docs))
    assert sizes.tolist() == [40_000, 40_000, 3_000, 40_000]
    assert [len(s) // 4 for s in sets.to_pylist()] == [4000, 4000, 3000, 4000]
    found = jaccards(sets, sizes, np.array([0, 0, 0]), np.array([1, 2, 3]), compiled)
    assert abs(found[0] - 35 / 45) < 4 * np.sqrt(0.78 * 0.22 / 4000)
    assert abs(found[1] - 3 / 40) < 4 * np.sqrt(0.075 * 0.925 / 4000)
    assert found[2] == 1.0


def lines(groups) -> pa.Table:
    """VERIFY lines from {(hub, block): ({row: shingles}, [pairs])}; the doc_id of row r is r's decimal digits repeated."""
    rows = []
    for (hub, block), (members, pairs) in groups.items():
        for row, doc in members.items():
            values = np.unique(np.array(doc, dtype=np.uint32))
            rows.append((hub, block, row, MEMBER, str(row) * 8, row, len(values), values.tobytes()))
        rows += [(hub, block, a, b, None, None, None, None) for a, b in pairs]
    table = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), VERIFY, strict=True)], schema=VERIFY
    )
    return sorted_table(table, ["hub", "block", "a", "b"])


def test_groups_are_verified_apart_and_edges_are_turned():
    near, far = list(range(20)), list(range(4, 24))
    table = lines(
        {
            (1, 0): ({1: near, 5: near[:16], 3: far}, [(5, 1), (1, 3)]),
            (1, 1): ({1: near, 4: near}, [(1, 4)]),
            (2, 0): ({2: far, 9: near}, [(9, 2)]),
        }
    )
    found = verify(table, 0.75).to_pylist()
    assert [(e["a_row"], e["b_row"], round(e["jaccard"], 4)) for e in found] == [(1, 5, 0.8), (1, 4, 1.0)]
    assert [(e["a"], e["b"]) for e in found] == [("1" * 8, "5" * 8), ("1" * 8, "4" * 8)]
    assert [(e["a_copies"], e["b_copies"]) for e in found] == [(1, 5), (1, 4)]


def test_a_pair_without_its_member_is_an_error():
    with pytest.raises(ValueError, match="no member"):
        verify(lines({(1, 0): ({1: [1], 2: [1]}, [(1, 3)])}), 0.5)


def test_nothing_in_nothing_out():
    assert verify(VERIFY.empty_table(), 0.75).num_rows == 0
