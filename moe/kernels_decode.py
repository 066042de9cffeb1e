"""Triton kernels of a decode step: at most 16 tokens at a time, every weight read once, eight launches a layer.

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

TOKENS = 16  # of a step at most; a program goes through them one by one, with its weights in registers
# A step waits for memory, not for arithmetic: a program asks for all its weights before it uses any, 64 bytes a thread.
ROWS = 8
BLOCK_IN = 2048
EXPERT_BLOCK_OUT = 512


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
) -> None:
    d, n = tl.arange(0, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = n.to(tl.int64)[:, None] * stride + d[None, :], (n < N)[:, None]
    w = tl.load(weight + at, mask=inside & (d < D)[None, :], other=0.0)
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    for m in range(M):
        read = m
        if LAST:
            read = m * tokens + tl.maximum(tl.load(kept + m), 1) - 1 + ahead
        total, square = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for low in tl.static_range(0, D, BLOCK):
            if D > BLOCK:  # more than a program holds: read again for each token
                w = tl.load(weight + at + low, mask=inside & (d < D - low)[None, :], other=0.0)
                g = tl.load(gain + d + low, mask=d < D - low, other=0.0).to(tl.float32)
            h = tl.load(x + read * D + low + d, mask=d < D - low, other=0.0).to(tl.float32)
            if NORM:
                square += h * h
                h = h * (1 + g)
            total += w.to(tl.float32) * h[None, :]
        y = tl.sum(total, axis=1)
        if NORM:  # 1 / rms is one number a token, so it may come last
            y = y / tl.sqrt(tl.sum(square, axis=0) / D + eps)
        if ADD:
            y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(add + m * N + n, mask=n < N, other=0.0)
        tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=n < N)


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
) -> None:
    d, n = tl.arange(0, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = n.to(tl.int64)[:, None] * D + d[None, :], (n < N)[:, None]
    for m in range(M):
        gate, up = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for low in tl.static_range(0, D, BLOCK):
            there = inside & (d < D - low)[None, :]
            h = tl.load(x + m * D + low + d, mask=d < D - low, other=0.0).to(tl.float32)
            square += h * h
            h = h * (1 + tl.load(gain + low + d, mask=d < D - low, other=0.0).to(tl.float32))
            gate += tl.load(gate_weight + at + low, mask=there, other=0.0).to(tl.float32) * h[None, :]
            up += tl.load(up_weight + at + low, mask=there, other=0.0).to(tl.float32) * h[None, :]
        scale = 1 / tl.sqrt(tl.sum(square, axis=0) / D + eps)
        a, u = tl.sum(gate, axis=1) * scale, tl.sum(up, axis=1) * scale
        a = a * tl.sigmoid(a)
        if LIMIT > 0:
            a, u = tl.minimum(a, LIMIT), tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
        tl.store(out + m * N + n, (a * u).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _route_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    router: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    chosen: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    routed_scale: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    m = tl.program_id(0)
    d, e, kept = tl.arange(0, BLOCK), tl.arange(0, BINS), tl.arange(0, KEPT)
    # One program sees a whole token, and all its loads are under way at once: time here is latency.
    w = tl.load(router + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
    part = tl.load(x + m * D + d, mask=d < D, other=0.0).to(tl.float32)
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(part * part, axis=0) / D + eps)
    h = (part * scale * (1 + g)).to(normed.dtype.element_ty)
    tl.store(normed + m * D + d, h, mask=d < D)
    score = tl.sigmoid(tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], axis=1))
    left = tl.where(e < E, score + tl.load(bias + e, mask=e < E, other=0.0), float("-inf"))
    experts, weights = tl.zeros([KEPT], tl.int32), tl.zeros([KEPT], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(left, axis=0)
        first = tl.minimum(tl.min(tl.where(left == best, e, BINS), axis=0), E - 1)
        experts = tl.where(kept == k, first, experts)
        weights = tl.where(kept == k, tl.sum(tl.where(e == first, score, 0.0), axis=0), weights)
        left = tl.where(e == first, float("-inf"), left)
    weights = weights / (tl.sum(weights, axis=0) + 1e-20) * routed_scale
    tl.store(chosen + m * K + kept, experts, mask=kept < K)
    tl.store(weight + m * K + kept, weights, mask=kept < K)


@triton.jit
def _expert_in_kernel(
    h: tl.tensor,
    chosen: tl.tensor,
    weight: tl.tensor,
    routed: tl.tensor,
    shared_gate: tl.tensor,
    shared_up: tl.tensor,
    hidden: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    FS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    LIMIT: tl.constexpr,
    SHARED_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    m, j = tl.program_id(0), tl.program_id(1)
    n = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if j < K:
        expert = tl.load(chosen + m * K + j).to(tl.int64)
        scale = tl.load(weight + m * K + j)
        gate_weight = routed + expert * (2 * F * D)
        up_weight = gate_weight + F * D
        width, limit = F, LIMIT
    else:
        scale = 1.0
        gate_weight, up_weight = shared_gate, shared_up
        width, limit = FS, SHARED_LIMIT
    gate, up = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for low in range(0, D, BLOCK):
        d = low + tl.arange(0, BLOCK)
        at, inside = n[:, None] * D + d[None, :], (n < width)[:, None] & (d < D)[None, :]
        x = tl.load(h + m * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(gate_weight + at, mask=inside, other=0.0).to(tl.float32) * x
        up += tl.load(up_weight + at, mask=inside, other=0.0).to(tl.float32) * x
    g, u = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    g = g * tl.sigmoid(g)
    if limit > 0:
        g, u = tl.minimum(g, limit), tl.minimum(tl.maximum(u, -limit), limit)
    tl.store(hidden + (m * (K + 1) + j) * WIDTH + n, g * u * scale, mask=n < width)


@triton.jit
def _expert_out_kernel(
    hidden: tl.tensor,
    chosen: tl.tensor,
    routed: tl.tensor,
    shared: tl.tensor,
    add: tl.tensor,
    out: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    FS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    m, n = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(K):
        expert = tl.load(chosen + m * K + j).to(tl.int64)
        for low in tl.static_range(0, F, BLOCK):
            f = low + tl.arange(0, BLOCK)
            x = tl.load(hidden + (m * (K + 1) + j) * WIDTH + f, mask=f < F, other=0.0)
            at, inside = n[:, None] * F + f[None, :], (n < D)[:, None] & (f < F)[None, :]
            total += tl.load(routed + expert * (D * F) + at, mask=inside, other=0.0).to(tl.float32) * x[None, :]
    for low in tl.static_range(0, FS, BLOCK):
        f = low + tl.arange(0, BLOCK)
        x = tl.load(hidden + (m * (K + 1) + K) * WIDTH + f, mask=f < FS, other=0.0)
        at, inside = n[:, None] * FS + f[None, :], (n < D)[:, None] & (f < FS)[None, :]
        total += tl.load(shared + at, mask=inside, other=0.0).to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1) + tl.load(add + m * D + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(out + m * D + n, y.to(out.dtype.element_ty), mask=n < D)


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
    out_MN = x_MD.new_empty(rows, outputs, dtype=dtype or x_MD.dtype)
    _linear_kernel[(triton.cdiv(outputs, ROWS),)](
        x_MD, x_MD if gain_D is None else gain_D, weight_ND, x_MD if add_MN is None else add_MN, kept_B, out_MN, rows,
        outputs, weight_ND.stride(0), tokens // rows, ahead, eps, width, gain_D is not None, add_MN is not None,
        last is not None, ROWS, _block(width), num_warps=8,
    )  # fmt: skip
    return out_MN


def swiglu_linear(
    x_MD: Tensor, gate_FD: Tensor, up_FD: Tensor, *, gain_D: Tensor, eps: float, limit: float | None
) -> Tensor:
    """SwiGLU's inner activation [M, F] of norm(x)."""
    tokens, width = x_MD.shape
    out_MF = x_MD.new_empty(tokens, gate_FD.shape[0])
    _swiglu_linear_kernel[(triton.cdiv(out_MF.shape[1], ROWS),)](
        x_MD, gain_D, gate_FD, up_FD, out_MF, tokens, out_MF.shape[1], eps, width, limit or 0.0, ROWS, _block(width),
        num_warps=8,
    )  # fmt: skip
    return out_MF


def route(
    x_MD: Tensor, router_ED: Tensor, bias_E: Tensor, top_k: int, *, gain_D: Tensor, eps: float, routed_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) [M, D], its chosen experts [M, K], int32, and their fp32 weights [M, K]."""
    tokens, width = x_MD.shape
    normed_MD, experts = torch.empty_like(x_MD), router_ED.shape[0]
    chosen_MK = torch.empty(tokens, top_k, dtype=torch.int32, device=x_MD.device)
    weight_MK = torch.empty(tokens, top_k, dtype=torch.float32, device=x_MD.device)
    _route_kernel[(tokens,)](
        x_MD, gain_D, router_ED, bias_E, normed_MD, chosen_MK, weight_MK, eps, routed_scale, width, experts, top_k,
        triton.next_power_of_2(experts), triton.next_power_of_2(top_k), triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return normed_MD, chosen_MK, weight_MK


def experts(
    h_MD: Tensor,
    chosen_MK: Tensor,
    weight_MK: Tensor,
    routed: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor],
    add_MD: Tensor,
    *,
    limit: float | None,
    shared_limit: float | None,
) -> Tensor:
    """`add` + the chosen experts' weighted outputs + the shared expert's, [M, D].

    `routed`: gate and up rows [E, 2F, D], down [E, D, F]; `shared`: gate, up [FS, D], down [D, FS]. A weight row is
    read once for each token that needs it.
    """
    (tokens, width), top_k = h_MD.shape, chosen_MK.shape[1]
    inner, shared_inner = routed[1].shape[2], shared[2].shape[1]
    widest = max(inner, shared_inner)
    hidden_MJF = h_MD.new_empty(tokens, top_k + 1, widest, dtype=torch.float32)
    _expert_in_kernel[(tokens, top_k + 1, triton.cdiv(widest, ROWS))](
        h_MD, chosen_MK, weight_MK, routed[0], shared[0], shared[1], hidden_MJF, width, inner, shared_inner, widest,
        top_k, limit or 0.0, shared_limit or 0.0, ROWS, _block(width), num_warps=8,
    )  # fmt: skip
    out_MD = torch.empty_like(add_MD)
    block = min(EXPERT_BLOCK_OUT, triton.next_power_of_2(inner))
    _expert_out_kernel[(tokens, triton.cdiv(width, ROWS))](
        hidden_MJF, chosen_MK, routed[1], shared[2], add_MD, out_MD, width, inner, shared_inner, widest, top_k,
        ROWS, block, num_warps=8,
    )  # fmt: skip
    return out_MD


def _block(width: int) -> int:
    return min(BLOCK_IN, triton.next_power_of_2(width))
