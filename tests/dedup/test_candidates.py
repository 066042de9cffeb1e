"""Candidate pairs from buckets: by hand, and the bound on their number."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engines.columns import sorted_table
from dedup.candidates import BANDS, BLOCK_ROWS, MEMBER, WANTS, band_rows, group_up, pair_up, tie_of


def buckets(*lines: tuple[int, int, int, int, int]) -> pa.Table:
    table = pa.Table.from_arrays([pa.array(c) for c in zip(*lines, strict=True)], names=BANDS.names).cast(BANDS)
    return sorted_table(table, ["bucket", "next", "tie", "row"])


def split(pairs: pa.Table) -> tuple[set, set]:
    """(member lines, pairs) after grouping."""
    wants = group_up(sorted_table(pairs, WANTS.names))
    lines = list(zip(*(wants.column(c).to_pylist() for c in wants.column_names), strict=True))
    assert len(lines) == len(set(lines))
    return {x[:3] for x in lines if x[3] == MEMBER}, {(x[2], x[3]) for x in lines if x[3] != MEMBER}


def test_small_bucket_gives_all_pairs_under_its_smallest_id():
    members, pairs = split(
        pair_up(buckets((9, 5, 30, 1, 100), (9, 4, 20, 2, 100), (9, 4, 10, 3, 100), (8, 0, 1, 4, 100)), 32, 0.75)
    )
    assert members == {(3, 0, 1), (3, 0, 2), (3, 0, 3)}
    assert pairs == {(3, 1), (3, 2), (2, 1)}


def test_sizes_rule_pairs_out():
    members, pairs = split(pair_up(buckets((9, 0, 1, 1, 100), (9, 0, 2, 2, 75), (9, 0, 3, 3, 74)), 32, 0.75))
    assert pairs == {(1, 2), (2, 3)}
    assert members == {(1, 0, 1), (1, 0, 2), (1, 0, 3)}
    assert split(pair_up(buckets((9, 0, 1, 1, 100), (9, 0, 2, 2, 10)), 32, 0.75)) == (set(), set())


def test_large_bucket_is_linear_and_keeps_star_and_window():
    n, window = 3000, 8
    rng = np.random.default_rng(0)
    lines = [(9, int(rng.integers(50)), int(t), i, 100) for i, t in enumerate(rng.permutation(n))]
    table = buckets(*lines)
    members, pairs = split(pair_up(table, window, 0.75))
    assert len(pairs) <= n * (window + 1)
    hub = next(row for _, _, tie, row, _ in lines if tie == 0)
    assert {(hub, i) for i in range(n) if i != hub} <= pairs
    rows, ties = table.column("row").to_pylist(), {x[3]: x[2] for x in lines}
    for i, j in [(0, 1), (100, 108), (1500, 1503)]:
        a, b = sorted((rows[i], rows[j]), key=ties.__getitem__)
        assert (a, b) in pairs
    assert {block for _, block, _ in members} == set(range(-(-n // BLOCK_ROWS)))
    assert {(block, rows[i]) for i, block in enumerate(np.arange(n) // BLOCK_ROWS)} <= {(b, r) for _, b, r in members}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 60)), max_size=40), st.integers(1, 40))
def test_buckets_do_not_depend_on_their_company(lines, window):
    """Pairing two chunks apart or together gives the same lines."""
    rows = [(bucket, following, i * 7919 % 40, i, size) for i, (bucket, following, size) in enumerate(lines)]
    low, high = [r for r in rows if r[0] < 2], [r for r in rows if r[0] >= 2]
    apart = [pair_up(buckets(*part), window, 0.6) for part in (low, high) if part]
    together = pair_up(buckets(*rows), window, 0.6) if rows else None
    if together is not None:
        assert sorted_table(pa.concat_tables(apart), WANTS.names).equals(sorted_table(together, WANTS.names))


def test_pairs_of_several_buckets_are_grouped_once():
    pair = [(1, 10, 1, 100), (2, 20, 2, 100)]
    chunk = pair_up(buckets(*[(b, n, t, r, s) for b in range(5) for n, t, r, s in pair]), 32, 0.75)
    assert chunk.to_pylist() == [{"hub": 1, "block": 0, "a": 1, "b": 2}]
    again = sorted_table(pa.concat_tables([chunk, chunk]), WANTS.names)
    assert split(again) == ({(1, 0, 1), (1, 0, 2)}, {(1, 2)})


def test_ties_are_in_the_order_of_ids():
    ids = sorted(f"{i * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for i in range(1, 500))
    ties = tie_of(pa.array(ids, pa.large_string()))
    assert np.all(np.diff(ties.astype(object)) > 0)
    assert tie_of(pa.array(["0123456789abcdef" + "0" * 16]))[0] == 0x0123456789ABCDEF - 2**63


def test_band_rows_leave_out_documents_without_words():
    bands = [np.arange(14, dtype=np.int64), np.arange(14, dtype=np.int64) + 100]
    nodes = pa.table(
        {
            "row": [5, 6],
            "doc_id": ["00" * 16, "ff" * 16],
            "size": pa.array([3, 0], pa.int32()),
            "bands": pa.array([b.tobytes() for b in bands], pa.large_binary()),
        }
    )
    lines = band_rows(nodes)
    assert lines.column("bucket").to_pylist() == list(range(14))
    assert lines.column("next").to_pylist() == [*range(1, 14), 0]
    assert set(lines.column("row").to_pylist()) == {5}
    assert band_rows(nodes.slice(1)).num_rows == 0


@pytest.mark.parametrize("n", [0, 1, 33, 34])
def test_all_pairs_up_to_the_window(n):
    _, pairs = split(pair_up(buckets(*[(1, i % 3, i, i, 10) for i in range(n)]), 32, 0.75)) if n else (set(), set())
    assert len(pairs) == n * (n - 1) // 2 or n > 33
