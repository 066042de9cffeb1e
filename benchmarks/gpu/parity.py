"""Our GPU paths beside a float64 reference, repeatability, and capture.

`kernels`: each Triton operator beside its torch reference. `layer`: the MoE layer's output and gradients by backend beside a
loop over experts in float64. `model`: loss and gradients of a small decoder by attention and expert backend beside the math
reference in float64. `repeat`: the same step twice gives the same bits. `graph`: a captured layer gives the bits of an
uncaptured one for new inputs and routings.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import timing
from benchmarks.gpu.train_step import step_shape
from moe import kernels
from moe.config import ModelConfig
from moe.experts import MoE
from moe.loss import next_token_loss
from moe.model import Decoder

BF16 = torch.bfloat16


def operators() -> dict[str, Any]:
    """Relative error of each operator; orders and choices must be equal."""
    from moe import kernels_triton

    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=g).to(dtype)

    figures: dict[str, Any] = {}
    for limit in (0.0, 0.7):
        h, weight, dy = draw(5000, 1024), draw(5000, dtype=torch.float32), draw(5000, 512)
        figures[f"swiglu_{limit}"] = timing.relative(
            kernels_triton.swiglu(h, weight, limit), kernels.swiglu_reference(h.double(), weight.double(), limit)
        )
        got = kernels_triton.swiglu_backward(dy, h, weight, limit)
        want = kernels.swiglu_backward_reference(dy.double(), h.double(), weight.double(), limit)
        figures[f"swiglu_dh_{limit}"], figures[f"swiglu_dweight_{limit}"] = map(timing.relative, got, want)
    x, dlogits = draw(5000, 1024), draw(5000, 32, dtype=torch.float32)
    for dtype in (torch.float32, BF16):
        w = draw(32, 1024, dtype=dtype)
        figures[f"router_{dtype}"] = timing.relative(kernels._router_logits(x, w), x.double() @ w.double().T)
        dx, dw = kernels._router_logits_backward(dlogits, x, w)
        figures[f"router_dx_{dtype}"] = timing.relative(dx, dlogits.double() @ w.double())
        figures[f"router_dw_{dtype}"] = timing.relative(dw, dlogits.double().T @ x.double())
    for experts, top_k in ((32, 4), (64, 8), (24, 3)):
        score = draw(9999, experts, dtype=torch.float32).mul(8).round()
        chosen = kernels_triton.top_experts(score, top_k)
        assert torch.equal(chosen, kernels.top_experts_reference(score, top_k))
        got, want = (
            f(chosen.flatten(), experts) for f in (kernels_triton.expert_order, kernels.expert_order_reference)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return figures


def layer(config: ModelConfig, tokens: int = 4096) -> dict[str, Any]:
    """Errors of output and gradients of one MoE layer, all experts' loads uneven."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        moe = MoE(config, 1)
        for p in moe.parameters():
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
        moe.router_bias.normal_(0, 0.05)
        x, dy = torch.randn(1, tokens, config.dim), torch.randn(1, tokens, config.dim)
    ours = _cast(config, moe, BF16)
    reference = _cast(dataclasses.replace(config, experts_backend="loop"), ours, torch.float64)
    figures: dict[str, Any] = {}
    want = _gradients(reference, x.to(BF16).double(), dy.to(BF16).double())
    for compiled in (False, True):
        run = torch.compile(ours, fullgraph=True, dynamic=False) if compiled else ours
        got = _gradients(ours, x.to(BF16), dy.to(BF16), run)
        again = _gradients(ours, x.to(BF16), dy.to(BF16), run)
        figures |= {f"{n}{'_compiled' if compiled else ''}": timing.relative(got[n], want[n]) for n in want}
        figures[f"repeats{'_compiled' if compiled else ''}"] = all(torch.equal(got[n], again[n]) for n in got)
    return figures


def _cast(config: ModelConfig, source: MoE, dtype: torch.dtype) -> MoE:
    with torch.device("cuda"):
        moe = MoE(config, 1).to(dtype).train()
    moe.load_state_dict({k: v.to(dtype if k != "router_bias" else v.dtype) for k, v in source.state_dict().items()})
    moe.watch = False
    return moe


def _gradients(moe: MoE, x: Tensor, dy: Tensor, run: Any = None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    moe.zero_grad(set_to_none=True)
    y = (moe if run is None else run)(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad} | {f"d_{n}": p.grad for n, p in moe.named_parameters() if p.grad is not None}


def model(attention: str, experts: str, segments: bool) -> dict[str, Any]:
    """A decoder of 5 layers at T = 1024: relative error of loss and of all gradients together."""
    shape = dataclasses.replace(
        step_shape(512), layers=5, window=128, context=1024, routed_clip=(0.0, 0.0, 0.0, 0.5, 0.5),
        attention_backend="math", experts_backend="loop",
    )  # fmt: skip
    torch.manual_seed(0)
    reference = timing.drawn(shape, torch.float64)
    reference.load_state_dict({k: v.to(BF16).to(v.dtype) for k, v in reference.state_dict().items()})
    with torch.device("cuda"):
        ours = Decoder(dataclasses.replace(shape, attention_backend=attention, experts_backend=experts)).to(BF16)  # type: ignore[arg-type]
    ours.load_state_dict({k: v.to(BF16) if "bias" not in k else v for k, v in reference.state_dict().items()})
    tokens = torch.randint(1, 512, (2, 1024), device="cuda")
    cuts = (torch.rand(2, 1024, device="cuda") < 0.01).cumsum(1) if segments else None
    values = []
    for m in (reference.train(), ours.train()):
        for moe in m.routed:
            moe.watch = False
        x = m.hidden(tokens, cuts).flatten(0, 1)
        loss, _ = next_token_loss(x, m.lm_head.weight, tokens.roll(-1, 1).flatten())
        loss.backward()
        values.append((loss.detach(), torch.cat([p.grad.flatten().double() for p in m.parameters()])))  # type: ignore[union-attr]
    (loss_want, grad_want), (loss_got, grad_got) = values
    return {"loss": timing.relative(loss_got, loss_want), "gradients": timing.relative(grad_got, grad_want)}


def graph(config: ModelConfig, tokens: int = 4096) -> dict[str, Any]:
    """A layer's forward and backward as a graph, replayed with three new inputs, beside plain runs: equal bits?"""
    torch.manual_seed(0)
    with torch.device("cuda"):
        moe = MoE(config, 1).to(BF16).train()
        for p in moe.parameters():
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
        x = torch.randn(1, tokens, config.dim, dtype=BF16, requires_grad=True)
        dy = torch.randn(1, tokens, config.dim, dtype=BF16)
    moe.watch = False
    wanted = [x, *moe.parameters()]

    def body() -> tuple[Tensor, ...]:
        y = moe(x)
        return (y, *torch.autograd.grad(y, wanted, dy))

    replay, equal = timing.graphed(body), []
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        got = [t.clone() for t in replay()]
        equal.append(all(torch.equal(a, b) for a, b in zip(got, body(), strict=True)))
    return {"equal": equal}


def main() -> None:
    """All parts."""
    args = timing.arguments("parity", __doc__, quick={"action": "store_true", "help": "operators and layer only"})
    results = timing.Results("parity", args.out)
    results.attempt("operators", operators)
    shape = dataclasses.replace(step_shape(64), routed_clip=(0.7,) * 17)
    for backend in ("loop", "grouped", "triton"):
        c = dataclasses.replace(shape, experts_backend=backend)
        if backend != "loop":
            results.attempt(f"layer_{backend}", lambda c=c: layer(c))  # type: ignore[misc]
            results.attempt(f"graph_{backend}", lambda c=c: graph(c))  # type: ignore[misc]
    if args.quick:
        return
    for segments in (False, True):
        for attention in ("math", "sdpa", "flex", "varlen", "auto"):
            for experts in ("grouped", "triton") if attention == "auto" else ("grouped",):
                results.attempt(
                    f"model_{attention}_{experts}{'_packed' if segments else ''}",
                    lambda a=attention, e=experts, s=segments: model(a, e, s),  # type: ignore[misc]
                )


if __name__ == "__main__":
    main()
