"""Attention against loops over single keys in float64, windows at their edges, block masks against torch's own."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from core.errors import ConfigError
from moe import attention
from moe.attention import FLEX_BLOCK, Math, Sdpa, Spans, Varlen, flex_mask
from moe.config import ModelConfig
from moe.layers import Attention, Rope

CPU = torch.device("cpu")


def _config(window: int, backend: str = "math") -> ModelConfig:
    return ModelConfig(vocab_size=2, eos=0, window=window, attention_backend=backend)  # type: ignore[arg-type]


def _segments(rows: int, positions: int, seed: int) -> Tensor:
    """Documents of about six tokens, numbered within each row."""
    starts = torch.rand(rows, positions, generator=torch.Generator().manual_seed(seed)) < 1 / 6
    return starts.cumsum(1)


def _qkv(rows: int, positions: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(positions)
    return [torch.randn(rows, h, positions, 8, generator=generator, dtype=dtype) for h in (6, 2, 2)]


def _by_loops(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, window: int | None) -> Tensor:
    y = torch.zeros_like(q)
    rows, heads, positions, width = q.shape
    for b, h, t in itertools.product(range(rows), range(heads), range(positions)):
        group = h // (heads // k.shape[1])
        seen = [
            j
            for j in range(t + 1)
            if (window is None or t - j < window) and (segments is None or segments[b, j] == segments[b, t])
        ]
        mass = [float(torch.exp(q[b, h, t] @ k[b, group, j] / width**0.5)) for j in seen]
        for j, m in zip(seen, mass, strict=True):
            y[b, h, t] += m / sum(mass) * v[b, group, j]
    return y


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("positions", [1, 4, 5, 10, 11, 23])
def test_every_backend_attends_as_defined(backend: str, packed: bool, positions: int) -> None:
    segments = _segments(2, positions, seed=positions) if packed else None
    q, k, v = _qkv(2, positions)
    layout = attention.layout(_config(5, backend), segments, (2, positions), CPU, torch.float64)
    for full in (True, False):
        expected = _by_loops(q, k, v, segments, None if full else 5)
        torch.testing.assert_close(layout.attend(0, full, q, k, v), expected, atol=1e-12, rtol=1e-12)


def test_positions_restart_with_each_segment() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 7, 7, 7, 7]])
    layout = attention.layout(_config(5), segments, (2, 6), CPU, torch.float32)
    assert layout.position_BT.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert attention.layout(_config(5), None, (2, 3), CPU, torch.float32).position_BT.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_a_window_of_512_has_512_keys(backend: str) -> None:
    # Equal scores: the output is the mean of the places seen, 0 to 511 at place 511, 1 to 512 at 512, 589 to 1100 at 1100.
    positions = 1101
    q, k = torch.zeros(1, 1, positions, 2), torch.zeros(1, 1, positions, 2)
    v = torch.arange(positions, dtype=torch.float32).view(1, 1, -1, 1).expand(-1, -1, -1, 2)
    layout = attention.layout(_config(512, backend), None, (1, positions), CPU, torch.float32)
    y = layout.attend(0, False, q, k, v)[0, 0, :, 0]
    assert [y[t].item() for t in (0, 510, 511, 512, 1100)] == pytest.approx([0, 255, 255.5, 256.5, 844.5], abs=1e-3)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("full", [True, False])
def test_gradients_are_those_of_the_definition(backend: str, full: bool) -> None:
    segments = _segments(2, 13, seed=3)
    gradients = []
    for kind in ("loops", backend):
        q, k, v = (x.requires_grad_() for x in _qkv(2, 13))
        if kind == "loops":
            seen = Spans(segments, (2, 13), 5, CPU).mask(full)
            k_all, v_all = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
            y = ((q @ k_all.mT / 8**0.5).masked_fill(~seen, -torch.inf)).softmax(-1) @ v_all
        else:
            y = attention.layout(_config(5, kind), segments, (2, 13), CPU, q.dtype).attend(0, full, q, k, v)
        (y * torch.arange(13.0, dtype=q.dtype)[:, None]).sum().backward()
        gradients.append([q.grad, k.grad, v.grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def _blocks(mask: BlockMask, row: int) -> tuple[list[set[int]], list[set[int]]]:
    """Of each block of queries, the blocks of keys that are seen in part and whole."""
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    some, every = ([set(i[:n].tolist()) for n, i in zip(num[row, 0], ind[row, 0], strict=True)] for num, ind in pairs)
    return some, every


@pytest.mark.parametrize("window", [1, 128, 129, 300, 5000])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
def test_block_masks_are_those_that_torch_finds_key_by_key(window: int, packed: bool) -> None:
    positions = 5 * FLEX_BLOCK
    segments = (_segments(2, positions // 40, seed=7).repeat_interleave(40, 1)) if packed else None
    spans = Spans(segments, (2 if packed else 1, positions), window, CPU)
    for full in (True, False):
        first = spans.first(full)

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor, first: Tensor = first) -> Tensor:
            return (k <= q) & (k >= first[b, q])

        theirs = create_block_mask(rule, len(first), None, positions, positions, device="cpu")
        for row in range(len(first)):
            assert _blocks(flex_mask(first), row) == _blocks(theirs, row)


@pytest.mark.parametrize("positions", [1, 127, 129, 500])
def test_a_last_block_that_is_not_full_is_seen_where_its_queries_look(positions: int) -> None:
    first = Spans(None, (1, positions), 130, CPU).first(False)
    seen = Spans(None, (1, positions), 130, CPU).mask(False)[0, 0]
    some, every = _blocks(flex_mask(first), 0)
    for n, (part, whole) in enumerate(zip(some, every, strict=True)):
        queries = seen[n * FLEX_BLOCK : (n + 1) * FLEX_BLOCK]
        for m in range(len(some)):
            keys = queries[:, m * FLEX_BLOCK : (m + 1) * FLEX_BLOCK]
            assert bool(keys.any()) == (m in part | whole)
            assert m not in whole or bool(keys.all())


def test_documents_laid_end_to_end_for_varlen() -> None:
    spans = Spans(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]]), (2, 8), 3, CPU)
    varlen = Varlen(spans)
    # Five documents of 3, 4, 1, 1 and 7: room for eight, the last three empty; 7 is rounded up to 8.
    assert varlen.ends_N.tolist() == [0, 3, 7, 8, 9, 16, 16, 16, 16]
    assert varlen.ends_N.dtype == torch.int32
    assert varlen.longest == 8
    whole = Varlen(Spans(None, (3, 5), 3, CPU))
    assert (whole.ends_N.tolist(), whole.longest) == ([0, 5, 10, 15], 5)


def test_what_auto_takes_without_a_gpu_and_what_varlen_needs() -> None:
    kinds = {
        d: type(attention.layout(_config(4, "auto"), None, (1, 9), CPU, d)) for d in (torch.float32, torch.float64)
    }
    assert kinds == {torch.float32: Sdpa, torch.float64: Math}
    with pytest.raises(ConfigError, match=r"varlen runs on a GPU .*got torch\.float32 on cpu"):
        attention.layout(_config(4, "varlen"), None, (1, 9), CPU, torch.float32)


@pytest.mark.parametrize("full", [True, False])
def test_the_gate_is_one_more_key_without_a_value(model_config: ModelConfig, full: bool) -> None:
    config = dataclasses.replace(model_config, window=4, attention_backend="math")
    layer = 0 if full else 1
    assert config.full(layer) == full
    module = Attention(config, layer).double()
    heads = config.heads_of(layer)
    x = torch.randn(1, 9, config.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        module.o_proj.weight.copy_(torch.eye(config.dim, heads * config.head_dim))
    layout = attention.layout(config, None, (1, 9), CPU, x.dtype)
    tables = {kind: Rope(config, kind)(layout.position_BT) for kind in (True, False)}
    seen = _Recorder(layout)
    y = module(x, tables, seen)
    assert module.g_proj is not None
    g = module.g_proj(x)
    q, k, v = seen.last
    mask = Spans(None, (1, 9), 4, CPU).mask(full)[0, 0]
    for h, t in itertools.product(range(heads), range(9)):
        mass = torch.exp(q[0, h, t] @ k[0, 0].T / config.head_dim**0.5) * mask[t]
        sink = torch.exp(-g[0, t, h]) * mass.sum()
        expected = (mass / (mass.sum() + sink)) @ v[0, 0]
        ours = y[0, t, h * config.head_dim : (h + 1) * config.head_dim]
        torch.testing.assert_close(ours, expected[: len(ours)], atol=1e-12, rtol=1e-12)


class _Recorder:
    """A layout that keeps what it was given."""

    def __init__(self, inner: attention.Layout) -> None:
        self.inner, self.position_BT = inner, inner.position_BT

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        self.last = q_BHTC, k_BGTC, v_BGTC
        return self.inner.attend(layer, full, q_BHTC, k_BGTC, v_BGTC)
