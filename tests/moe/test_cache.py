"""The cache against the uncached forward, in fp64: over window edges, turns of the ring, mixed lengths and rollbacks."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.cache import Cache, attention
from moe.config import ModelConfig
from moe.model import Decoder
from moe.presets import preset

WINDOW, SLACK, CONTEXT = 5, 3, 40
CLOSE = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Two windowed layers between full ones; 40 positions turn the ring of 5 + 3 slots five times."""
    config = preset("ci", vocab_size=64, eos=0)
    config = dataclasses.replace(config, layers=4, full_every=3, window=WINDOW, context=CONTEXT, mtp_heads=0)
    return Decoder(config, seed=1).double().eval()


def _cache(config: ModelConfig, rows: int, slack: int = SLACK, capacity: int = CONTEXT) -> Cache:
    return Cache(config, range(config.layers), rows=rows, capacity=capacity, slack=slack, dtype=torch.float64)


def _tokens(rows: int, length: int = CONTEXT) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts",
    [
        (0, 40),
        (0, 4, 9, 40),
        (0, 5, 6, 40),
        tuple(range(41)),
        (0, *range(7, 41)),
        (0, 20, 24, 28, 29, 33, 40),
        (0, 1, 14, 15, 40),
    ],
    ids=["at once", "chunks", "edge", "one by one", "prompt, then one by one", "verified by four", "long after short"],
)
def test_parts_equal_the_whole(model: Decoder, cuts: tuple[int, ...]) -> None:
    tokens, cache = _tokens(2), _cache(model.config, 2)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **CLOSE)
    assert cache.lengths_B.tolist() == [40, 40]


@torch.no_grad()
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_rows_of_their_own_lengths_with_rollbacks(model: Decoder, data: st.DataObject) -> None:
    """Any padded steps and rollbacks: each kept token's logits are those of its row alone, without a cache."""
    rows = data.draw(st.integers(1, 3))
    tokens, cache, lengths = _tokens(rows), _cache(model.config, rows), [0] * rows
    expected, got = model(tokens), torch.zeros(rows, CONTEXT, 64, dtype=torch.float64)
    for _ in range(data.draw(st.integers(1, 8))):
        most = data.draw(st.sampled_from([1, 2, 4, 4, 7, 13]))
        counts = [data.draw(st.integers(0, min(most, CONTEXT - n))) for n in lengths]
        fed = torch.full((rows, most), 63)
        for row, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            fed[row, :count] = tokens[row, n : n + count]
        # What is taken back was another token: nothing of it may be left.
        back = [data.draw(st.integers(0, min(count, SLACK))) for count in counts]
        for row, (count, taken) in enumerate(zip(counts, back, strict=True)):
            fed[row, count - taken : count] = 7
        logits = model(fed, cache=cache.feed(counts_B=torch.tensor(counts)))
        assert logits.isfinite().all(), "padding's states stay finite"
        cache.rollback(torch.tensor(back))
        for row, (count, taken) in enumerate(zip(counts, back, strict=True)):
            kept = count - taken
            got[row, lengths[row] : lengths[row] + kept] = logits[row, :kept]
            lengths[row] += kept
        assert cache.lengths_B.tolist() == lengths
    for row, n in enumerate(lengths):
        torch.testing.assert_close(got[row, :n], expected[row, :n], **CLOSE)


@torch.no_grad()
def test_rows_are_fed_by_index_freed_and_reused(model: Decoder) -> None:
    tokens, cache = _tokens(3), _cache(model.config, 3)
    model(tokens, cache=cache)
    cache.restart(torch.tensor([0, 2]))
    index = torch.tensor([2, 0])
    first = model(tokens[index, :9], cache=cache.feed(index, reach=9))
    assert cache.lengths_B.tolist() == [9, 40, 9]
    torch.testing.assert_close(first, model(tokens[index, :9]), **CLOSE)
    second = model(tokens[:1, 9:12], cache=cache.feed(1))
    assert cache.lengths_B.tolist() == [12, 40, 9]
    torch.testing.assert_close(second, model(tokens[:1, :12])[:, 9:], **CLOSE)
    third = model(tokens[2:, 9:30], cache=cache.feed(torch.tensor([2])))
    torch.testing.assert_close(third, model(tokens[2:, :30])[:, 9:], **CLOSE)


@torch.no_grad()
def test_a_row_may_start_late_and_before_its_start(model: Decoder) -> None:
    """Tokens below a row's start are dropped, at negative places too; the others see each other only."""
    tokens, cache = _tokens(1), _cache(model.config, 1)
    cache.restart(torch.tensor([0]), start=0, length=-2)
    got = torch.cat([model(tokens[:, :3], cache=cache), model(tokens[:, 3:6], cache=cache)], 1)
    torch.testing.assert_close(got[:, 2:], model(tokens[:, 2:6]), **CLOSE)
    cache.restart(torch.tensor([0]), start=12, length=11)
    got = torch.cat([model(tokens[:, :3], cache=cache), model(tokens[:, 3:12], cache=cache)], 1)
    # Attention is relative; the rotary angles are fp32 whatever the model is.
    torch.testing.assert_close(got[:, 1:], model(tokens[:, 1:12]), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_tokens_beyond_the_capacity_leave_the_others_alone(model: Decoder) -> None:
    tokens, cache = _tokens(1), _cache(model.config, 1, capacity=20)
    model(tokens[:, :18], cache=cache)
    logits = model(tokens[:, 18:22], cache=cache)
    torch.testing.assert_close(logits[:, :2], model(tokens[:, :20])[:, 18:], **CLOSE)
    assert logits.isfinite().all()


@torch.no_grad()
def test_fp32_prefill_by_the_fused_kernel(model: Decoder) -> None:
    single, tokens = Decoder(model.config, seed=1).eval(), _tokens(2)
    cache = Cache(model.config, range(model.config.layers), rows=2, capacity=CONTEXT, slack=SLACK)
    counts = torch.tensor([30, 17])
    logits = single(tokens[:, :30], cache=cache.feed(counts_B=counts, reach=30))
    torch.testing.assert_close(logits[0], single(tokens[:1, :30])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, :17], single(tokens[1:, :17])[0], atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


def test_attention_by_hand() -> None:
    q = torch.tensor([2**0.5, 0.0]).view(1, 1, 1, 2)  # times 1 / sqrt(2): scores 1 and 0
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]).view(1, 1, 3, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]).view(1, 1, 3, 2)
    seen = torch.tensor([[[True, True, False]]])
    share = math.e / (math.e + 1)
    torch.testing.assert_close(attention(q, k, v, seen)[0, 0, 0], torch.tensor([share, 1 - share]))
    assert attention(q, k, v, torch.zeros_like(seen)).isfinite().all()


def test_memory_is_counted() -> None:
    config = preset("ci", vocab_size=64, eos=0)  # layers F, S, F; window 16, one key head of width 16
    cache = Cache(config, range(3), rows=2, capacity=64, slack=3)
    assert cache.nbytes == 2 * 2 * 16 * 4 * (65 + 20 + 65)
