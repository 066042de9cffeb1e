"""Triton bodies of moe/kernels_heads.py: norm and rotation of a head's tile in registers, forward and backward.

In: CUDA tensors (or CPU ones under TRITON_INTERPRET=1). A program takes one head and a run of tokens; its partner widths
(i and i + A) are a second load of the same tile, which the first brought into the cache. Gains' gradients are summed by
a program over its tokens, and over programs by torch.

Legend: S = B * T tokens, N columns of the product, H query heads, G key/value heads, C head width, A angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens of a tile: 16 x 128 widths are 16 values a thread of four warps
RUN = 16  # tiles of a program; its gains' gradients are one row of partial sums


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    gain_q: tl.tensor,
    gain_k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    S: tl.tensor,
    stride: tl.tensor,
    places: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    inside = (row < S)[:, None] & (c < C)[None, :]
    wide = row.to(tl.int64)[:, None]
    at = wide * stride + head * C
    raw = tl.load(x + at + c[None, :], mask=inside, other=0.0)
    if head >= H + G:
        tl.store(v + wide * (G * C) + (head - H - G) * C + c[None, :], raw, mask=inside)
    else:
        gain = gain_q
        if head >= H:
            gain = gain_k
        n = raw.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(n * n, axis=1) / C + eps)
        # The width that c is paired with, and the sign of its sine; widths beyond 2A are their own pair and do not turn.
        pair = tl.where(c < A, c + A, tl.where(c < 2 * A, c - A, c))
        other = tl.load(x + at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        n *= 1 + tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        other *= 1 + tl.load(gain + pair, mask=c < C, other=0.0).to(tl.float32)[None, :]
        angle = (row % places)[:, None] * A + (c % A)[None, :]
        turns = (row < S)[:, None] & (c < 2 * A)[None, :]
        cosine = tl.load(cos + angle, mask=turns, other=1.0)
        sine = tl.load(sin + angle, mask=turns, other=0.0)
        y = (n * cosine + other * tl.where(c < A, -1.0, 1.0)[None, :] * sine) * scale[:, None]
        y = y.to(q.dtype.element_ty)
        if head < H:
            tl.store(q + wide * (H * C) + head * C + c[None, :], y, mask=inside)
        else:
            tl.store(k + wide * (G * C) + (head - H) * C + c[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dgate: tl.tensor,
    x: tl.tensor,
    gain_q: tl.tensor,
    gain_k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dx: tl.tensor,
    dgain: tl.tensor,
    S: tl.tensor,
    T: tl.tensor,
    stride: tl.tensor,
    places: tl.tensor,
    dq_b: tl.tensor,
    dq_t: tl.tensor,
    dq_h: tl.tensor,
    dk_b: tl.tensor,
    dk_t: tl.tensor,
    dk_h: tl.tensor,
    dv_b: tl.tensor,
    dv_t: tl.tensor,
    dv_h: tl.tensor,
    gates: tl.tensor,
    N: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    part, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    if head == H + 2 * G:  # gates, then padding
        for tile in range(RUN):
            row = (part * RUN + tile) * ROWS + tl.arange(0, ROWS)
            wide, t = row.to(tl.int64)[:, None], tl.arange(0, TAIL)
            there = (row < S)[:, None]
            value = tl.load(dgate + wide * gates + t[None, :], mask=there & (t < gates)[None, :], other=0.0)
            column = (H + 2 * G) * C + t
            tl.store(dx + wide * N + column[None, :], value, mask=there & (column < N)[None, :])
    elif head >= H + G:
        for tile in range(RUN):
            row = (part * RUN + tile) * ROWS + tl.arange(0, ROWS)
            inside = (row < S)[:, None] & (c < C)[None, :]
            b, t = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
            value = tl.load(dv + b * dv_b + t * dv_t + (head - H - G) * dv_h + c[None, :], mask=inside, other=0.0)
            tl.store(dx + row.to(tl.int64)[:, None] * N + head * C + c[None, :], value, mask=inside)
    else:
        gain, dy, dy_b, dy_t, dy_h, mine = gain_q, dq, dq_b, dq_t, dq_h, head
        if head >= H:
            gain, dy, dy_b, dy_t, dy_h, mine = gain_k, dk, dk_b, dk_t, dk_h, head - H
        scale_c = 1 + tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
        pair = tl.where(c < A, c + A, tl.where(c < 2 * A, c - A, c))
        sign = tl.where(c < A, 1.0, -1.0)  # turning back: the sines' signs are those of the way there, reversed
        total = tl.zeros([WIDTH], tl.float32)
        for tile in range(RUN):
            row = (part * RUN + tile) * ROWS + tl.arange(0, ROWS)
            inside = (row < S)[:, None] & (c < C)[None, :]
            wide = row.to(tl.int64)[:, None]
            b, t = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
            at = b * dy_b + t * dy_t + mine * dy_h
            grad = tl.load(dy + at + c[None, :], mask=inside, other=0.0).to(tl.float32)
            other = tl.load(dy + at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
            raw = tl.load(x + wide * stride + head * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            angle = (row % places)[:, None] * A + (c % A)[None, :]
            turns = (row < S)[:, None] & (c < 2 * A)[None, :]
            cosine = tl.load(cos + angle, mask=turns, other=1.0)
            sine = tl.load(sin + angle, mask=turns, other=0.0)
            scale = 1 / tl.sqrt(tl.sum(raw * raw, axis=1) / C + eps)
            y = raw * scale[:, None]
            dn = grad * cosine + other * sign[None, :] * sine
            total += tl.sum(dn * y, axis=0)
            dn *= scale_c[None, :]
            mean = tl.sum(dn * y, axis=1) / C
            out = scale[:, None] * (dn - y * mean[:, None])
            tl.store(dx + wide * N + head * C + c[None, :], out.to(dx.dtype.element_ty), mask=inside)
        tl.store(dgain + (part * (H + G) + head) * C + c, total, mask=c < C)


def heads(
    x_BTN: Tensor,
    gain_q_C: Tensor,
    gain_k_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    gates: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels_heads.heads_reference` in one pass."""
    (H, G, C), (B, T, N) = shape, x_BTN.shape
    x_BTN = x_BTN.contiguous()
    q, k, v = (x_BTN.new_empty(B, T, n, C) for n in (H, G, G))
    _forward_kernel[(triton.cdiv(B * T, ROWS), H + 2 * G)](
        x_BTN, gain_q_C, gain_k_C, *_tables(cos, sin), q, k, v, B * T, N, cos.shape[0] * T, eps, H, G, C, cos.shape[-1],
        ROWS, triton.next_power_of_2(C), num_warps=4,
    )  # fmt: skip
    begin = (H + 2 * G) * C
    return q, k, v, x_BTN[..., begin : begin + gates].clone(memory_format=torch.contiguous_format)


def heads_backward(
    grads: list[Tensor],
    x_BTN: Tensor,
    gain_q_C: Tensor,
    gain_k_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels_heads.heads_backward_reference` in one pass and a small sum."""
    (H, G, C), (B, T, N) = shape, x_BTN.shape
    x_BTN = x_BTN.contiguous()
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads[:3])
    dgate = grads[3].contiguous()
    parts = triton.cdiv(B * T, ROWS * RUN)
    dx_BTN, dgain = torch.empty_like(x_BTN), torch.empty(parts, H + G, C, dtype=torch.float32, device=x_BTN.device)
    tail = triton.next_power_of_2(max(1, N - (H + 2 * G) * C))
    _backward_kernel[(parts, H + 2 * G + 1)](
        dq, dk, dv, dgate, x_BTN, gain_q_C, gain_k_C, *_tables(cos, sin), dx_BTN, dgain, B * T, T, N, cos.shape[0] * T,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], dgate.shape[-1], N, eps, H, G, C, cos.shape[-1], ROWS, RUN,
        triton.next_power_of_2(C), tail, num_warps=4,
    )  # fmt: skip
    dgain_HC = dgain.sum(0)
    return dx_BTN, dgain_HC[:H].sum(0).to(gain_q_C.dtype), dgain_HC[H:].sum(0).to(gain_k_C.dtype)


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.contiguous(), sin.contiguous()
