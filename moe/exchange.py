"""Expert parallelism: ranks that hold different experts send each other's tokens to and fro.

In: rows sorted by expert and their number for each of all E experts. Out: the experts' outputs for the same rows, in the
same order, as one rank that held all experts would give them. Each direction is one all-to-all per tensor, differentiable;
the split sizes come from an all-to-all of the counts, which costs a wait for the device. A rank may receive nothing, or
send nothing; all ranks of the team must run the same layers in the same order, and as many micro-batches.

Legend: R rows, E experts, L = E / ranks local ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from moe.parallel import Team, World


class Exchange:
    """Called around the expert products of one MoE layer (moe/experts.py)."""

    def __init__(self, team: Team) -> None:
        self.team = team

    def __call__(self, x_RD: Tensor, load_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`experts(rows, load_L)` on the owners, for rows [R, D] sorted by expert with `load_E` of each."""
        ranks = self.team.size
        given_E = load_E.to(torch.int64).contiguous()
        each = [len(given_E) // ranks] * ranks
        taken_RL = self.team.swap(given_E, each, each).view(ranks, -1)
        given, taken = given_E.view(ranks, -1).sum(1).tolist(), taken_RL.sum(1).tolist()
        # Rows arrive by sender, then expert; the products want them by expert, then sender (the one-rank order).
        expert_R = torch.arange(taken_RL.shape[1], device=load_E.device).repeat(ranks)
        order_R = expert_R.repeat_interleave(taken_RL.flatten()).argsort(stable=True)
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        arrived = _Permute.apply(_Swap.apply(x_RD, given, taken, self.team), order_R, back_R)
        y = _Permute.apply(experts(arrived, taken_RL.sum(0)), back_R, order_R)
        return _Swap.apply(y, taken, given, self.team)


def expert_names(model: nn.Module) -> list[str]:
    """Parameters of which each rank of the expert team holds its own slice: none unless the experts were split."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(getattr(module, "exchange", None), Exchange)
        for name, p in module.named_parameters()
        if p.ndim == 3
    ]


@torch.no_grad()
def split_experts(model: nn.Module, world: World) -> None:
    """Leaves this rank its slice of every layer's experts and gives the layers an `Exchange`.

    Layers are modules with an attribute `exchange`; their 3-D parameters are experts' weights. Build the optimiser
    after this call. Does nothing where every rank has all experts.
    """
    team = world.experts
    if team.size == 1:
        return
    for path, module in model.named_modules():
        if not hasattr(module, "exchange"):
            continue
        for name, p in module.named_parameters():
            if p.ndim != 3:
                continue
            if len(p) % team.size:
                raise ConfigError(
                    f"train.expert_ranks: must divide the experts, got {team.size} for {len(p)} in {path}.{name}"
                )
            p.data = p.data.chunk(team.size)[team.rank].clone()
        module.exchange = Exchange(team)


@torch.no_grad()
def whole_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The state dict of the model with all experts, on CPU: on rank 0, empty on the others. All ranks must call it."""
    tensors, split = model.state_dict(), set(expert_names(model))
    out = {}
    for name, value in tensors.items():
        whole = world.experts.join_parts(value) if name in split else value
        if world.rank == 0:
            out[name] = whole.detach().cpu()
    return out


class _Swap(torch.autograd.Function):
    """`Team.swap`; the gradient goes back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[int], taken: list[int], team: Team) -> Tensor:
        ctx.given, ctx.taken, ctx.team = given, taken, team
        return team.swap(x, given, taken)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.team.swap(grad, ctx.taken, ctx.given), None, None, None


class _Permute(torch.autograd.Function):
    """x[order] whose gradient is grad[back], instead of an indexed sum in thread order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.back], None, None
