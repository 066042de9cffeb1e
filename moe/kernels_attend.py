"""Triton kernels of a decode step's attention: norm, rotation and storing of new keys, scores by chunk, gated sum.

In: the projections of M = B * T new tokens and the buffers of moe/cache.py. Out: the heads' outputs. A row's queries
read its keys chunk by chunk in parallel, and a second kernel weighs the chunks; chunks are cut by slot, so that a
query's bits depend neither on T nor on the other rows.

Legend: as in moe/kernels_decode.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels_chain import chained, release, wait

KEYS = 64  # slots scored at a time; fp32, which is there for exact comparisons, takes fewer
EXACT_KEYS = 16
CHUNKS = 64  # at most so many programs a key head; longer buffers have longer chunks
FEW = 16  # chunks that are read before it is known which ones count


@triton.jit
def _rotate_store_kernel(
    joined: tl.tensor,
    q_gain: tl.tensor,
    k_gain: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    lengths: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    extra: tl.tensor,
    capacity: tl.tensor,
    eps: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    P: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    inside = c < C
    row, t = m // T, m % T
    place = tl.load(lengths + row) + t
    count = tl.load(counts + row)
    held = (t < tl.where(count > 0, count + extra, 0)) & (place >= tl.load(starts + row)) & (place < capacity)
    slot = tl.where(held, place % P, P)  # the spare one, which nothing reads
    place = tl.minimum(tl.maximum(place, 0), capacity - 1)
    x = tl.load(joined + m * N + head * C + c, mask=inside, other=0.0)
    if head < H + G:
        gain = q_gain if head < H else k_gain
        # Of the 2 * HALF rotated widths, i is paired with i + HALF.
        pair = tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))
        y = tl.load(joined + m * N + head * C + pair, mask=inside, other=0.0).to(tl.float32)
        a = x.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(a * a, axis=0) / C + eps)
        a = (a * scale * (1 + tl.load(gain + c, mask=inside, other=0.0).to(tl.float32))).to(x.dtype).to(tl.float32)
        y = (y * scale * (1 + tl.load(gain + pair, mask=inside, other=0.0).to(tl.float32))).to(x.dtype).to(tl.float32)
        turned = c < 2 * HALF
        cos_c = tl.load(cos + place * HALF + c % HALF, mask=turned, other=1.0)
        sin_c = tl.load(sin + place * HALF + c % HALF, mask=turned, other=0.0)
        x = (a * cos_c + y * tl.where(c < HALF, -sin_c, sin_c)).to(x.dtype)
    if head < H:
        tl.store(q + (m * H + head) * C + c, x, mask=inside)
    elif head < H + G:
        tl.store(keys + row.to(tl.int64) * row_stride + (head - H) * head_stride + slot * C + c, x, mask=inside)
    else:
        tl.store(values + row.to(tl.int64) * row_stride + (head - H - G) * head_stride + slot * C + c, x, mask=inside)


@triton.jit
def _score_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    lengths: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    part: tl.tensor,
    top: tl.tensor,
    mass: tl.tensor,
    extra: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    P: tl.tensor,
    T: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = m // T
    count = tl.load(counts + row)
    # The newest position that is held. Queries of padding see what it sees, so that their states stay finite.
    last = tl.minimum(tl.load(lengths + row) + tl.where(count > 0, count + extra, 0), capacity) - 1
    place_q = tl.minimum(tl.load(lengths + row) + m % T, last)
    first = tl.load(starts + row)
    r, c = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    shared: tl.constexpr = H // G
    head = group * shared + r
    inside = (r < shared)[:, None] & (c < C)[None, :]
    query = tl.load(q + (m * H + head)[:, None] * C + c[None, :], mask=inside, other=0.0)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    y = tl.zeros([QUERIES, WIDTH], tl.float32)
    base = row.to(tl.int64) * row_stride + group * head_stride
    high = tl.minimum(chunk * CHUNK + CHUNK, tl.minimum(P, last + 1))
    for low in range(chunk * CHUNK, high, KEYS):
        slot = low + tl.arange(0, KEYS)
        # The newest position that the slot can hold; one before `first` was never written.
        place = last - (last - slot + P) % P
        seen = (slot < high) & (place >= first) & (place >= 0) & (place <= place_q)
        if WINDOW > 0:
            seen = seen & (place > place_q - WINDOW)
        at, there = base + slot[:, None] * C + c[None, :], seen[:, None] & (c < C)[None, :]
        k = tl.load(keys + at, mask=there, other=0.0)
        v = tl.load(values + at, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        peak = tl.maximum(best, tl.max(score, axis=1))
        origin = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp(score - origin[:, None])
        kept = tl.exp(best - origin)
        y = y * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weight, axis=1)
        best = peak
    at = (m * H + head) * S + chunk
    tl.store(top + at, best, mask=r < shared)
    tl.store(mass + at, total, mask=r < shared)
    tl.store(part + at[:, None] * C + c[None, :], y, mask=inside)


@triton.jit
def _gather_kernel(
    part: tl.tensor,
    top: tl.tensor,
    mass: tl.tensor,
    joined: tl.tensor,
    y: tl.tensor,
    N: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    GATE: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    FEW: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, head = tl.program_id(0), tl.program_id(1)
    s, c = tl.arange(0, BINS), tl.arange(0, WIDTH)
    at = (m * H + head) * S + s
    peaks = tl.load(top + at, mask=s < S, other=float("-inf"))
    masses = tl.load(mass + at, mask=s < S, other=0.0)
    places, inside = part + at[:, None] * C + c[None, :], (c < C)[None, :]
    if BINS <= FEW:  # all at once, those without a key too, which are zeros
        sums = tl.load(places, mask=inside & (s < S)[:, None], other=0.0)
    peak = tl.max(peaks, axis=0)
    weight = tl.where(peaks == float("-inf"), 0.0, tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)))
    if BINS > FEW:
        sums = tl.load(places, mask=inside & (weight > 0)[:, None], other=0.0)
    total = tl.sum(weight * masses, axis=0)
    out = tl.sum(sums * weight[:, None], axis=0) / tl.maximum(total, 1e-30)
    if GATE:
        gate = tl.load(joined + m * N + (H + 2 * G) * C + head).to(tl.float32)
        out = out.to(y.dtype.element_ty).to(tl.float32) * tl.sigmoid(gate)
    tl.store(y + (m * H + head) * C + c, out.to(y.dtype.element_ty), mask=c < C)


def attend(
    joined_MN: Tensor,
    gains: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    buffers: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    *,
    extra: int,
    tokens: int,
    heads: int,
    window: int | None,
    eps: float,
) -> Tensor:
    """Stores the new keys and values and returns the gated outputs [M, H * C].

    Of row b's `tokens` the first `counts_B[b] + extra` are stored at places `lengths_B[b]` onwards; none where the count
    is 0. Those that are not, like those before the row's start or beyond the tables, go to the buffer's spare slot.

    `joined_MN` holds q, k, v of all heads and one gate logit a query head (none: no gate), side by side; `gains` of the
    q and k norm; `tables` cos and sin [positions, half of the rotated width] in fp32; `buffers` [rows, G, P + 1, C]. A
    window needs P >= window + T - 1.
    """
    keys, values = buffers
    (M, N), (G, C), slots = joined_MN.shape, (keys.shape[1], keys.shape[3]), keys.shape[2] - 1
    H, (capacity, half), width = heads, tables[0].shape, triton.next_power_of_2(C)
    q_MHC = joined_MN.new_empty(M, H, C)
    strides = keys.stride(0), keys.stride(1)
    _rotate_store_kernel[(M, H + 2 * G)](
        joined_MN, *gains, *tables, q_MHC, keys, values, lengths_B, starts_B, counts_B, extra, capacity, eps, *strides,
        slots, tokens, N, H, G, C, half, width, **chained(q_MHC), num_warps=1,
    )  # fmt: skip
    chunk = KEYS * triton.cdiv(slots, KEYS * CHUNKS)
    block = KEYS if joined_MN.element_size() == 2 else EXACT_KEYS
    chunks, queries = triton.cdiv(slots, chunk), max(16, triton.next_power_of_2(H // G))
    part = torch.empty(M, H, chunks, C, dtype=torch.float32, device=q_MHC.device)
    top, mass = part.new_empty(M, H, chunks), part.new_empty(M, H, chunks)
    _score_kernel[(M, G, chunks)](
        q_MHC, keys, values, lengths_B, starts_B, counts_B, part, top, mass, extra, capacity, C**-0.5, *strides, slots,
        tokens, H, G, C, window or 0, chunks, chunk, block, queries, width, **chained(q_MHC), num_warps=8, num_stages=2,
    )  # fmt: skip
    y_MX = joined_MN.new_empty(M, H * C)
    gated = N > (H + 2 * G) * C
    _gather_kernel[(M, H)](
        part, top, mass, joined_MN, y_MX, N, H, G, C, chunks, gated, triton.next_power_of_2(chunks), width, FEW,
        **chained(q_MHC), num_warps=4,
    )  # fmt: skip
    return y_MX
