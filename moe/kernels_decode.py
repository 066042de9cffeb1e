"""Triton kernels of a decode step: at most 32 tokens at a time, every weight read once, eight launches a layer.

In: bf16 (or fp32) weights and M = B * T tokens, T new ones of each of B rows. Out: what the same layers of moe/layers.py
compute, from fp32 sums. moe/fused.py puts them together.

A token's bits do not depend on M: chunks of keys and the order of sums are fixed by the shapes of the weights and of the
cache. So a step that verifies four drafted tokens gives the bits of four steps of one token.

Legend: M tokens, D model width, N outputs, E experts, K chosen, J = K + 1 with the shared expert, F expert width, H
query heads, G key/value heads, C head width, P slots of a cache, S chunks of slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels_chain import chained, release, wait

# Of a step at most, of which a program takes one after the other, with its weights in registers. Of 32 rows a step takes 2.5 ms
# on an H100 (`1b`), by the model's own layers 4.6; more were not measured.
TOKENS = 32
# A step waits for memory, not for arithmetic: a program asks for all its weights before it uses any, 64 bytes a thread.
ROWS = 8
BLOCK_IN = 2048
# A warp for each row. The bound on registers is above what is needed: without one ptxas saves them, and loads in two goes.
LAUNCH = {"num_warps": ROWS, "maxnreg": 128}


@triton.jit
def _linear_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    weight: tl.tensor,
    add: tl.tensor,
    kept: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    ahead: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    d, n = columns(ROWS, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = n.to(tl.int64)[:, None, None] * stride + d, (n < N)[:, None, None]
    if D > BLOCK:  # more than a program holds: read for each token
        wait(CHAINED)
        for m in range(M):
            beside = _beside(add + m * N, n, N, ADD, ROWS)
            read = x + _place(kept, m, tokens, ahead, LAST) * D
            total, square = tl.zeros_like(d).to(tl.float32), tl.zeros_like(d).to(tl.float32)
            for low in tl.static_range(0, D, BLOCK):
                w = tl.load(weight + at + low, mask=inside & (d < D - low), other=0.0)
                h = tl.load(read + low + d, mask=d < D - low, other=0.0).to(tl.float32)
                if NORM:
                    square += h * h
                    h = h * (1 + tl.load(gain + d + low, mask=d < D - low, other=0.0).to(tl.float32))
                total += w.to(tl.float32) * h
            _write(out + m * N, total, square, beside, eps, n, N, D, NORM, ADD)
    else:
        w, g = tl.load(weight + at, mask=inside & (d < D), other=0.0), tl.zeros_like(d).to(tl.float32)
        if NORM:
            g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
        wait(CHAINED)
        for m in range(0, M if PAIRS else 1, 2):
            beside = _beside(add + m * N, n, N, ADD, ROWS)
            h = tl.load(x + _place(kept, m, tokens, ahead, LAST) * D + d, mask=d < D, other=0.0)
            if PAIRS:  # the other token's numbers are under way while this one's are added up
                other = tl.minimum(m + 1, M - 1)
                other_beside = _beside(add + other * N, n, N, ADD, ROWS)
                other_h = tl.load(x + _place(kept, other, tokens, ahead, LAST) * D + d, mask=d < D, other=0.0)
            total, square = _products(h, w, g, NORM)
            _write(out + m * N, total, square, beside, eps, n, N, D, NORM, ADD)
            if PAIRS:
                total, square = _products(other_h, w, g, NORM)
                _write(out + other * N, total, square, other_beside, eps, n, N, D, NORM, ADD)


@triton.jit
def columns(ROWS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Places in each of ROWS rows, as [ROWS, BLOCK / WIDTH, WIDTH]: Triton then gives a warp whole rows.

    So sums need no barrier, and what goes with all rows, as x does, is loaded by each warp: that takes no exchange either.
    """
    WIDTH: tl.constexpr = min(256, BLOCK)  # 16 bytes a thread
    d = tl.arange(0, BLOCK // WIDTH)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.broadcast_to(d, [ROWS, BLOCK // WIDTH, WIDTH])


@triton.jit
def across(total: tl.tensor) -> tl.tensor:
    """Sums of rows [ROWS] that lie as `columns` has them."""
    return tl.sum(tl.sum(total, axis=1), axis=1)


@triton.jit
def firsts(n: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Places [ROWS, 32] of rows' results, of which the first of each row count: a warp stores its own, without a barrier."""
    lane = tl.arange(0, 32)[None, :]
    return n[:, None] + lane, lane == 0


@triton.jit
def _place(kept: tl.tensor, m: tl.tensor, tokens: tl.tensor, ahead: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    """The token of x that is read for the result m."""
    if LAST:
        m = m * tokens + tl.maximum(tl.load(kept + m), 1) - 1 + ahead
    return m


@triton.jit
def _beside(add: tl.tensor, n: tl.tensor, N: tl.tensor, ADD: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """What is added to a result, as `firsts` has it; zeros where nothing is."""
    if ADD:
        at, first = firsts(n)
        y = tl.load(add + at, mask=first & (n < N)[:, None], other=0.0).to(tl.float32)
    else:
        y = tl.zeros([ROWS, 32], tl.float32)
    return y


@triton.jit
def _products(h: tl.tensor, w: tl.tensor, g: tl.tensor, NORM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Products of a token with weight rows, and its squares; not added up yet."""
    h = h.to(tl.float32)
    square = h * h
    if NORM:
        h = h * (1 + g)
    return w.to(tl.float32) * h, square


@triton.jit
def _write(
    out: tl.tensor,
    total: tl.tensor,
    square: tl.tensor,
    beside: tl.tensor,
    eps: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Adds up and stores; 1 / rms is one number a token, so it may come last."""
    y = across(total)
    if NORM:
        y = y / tl.sqrt(across(square) / D + eps)
    if ADD:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    at, first = firsts(n)
    tl.store(out + at, (y[:, None] + beside).to(out.dtype.element_ty), mask=first & (n < N)[:, None])


@triton.jit
def _swiglu_linear_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    gate_weight: tl.tensor,
    up_weight: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    d, n = columns(ROWS, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = n.to(tl.int64)[:, None, None] * D + d, (n < N)[:, None, None]
    gate_w = tl.load(gate_weight + at, mask=inside & (d < D), other=0.0)
    up_w = tl.load(up_weight + at, mask=inside & (d < D), other=0.0)
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    wait(CHAINED)
    for m in range(M):
        gate, up = tl.zeros_like(d).to(tl.float32), tl.zeros_like(d).to(tl.float32)
        square = tl.zeros_like(d).to(tl.float32)
        for low in tl.static_range(0, D, BLOCK):
            if D > BLOCK:  # more than a program holds: read again for each token
                there = inside & (d < D - low)
                gate_w = tl.load(gate_weight + at + low, mask=there, other=0.0)
                up_w = tl.load(up_weight + at + low, mask=there, other=0.0)
                g = tl.load(gain + low + d, mask=d < D - low, other=0.0).to(tl.float32)
            h = tl.load(x + m * D + low + d, mask=d < D - low, other=0.0).to(tl.float32)
            square += h * h
            h = h * (1 + g)
            gate += gate_w.to(tl.float32) * h
            up += up_w.to(tl.float32) * h
        scale = 1 / tl.sqrt(across(square) / D + eps)
        a, u = across(gate) * scale, across(up) * scale
        a = a * tl.sigmoid(a)
        if LIMIT > 0:
            a, u = tl.minimum(a, LIMIT), tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
        to, first = firsts(n)
        tl.store(out + m * N + to, (a * u)[:, None].to(out.dtype.element_ty), mask=first & (n < N)[:, None])


def linear(
    x_MD: Tensor,
    weight_ND: Tensor,
    *,
    gain_D: Tensor | None = None,
    eps: float = 0.0,
    add_MN: Tensor | None = None,
    last: tuple[Tensor, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`norm(x) @ weight.T + add` [M, N]; without `gain_D` x is taken as it is.

    `last`: kept [B] and h. Of each row's x only the token at max(kept, 1) - 1 + h is read, and the result is [B, N].
    """
    (tokens, width), outputs = x_MD.shape, weight_ND.shape[0]
    kept_B, ahead = (x_MD, 0) if last is None else last
    rows = tokens if last is None else len(kept_B)
    out_MN, block = x_MD.new_empty(rows, outputs, dtype=dtype or x_MD.dtype), block_in(width)
    _linear_kernel[(triton.cdiv(outputs, ROWS),)](
        x_MD, x_MD if gain_D is None else gain_D, weight_ND, x_MD if add_MN is None else add_MN, kept_B, out_MN, rows,
        outputs, weight_ND.stride(0), tokens // rows, ahead, eps, width, gain_D is not None, add_MN is not None,
        last is not None, ROWS, block, rows > 1, **chained(x_MD), **LAUNCH,
    )  # fmt: skip
    return out_MN


def swiglu_linear(
    x_MD: Tensor, gate_FD: Tensor, up_FD: Tensor, *, gain_D: Tensor, eps: float, limit: float | None
) -> Tensor:
    """SwiGLU's inner activation [M, F] of norm(x)."""
    tokens, width = x_MD.shape
    out_MF, block = x_MD.new_empty(tokens, gate_FD.shape[0]), block_in(width)
    _swiglu_linear_kernel[(triton.cdiv(out_MF.shape[1], ROWS),)](
        x_MD, gain_D, gate_FD, up_FD, out_MF, tokens, out_MF.shape[1], eps, width, limit or 0.0, ROWS, block,
        **chained(x_MD), **LAUNCH,
    )  # fmt: skip
    return out_MF


def block_in(width: int) -> int:
    """Numbers of a row that a program takes at once."""
    return min(BLOCK_IN, triton.next_power_of_2(width))
