"""Who sees whom, and the attending: one `Layout` a forward, whatever kernel runs below.

In: segment ids [B, T] or None, then queries, keys and values layer by layer. Out: attention outputs. A query sees the
keys of its own segment up to its own place; in a windowed layer the last `window` of them, itself counted. Both rules
are one number a query, the first key that it sees, from which every backend's mask follows:

    math     explicit masks and a softmax in fp32 at least, any device: what the others are compared with
    sdpa     scaled_dot_product_attention; windows by blocks of `window` queries over twice as many keys
    flex     flex_attention with block masks; on a GPU compiled. Fastest for windows and packed documents there
    varlen   varlen_attn (flash attention over packed documents); GPU and half precision only

`auto` on a GPU in half precision: cuDNN's SDPA for full layers of whole rows, else flex (H100, T = 4096: 1.5x the flash
kernel; flex windows 1.25x varlen, 15x a dense mask). Elsewhere sdpa, in fp64 math.

Legend: B rows, T positions, H query heads, G key/value heads, C head width.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from core.errors import ConfigError
from moe.config import ModelConfig

FLEX_BLOCK = 128  # flex_attention's own block of queries and keys


class Layout(Protocol):
    """The positions of one forward pass, and its attention."""

    # Place of each position in its segment, int64, [B or 1, T].
    position_BT: Tensor  # noqa: N815

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Outputs [B, H, T, C] of scale 1 / sqrt(C); `layer` tells a cache whose keys they are."""
        ...


def layout(
    config: ModelConfig, segments_BT: Tensor | None, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Layout:
    """The layout of whole rows of `shape` [B, T] by `config.attention_backend`."""
    spans = Spans(segments_BT, shape, config.window, device)
    name = config.attention_backend
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "varlen" and not half:
        raise ConfigError(
            f"moe.attention_backend: varlen runs on a GPU in half precision, got {dtype} on {device.type}; use auto"
        )
    if name == "auto" and half and segments_BT is None and shape[1] > config.window:
        return Mixed(spans, Sdpa(spans, dtype), Flex(spans))
    if name == "auto":
        name = "math" if dtype == torch.float64 else "flex" if half and segments_BT is not None else "sdpa"
    if name == "sdpa":
        return Sdpa(spans, dtype)
    kinds: dict[str, Callable[[Spans], Layout]] = {"math": Math, "flex": Flex, "varlen": Varlen}
    return kinds[name](spans)


class Spans:
    """The first key that each query sees; the last one is itself."""

    def __init__(self, segments_BT: Tensor | None, shape: tuple[int, int], window: int, device: torch.device) -> None:
        self.shape, self.window = shape, window
        self.index_T = torch.arange(shape[1], device=device)
        self.start_BT: Tensor | None = None  # where each position's segment begins; None: all rows are one segment
        if segments_BT is not None:
            begins_BT = functional.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))
            self.start_BT = (begins_BT * self.index_T).cummax(1).values
        self.position_BT = self.index_T[None] if self.start_BT is None else self.index_T - self.start_BT

    def first(self, full: bool) -> Tensor:
        """[B, T], or [1, T] where all rows are alike."""
        window_T = (self.index_T - (self.window - 1)).clamp(min=0)
        if self.start_BT is None:
            return (torch.zeros_like(self.index_T) if full else window_T)[None]
        return self.start_BT if full else torch.maximum(self.start_BT, window_T)

    def mask(self, full: bool) -> Tensor:
        """Keys that a query may see, bool [B or 1, 1, T, T]."""
        first_BT1 = self.first(full)[:, :, None]
        return ((self.index_T >= first_BT1) & (self.index_T <= self.index_T[:, None]))[:, None]


class Math:
    """The definition, with [T, T] scores in fp32 at least."""

    def __init__(self, spans: Spans) -> None:
        self.position_BT = spans.position_BT
        self.masks = {full: spans.mask(full) for full in (True, False)}

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        return masked_attention(q_BHTC, k_BGTC, v_BGTC, self.masks[full])


def masked_attention(q_BHTC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, mask: Tensor) -> Tensor:
    """Attention of T queries to P keys under a bool mask [B or 1, 1, T, P]."""
    heads, groups = q_BHTC.shape[1], k_BGPC.shape[1]
    dtype = torch.promote_types(q_BHTC.dtype, torch.float32)
    q, k, v = q_BHTC.to(dtype).unflatten(1, (groups, heads // groups)), k_BGPC.to(dtype), v_BGPC.to(dtype)
    scores = q @ k.unsqueeze(2).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2).to(q_BHTC.dtype)


class Sdpa:
    """torch's fused kernel. Windows shorter than the row are cut into blocks, so that no mask is [T, T]."""

    def __init__(self, spans: Spans, dtype: torch.dtype) -> None:
        self.position_BT, self.window = spans.position_BT, spans.window
        positions, whole = spans.shape[1], spans.start_BT is None
        self.blocked = positions > 2 * self.window
        self.full_mask = None if whole else _additive(spans.mask(True), dtype)
        self.window_mask: Tensor | None = None
        if self.blocked:
            self.window_mask = _additive(block_mask(spans), dtype)
        elif not whole or positions > self.window:
            self.window_mask = _additive(spans.mask(False), dtype)

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        if not full and self.blocked:
            return blocked_attention(q_BHTC, k_BGTC, v_BGTC, self.window_mask, self.window)
        mask = self.full_mask if full else self.window_mask
        return functional.scaled_dot_product_attention(
            q_BHTC, k_BGTC, v_BGTC, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The form that the kernels take; given a bool mask they make it anew in every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def block_mask(spans: Spans) -> Tensor:
    """Of block n of `window` queries over the keys of blocks n - 1 and n: bool [B or 1, N, 1, window, 2 * window]."""
    window, (_, positions) = spans.window, spans.shape
    blocks = -(-positions // window)
    # Queries beyond the row see key 0 of their own block, so that no softmax is empty.
    query_NQ = torch.arange(blocks * window, device=spans.index_T.device).view(blocks, window)
    first_BT = functional.pad(spans.first(False), (0, blocks * window - positions), value=0)
    key_NK = query_NQ[:, :1] - window + torch.arange(2 * window, device=query_NQ.device)
    first_BNQ = torch.maximum(first_BT.view(-1, blocks, window), key_NK[:, :1])
    return ((key_NK[:, None] >= first_BNQ[..., None]) & (key_NK[:, None] <= query_NQ[..., None])).unsqueeze(2)


def blocked_attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Windowed attention as one batch of blocks."""
    rows, _, positions, _ = q_BHTC.shape
    blocks = -(-positions // window)
    behind = blocks * window - positions

    def cut(x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0, 0, behind)).unflatten(2, (blocks, window)).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        here = cut(x)
        previous = functional.pad(here[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((previous, here), dim=3).flatten(0, 1)

    assert mask is not None
    mask_NQK = mask.expand(rows, -1, -1, -1, -1).flatten(0, 1)
    y = functional.scaled_dot_product_attention(
        cut(q_BHTC).flatten(0, 1), with_previous(k_BGTC), with_previous(v_BGTC), attn_mask=mask_NQK, enable_gqa=True
    )
    return y.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :positions]


class Flex:
    """flex_attention over block masks, which are made from the spans without ever holding [T, T]."""

    def __init__(self, spans: Spans) -> None:
        self.position_BT = spans.position_BT
        if spans.start_BT is None:
            positions, device = spans.shape[1], spans.index_T.device
            self.full_mask, self.window_mask = _row_masks(positions, spans.window, device)
        else:
            self.full_mask, self.window_mask = (flex_mask(spans.first(full)) for full in (True, False))

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        mask = self.full_mask if full else self.window_mask
        if torch.compiler.is_compiling() or q_BHTC.device.type != "cuda":
            return flex.flex_attention(q_BHTC, k_BGTC, v_BGTC, block_mask=mask, enable_gqa=True)
        return _compiled_flex()(q_BHTC, k_BGTC, v_BGTC, block_mask=mask, enable_gqa=True)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention)


@cache
def _row_masks(positions: int, window: int, device: torch.device) -> tuple[flex.BlockMask, flex.BlockMask]:
    """Masks of rows without segments: the same for every batch, so made once."""
    with torch.inference_mode(False):
        spans = Spans(None, (1, positions), window, device)

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q

        def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q - k < window)

        return flex_mask(spans.first(True), causal), flex_mask(spans.first(False), windowed)


def flex_mask(first_BT: Tensor, rule: Callable[..., Tensor] | None = None) -> flex.BlockMask:
    """The block mask of queries that see keys from `first_BT` up to themselves.

    `first_BT` never falls along a row, so the blocks that a block of queries sees are those from its first query's
    first key to its own; all its queries see a block that lies before them and begins at or behind the last one's
    first key. `rule` says the same for single keys, by `first_BT` if None.
    """
    rows, positions = first_BT.shape
    blocks = -(-positions // FLEX_BLOCK)
    inside = torch.arange(blocks * FLEX_BLOCK, device=first_BT.device).clamp(max=positions - 1)
    first_BNQ = first_BT[:, inside].view(rows, blocks, FLEX_BLOCK)
    index_N = torch.arange(blocks, device=first_BT.device)
    seen_BNN = (index_N >= first_BNQ[:, :, :1] // FLEX_BLOCK) & (index_N <= index_N[:, None])
    whole_BNN = (index_N * FLEX_BLOCK >= first_BNQ[:, :, -1:]) & (index_N < index_N[:, None])
    some, every = _ordered(seen_BNN & ~whole_BNN), _ordered(whole_BNN)

    def from_first(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first_BT[b, q])

    return flex.BlockMask.from_kv_blocks(
        *some, *every, BLOCK_SIZE=FLEX_BLOCK, mask_mod=rule or from_first, seq_lengths=(positions, positions)
    )


def _ordered(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen key blocks and their indices first, each with a dimension for heads, int32."""
    order = chosen_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BNN.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


class Varlen:
    """Flash attention over the documents of all rows, laid end to end.

    One host synchronisation a forward: the kernel wants the longest document's length, and ten times the time without
    it. Length and number of documents are rounded up to powers of two, so that few variants of a layer are compiled.
    """

    def __init__(self, spans: Spans) -> None:
        self.position_BT, self.window = spans.position_BT, spans.window
        rows, positions = spans.shape
        tokens = rows * positions
        if spans.start_BT is None:
            self.longest = positions
            self.ends_N = torch.arange(0, tokens + 1, positions, dtype=torch.int32, device=spans.index_T.device)
            return
        begin_N = (spans.position_BT.flatten() == 0).nonzero()[:, 0]
        length_N = functional.pad(begin_N, (0, 1), value=tokens).diff()
        self.longest = min(positions, _power_of_two(int(length_N.max())))
        missing = _power_of_two(len(begin_N)) + 1 - len(begin_N)
        self.ends_N = functional.pad(begin_N, (0, missing), value=tokens).to(torch.int32)

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTC, k_BGTC, v_BGTC))
        window = (-1, 0) if full else (self.window - 1, 0)
        y = _varlen()(q, k, v, self.ends_N, self.ends_N, self.longest, self.longest, window_size=window)
        return y.unflatten(0, (q_BHTC.shape[0], q_BHTC.shape[2])).transpose(1, 2)


@cache
def _varlen() -> Callable[..., Tensor]:
    """torch's function: 2.11 groups heads by itself, later releases want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    kernel: Callable[..., Any] = varlen_attn
    return partial(kernel, enable_gqa=True) if "enable_gqa" in inspect.signature(kernel).parameters else kernel


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Mixed:
    """One layout for full layers, another for windowed ones."""

    def __init__(self, spans: Spans, full: Layout, windowed: Layout) -> None:
        self.position_BT, self.full, self.windowed = spans.position_BT, full, windowed

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        return (self.full if full else self.windowed).attend(layer, full, q_BHTC, k_BGTC, v_BGTC)
