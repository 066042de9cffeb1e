"""Triton bodies of moe/kernels_heads.py: norm and rotation of a head's tile in registers, forward and backward.

In: CUDA tensors (or CPU ones under TRITON_INTERPRET=1). A program takes one head and a run of tokens. A head is three
tiles: the widths that turn, those they are paired with, and the rest, so that every load is of neighbours. Gains'
gradients are summed by a program over its tokens, and over programs by another kernel.

Legend: S = B * T tokens, N columns of the product, H query heads, G key/value heads, C head width, A angles, R = C - 2A
widths that do not turn; ANGLES and REST are A and R rounded up to powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens of a tile: 16 x 128 widths are 16 values a thread of four warps
COLUMNS = 128  # of values and gates at once
PARTS, SUMS = 64, 8  # programs and widths whose gains' gradients are added at once
# A program of the backward takes RUN tiles, whose gains' gradients are one row of partial sums, and loads STAGES - 1 of them
# ahead, into shared memory. The fastest of eight settings on an H100 (docs/decisions.md, 69).
RUN, STAGES = 16, 3


@triton.jit
def _square(x: tl.tensor) -> tl.tensor:
    return tl.sum(x * x, axis=1)


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
    N: tl.tensor,
    places: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    ANGLES: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    there, wide = (row < S)[:, None], row.to(tl.int64)[:, None]
    i = tl.arange(0, ANGLES)[None, :]
    turns = there & (i < A)
    x += wide * N + head * C
    a, b = tl.load(x + i, mask=turns, other=0.0), tl.load(x + A + i, mask=turns, other=0.0)
    # Where a head goes, and its row there.
    out, at, gain = q, wide * (H * C) + head * C, gain_q
    if head >= H + G:
        out, at = v, wide * (G * C) + (head - H - G) * C
    elif head >= H:
        out, at, gain = k, wide * (G * C) + (head - H) * C, gain_k
    scale = tl.full([ROWS], 1.0, tl.float32)
    if head < H + G:
        total = _square(a.to(tl.float32)) + _square(b.to(tl.float32))
        if C > 2 * A:
            r = tl.arange(0, REST)[None, :]
            total += _square(tl.load(x + 2 * A + r, mask=there & (r < C - 2 * A), other=0.0).to(tl.float32))
        scale = 1 / tl.sqrt(total / C + eps)
        cosine = tl.load(cos + (row % places)[:, None] * A + i, mask=turns, other=1.0)
        sine = tl.load(sin + (row % places)[:, None] * A + i, mask=turns, other=0.0)
        left = a.to(tl.float32) * (1 + tl.load(gain + i, mask=i < A, other=0.0).to(tl.float32))
        right = b.to(tl.float32) * (1 + tl.load(gain + A + i, mask=i < A, other=0.0).to(tl.float32))
        a = ((left * cosine - right * sine) * scale[:, None]).to(a.dtype)
        b = ((right * cosine + left * sine) * scale[:, None]).to(b.dtype)
    tl.store(out + at + i, a, mask=turns)
    tl.store(out + at + A + i, b, mask=turns)
    if C > 2 * A:
        r = tl.arange(0, REST)[None, :]
        rests = there & (r < C - 2 * A)
        c = tl.load(x + 2 * A + r, mask=rests, other=0.0)
        if head < H + G:
            g = 1 + tl.load(gain + 2 * A + r, mask=r < C - 2 * A, other=0.0).to(tl.float32)
            c = (c.to(tl.float32) * g * scale[:, None]).to(c.dtype)
        tl.store(out + at + 2 * A + r, c, mask=rests)


@triton.jit
def _backward_kernel(
    dq: tl.tensor,
    dk: tl.tensor,
    x: tl.tensor,
    gain_q: tl.tensor,
    gain_k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dx: tl.tensor,
    dgain: tl.tensor,
    S: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    places: tl.tensor,
    dq_b: tl.tensor,
    dq_t: tl.tensor,
    dq_h: tl.tensor,
    dk_b: tl.tensor,
    dk_t: tl.tensor,
    dk_h: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    ANGLES: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    part, head = tl.program_id(0), tl.program_id(1)
    gain, dy, dy_b, dy_t = gain_q, dq + head * dq_h, dq_b, dq_t
    if head >= H:
        gain, dy, dy_b, dy_t = gain_k, dk + (head - H) * dk_h, dk_b, dk_t
    i, r = tl.arange(0, ANGLES)[None, :], tl.arange(0, REST)[None, :]
    gain_a = 1 + tl.load(gain + i, mask=i < A, other=0.0).to(tl.float32)
    gain_b = 1 + tl.load(gain + A + i, mask=i < A, other=0.0).to(tl.float32)
    # As tiles until the end: within the loop each sum over tokens would go through shuffles and shared memory.
    total_a, total_b = tl.zeros([ROWS, ANGLES], tl.float32), tl.zeros([ROWS, ANGLES], tl.float32)
    total_c = tl.zeros([ROWS, REST], tl.float32)
    for tile in tl.range(0, RUN, num_stages=STAGES):
        row = (part * RUN + tile) * ROWS + tl.arange(0, ROWS)
        there, wide = (row < S)[:, None], row.to(tl.int64)[:, None]
        turns = there & (i < A)
        raw = x + wide * N + head * C
        grad = dy + (row // T).to(tl.int64)[:, None] * dy_b + (row % T).to(tl.int64)[:, None] * dy_t
        a = tl.load(raw + i, mask=turns, other=0.0).to(tl.float32)
        b = tl.load(raw + A + i, mask=turns, other=0.0).to(tl.float32)
        da = tl.load(grad + i, mask=turns, other=0.0).to(tl.float32)
        db = tl.load(grad + A + i, mask=turns, other=0.0).to(tl.float32)
        cosine = tl.load(cos + (row % places)[:, None] * A + i, mask=turns, other=1.0)
        sine = tl.load(sin + (row % places)[:, None] * A + i, mask=turns, other=0.0)
        square = _square(a) + _square(b)
        if C > 2 * A:
            rests = there & (r < C - 2 * A)
            c = tl.load(raw + 2 * A + r, mask=rests, other=0.0).to(tl.float32)
            dc = tl.load(grad + 2 * A + r, mask=rests, other=0.0).to(tl.float32)
            square += _square(c)
        scale = 1 / tl.sqrt(square / C + eps)[:, None]
        a, b = a * scale, b * scale
        # Turned back; from here on these are gradients of the normed widths, before and then behind their gain.
        da, db = da * cosine + db * sine, db * cosine - da * sine
        total_a += da * a
        total_b += db * b
        da, db = da * gain_a, db * gain_b
        along = tl.sum(da * a, axis=1) + tl.sum(db * b, axis=1)
        if C > 2 * A:
            c *= scale
            total_c += dc * c
            dc *= 1 + tl.load(gain + 2 * A + r, mask=r < C - 2 * A, other=0.0).to(tl.float32)
            along += tl.sum(dc * c, axis=1)
        mean = along[:, None] / C
        out = dx + wide * N + head * C
        tl.store(out + i, (scale * (da - a * mean)).to(dx.dtype.element_ty), mask=turns)
        tl.store(out + A + i, (scale * (db - b * mean)).to(dx.dtype.element_ty), mask=turns)
        if C > 2 * A:
            tl.store(out + 2 * A + r, (scale * (dc - c * mean)).to(dx.dtype.element_ty), mask=rests)
    dgain += (part * (H + G) + head) * C
    total_a, total_b, total_c = tl.sum(total_a, axis=0), tl.sum(total_b, axis=0), tl.sum(total_c, axis=0)
    tl.store(dgain + tl.arange(0, ANGLES), total_a, mask=tl.arange(0, ANGLES) < A)
    tl.store(dgain + A + tl.arange(0, ANGLES), total_b, mask=tl.arange(0, ANGLES) < A)
    if C > 2 * A:
        tl.store(dgain + 2 * A + tl.arange(0, REST), total_c, mask=tl.arange(0, REST) < C - 2 * A)


@triton.jit
def _sum_kernel(
    dgain: tl.tensor,
    dgain_q: tl.tensor,
    dgain_k: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    ALL: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Over all programs, and the heads of a kind."""
    c, part = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, PARTS)[:, None]
    total_q, total_k = tl.zeros([PARTS, WIDTH], tl.float32), tl.zeros([PARTS, WIDTH], tl.float32)
    for low in range(0, ALL, PARTS):
        at = dgain + (low + part) * ((H + G) * C) + c[None, :]
        inside = (low + part < ALL) & (c < C)[None, :]
        for head in range(H):
            total_q += tl.load(at + head * C, mask=inside, other=0.0)
        for head in range(H, H + G):
            total_k += tl.load(at + head * C, mask=inside, other=0.0)
    tl.store(dgain_q + c, tl.sum(total_q, axis=0).to(dgain_q.dtype.element_ty), mask=c < C)
    tl.store(dgain_k + c, tl.sum(total_k, axis=0).to(dgain_k.dtype.element_ty), mask=c < C)


@triton.jit
def _rest_kernel(
    dv: tl.tensor,
    dgate: tl.tensor,
    dx: tl.tensor,
    S: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    dv_b: tl.tensor,
    dv_t: tl.tensor,
    dv_h: tl.tensor,
    gates: tl.tensor,
    begin: tl.tensor,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    there, wide = (row < S)[:, None], row.to(tl.int64)[:, None]
    at = (row // T).to(tl.int64)[:, None] * dv_b + (row % T).to(tl.int64)[:, None] * dv_t
    value = tl.load(dv + at + (j // C) * dv_h + j % C, mask=there & (j < G * C), other=0.0)
    gate = j - G * C
    value += tl.load(dgate + wide * gates + gate, mask=there & (gate >= 0) & (gate < gates), other=0.0)
    tl.store(dx + wide * N + begin + j, value, mask=there & (begin + j < N))


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
        x_BTN, gain_q_C, gain_k_C, *_tables(cos, sin), q, k, v, B * T, N, cos.shape[0] * T, eps, H, G, C,
        *_tiles(C, cos.shape[-1]), num_warps=4,
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
    dgate, tokens, angles = grads[3].contiguous(), B * T, cos.shape[-1]
    parts = triton.cdiv(tokens, ROWS * RUN)
    dx_BTN, dgain = torch.empty_like(x_BTN), torch.empty(parts, H + G, C, dtype=torch.float32, device=x_BTN.device)
    a, rows, *widths = _tiles(C, angles)
    _backward_kernel[(parts, H + G)](
        dq, dk, x_BTN, gain_q_C, gain_k_C, *_tables(cos, sin), dx_BTN, dgain, tokens, T, N, cos.shape[0] * T,
        *dq.stride()[:3], *dk.stride()[:3], eps, H, G, C, a, rows, RUN, STAGES, *widths, num_warps=4,
    )  # fmt: skip
    begin = (H + G) * C
    _rest_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(N - begin, COLUMNS))](
        dv, dgate, dx_BTN, tokens, T, N, *dv.stride()[:3], dgate.shape[-1], begin, G, C, ROWS, COLUMNS, num_warps=4
    )
    dgains = torch.empty_like(gain_q_C), torch.empty_like(gain_k_C)
    _sum_kernel[(triton.cdiv(C, SUMS),)](dgain, *dgains, H, G, C, parts, PARTS, SUMS, num_warps=4)
    return dx_BTN, *dgains


def _tiles(width: int, angles: int) -> tuple[int, int, int, int]:
    """The kernels' sizes A, ROWS, ANGLES, REST."""
    return angles, ROWS, triton.next_power_of_2(angles), triton.next_power_of_2(max(1, width - 2 * angles))


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.contiguous(), sin.contiguous()
