"""Triton bodies of the operators in moe/kernels.py, for CUDA tensors (or CPU ones under TRITON_INTERPRET=1).

In: contiguous tensors of the shapes named in moe/kernels.py. Out: fresh tensors. Each kernel reads its inputs once and
writes its outputs once; products and sums are fp32. Sizes of tiles: chosen for rows of 256 to 1,024 columns, the
measurements are in docs/benchmarks.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SWIGLU_ELEMENTS = 4096  # of one tile: 32 values a thread of four warps
TOP_ROWS = 32
ORDER_ROWS = 256  # routed copies a program counts; with 64 experts its one-hot table has 16k entries


@triton.jit
def _swiglu_kernel(
    h: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    R: tl.tensor,
    F: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < R)[:, None] & (col < F)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * F) + col[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    out = gate * up * tl.load(weight + row, mask=row < R, other=0.0)[:, None]
    tl.store(y + row.to(tl.int64)[:, None] * F + col[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    dy: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    dh: tl.tensor,
    dweight: tl.tensor,
    R: tl.tensor,
    F: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_wide = row.to(tl.int64)[:, None]
    weight_row = tl.load(weight + row, mask=row < R, other=0.0)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for low in tl.static_range(0, F, COLS):
        col = low + tl.arange(0, COLS)
        inside = (row < R)[:, None] & (col < F)[None, :]
        at = row_wide * (2 * F) + col[None, :]
        raw = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row_wide * F + col[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(raw)
        gate = raw * sigmoid
        slope = sigmoid * (1 + raw * (1 - sigmoid))
        if LIMIT > 0:
            slope = tl.where(gate <= LIMIT, slope, 0.0)
            passed = tl.where(tl.abs(up) <= LIMIT, 1.0, 0.0)
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        else:
            passed = 1.0
        total += tl.sum(grad * gate * up, axis=1)
        grad = grad * weight_row
        tl.store(dh + at, (grad * up * slope).to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + at + F, (grad * gate * passed).to(dh.dtype.element_ty), mask=inside)
    tl.store(dweight + row, total, mask=row < R)


@triton.jit
def _top_kernel(
    score: tl.tensor,
    chosen: tl.tensor,
    S: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < S)[:, None] & (col < E)[None, :]
    left = tl.load(score + row[:, None] * E + col[None, :], mask=inside, other=float("-inf"))
    left = tl.where(left == left, left, float("-inf"))  # NaN: never chosen before a number, but always an expert
    taken = tl.broadcast_to((col >= E)[None, :], (ROWS, COLS))
    for k in tl.static_range(K):
        best = tl.max(tl.where(taken, float("-inf"), left), axis=1)
        first = tl.min(tl.where((left == best[:, None]) & (taken == 0), col[None, :], COLS), axis=1)
        tl.store(chosen + row * K + k, first.to(tl.int64), mask=row < S)
        taken = taken | (col[None, :] == first[:, None])


@triton.jit
def _count_kernel(
    chosen: tl.tensor, counts: tl.tensor, R: tl.tensor, blocks: tl.tensor, ROWS: tl.constexpr, E: tl.constexpr
) -> None:
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.load(chosen + row, mask=row < R, other=E).to(tl.int32)
    bins = tl.arange(0, E)
    hits = (expert[:, None] == bins[None, :]).to(tl.int32)
    tl.store(counts + bins * blocks + block, tl.sum(hits, axis=0))


@triton.jit
def _place_kernel(
    chosen: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    place: tl.tensor,
    R: tl.tensor,
    blocks: tl.tensor,
    ROWS: tl.constexpr,
    E: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.load(chosen + row, mask=row < R, other=E).to(tl.int32)
    bins = tl.arange(0, E)
    hits = (expert[:, None] == bins[None, :]).to(tl.int32)
    # `ends` counts this block's hits too, so the first of them goes to the end less their number.
    start = tl.load(ends + bins * blocks + block) - tl.sum(hits, axis=0)
    rank = tl.cumsum(hits, axis=0) - 1 + start[None, :]
    target = tl.sum(hits * rank, axis=1).to(tl.int64)
    tl.store(place + row, target, mask=row < R)
    tl.store(order + target, row.to(tl.int64), mask=row < R)


@triton.jit
def _two_pieces_kernel(
    x: tl.tensor, out: tl.tensor, S: tl.tensor, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
) -> None:
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < S) & (col < E)
    value = tl.load(x + row * E + col, mask=inside, other=0.0)
    high = value.to(out.dtype.element_ty)
    at = out + row * (2 * E) + col
    tl.store(at, high, mask=inside)
    tl.store(at + E, (value - high.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def swiglu(h_RH: Tensor, weight_R: Tensor, limit: float) -> Tensor:
    """`kernels.swiglu_reference` in one pass."""
    rows, width = h_RH.shape[0], h_RH.shape[1] // 2
    y_RF = h_RH.new_empty(rows, width)
    cols = min(512, triton.next_power_of_2(width))
    tile = max(1, SWIGLU_ELEMENTS // cols)
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, cols))
    _swiglu_kernel[grid](h_RH.contiguous(), weight_R.contiguous(), y_RF, rows, width, limit, tile, cols, num_warps=4)
    return y_RF


def swiglu_backward(dy_RF: Tensor, h_RH: Tensor, weight_R: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """`kernels.swiglu_backward_reference` in one pass."""
    rows, width = dy_RF.shape
    dh_RH, dweight_R = torch.empty_like(h_RH), torch.empty_like(weight_R)
    # 256 columns of a row lie in one warp, so that its sum needs no exchange between warps.
    cols = min(256, triton.next_power_of_2(width))
    tile = max(1, SWIGLU_ELEMENTS // 2 // cols)
    _swiglu_backward_kernel[(triton.cdiv(rows, tile),)](
        dy_RF.contiguous(), h_RH, weight_R, dh_RH, dweight_R, rows, width, limit, tile, cols, num_warps=4
    )
    return dh_RH, dweight_R


def top_experts(score_SE: Tensor, top_k: int) -> Tensor:
    """`kernels.top_experts_reference` by K rounds of maximum; a NaN counts as the least score."""
    tokens, experts = score_SE.shape
    chosen_SK = torch.empty(tokens, top_k, dtype=torch.int64, device=score_SE.device)
    cols = triton.next_power_of_2(experts)
    grid = (triton.cdiv(tokens, TOP_ROWS),)
    _top_kernel[grid](score_SE.contiguous(), chosen_SK, tokens, experts, top_k, TOP_ROWS, cols, num_warps=4)
    return chosen_SK


def two_pieces(x_SE: Tensor) -> Tensor:
    """`kernels.pieces(x, 2)` side by side [S, 2E], bf16, of fp32 x."""
    tokens, experts = x_SE.shape
    out_SP = torch.empty(tokens, 2 * experts, dtype=torch.bfloat16, device=x_SE.device)
    cols = triton.next_power_of_2(experts)
    _two_pieces_kernel[(triton.cdiv(tokens, TOP_ROWS),)](
        x_SE.contiguous(), out_SP, tokens, experts, TOP_ROWS, cols, num_warps=4
    )
    return out_SP


def expert_order(chosen_R: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.expert_order_reference` by a counting sort: count by block, one small cumsum, place."""
    rows, bins, device = len(chosen_R), triton.next_power_of_2(experts), chosen_R.device
    blocks = triton.cdiv(rows, ORDER_ROWS)
    order_R = torch.empty(rows, dtype=torch.int64, device=device)
    place_R = torch.empty_like(order_R)
    counts_EN = torch.empty(bins, blocks, dtype=torch.int32, device=device)
    _count_kernel[(blocks,)](chosen_R, counts_EN, rows, blocks, ORDER_ROWS, bins, num_warps=4)
    ends_EN = counts_EN.view(-1).cumsum(0, dtype=torch.int32).view(bins, blocks)
    _place_kernel[(blocks,)](chosen_R, ends_EN, order_R, place_R, rows, blocks, ORDER_ROWS, bins, num_warps=8)
    return order_R, place_R, ends_EN[:experts, -1].contiguous()
