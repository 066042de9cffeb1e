"""Rows of best-fit packing and of the stream: by hand, against the plain algorithm, and as laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.packing import BestFit, Stream, best_fit, permuted

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).map(np.array)


def _rows(packing: BestFit | Stream) -> list[list[tuple[int, int, int]]]:
    return [list(packing.pieces(row)) for row in range(packing.rows)]


def test_best_fit_by_hand() -> None:
    # 7 opens a row; 6 the next; 4 goes to 6 (room 4, 7 has 3); 3 to 7; 2 opens a row
    packing = BestFit(np.array([3, 6, 7, 2, 4]), context=10)
    assert _rows(packing) == [[(1, 0, 6), (4, 0, 4)], [(0, 0, 3), (2, 0, 7)], [(3, 0, 2)]]
    assert packing.fill_fraction == 22 / 30
    assert packing.cut_docs == 0


def test_documents_beyond_the_context_are_cut_into_contexts_and_a_rest() -> None:
    packing = BestFit(np.array([1, 23, 0, 7, 10]), context=10)
    assert _rows(packing) == [[(0, 0, 1)], [(1, 0, 10)], [(1, 10, 20)], [(1, 20, 23), (3, 0, 7)], [(4, 0, 10)]]
    assert packing.cut_docs == 1
    assert packing.fill_fraction == 41 / 50


@given(lengths, st.integers(1, 17), st.integers(1, 25))
def test_every_token_lies_in_one_row_and_few_documents_are_cut(sizes: np.ndarray, context: int, window: int) -> None:
    packing = BestFit(sizes, context, window)
    rows = _rows(packing)
    seen = sorted((i, t) for row in rows for i, low, high in row for t in range(low, high))
    assert seen == [(i, t) for i, n in enumerate(sizes.tolist()) for t in range(n)]
    assert all(0 < sum(high - low for _, low, high in row) <= context for row in rows)
    owners = [i for row in rows for i in {i for i, _, _ in row}]
    cut = {i for i in owners if owners.count(i) > 1}
    assert cut == {i for i, n in enumerate(sizes.tolist()) if n > context}
    assert packing.cut_docs == len(cut)
    assert all(row == sorted(row) for row in rows), "pieces keep the mixture's order"


def _plain(pieces: list[int], context: int) -> list[list[int]]:
    """Best-fit-decreasing, one piece at a time."""
    rows: list[list[int]] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row in rows if sum(row) + piece <= context]
        if fitting:
            max(fitting, key=sum).append(piece)
        else:
            rows.append([piece])
    return rows


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_best_fit_is_the_plain_algorithm(case: tuple[int, list[int]]) -> None:
    context, pieces = case
    row = best_fit(np.array(pieces, dtype=np.int64), context)
    made = np.bincount(row, weights=pieces) if pieces else np.zeros(0)
    assert sorted(made) == sorted(map(sum, _plain(pieces, context))), "rows with equal room may be exchanged"


def test_rows_stand_in_the_order_of_their_longest_pieces() -> None:
    row = best_fit(np.array([2, 9, 3, 8, 10, 1]), 10)  # rows 9 + 1, 3, 8 + 2 and 10
    assert row.tolist() == [2, 0, 1, 2, 3, 0]


def test_a_larger_window_fills_better() -> None:
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(5, 1.2, 20_000)), 1, None).astype(np.int64)
    small, large = (BestFit(sizes, 1024, window) for window in (64, 1 << 20))
    assert small.fill_fraction < 0.99 < 0.999 < large.fill_fraction
    assert large.cut_docs < Stream(sizes, 1024).cut_docs / 2


@given(lengths, st.integers(1, 17))
def test_the_stream_counts_the_documents_that_it_cuts(sizes: np.ndarray, context: int) -> None:
    packing = Stream(sizes, context)
    held = [p for row in _rows(packing) for p in row]
    whole = {i for i, low, high in held if (low, high) == (0, sizes[i])}
    assert packing.cut_docs == len({i for i, _, _ in held} - whole)
    assert sum(high - low for _, low, high in held) == sizes.sum() // context * context


@pytest.mark.parametrize("packing", [Stream, BestFit])
def test_nothing_makes_no_rows(packing: type[Stream] | type[BestFit]) -> None:
    for sizes in ([], [0, 0]):
        assert packing(np.array(sizes, dtype=np.int64), 4).rows == 0


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 3))
def test_permuted_is_a_permutation(n: int, seed: int, turn: int) -> None:
    assert sorted(permuted(i, n, seed, turn) for i in range(n)) == list(range(n))


def test_permuted_depends_on_the_seed() -> None:
    orders = {tuple(permuted(i, 50, seed) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20
