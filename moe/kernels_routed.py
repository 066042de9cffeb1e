"""Triton kernels of a decode step's experts: which ones, their gates and ups, their weighted downs beside the shared expert's.

In: M tokens of the residual stream, and the weights of a routed layer. Out: the stream behind it. A token's bits do not depend on
the others.

Legend: as in moe/kernels_decode.py; WIDTH the wider one of F and FS, the shared expert's width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels_chain import chained, release, wait
from moe.kernels_decode import LAUNCH, ROWS, across, block_in, columns, firsts

RANKED = 64  # experts up to which all pairs are compared at once; a search for the best, K times, waits K times
HELD = 16384  # weights of all chosen experts that a program holds: 64 a thread


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
    RANKED: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    m = tl.program_id(0)
    d, e, kept = tl.arange(0, BLOCK), tl.arange(0, BINS), tl.arange(0, KEPT)
    # One program sees a whole token, and all its loads are under way at once: time here is latency.
    w = tl.load(router + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    lean = tl.load(bias + e, mask=e < E, other=0.0)
    wait(CHAINED)
    part = tl.load(x + m * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(part * part, axis=0) / D + eps)
    h = (part * scale * (1 + g)).to(normed.dtype.element_ty)
    tl.store(normed + m * D + d, h, mask=d < D)
    score = tl.sigmoid(tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], axis=1))
    left = tl.where(e < E, score + lean, float("-inf"))
    if BINS <= RANKED:  # how many go before an expert is its rank; of equal scores the lower expert does
        before = (left[None, :] > left[:, None]) | ((left[None, :] == left[:, None]) & (e[None, :] < e[:, None]))
        rank = tl.sum(before.to(tl.int32), axis=1)
        mine = rank[None, :] == kept[:, None]
        experts = tl.minimum(tl.sum(tl.where(mine, e[None, :], 0), axis=1), E - 1)
        weights = tl.where(kept < K, tl.sum(tl.where(mine, score[None, :], 0.0), axis=1), 0.0)
    else:
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
    CHAINED: tl.constexpr,
) -> None:
    wait(CHAINED)
    release(CHAINED)  # behind the wait: the next kernel reads `chosen` before its own
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
    d = columns(ROWS, BLOCK)
    at, inside = n[:, None, None] * D + d, (n < width)[:, None, None]
    gate, up = tl.zeros_like(d).to(tl.float32), tl.zeros_like(d).to(tl.float32)
    for low in tl.static_range(0, D, BLOCK):
        # Weights first: a program asks for all of them before it waits for any number.
        gate_w = tl.load(gate_weight + low + at, mask=inside & (d < D - low), other=0.0)
        up_w = tl.load(up_weight + low + at, mask=inside & (d < D - low), other=0.0)
        x = tl.load(h + m * D + low + d, mask=d < D - low, other=0.0).to(tl.float32)
        gate += gate_w.to(tl.float32) * x
        up += up_w.to(tl.float32) * x
    g, u = across(gate), across(up)
    g = g * tl.sigmoid(g)
    if limit > 0:
        g, u = tl.minimum(g, limit), tl.minimum(tl.maximum(u, -limit), limit)
    at, first = firsts(n)
    tl.store(hidden + (m * (K + 1) + j) * WIDTH + at, (g * u * scale)[:, None], mask=first & (n < width)[:, None])


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
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    m, n = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    f, inside = tl.arange(0, BLOCK), (n < D)[:, None]
    at, shared_at = n[:, None] * F + f[None, :], n[:, None] * FS + f[None, :]
    hidden += m * (K + 1) * WIDTH
    # The kernel before has released this one behind its own wait, so `chosen` is there; past the L1, which may be older.
    experts = ()
    for j in tl.static_range(K):
        experts += (tl.load(chosen + m * K + j, cache_modifier=".cg").to(tl.int64),)  # type: ignore[assignment]
    total, weights, states = tl.zeros([ROWS, BLOCK], tl.float32), (), ()
    if F <= BLOCK and FS <= BLOCK:  # a program holds them
        for j in tl.static_range(K):
            w = tl.load(routed + experts[j] * (D * F) + at, mask=inside & (f < F)[None, :], other=0.0)
            weights += (w,)  # type: ignore[assignment]
        w = tl.load(shared + shared_at, mask=inside & (f < FS)[None, :], other=0.0)
        weights += (w,)  # type: ignore[assignment]
    wait(CHAINED)
    beside = tl.load(add + m * D + n, mask=n < D, other=0.0).to(tl.float32)
    if F <= BLOCK and FS <= BLOCK:
        for j in tl.static_range(K + 1):
            x = tl.load(hidden + j * WIDTH + f, mask=f < (F if j < K else FS), other=0.0)
            states += (x,)  # type: ignore[assignment]
        for j in tl.static_range(K + 1):
            total += weights[j].to(tl.float32) * states[j][None, :]
    else:
        for j in tl.static_range(K):
            for low in tl.static_range(0, F, BLOCK):
                x = tl.load(hidden + j * WIDTH + low + f, mask=f < F - low, other=0.0)
                w = tl.load(routed + experts[j] * (D * F) + at + low, mask=inside & (f < F - low)[None, :], other=0.0)
                total += w.to(tl.float32) * x[None, :]
        for low in tl.static_range(0, FS, BLOCK):
            x = tl.load(hidden + K * WIDTH + low + f, mask=f < FS - low, other=0.0)
            w = tl.load(shared + shared_at + low, mask=inside & (f < FS - low)[None, :], other=0.0)
            total += w.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1) + beside
    tl.store(out + m * D + n, y.to(out.dtype.element_ty), mask=n < D)


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
        triton.next_power_of_2(experts), triton.next_power_of_2(top_k), triton.next_power_of_2(width), RANKED,
        **chained(x_MD), num_warps=8,
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
        top_k, limit or 0.0, shared_limit or 0.0, ROWS, block_in(width), **chained(h_MD), **LAUNCH,
    )  # fmt: skip
    out_MD = torch.empty_like(add_MD)
    block = min(HELD // (ROWS * triton.next_power_of_2(top_k)), triton.next_power_of_2(widest))
    _expert_out_kernel[(tokens, triton.cdiv(width, ROWS))](
        hidden_MJF, chosen_MK, routed[1], shared[2], add_MD, out_MD, width, inner, shared_inner, widest, top_k,
        ROWS, block, **chained(h_MD), num_warps=8,
    )  # fmt: skip
    return out_MD
