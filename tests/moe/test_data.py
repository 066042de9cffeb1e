"""Packing against hand-laid rows, and its laws against the plain concatenation."""

import threading
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, InputError
from core.hashing import digest
from moe.config import ModelConfig, TrainConfig
from moe.data import ArrayTokenSource, Batch, PackedRows, ReadAhead, training_rows


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
    assert batch.mask.all()
    assert rows.tokens == 10
    assert rows.steps == 1


def test_best_fit_rows_by_hand() -> None:
    source = _source([[11, 12, 0], [21, 0], [31, 32, 33, 34, 0]], [0, 1, 0])
    rows = PackedRows(source, context=4, rows=3, packing="best_fit")
    batch = rows.batch(0)
    assert batch.targets.tolist() == [[11, 12, 0, 0], [21, 0, 0, 0], [31, 32, 33, 34]]
    assert batch.inputs.tolist() == [[0, 11, 12, 34], [0, 21, 0, 0], [0, 31, 32, 33]]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    assert batch.domains[batch.mask].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert (rows.packing.cut_docs, rows.packing.fill_fraction) == (1, 10 / 12)


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


def _hashes(batch: Batch) -> list[str]:
    """One a row, over all its arrays."""
    arrays = (batch.inputs, batch.targets, batch.segments, batch.domains, batch.mask)
    return [digest([a[b].tolist() for a in arrays]) for b in range(len(batch.inputs))]


def _long_source() -> ArrayTokenSource:
    rng = np.random.default_rng(3)
    docs = [[*rng.integers(1, 100, rng.integers(0, 40)).tolist(), 0] for _ in range(300)]
    return _source(docs, [i % 2 for i in range(300)])


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_same_rows_whatever_their_number(packing: Literal["stream", "best_fit"], shuffle: bool) -> None:
    def step_hashes(step: int, world: int) -> list[str]:
        rows = PackedRows(
            _long_source(),
            context=16,
            rows=4,
            growth=((3, 8), (5, 12)),
            packing=packing,
            shuffle=shuffle,
            repeat=True,
            seed=5,
        )
        return [h for rank in range(world) for h in _hashes(rows.batch(step, rank, world))]

    seen: list[str] = []
    for step in (0, 2, 3, 4, 5, 9, 60):
        alone = step_hashes(step, 1)
        assert len(alone) == (4 if step < 3 else 8 if step < 5 else 12)
        assert step_hashes(step, 2) == step_hashes(step, 4) == alone
        seen += alone
    assert len(set(seen)) > 0.9 * len(seen), "the rows are told apart"


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=3), st.integers(1, 60))
def test_growing_steps_tile_the_rows(rows: int, stages: list[tuple[int, int]], tokens: int) -> None:
    growth, start = [], 0
    for length, count in stages:
        start += length
        growth.append((start, count))
    config = TrainConfig(model=ModelConfig(vocab_size=100, eos=0), rows=rows, row_growth=tuple(growth))
    packed = PackedRows(_source([[*range(1, tokens), 0]]), context=1, rows=rows, growth=growth)
    at = step = 0
    while at + config.rows_of(step) <= tokens:
        assert packed.first_row(step) == at
        assert packed.rows_of(step) == config.rows_of(step)
        assert packed.batch(step).targets.ravel().tolist() == [
            (t + 1) % tokens for t in range(at, at + config.rows_of(step))
        ]
        at += config.rows_of(step)
        step += 1
    assert packed.steps == step
    with pytest.raises(ConfigError, match=f"no batch {step}, got {tokens} tokens = {step} batches"):
        packed.batch(step)


def test_rows_that_the_ranks_do_not_share_equally_are_named() -> None:
    rows = PackedRows(_source([[*range(1, 100), 0]]), context=2, rows=4, growth=[(2, 6)])
    assert len(rows.batch(1, 3, 4).inputs) == 1
    with pytest.raises(
        ConfigError, match="do not share a step's rows equally, got rank 0 of 4 and 6 rows from step 2 on"
    ):
        rows.batch(2, 0, 4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        rows.batch(0, 2, 2)


def test_a_sources_mask_says_what_counts() -> None:
    masks = [np.array([False, True, True]), None, np.array([False] * 4 + [True])]
    docs = [np.array(d) for d in ([11, 12, 0], [21, 0], [31, 32, 33, 34, 0])]
    source = ArrayTokenSource(docs, vocab_size=100, eos=0, text_bytes=[1] * 3, masks=masks)
    stream = PackedRows(source, context=5, rows=2).batch(0)
    assert stream.targets[stream.mask].tolist() == [12, 0, 21, 0, 0]
    packed = PackedRows(source, context=4, rows=3, packing="best_fit").batch(0)
    assert sorted(packed.targets[packed.mask].tolist()) == [0, 0, 0, 12, 21]
    unmasked = ArrayTokenSource(docs, vocab_size=100, eos=0, text_bytes=[1] * 3)
    assert unmasked.content != source.content
    wrong = ArrayTokenSource(docs, vocab_size=100, eos=0, text_bytes=[1] * 3, masks=[masks[0], None, masks[0]])
    with pytest.raises(
        InputError, match="document 2 of the mixture changed, got 5 tokens and a loss mask of 3, expected 5"
    ):
        PackedRows(wrong, context=10, rows=1).batch(0)


def test_reading_ahead_changes_nothing_and_ends() -> None:
    rows = PackedRows(_long_source(), context=16, rows=4, shuffle=True)
    assert rows.steps is not None
    with ReadAhead(rows, 1, 2) as ahead:
        for step in (0, 1, 2, 7, 7, 3, rows.steps - 1):
            assert _hashes(ahead.batch(step)) == _hashes(rows.batch(step, 1, 2))
        with pytest.raises(ConfigError, match="has no batch"):
            ahead.batch(rows.steps)
        assert _hashes(ahead.batch(0)) == _hashes(rows.batch(0, 1, 2)), "an error leaves it usable"
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


class _Recording(PackedRows):
    read: list[int]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        self.read.append(step)
        return super().batch(step, rank, world)


def test_the_next_batch_is_read_once_and_before_it_is_asked_for() -> None:
    rows = _Recording(_long_source(), context=16, rows=4)
    rows.read = []
    with ReadAhead(rows) as ahead:
        ahead.batch(0)
        ahead.batch(1)
        ahead.batch(7)
    assert rows.read in ([0, 1, 2, 7, 8], [0, 1, 2, 7]), "closing may come before the last"


def _config(**fields: object) -> TrainConfig:
    model = ModelConfig(vocab_size=104, eos=0, context=16)
    return TrainConfig(model=model, **{"steps": 5, "rows": 2, **fields})  # type: ignore[arg-type]


def test_training_rows_are_those_of_the_config() -> None:
    config = _config(
        row_growth=((2, 4),), packing="best_fit", shuffle=True, order_seed=9, seed=1, fim_fraction=0.5,
        fim_domains=("b",), fim_tokens=(101, 102, 103),
    )  # fmt: skip
    rows = training_rows(config, _long_source())
    assert [rows.rows_of(step) for step in range(4)] == [2, 2, 4, 4]
    assert (rows.seed, rows.shuffle, rows.source.vocab_size) == (9, True, 104)
    taken = [rows.batch(step) for step in range(rows.steps or 0)]
    sentinels = [int((b.targets == 101).sum()) for b in taken]
    assert 10 < sum(sentinels) < 100
    assert not any((b.targets[b.mask] > 100).any() for b in taken)
    assert not all(b.mask.all() for b in taken), "best fit pads"
    plain = training_rows(_config(), _long_source())
    assert (plain.seed, plain.shuffle, plain.packing.fill_fraction) == (0, False, 1.0)


def test_a_source_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"exceeds the embedding, got 105 tokens, expected at most 104"):
        training_rows(
            _config(packing="best_fit", fim_fraction=0.1, fim_domains=("a",), fim_tokens=(101, 102, 104)),
            _long_source(),
        )
    foreign = ArrayTokenSource([np.array([1, 2, 3])], vocab_size=200, eos=3, text_bytes=[1])
    with pytest.raises(
        ConfigError, match=r"got 200 tokens, expected at most 104[^$]*got token 3, expected model\.eos 0"
    ):
        training_rows(_config(), foreign)
    with pytest.raises(ConfigError, match=r"too short, got 20 tokens = 0 steps of 2 x 16, expected 5"):
        training_rows(_config(), _source([[*range(1, 20), 0]]))


def test_a_stream_of_rearranged_documents_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"got train\.packing stream and fraction 0\.5; set train\.packing to best_fit"
    ):
        training_rows(_config(fim_fraction=0.5, fim_domains=("b",), fim_tokens=(101, 102, 103)), _long_source())


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
