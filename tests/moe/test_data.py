"""Packing against hand-laid rows, and its laws against the plain concatenation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, InputError
from moe.data import ArrayTokenSource, PackedRows, permuted


def _source(documents: list[list[int]], domains: list[int] | None = None) -> ArrayTokenSource:
    return ArrayTokenSource(
        [np.array(d, dtype=np.int32) for d in documents],
        vocab_size=100,
        eos=0,
        text_bytes=[len(d) for d in documents],
        document_domains=domains,
        domains=("a", "b"),
    )


def test_rows_by_hand() -> None:
    rows = PackedRows(_source([[11, 12, 0], [21, 0], [31, 32, 33, 34, 0]], [0, 1, 0]), context=4, rows=2)
    batch = rows.batch(0)
    assert batch.targets.tolist() == [[11, 12, 0, 21], [0, 31, 32, 33]]
    assert batch.inputs.tolist() == [[0, 11, 12, 0], [21, 0, 31, 32]]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert batch.domains.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert rows.tokens == 10
    assert rows.steps == 1


documents = st.lists(st.lists(st.integers(1, 99), max_size=12).map(lambda d: [*d, 0]), min_size=3, max_size=30)


@given(documents, st.integers(1, 7), st.integers(1, 3))
def test_rows_tile_the_stream(docs: list[list[int]], context: int, count: int) -> None:
    stream = np.concatenate(docs)
    if len(stream) < context * count:
        return
    rows = PackedRows(_source(docs), context=context, rows=count)
    assert rows.steps is not None
    batches = [rows.batch(step) for step in range(rows.steps)]
    seen = np.concatenate([b.targets.ravel() for b in batches])
    assert seen.tolist() == stream[: len(seen)].tolist()
    assert len(stream) - len(seen) < context * count
    inputs = np.concatenate([b.inputs.ravel() for b in batches])
    assert inputs.tolist() == [0, *stream[: len(seen) - 1]], (
        "every document ends in EOS, so the shift is the whole story"
    )


@given(documents, st.integers(1, 7))
def test_segments_are_the_documents(docs: list[list[int]], context: int) -> None:
    owner = np.repeat(np.arange(len(docs)), [len(d) for d in docs])
    if len(owner) < context:
        return
    rows = PackedRows(_source(docs), context=context, rows=1)
    for step in range(rows.steps or 0):
        here = owner[step * context : (step + 1) * context]
        assert rows.batch(step).segments[0].tolist() == (here - here[0]).tolist()


def test_empty_entries_leave_no_trace() -> None:
    filled = PackedRows(_source([[11, 12, 0], [21, 22, 0]]), context=3, rows=2).batch(0)
    gaps = PackedRows(_source([[], [11, 12, 0], [], [], [21, 22, 0], []]), context=3, rows=2).batch(0)
    assert gaps.targets.tolist() == filled.targets.tolist()
    assert gaps.inputs.tolist() == filled.inputs.tolist()


def test_the_end_is_an_error_unless_repeated() -> None:
    source = _source([[1, 2, 3, 4, 5, 6, 0]])
    rows = PackedRows(source, context=3, rows=1)
    assert rows.batch(1).targets.tolist() == [[4, 5, 6]]
    with pytest.raises(ConfigError, match=r"no batch 2, got 7 tokens = 2 batches of 1 x 3"):
        rows.batch(2)
    assert PackedRows(source, context=3, rows=1, repeat=True).batch(2).targets.tolist() == [[1, 2, 3]]


def test_shuffle_is_a_new_order_of_the_same_rows_each_pass() -> None:
    source = _source([[*range(1, 100), 0]] * 4)
    plain = PackedRows(source, context=10, rows=1)
    mixed = PackedRows(source, context=10, rows=1, shuffle=True, repeat=True, seed=1)
    rows = [tuple(plain.batch(i).targets[0]) for i in range(40)]
    passes = [[tuple(mixed.batch(i).targets[0]) for i in range(start, start + 40)] for start in (0, 40)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(rows)
    assert passes[0] != passes[1]
    assert passes[0] != rows


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 3))
def test_permuted_is_a_permutation(n: int, seed: int, turn: int) -> None:
    assert sorted(permuted(i, n, seed, turn) for i in range(n)) == list(range(n))


def test_permuted_depends_on_the_seed() -> None:
    orders = {tuple(permuted(i, 50, seed) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20


def test_fingerprint_notices_another_order() -> None:
    first = PackedRows(_source([[1, 2, 0], [3, 0]]), context=2, rows=1).fingerprint
    assert PackedRows(_source([[3, 0], [1, 2, 0]]), context=2, rows=1).fingerprint != first
    assert PackedRows(_source([[1, 2, 0], [3, 0]]), context=3, rows=1).fingerprint == first
    same_lengths = PackedRows(_source([[1, 4, 0], [3, 0]]), context=2, rows=1).fingerprint
    assert same_lengths != first


class _Changing(ArrayTokenSource):
    def length(self, i: int) -> int:
        return super().length(i) + 1


def test_bad_tokens_are_named() -> None:
    with pytest.raises(InputError, match="document 1 has a token outside the vocabulary, got 0 to 100"):
        PackedRows(_source([[1, 0], [100, 0]]), context=2, rows=2).batch(0)
    with pytest.raises(InputError, match="document 0 of the mixture changed, got 2 tokens, expected 3"):
        PackedRows(_Changing([np.array([1, 0])], vocab_size=9, eos=0, text_bytes=[1]), context=2, rows=1).batch(0)
    with pytest.raises(InputError, match="2 documents, 1 byte counts"):
        ArrayTokenSource([np.array([0])] * 2, vocab_size=1, eos=0, text_bytes=[1])
    with pytest.raises(ConfigError, match="does not fill one row, got 2 tokens"):
        PackedRows(_source([[1, 0]]), context=3, rows=1)
