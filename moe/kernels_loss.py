"""Triton body of the loss's work on logits: two passes over a row, the second of which finds it in the L2 cache.

In: a chunk's logits, fp32, bf16 or fp16. Out: what `moe.loss._rows` computes, with the gradient written over the logits.
By torch.compile the same takes three kernels and 5 times the traffic: of one chunk of 4,096 tokens, V = 32,768, bf16,
0.66 ms on an H100, where reading and writing the logits once takes 0.18 (docs/benchmarks.md).

Sums are fp32 in an order that V alone fixes: the same bits every time.

Legend: S rows of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits at once: 16 for each thread of 16 warps
WARPS = 16


@triton.jit
def _rows_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    counted: tl.tensor,
    nll: tl.tensor,
    penalty: tl.tensor,
    stride: tl.tensor,
    z: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    answer = tl.load(target + row)
    chosen = tl.load(logits + answer).to(tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for low in range(0, V, BLOCK):
        x = tl.load(logits + low + column, mask=low + column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # A lane beyond the vocabulary has seen nothing but -inf, of which no difference may be taken.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    peak = tl.max(top, axis=0)
    partition = tl.sum(mass * tl.exp(top - peak), axis=0)
    log_partition = tl.log(partition) + peak
    kept = tl.load(counted + row) != 0
    slope = tl.where(kept, 1 + 2 * z * log_partition, 0.0)
    tl.store(nll + row, tl.where(kept, log_partition - chosen, 0.0))
    tl.store(penalty + row, tl.where(kept, z * log_partition * log_partition, 0.0))
    factor, hit = slope / partition, tl.where(kept, 1.0, 0.0)
    for low in range(0, V, BLOCK):
        inside = low + column < V
        x = tl.load(logits + low + column, mask=inside, other=float("-inf")).to(tl.float32)
        # Where nothing counts the gradient is 0 whatever the logits are, NaN and infinities too.
        grad = tl.where(kept, tl.exp(x - peak) * factor, 0.0) - tl.where(low + column == answer, hit, 0.0)
        tl.store(logits + low + column, grad.to(logits.dtype.element_ty), mask=inside)


def rows(logits_SV: Tensor, target_S: Tensor, mask_S: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, the z-loss of all, and the gradient of their sum, which is `logits_SV` written over."""
    count, vocab = logits_SV.shape
    nll_S = torch.empty(count, dtype=torch.float32, device=logits_SV.device)
    penalty_S = torch.empty_like(nll_S)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _rows_kernel[(count,)](
        logits_SV, target_S, mask_S, nll_S, penalty_S, logits_SV.stride(0), z, vocab, block, num_warps=WARPS
    )
    return nll_S, penalty_S.sum(), logits_SV
