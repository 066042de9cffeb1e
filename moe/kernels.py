"""Fused pieces of the MoE layer as torch operators: SwiGLU with clip and gate weight, fp32 router, top-k, expert order.

Each operator has a plain torch body, which runs on the CPU and is the reference of the tests, and a Triton body
(moe/kernels_triton.py), which runs on CUDA tensors. Both are opaque to the compiler, with shapes and gradients
registered, so `torch.compile(fullgraph=True)` and CUDA graphs hold. All are deterministic: no atomics, ties by index.

What they save (one H100, 32k tokens, D 1024, E32 k4 F512; figures in docs/benchmarks.md): the backward of SwiGLU and of
the gate weight read the same three tensors, so one pass does both; the router's fp32 product runs on tensor cores; the
order by expert is a counting sort of E bins instead of a radix sort of R keys.

Legend: S tokens, D model width, E experts, K chosen of them, R = S * K routed copies, F expert width, H = 2F (gate
rows, then up rows).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

# An fp32 mantissa is three of bf16, so three bf16 pieces hold an fp32 weight exactly; two hold a gradient to 2^-17.
WEIGHT_PIECES = 3
GRADIENT_PIECES = 2


def at_home(device: torch.device) -> bool:
    """Whether the Triton bodies run on a device."""
    return why_not(device) is None


def why_not(device: torch.device, interpreted: bool = False) -> str | None:
    """What is lacking for the Triton bodies: the package, or a GPU of capability 8.0 or more, which Triton wants.

    `interpreted`: Triton's interpreter is on, which runs them on a CPU too.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and interpreted:
        return None
    if device.type != "cuda":
        return f"they need a GPU, got {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"they need compute capability 8, got {torch.cuda.get_device_name(device)}"
    return None


def dependents(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before still runs, on a device where the bodies run (moe/kernels_chain.py)."""
    known = device.type == "cuda" and torch.version.cuda is not None
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def swiglu(h_RH: Tensor, weight_R: Tensor | None, limit: float | None = None) -> Tensor:
    """`min(silu(gate), limit) * clip(up, -limit, limit) * weight` [R, F]; fp32 inside, `h`'s type outside.

    `h` holds the gate columns, then the up columns; `weight` [R] (or [R, 1]) is fp32, None for
    ones. Differentiable in both.
    """
    if weight_R is None:
        weight_R = h_RH.new_ones(h_RH.shape[0], dtype=_wide(h_RH))
    return _swiglu(h_RH, weight_R.flatten(), limit or 0.0)


def router_logits(x_SD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x @ weight.T` [S, E] in fp32, whatever the inputs' types. Differentiable in both."""
    return _router_logits(x_SD, weight_ED)


def top_experts(score_SE: Tensor, top_k: int) -> Tensor:
    """Indices [S, K], int64, of the greatest scores, falling; of equal scores the lower expert wins."""
    return _top_experts(score_SE.detach(), top_k)


def expert_order(chosen_R: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order` [R], the routed copies sorted by expert (stable); `place` [R], its inverse; `ends` [E], int32.

    Expert e has the copies `order[ends[e - 1] : ends[e]]`.
    """
    return _expert_order(chosen_R, experts)


def swiglu_reference(h_RH: Tensor, weight_R: Tensor, limit: float) -> Tensor:
    """What `swiglu` computes, in plain torch."""
    gate, up = h_RH.to(_wide(h_RH)).chunk(2, dim=-1)
    gate = torch.nn.functional.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * up * weight_R[:, None]).to(h_RH.dtype)


def swiglu_backward_reference(dy_RF: Tensor, h_RH: Tensor, weight_R: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Gradients of `h` and `weight`. A bound passes the gradient where it is only just reached, as torch.clamp does."""
    dy_RF, (raw, up) = dy_RF.to(_wide(h_RH)), h_RH.to(_wide(h_RH)).chunk(2, dim=-1)
    sigmoid = raw.sigmoid()
    gate = raw * sigmoid
    dgate = sigmoid * (1 + raw * (1 - sigmoid))
    dup = torch.ones_like(up)
    if limit:
        dgate, dup = dgate * (gate <= limit), dup * (up.abs() <= limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    dact = dy_RF * weight_R[:, None]
    dh_RH = torch.cat((dact * up * dgate, dact * gate * dup), dim=-1).to(h_RH.dtype)
    return dh_RH, (dy_RF * gate * up).sum(-1).to(weight_R.dtype)


def top_experts_reference(score_SE: Tensor, top_k: int) -> Tensor:
    """What `top_experts` computes, by a stable sort."""
    return score_SE.argsort(dim=-1, descending=True, stable=True)[:, :top_k].contiguous()


def expert_order_reference(chosen_R: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `expert_order` computes, by a stable sort."""
    order_R = chosen_R.argsort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    bins_E = torch.arange(experts, device=chosen_R.device)
    return order_R, place_R, (chosen_R[:, None] == bins_E).sum(0).cumsum(0).to(torch.int32)


def pieces(x: Tensor, count: int) -> list[Tensor]:
    """`count` bf16 tensors whose sum is fp32 `x`, each the rounding of what the ones before it left."""
    parts = []
    for _ in range(count):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].float()
    return parts


def _two_pieces(x_SE: Tensor) -> Tensor:
    """`pieces(x, 2)` side by side [S, 2E]."""
    if x_SE.is_cuda:
        from moe import kernels_triton

        return kernels_triton.two_pieces(x_SE)
    return torch.cat(pieces(x_SE, 2), dim=1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


@torch.library.custom_op("stepwell::swiglu", mutates_args=())
def _swiglu(h: Tensor, weight: Tensor, limit: float) -> Tensor:
    if h.is_cuda and h.dtype != torch.float64:  # the kernels work in fp32
        from moe import kernels_triton

        return kernels_triton.swiglu(h, weight, limit)
    return swiglu_reference(h, weight, limit)


@torch.library.custom_op("stepwell::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, h: Tensor, weight: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    if h.is_cuda and h.dtype != torch.float64:
        from moe import kernels_triton

        return kernels_triton.swiglu_backward(dy, h, weight, limit)
    return swiglu_backward_reference(dy, h, weight, limit)


@_swiglu.register_fake
def _(h: Tensor, weight: Tensor, limit: float) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@_swiglu_backward.register_fake
def _(dy: Tensor, h: Tensor, weight: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(weight)


def _swiglu_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    h, weight, ctx.limit = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(h, weight)


def _swiglu_gradient(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    h, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_swiglu_backward(dy.contiguous(), h, weight, ctx.limit), None  # type: ignore[attr-defined]


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)


@torch.library.custom_op("stepwell::router_logits", mutates_args=())
def _router_logits(x: Tensor, weight: Tensor) -> Tensor:
    if not _on_tensor_cores(x):
        return x.to(_wide(x)) @ weight.to(_wide(x)).T
    parts = pieces(weight.float(), 1 if weight.dtype == torch.bfloat16 else WEIGHT_PIECES)
    logits = torch.mm(x, torch.cat(parts).T, out_dtype=torch.float32)
    return logits.unflatten(1, (len(parts), -1)).sum(1) if len(parts) > 1 else logits


@torch.library.custom_op("stepwell::router_logits_backward", mutates_args=())
def _router_logits_backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not _on_tensor_cores(x):
        wide = dlogits.to(_wide(x))
        return (wide @ weight.to(_wide(x))).to(x.dtype), (wide.T @ x.to(_wide(x))).to(weight.dtype)
    both = _two_pieces(dlogits)
    weights = pieces(weight.float(), 1 if weight.dtype == torch.bfloat16 else GRADIENT_PIECES)
    # Of two pieces each way, low times low is below the rounding of the result.
    left = torch.cat((both, both[:, : dlogits.shape[1]]), dim=1) if len(weights) > 1 else both
    right = torch.cat((weights[0], weights[0], *weights[1:]))
    dweight = torch.mm(both.T, x, out_dtype=torch.float32).unflatten(0, (GRADIENT_PIECES, -1)).sum(0)
    return left @ right, dweight.to(weight.dtype)


@_router_logits.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=_wide(x))


@_router_logits_backward.register_fake
def _(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _router_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_gradient(ctx: torch.autograd.function.FunctionCtx, dlogits: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    return _router_logits_backward(dlogits.contiguous(), x, weight)


_router_logits.register_autograd(_router_gradient, setup_context=_router_setup)


@torch.library.custom_op("stepwell::top_experts", mutates_args=())
def _top_experts(score: Tensor, top_k: int) -> Tensor:
    if score.is_cuda and score.dtype == torch.float32:
        from moe import kernels_triton

        return kernels_triton.top_experts(score, top_k)
    return top_experts_reference(score, top_k)


@_top_experts.register_fake
def _(score: Tensor, top_k: int) -> Tensor:
    return score.new_empty(score.shape[0], top_k, dtype=torch.int64)


@torch.library.custom_op("stepwell::expert_order", mutates_args=())
def _expert_order(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if chosen.is_cuda:
        from moe import kernels_triton

        return kernels_triton.expert_order(chosen, experts)
    return expert_order_reference(chosen, experts)


@_expert_order.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = chosen.new_empty(chosen.shape[0], dtype=torch.int64)
    return order, torch.empty_like(order), chosen.new_empty(experts, dtype=torch.int32)
