"""Feed-forward layers: SwiGLU, and the routed experts with loss-free balancing.

In: x [B, T, D]. Out: the same shape. No token is dropped: experts take what the router sends them, however uneven. The
router works in fp32 (fp64 for a model in fp64): sigmoid scores, selection by score + bias, weights from the unbiased
scores renormalised over the chosen and times `routed_scale` (Step 3.5 Flash, section 2; the bias after DeepSeek-V3,
arXiv 2408.15664). SwiGLU's factors are bounded behind the SiLU: min(silu(gate), L) * clip(up, -L, L).

Copies of tokens are sorted by expert, so that each expert's rows are one block of a grouped matrix product. Gather and
sum are each other's gradient through the inverse permutation: no atomic additions, the same bits every time. The gate
weight is applied before the down projection, to F numbers a copy instead of D.

Storage differs from the released checkpoint in one place: the experts' gate and up projections are one tensor
[E, 2F, D], gate rows first, since one product is faster than two. `halves` tells the parts and their released names.

Legend: B rows, T positions, S = B * T tokens, D model width, F expert width, E experts, K chosen of them, R = S * K
routed copies of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe import kernels
from moe.balance import WEIGHT_SUM_EPS, activity_stats, counted_load, group_loss, routing_stats, squares_and_rows
from moe.config import ModelConfig

FUSED, PARTS = "moe.gate_up_proj.weight", ("moe.gate_proj.weight", "moe.up_proj.weight")
MANY_ROWS, ALIGNED = 512, 64  # from so many rows on weights are copied side by side (chosen), in multiples of 64


class Exchange(Protocol):
    """Carries rows to the ranks that hold their experts and back (moe/parallel.py)."""

    def __call__(self, x_RD: Tensor, load_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Outputs of all rows, in their order.

        The rows are sorted by expert, `load_E` of each. `experts` takes rows sorted by local expert and their counts.
        """


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def halves(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter's matrices by the released checkpoint's names, as views: two for a fused one, else itself."""
    if not name.endswith(FUSED):
        return {name: tensor}
    stem = name.removesuffix(FUSED)
    return {stem + part: half for part, half in zip(PARTS, tensor.unflatten(1, (2, -1)).unbind(1), strict=True)}


class ExactBuffers(nn.Module):
    """A module whose buffers keep their precision when the model is cast to a lower one."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactBuffers":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.element_size() < old.element_size():
                self._buffers[name] = old.to(new.device)
        return self


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases; both factors bounded by `limit`, if there is one."""

    def __init__(self, dim: int, hidden: int, limit: float | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)
        return self.down_proj(gated(gate, up, self.limit))


def side_by_side(x: Tensor, *maps: nn.Linear) -> list[Tensor]:
    """Each map of x; of many rows on a GPU by one product, which reads x once and has one gradient of x to add."""
    if not many(x):
        return [m(x) for m in maps]
    widths = [m.out_features for m in maps]
    y = product(x, maps)
    return list(y.split([*widths, y.shape[-1] - sum(widths)], -1)[:-1])


def many(x: Tensor) -> bool:
    """Whether there is enough on a GPU to pay for weights copied side by side."""
    return x.is_cuda and x.shape[:-1].numel() >= MANY_ROWS


def fused(x: Tensor) -> bool:
    """Whether kernels in half precision pay for what stands between products, where they run (`kernels.at_home`)."""
    return many(x) and x.dtype in (torch.bfloat16, torch.float16)


def product(x: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
    """All maps of x side by side, behind them columns of zeros up to a multiple of `ALIGNED`."""
    weight = torch.cat([m.weight for m in maps])
    return functional.linear(x, functional.pad(weight, (0, 0, 0, -len(weight) % ALIGNED)))


def gated(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up, the first bounded from above and the second on both sides."""
    gate = functional.silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


class ExpertLinear(nn.Module):
    """One weight [out, in] per expert, applied to rows sorted by expert."""

    def __init__(self, experts: int, out_dim: int, in_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))

    def forward(self, x_RI: Tensor, rows: Tensor | list[int]) -> Tensor:
        """`rows` of each expert in turn: as their running sum, int32, by one grouped product, as numbers by a loop.

        Both give the same bits on CPU (tests hold them to it).
        """
        if isinstance(rows, Tensor):
            return functional.grouped_mm(x_RI, self.weight.transpose(-2, -1), offs=rows)
        # One unbind: indexing the weight E times would write E full-sized gradients (5x slower for 16 experts).
        parts = zip(x_RI.split(rows), self.weight.unbind(0), strict=True)
        return torch.cat([functional.linear(x, w) for x, w in parts])


class MoE(ExactBuffers):
    """Router and routed experts; the layer adds the shared expert.

    After a forward in training: `load` [E] counts copies since the last `rebalance`; `group_loss` is the loss that
    balances `expert_groups` groups of neighbouring experts; `stats()` describes that forward, unless `watch` is off.
    Tokens that are not `counted`, as padding, pass through experts like all others but enter none of these, but for
    the activity of the experts.
    """

    router_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.top_k, self.routed_scale, self.limit = c.top_k, c.routed_scale, c.routed_limit(layer)
        self.backend, self.router_dtype = c.experts_backend, c.router_dtype
        self.gate = nn.Linear(c.dim, c.experts, bias=False)
        self.gate_up_proj = ExpertLinear(c.experts, 2 * c.expert_dim, c.dim)
        self.down_proj = ExpertLinear(c.experts, c.dim, c.expert_dim)
        self.register_buffer("router_bias", torch.zeros(c.experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(c.experts, dtype=torch.int64), persistent=False)
        self.pieces = self._pieces()
        self.exchange: Exchange | None = None
        self.expert_groups, self.watch = 1, True
        self.counted: Tensor | None = None  # [S] bool: the tokens of the next forward that steer the router; None: all
        self.group_loss: Tensor | None = None
        # Written whole and never read in a forward: a compiled one would be compiled again for what it finds here.
        self.routing: dict[str, Tensor] | None = None
        self.activity: Tensor | None = None  # [this rank's experts, 2]: sums of squares, rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Moves or casts the module, and chooses anew what fits where it is then; a forward has nothing to ask."""
        super()._apply(fn, recurse)
        self.pieces = self._pieces()
        return self

    def _pieces(self) -> "Pieces":
        weight = self.gate.weight
        return pieces(self.backend, weight.device, weight.dtype, len(weight), kernels.at_home(weight.device))

    def logits(self, x_SD: Tensor) -> Tensor:
        """Router logits [S, E], in fp32 at least."""
        if self.router_dtype == "bfloat16":
            return functional.linear(x_SD.bfloat16(), self.gate.weight.bfloat16()).float()
        return self.pieces.logits(x_SD, self.gate.weight)

    def choose(self, score_SE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [S, K], int64, and their weights [S, K] in the scores' precision."""
        chosen_SK = self.pieces.top((score_SE + self.router_bias).detach(), self.top_k)
        weight_SK = score_SE.gather(1, chosen_SK)
        return chosen_SK, weight_SK / (weight_SK.sum(-1, keepdim=True) + WEIGHT_SUM_EPS) * self.routed_scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        logit_SE = self.logits(x_SD)
        score_SE = logit_SE.sigmoid()
        chosen_SK, weight_SK = self.choose(score_SE)
        order_R, inverse_R, ends_E = self.pieces.sort(chosen_SK.flatten(), len(self.router_bias))
        load_E = functional.pad(ends_E, (1, 0)).diff()
        if self.training:
            steer_E = load_E if self.counted is None else counted_load(self.counted, order_R, ends_E, self.top_k)
            self.load += steer_E
            self.group_loss = group_loss(score_SE, steer_E, self.expert_groups, self.counted)
            if self.watch:
                self.routing = routing_stats(logit_SE.detach(), score_SE.detach(), chosen_SK, steer_E, self.counted)
        x_RD = _Dispatch.apply(x_SD, order_R, inverse_R, self.top_k)
        weight_R = _Dispatch.apply(weight_SK.flatten(), order_R, inverse_R, 1)
        if self.exchange is None:
            y_RD = self.experts(x_RD, load_E, weight_R)
        else:
            y_RD = self.exchange(x_RD, load_E, self.experts)
            y_RD = (y_RD * weight_R[:, None]).to(y_RD.dtype)
        return _Combine.apply(y_RD, order_R, inverse_R, self.top_k).view_as(x_BTD)

    def experts(self, x_RD: Tensor, load_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """Rows sorted by expert through their experts; `weight_R` scales each row's output."""
        # What grouped_mm takes: no fp64, and rows of whole 16 bytes.
        odd = any(n * x_RD.element_size() % 16 for n in (x_RD.shape[1], self.down_proj.weight.shape[2]))
        looped = self.backend == "loop" or x_RD.dtype == torch.float64 or odd
        if weight_R is None:
            weight_R = torch.ones(len(x_RD), device=x_RD.device)
        rows = load_E.tolist() if looped else load_E.cumsum(0).to(torch.int32)
        a_RF = self.pieces.swiglu(self.gate_up_proj(x_RD, rows), weight_R, self.limit)
        if self.training and self.watch:
            self.activity = squares_and_rows(a_RF.detach(), weight_R.detach(), load_E)
        return self.down_proj(a_RF, rows)

    def stats(self, activity_E2: Tensor | None = None) -> dict[str, Tensor]:
        """What the last forward in training showed (moe/balance.py), as 0-d tensors; nothing is read back from a GPU.

        `activity_E2` is `activity` of all experts over all ranks, where this rank has not all of it.
        """
        if self.routing is None or self.activity is None:
            return {}
        return activity_stats(self.activity if activity_E2 is None else activity_E2) | self.routing

    @torch.no_grad()
    def rebalance(self, rate: float) -> Tensor:
        """Moves each expert's bias by `rate` towards the mean load, forgets the load, and returns its violation, 0-d.

        The violation is the greatest load over the mean, minus 1: 0 when balanced, E / K - 1 when K experts take all.
        """
        load_E = self.load.float()
        mean = load_E.mean()
        self.router_bias += rate * torch.sign(mean - load_E)
        self.load.zero_()
        return load_E.max() / mean - 1


def router_logits(x_SD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in fp32 at least."""
    x_wide = wide(x_SD)
    return functional.linear(x_wide, weight_ED.to(x_wide.dtype))


def top_experts(score_SE: Tensor, k: int) -> Tensor:
    """Experts of the k greatest scores, falling.

    The lower of two equal experts wins; on a GPU the one that `topk` finds first, as a stable sort would take longer
    than all else around the products.
    """
    if score_SE.is_cuda:
        return score_SE.topk(k, dim=-1).indices
    return score_SE.argsort(dim=-1, descending=True, stable=True)[:, :k]


def sort_by_expert(chosen_R: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of copies by expert, then token; its inverse; and where each expert's copies end, int32.

    Keys are 16 bits wide, which halves the sort's time on a GPU.
    """
    key_R = chosen_R.to(torch.int16 if experts <= 2**15 else torch.int32)
    sorted_R, order_R = key_R.sort(stable=True)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    each_E = torch.arange(experts, dtype=key_R.dtype, device=key_R.device)
    return order_R, inverse_R, torch.searchsorted(sorted_R, each_E, right=True, out_int32=True)


def swiglu(h_RH: Tensor, weight_R: Tensor, limit: float | None) -> Tensor:
    """SwiGLU of gate and up columns side by side, each row times its weight in the weight's precision."""
    gate_RF, up_RF = h_RH.chunk(2, dim=-1)
    return (gated(gate_RF, up_RF, limit) * weight_R[:, None]).to(h_RH.dtype)


class Pieces(NamedTuple):
    """What stands around the experts' products; moe/kernels.py has the same by name, fused."""

    logits: Callable[[Tensor, Tensor], Tensor]
    top: Callable[[Tensor, int], Tensor]
    sort: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor, float | None], Tensor]


PLAIN = Pieces(router_logits, top_experts, sort_by_expert, swiglu)
FUSED_PIECES = Pieces(kernels.router_logits, kernels.top_experts, kernels.expert_order, kernels.swiglu)
FUSED_EXPERTS = 64  # auto's most: as many were measured (docs/benchmarks.md), and the sort's tables grow with them


def pieces(backend: str, device: torch.device, dtype: torch.dtype, experts: int, triton: bool) -> Pieces:
    """The pieces of a backend. `auto` takes the fused ones on a GPU with Triton, in bfloat16 and for few experts.

    They are as repeatable as the plain ones (no atomic additions), so a deterministic run takes them too.
    """
    fits = triton and device.type == "cuda" and dtype == torch.bfloat16 and experts <= FUSED_EXPERTS
    return FUSED_PIECES if backend == "triton" or (backend == "auto" and fits) else PLAIN


def summed(y_RD: Tensor, inverse_R: Tensor, k: int) -> Tensor:
    """Sum of each token's k copies, in fp32 at least."""
    if not torch.compiler.is_compiling():
        return y_RD[inverse_R].unflatten(0, (-1, k)).sum(1)
    # Term by term: of 8 and more the compiler makes a reduction that took three times as long (E64 k8 on an H100).
    place_SK = inverse_R.unflatten(0, (-1, k))
    total = wide(y_RD[place_SK[:, 0]])
    for j in range(1, k):
        total = total + y_RD[place_SK[:, j]]
    return total.to(y_RD.dtype)


class _Dispatch(torch.autograd.Function):
    """Row order // k of x for each copy. Its gradient is `_Combine`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_R: Tensor, inverse_R: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.k = k
        return x[order_R // k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return summed(grad, inverse_R, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sum of each token's k copies. Its gradient is `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.k = k
        return summed(y_RD, inverse_R, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad[order_R // ctx.k], None, None, None
