"""What stands between the product of queries, keys, values and gates and the attention, as one torch operator.

In: the product's columns side by side: H query heads, G key heads, G value heads, H gates or none, padding. Out: queries
and keys normed (zero-centred RMSNorm of each head) and rotated, values and gates. The plain torch body runs on the CPU
and is the reference of the tests; the Triton body (moe/kernels_heads_triton.py) runs on CUDA tensors and reads the
product once, forward and backward, where torch.compile takes three kernels each way. Opaque to the compiler, with shapes
and gradients registered. Deterministic: no atomics.

Numbers differ from `RMSNorm`, then `rotate` (moe/layers.py) by one rounding to the product's type, which these do
between the two and this does not.

Legend: B rows, T positions, N columns of the product, H query heads, G key/value heads, C head width, A angles (half of
the widths that rotate).
"""

import torch
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor, Tensor]


def heads(
    x_BTN: Tensor,
    gain_q_C: Tensor,
    gain_k_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: tuple[int, int, int],
    gates: int,
    eps: float,
) -> Heads:
    """Queries [B, T, H, C], keys and values [B, T, G, C], gates [B, T, `gates`].

    `shape` is (H, G, C); `cos` and `sin` are [B or 1, T, 1, A] in fp32. Differentiable in the product and the gains.
    """
    return _heads(x_BTN, gain_q_C, gain_k_C, cos, sin, list(shape), gates, eps)


def heads_reference(
    x_BTN: Tensor,
    gain_q_C: Tensor,
    gain_k_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    gates: int,
    eps: float,
) -> Heads:
    """What `heads` computes, in plain torch."""
    H, G, C = shape
    q, k, v, gate, _ = x_BTN.split((H * C, G * C, G * C, gates, x_BTN.shape[-1] - (H + 2 * G) * C - gates), -1)
    q, k, v = (part.unflatten(-1, (-1, C)) for part in (q, k, v))
    q, k = (_turn(_normed(part, eps) * (1 + gain), cos, sin) for part, gain in ((q, gain_q_C), (k, gain_k_C)))
    return (
        *(part.to(x_BTN.dtype).contiguous() for part in (q, k)),
        *(part.clone(memory_format=torch.contiguous_format) for part in (v, gate)),
    )


def heads_backward_reference(
    grads: list[Tensor],
    x_BTN: Tensor,
    gain_q_C: Tensor,
    gain_k_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the product and of both gains."""
    H, G, C = shape
    dq, dk, dv, dgate = grads
    q, k, _ = x_BTN.split((H * C, G * C, x_BTN.shape[-1] - (H + G) * C), -1)
    parts, dgains = [], []
    for raw, dy, gain in ((q, dq, gain_q_C), (k, dk, gain_k_C)):
        x = _wide(raw.unflatten(-1, (-1, C)))
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y, dn = x * scale, _turn(_wide(dy), cos, -sin)
        dgains.append((dn * y).flatten(0, 2).sum(0).to(gain.dtype))
        dn = dn * (1 + gain)
        parts.append((scale * (dn - y * (dn * y).mean(-1, keepdim=True))).flatten(2).to(x_BTN.dtype))
    used = (H + 2 * G) * C + dgate.shape[-1]
    rest = x_BTN.new_zeros(*x_BTN.shape[:2], x_BTN.shape[-1] - used)
    return torch.cat((*parts, dv.flatten(2), dgate, rest), -1), dgains[0], dgains[1]


def _normed(x: Tensor, eps: float) -> Tensor:
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2A widths, i paired with i + A; with -sin it turns back."""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("stepwell::heads", mutates_args=())
def _heads(
    x: Tensor, gain_q: Tensor, gain_k: Tensor, cos: Tensor, sin: Tensor, shape: list[int], gates: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.is_cuda:
        from moe import kernels_heads_triton

        return kernels_heads_triton.heads(x, gain_q, gain_k, cos, sin, shape, gates, eps)
    return heads_reference(x, gain_q, gain_k, cos, sin, shape, gates, eps)


@torch.library.custom_op("stepwell::heads_backward", mutates_args=())
def _heads_backward(
    grads: list[Tensor],
    x: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        from moe import kernels_heads_triton

        return kernels_heads_triton.heads_backward(grads, x, gain_q, gain_k, cos, sin, shape, eps)
    return heads_backward_reference(grads, x, gain_q, gain_k, cos, sin, shape, eps)


@_heads.register_fake
def _(
    x: Tensor, gain_q: Tensor, gain_k: Tensor, cos: Tensor, sin: Tensor, shape: list[int], gates: int, eps: float
) -> Heads:
    (H, G, C), lead = shape, x.shape[:2]
    return x.new_empty(*lead, H, C), x.new_empty(*lead, G, C), x.new_empty(*lead, G, C), x.new_empty(*lead, gates)


@_heads_backward.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(gain_q), torch.empty_like(gain_k)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Heads) -> None:
    x, gain_q, gain_k, cos, sin, shape, _, eps = inputs
    ctx.save_for_backward(x, gain_q, gain_k, cos, sin)
    ctx.shape, ctx.eps = shape, eps  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, gain_q, gain_k, cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dgain_q, dgain_k = _heads_backward(list(grads), x, gain_q, gain_k, cos, sin, ctx.shape, ctx.eps)  # type: ignore[attr-defined]
    return dx, dgain_q, dgain_k, None, None, None, None, None


_heads.register_autograd(_gradient, setup_context=_setup)
