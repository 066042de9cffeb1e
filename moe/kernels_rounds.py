"""Triton kernels around a decode step's layers: what is read, which token is likeliest, what each row has gained.

In: the rows' pending tokens, drafts and counts as moe/decode.py holds them. Out: the same, one step on, and the layers'
inputs. Each does what takes torch half a dozen tiny operations; in a graph one of these costs as much as a kernel of a
layer does.

Legend: B rows of a step, T tokens of each, M = B * T, K drafts, D model width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels_chain import chained, release, wait

BEST_BLOCK = 1024


@triton.jit
def _embed_kernel(
    token: tl.tensor,
    drafts: tl.tensor,
    table: tl.tensor,
    x: tl.tensor,
    draft_stride: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, d = tl.program_id(0), tl.arange(0, BLOCK)
    row, t = m // T, m % T
    read = tl.load(token + row)
    if T > 1:
        read = tl.where(t > 0, tl.load(drafts + row * draft_stride + t - 1, mask=t > 0, other=0), read)
    tl.store(x + m * D + d, tl.load(table + read * D + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _feed_kernel(
    out: tl.tensor,
    drafts: tl.tensor,
    kept: tl.tensor,
    table: tl.tensor,
    state: tl.tensor,
    carry: tl.tensor,
    e_gain: tl.tensor,
    h_gain: tl.tensor,
    x: tl.tensor,
    out_stride: tl.tensor,
    draft_stride: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, d = tl.program_id(0), tl.arange(0, BLOCK)
    inside = d < D
    row, t = m // T, m % T
    count = tl.load(kept + row)
    last = tl.maximum(count, 1) - 1
    ahead = t - last - 1  # drafts that lie before this token and behind the verified ones
    verified = tl.load(out + row * out_stride + t, mask=ahead < 0, other=0)
    drafted = tl.load(drafts + row * draft_stride + ahead, mask=(ahead >= 0) & (ahead < HEAD), other=0)
    e = tl.load(table + tl.where(ahead < 0, verified, drafted) * D + d, mask=inside, other=0.0)
    if HEAD == 0:
        h = tl.load(state + m * D + d, mask=inside, other=0.0)
    else:
        before = state + row * (T - 1) * D + d
        first = tl.load(carry + row * D + d, mask=inside & (t == 0), other=0.0)
        fresh = tl.load(before + last * D, mask=inside & (t == 0), other=0.0)
        h = tl.where(t == 0, first, tl.load(before + (t - 1) * D, mask=inside & (t > 0), other=0.0))
        tl.debug_barrier()  # the one program that has read a row's carry writes the next
        tl.store(carry + row * D + d, fresh, mask=inside & (t == 0) & (count > 0))
    a, b = e.to(tl.float32), h.to(tl.float32)
    a = a / tl.sqrt(tl.sum(a * a, axis=0) / D + eps)
    b = b / tl.sqrt(tl.sum(b * b, axis=0) / D + eps)
    a = a * (1 + tl.load(e_gain + d, mask=inside, other=0.0).to(tl.float32))
    b = b * (1 + tl.load(h_gain + d, mask=inside, other=0.0).to(tl.float32))
    tl.store(x + m * 2 * D + d, a.to(e.dtype), mask=inside)
    tl.store(x + m * 2 * D + D + d, b.to(e.dtype), mask=inside)


@triton.jit
def _best_kernel(
    logits: tl.tensor,
    value: tl.tensor,
    index: tl.tensor,
    V: tl.tensor,
    parts: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, part = tl.program_id(0), tl.program_id(1)
    v = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + m * V + v, mask=v < V, other=float("-inf"))
    best = tl.max(x, axis=0)
    tl.store(value + m * parts + part, best)
    tl.store(index + m * parts + part, tl.min(tl.where(x == best, v, V), axis=0))


@triton.jit
def _best_of_kernel(
    value: tl.tensor,
    index: tl.tensor,
    token: tl.tensor,
    kept: tl.tensor,
    stride: tl.tensor,
    parts: tl.tensor,
    V: tl.tensor,
    BUSY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    m, part = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(value + m * parts + part, mask=part < parts, other=float("-inf"))
    v = tl.load(index + m * parts + part, mask=part < parts, other=V)
    best = tl.min(tl.where(x == tl.max(x, axis=0), v, V), axis=0)
    best = tl.minimum(best, V - 1).to(tl.int64)
    if BUSY:
        tl.store(token + m * stride, best, mask=tl.load(kept + m) > 0)
    else:
        tl.store(token + m * stride, best)


@triton.jit
def _settle_kernel(
    new: tl.tensor,
    drafts: tl.tensor,
    gained: tl.tensor,
    active: tl.tensor,
    token: tl.tensor,
    out: tl.tensor,
    kept: tl.tensor,
    made: tl.tensor,
    lengths: tl.tensor,
    out_stride: tl.tensor,
    draft_stride: tl.tensor,
    T: tl.constexpr,
    VERIFY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    release(CHAINED)
    wait(CHAINED)
    row, t = tl.program_id(0), tl.arange(0, BLOCK)
    tokens = tl.load(new + row * T + t, mask=t < T, other=0)
    if VERIFY:
        drafted = tl.load(drafts + row * draft_stride + t, mask=t < T - 1, other=-1)
        count = tl.min(tl.where((t < T - 1) & (tokens == drafted), T, t), axis=0).to(tl.int64) + 1
    else:
        count = tl.load(gained + row)
    count = tl.where(tl.load(active + row) > 0, count, 0)
    tl.store(out + row * out_stride + t, tokens, mask=t < T)
    tl.store(kept + row, count)
    tl.store(made + row, tl.load(made + row) + count)
    tl.store(lengths + row, tl.load(lengths + row) + count)
    last = tl.sum(tl.where(t == count - 1, tokens, 0), axis=0)
    tl.store(token + row, last, mask=count > 0)


def embed(token_B: Tensor, drafts_BK: Tensor | None, table_VD: Tensor) -> Tensor:
    """Embeddings [M, D] of each row's pending token and, where given, the drafts behind it."""
    rows, tokens = len(token_B), 1 if drafts_BK is None else drafts_BK.shape[1] + 1
    drafts_BK = token_B[:, None] if drafts_BK is None else drafts_BK
    width = table_VD.shape[1]
    x_MD = table_VD.new_empty(rows * tokens, width)
    _embed_kernel[(rows * tokens,)](
        token_B, drafts_BK, table_VD, x_MD, drafts_BK.stride(0), tokens, width, triton.next_power_of_2(width),
        **chained(x_MD), num_warps=4,
    )  # fmt: skip
    return x_MD


def feed(
    head: int,
    state_MD: Tensor,
    carry_BD: Tensor,
    verified: tuple[Tensor, Tensor],
    drafts_BK: Tensor,
    table_VD: Tensor,
    gains: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """What head `head` reads, [B * (T + head), 2 D]: normed embeddings, and normed states of the head before (or trunk).

    `verified`: out [B, T] and kept [B]. Row b's tokens are its verified ones, then the `head` drafts so far, then padding.
    States of a head above 0 begin with the row's carry, which becomes the state of the last verified row.
    """
    out_BT, kept_B = verified
    rows, width = len(kept_B), table_VD.shape[1]
    tokens = len(state_MD) // rows + (head > 0)
    x_MX = state_MD.new_empty(rows * tokens, 2 * width)
    _feed_kernel[(rows * tokens,)](
        out_BT, drafts_BK, kept_B, table_VD, state_MD, carry_BD, *gains, x_MX, out_BT.stride(0), drafts_BK.stride(0),
        eps, tokens, head, width, triton.next_power_of_2(width), **chained(x_MX), num_warps=4,
    )  # fmt: skip
    return x_MX


def greedy(logits_MV: Tensor, token_M: Tensor | None = None, kept_M: Tensor | None = None) -> Tensor:
    """The likeliest token of each row, int64 [M]; of equal ones the lowest. Into `token_M` where `kept_M` is positive."""
    tokens, vocab = logits_MV.shape
    parts = triton.cdiv(vocab, BEST_BLOCK)
    value = logits_MV.new_empty(tokens, parts)
    index = torch.empty(tokens, parts, dtype=torch.int32, device=logits_MV.device)
    if token_M is None:
        token_M = torch.empty(tokens, dtype=torch.int64, device=logits_MV.device)
    _best_kernel[(tokens, parts)](logits_MV, value, index, vocab, parts, BEST_BLOCK, **chained(logits_MV), num_warps=4)
    _best_of_kernel[(tokens,)](
        value, index, token_M, token_M if kept_M is None else kept_M, token_M.stride(0), parts, vocab, kept_M is not None,
        triton.next_power_of_2(parts), **chained(logits_MV), num_warps=4,
    )  # fmt: skip
    return token_M


def settle(
    new_BT: Tensor,
    drafts_BK: Tensor | None,
    gained_B: Tensor | None,
    active_B: Tensor,
    into: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Notes each active row's tokens in `into`: token, out, kept, made and the trunk's lengths.

    Its first `gained_B` of `new_BT` count; None: those that follow accepted drafts, as in `verify_greedy`.
    """
    rows, tokens = new_BT.shape
    token_B, out_BT, kept_B, made_B, lengths_B = into
    drafts = new_BT if drafts_BK is None else drafts_BK
    _settle_kernel[(rows,)](
        new_BT, drafts, active_B if gained_B is None else gained_B, active_B, token_B, out_BT, kept_B, made_B, lengths_B,
        out_BT.stride(0), drafts.stride(0), tokens, gained_B is None, max(2, triton.next_power_of_2(tokens)),
        **chained(new_BT), num_warps=1,
    )  # fmt: skip
