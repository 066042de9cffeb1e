"""The MoE layer and attention alone, forward and backward at 32k tokens.

`moe`: router, experts and glue of one layer (no shared expert), D 1024, by backend and shape, compiled; the grouped
products alone beside it are the floor. `attention`: the kernels that could do a full or windowed layer, by shape: the race
that `attention_backend: auto` follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import timing
from benchmarks.gpu.train_step import E64, step_shape
from moe import attention, kernels
from moe.config import ModelConfig
from moe.experts import MoE, sort_by_expert

TOKENS, ROWS, CONTEXT = 32_768, 8, 4096
LAYOUTS = {"flex": attention.Flex, "varlen": attention.Varlen}


def moe_layer(config: ModelConfig) -> dict[str, Any]:
    """Milliseconds of the compiled layer and of its six grouped products alone, both as called and as a graph."""
    graph_ms = timing.median_ms(timing.graphed(_both(config)[0]))
    body, run, moe, x = _both(config)
    ms, forward = timing.median_ms(body), timing.median_ms(lambda: run(x))
    before = torch.cuda.memory_allocated()
    kept = run(x)
    held = torch.cuda.memory_allocated() - before
    del kept
    moe.load.zero_()
    run(x)
    products, products_graph = _products(config, moe, moe.load.clone())
    flops = 18 * TOKENS * config.top_k * config.dim * config.expert_dim
    return {
        "forward_ms": forward, "ms": ms, "graph_ms": graph_ms, "products_ms": products,
        "products_graph_ms": products_graph,
        "layer_tflops": flops / graph_ms / 1e9, "held_gib": held / 2**30,
        "load_most_over_mean": float(moe.load.max() / moe.load.float().mean()),
    }  # fmt: skip


def _both(config: ModelConfig) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor], MoE, Tensor]:
    """A layer's forward and backward as one call, and its parts; nothing has run yet, so that it may be captured."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        moe = MoE(config, 1).to(torch.bfloat16).train()
        for p in moe.parameters():
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
        x = torch.randn(1, TOKENS, config.dim, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(1, TOKENS, config.dim, dtype=torch.bfloat16)
    moe.watch = False
    run, wanted = torch.compile(moe, fullgraph=True, dynamic=False), [x, *moe.parameters()]
    return lambda: torch.autograd.grad(run(x), wanted, dy), run, moe, x


def glue(experts: int, top_k: int, inner: int) -> dict[str, Any]:
    """Milliseconds and GB/s of what stands around the products, each piece alone."""
    from moe import kernels_triton

    torch.manual_seed(0)
    rows, dim = TOKENS * top_k, 1024
    with torch.device("cuda"):
        h, dy = torch.randn(rows, 2 * inner, dtype=torch.bfloat16), torch.randn(rows, inner, dtype=torch.bfloat16)
        x, weight = torch.randn(TOKENS, dim, dtype=torch.bfloat16), torch.rand(rows)
        router, dlogits = torch.randn(experts, dim, dtype=torch.bfloat16), torch.randn(TOKENS, experts)
        score = torch.rand(TOKENS, experts)
    chosen = kernels.top_experts(score, top_k).flatten()
    moved = {
        "swiglu": (lambda: kernels_triton.swiglu(h, weight, 0.0), 6 * rows * inner),
        "swiglu_backward": (lambda: kernels_triton.swiglu_backward(dy, h, weight, 0.0), 10 * rows * inner),
        "router_logits": (lambda: kernels._router_logits(x, router), 2 * TOKENS * dim),
        "router_logits_backward": (lambda: kernels._router_logits_backward(dlogits, x, router), 4 * TOKENS * dim),
        "top_experts": (lambda: kernels_triton.top_experts(score, top_k), 4 * TOKENS * experts),
        "topk": (lambda: score.topk(top_k, dim=-1), 4 * TOKENS * experts),
        "expert_order": (lambda: kernels_triton.expert_order(chosen, experts), 24 * rows),
        "sort_by_expert": (lambda: sort_by_expert(chosen, experts), 24 * rows),
    }
    figures: dict[str, Any] = {}
    for name, (body, size) in moved.items():
        ms = timing.median_ms(timing.graphed(body))
        figures[name] = [ms, size / ms / 1e6]
    return figures


def kernels_of(config: ModelConfig) -> list[tuple[str, float, int]]:
    """The kernels of the compiled layer, forward and backward: name, milliseconds, launches."""
    return timing.kernels(_both(config)[0])


def _products(config: ModelConfig, moe: MoE, load_E: Tensor) -> tuple[float, float]:
    ends = load_E.cumsum(0).to(torch.int32)
    rows, c = TOKENS * config.top_k, config
    x, h, a = (
        torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (c.dim, 2 * c.expert_dim, c.expert_dim)
    )
    w13, w2 = moe.gate_up_proj.weight.detach(), moe.down_proj.weight.detach()

    def run() -> list[Tensor]:
        pairs = ((x, w13.mT), (a, w2.mT), (h, w13), (x, w2), (h.T, x), (x.T, a))
        return [functional.grouped_mm(left, right, offs=ends) for left, right in pairs]

    return timing.median_ms(run), timing.median_ms(timing.graphed(run))


def race(heads: int, groups: int, width: int, window: int | None, backend: str, **options: Any) -> dict[str, Any]:
    """One attention kernel: milliseconds, rates counted by the pairs that are seen, error beside fp32 math."""
    torch.manual_seed(0)
    q, k, v, dy = (
        torch.randn(ROWS, CONTEXT, h, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for h in (heads, groups, groups, heads)
    )
    spans = attention.Spans(None, (ROWS, CONTEXT), window or CONTEXT, q.device)
    layout: Any = attention.Sdpa(spans, q.dtype) if backend == "sdpa" else LAYOUTS[backend](spans)
    full = window is None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if options:
            mask = layout.full_mask if full else layout.window_mask
            return torch.nn.attention.flex_attention.flex_attention(
                q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options
            )
        return layout.attend(0, full, q, k, v)

    run: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=False)
    pairs = sum(min(t + 1, window or CONTEXT) for t in range(CONTEXT)) * ROWS
    flops = 4 * heads * width * pairs

    def both() -> None:
        torch.autograd.grad(run(q, k, v), (q, k, v), dy.detach())

    forward = timing.median_ms(lambda: run(q, k, v))
    ms = timing.median_ms(both)
    return {
        "forward_ms": forward, "ms": ms, "forward_tflops": flops / forward / 1e9, "tflops": 3.5 * flops / ms / 1e9,
        "deviation": _deviation(heads, groups, width, window, run, q, k, v),
    }  # fmt: skip


def _deviation(
    heads: int, groups: int, width: int, window: int | None, run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> float:
    got = run(q, k, v)[:1, :, :1024]
    spans = attention.Spans(None, (1, 1024), window or CONTEXT, q.device)
    want = attention.masked_attention(*(x[:1, :, :1024].float() for x in (q, k, v)), spans.mask(window is None))
    return timing.relative(got, want)


def main() -> None:
    """All shapes."""
    args = timing.arguments(
        "layer",
        __doc__,
        part={"default": "all", "choices": ("all", "moe", "glue", "attention", "tune"), "help": "default: all"},
    )
    results = timing.Results("layer", args.out)
    shapes = {"e32_k4_f512": step_shape(64), "e64_k8_f256": step_shape(64, **E64)}
    if args.part in ("all", "moe"):
        for shape, config in shapes.items():
            for backend in ("triton", "grouped"):
                for router in ("float32", "bfloat16") if backend == "grouped" else ("float32",):
                    c = dataclasses.replace(config, experts_backend=backend, router_dtype=router)
                    results.attempt(f"moe_{shape}_{backend}_{router}", lambda c=c: moe_layer(c))
    if args.part in ("all", "glue"):
        results.attempt("glue_e32", lambda: glue(32, 4, 512))
        results.attempt("glue_e64", lambda: glue(64, 8, 256))
        for backend in ("grouped", "triton"):
            c = dataclasses.replace(shapes["e32_k4_f512"], experts_backend=backend)
            results.attempt(f"kernels_{backend}", lambda c=c: {"kernels": kernels_of(c)})
    if args.part in ("all", "attention"):
        for heads, groups, width, window in ((8, 2, 128, None), (12, 2, 128, 512)):
            for backend in ("sdpa", "flex", "varlen"):
                name = (
                    f"attention_h{heads}_g{groups}_c{width}_{'full' if window is None else f'window{window}'}_{backend}"
                )
                results.attempt(name, lambda a=(heads, groups, width, window, backend): race(*a))
    if args.part == "tune":
        for number, options in enumerate(TUNED):
            results.attempt(f"flex_{number}_{options}", lambda o=options: race(12, 2, 128, 512, "flex", **o))


# Tiles of the windowed flex kernel: forward M x N, backward M1 x N1 (dk, dv) and M2 x N2 (dq).
TUNED: tuple[dict[str, Any], ...] = (
    {
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 128,
        "bwd_BLOCK_M2": 128,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 8,
        "bwd_num_stages": 2,
    },
    {
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4,
        "bwd_num_stages": 3,
    },
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 2},
)


if __name__ == "__main__":
    main()
