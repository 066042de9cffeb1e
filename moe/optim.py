"""The optimiser: Muon for matrices, AdamW for embeddings, heads, gains and biases, on any number of ranks.

In: a model, an `OptimConfig`, a `World`, and gradients that are this rank's part of a sum. Out: updated weights, equal on
all ranks, and state tensors by parameter name. Both kinds of update work on slabs (moe/slab.py): gradients are summed
and brought to the owner of each whole matrix, who alone keeps its momentum (and, for bfloat16 weights, its fp32
original), updates it, and sends the weight to all. On one rank nothing is sent and a slab only batches the work.

A file of state tensors has whole tensors under parameter names, so it can be read by any number of ranks:

    updates                 int64, number of updates so far
    <name>.momentum         matrices                    <name>.exp_avg, <name>.exp_avg_sq   the others
    <name>.master           fp32 weights, where the model's have fewer bits

Weight decay falls on matrices and output heads; embeddings, gains and biases have none (the release decays gains too).
State is fp32 (fp64 for fp64 weights), and so are sums of several micro-batches' gradients, over micro-batches and ranks
(`Optimizer.add_up`): of 512 equal bfloat16 numbers, added one by one, the second half is lost. Gradients of a single
micro-batch stay in the weights' type, in memory and between ranks. Cost on one H100, 1B parameters: about 46 ms an update
for Muon's matrices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from core.errors import StageError
from moe import muon, schedule
from moe.config import OptimConfig
from moe.exchange import expert_names
from moe.parallel import World
from moe.slab import Kind, Slab, Unit, element_slabs, matrix_slabs

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def build(model: nn.Module, config: OptimConfig, world: World | None = None, *, compiled: bool = False) -> "Optimizer":
    """The optimiser of the parameters that train; the model must be on its device, its experts split if they will be.

    `compiled` fuses each slab's Muon update by torch.compile (GPU: 2.8 instead of 4.0 ms a layer).
    """
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not frozen(name, config))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Optimizer(trained, set(expert_names(model)), config, world or World.alone(), compiled)


def frozen(name: str, config: OptimConfig) -> bool:
    """Whether a parameter stays as it is: routers if they are frozen, and MTP heads whose loss has no weight."""
    return (config.freeze_router and name.endswith("moe.gate.weight")) or (
        not config.mtp_loss and name.startswith("mtp.")
    )


class Optimizer:
    """`reduce`, look at the norm, `step`, `zero_grad`; all ranks call each of them, and the state's two, together.

    `add_up` comes behind each backward pass where an update has several.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sharded: set[str],
        config: OptimConfig,
        world: World,
        compiled: bool,
    ) -> None:
        self.parameters, self.config, self.world, self.updates = dict(parameters), config, world, 0
        self.slabs = list(_slabs(self.parameters, sharded, config, world))
        self._muon: Callable[..., None] = muon.update
        if compiled:
            # One graph a slab's shape; past the limit torch would go on uncompiled without a word.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, len(self.slabs) + 8)
            self._muon = torch.compile(muon.update, fullgraph=True, dynamic=False)
        self._norm: Tensor | None = None
        self._sums: dict[str, Tensor] | None = None  # of parameters whose own type is narrower than the sum's

    @torch.no_grad()
    def add_up(self) -> None:
        """Takes the gradients of a backward pass into sums in fp32 or wider, and frees them.

        Where the weights' type is that wide already, gradients add up where they are.
        """
        self._sums = {} if self._sums is None else self._sums
        for name, p in self.parameters.items():
            if p.grad is None or p.grad.dtype == (wide := _wide(p.dtype)):
                continue
            if name in self._sums:
                self._sums[name].add_(p.grad)
            else:
                self._sums[name] = p.grad.to(wide)
            p.grad = None

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks and returns their norm before clipping, 0-d, equal on all ranks.

        `step` calls it if nobody did; call it first to stop at a norm that is not finite.
        """
        if self.world.size == 1:
            grads = [grad for grad in self._grads().values() if grad is not None]
        else:
            for slab in self.slabs:
                slab.grad = self._reduced(slab)
            grads = [slab.grad for slab in self.slabs if slab.grad is not None]
        self._norm = self.world.sum(_square_sum(grads)).sqrt()
        return self._norm

    @torch.no_grad()
    def step(self, lr: float, momentum: float | None = None) -> None:
        """One update of all weights; gradients are scaled down to a norm of `grad_clip` at most.

        `momentum`: Muon's, by default the schedule's. A parameter without a gradient counts as one with zeros.
        """
        norm = self.reduce() if self._norm is None else self._norm
        scale = (self.config.grad_clip / (norm + CLIP_EPS)).clamp(max=1.0)
        warm = schedule.momentum(self.updates, self.config)
        # 0-d tensors on the CPU: a new rate must not compile the update again.
        rates = torch.tensor([lr, warm if momentum is None else momentum], dtype=torch.float64)
        for slab in self.slabs:
            self._update(slab, scale, rates)
        self.updates += 1
        self._norm = None

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._norm = self._sums = None
        for p in self.parameters.values():
            p.grad = None
        for slab in self.slabs:
            slab.grad = None

    @property
    def state_bytes(self) -> int:
        """Memory of this rank's share of the state."""
        return sum(t.nbytes for slab in self.slabs for t in slab.state.values())

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU, on rank 0; empty on other ranks, and before the first update."""
        out: dict[str, Tensor] = {}
        if not self.updates:
            return out
        for slab in self.slabs:
            for key, own in slab.state.items():
                self._gather(slab, key, own, out)
        return {"updates": torch.tensor(self.updates), **out} if self.world.rank == 0 else {}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`; every rank gets the whole mapping. Weights must be in place before."""
        self._check(tensors)
        self.updates = int(tensors["updates"]) if tensors else 0
        for slab in self.slabs:
            slab.state = {}
            if tensors:
                for key, dtype in _state_keys(slab).items():
                    mine = {name: self._slice(slab, name, tensors[f"{name}.{key}"]) for name in slab.names}
                    slab.state[key] = slab.own(mine, dtype)

    def _update(self, slab: Slab, scale: Tensor, rates: Tensor) -> None:
        if not slab.state:
            self._start(slab)
        wide, state = _wide(slab.kind.dtype), slab.state
        grad = self._reduced(slab) if slab.grad is None else slab.grad
        grad, slab.grad = grad.to(wide) * scale.to(wide), None
        weights = self._weights()
        weight = state["master"] if "master" in state else slab.own(weights, wide)
        if not slab.units:
            pass  # nothing of it is this rank's
        elif slab.shape:
            self._muon(weight, state["momentum"], grad, rates[0], rates[1], slab.kind.decay)
        else:
            c = self.config
            adamw(
                [weight], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                [torch.full((), float(self.updates), device=weight.device)], fused=True, amsgrad=False, beta1=c.beta1,
                beta2=c.beta2, lr=float(rates[0]), weight_decay=slab.kind.decay, eps=c.eps, maximize=False,
            )  # fmt: skip
        slab.unpack(slab.whole(weight), weights)

    def _start(self, slab: Slab) -> None:
        for key, dtype in _state_keys(slab).items():
            weight = slab.own(self._weights(), dtype)
            slab.state[key] = weight if key == "master" else torch.zeros_like(weight)

    def _gather(self, slab: Slab, key: str, own: Tensor, out: dict[str, Tensor]) -> None:
        """Adds the slab's part of whole tensors to `out` on rank 0."""
        team = self.world.experts
        whole = slab.whole(own)
        parts = team.join_parts(whole[None]) if slab.kind.sharded else whole[None]
        if self.world.rank > 0:
            return
        for name in slab.names:
            p = self.parameters[name]
            shape = (len(p) * len(parts), *p.shape[1:])
            if f"{name}.{key}" not in out:
                out[f"{name}.{key}"] = torch.empty(shape, dtype=own.dtype)
        for i, part in enumerate(parts):
            slab.unpack(part.cpu(), {n: out[f"{n}.{key}"].chunk(len(parts))[i] for n in slab.names})

    def _slice(self, slab: Slab, name: str, whole: Tensor) -> Tensor:
        """This rank's experts, or all of a tensor that every rank has."""
        team = self.world.experts
        return whole.chunk(team.size)[team.rank] if slab.kind.sharded else whole

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {
            f"{name}.{key}": self.parameters[name].numel() * (self.world.experts.size if slab.kind.sharded else 1)
            for slab in self.slabs
            for name in slab.names
            for key in _state_keys(slab)
        } | {"updates": 1}
        found = {name: t.numel() for name, t in tensors.items()}
        wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        if tensors and wrong:
            raise StageError(
                f"optim: the state is another optimiser's, got {found.get(wrong[0], 'no')} values of {wrong[0]} and "
                f"{len(wrong) - 1} more such, expected {wanted.get(wrong[0], 'none')}; use the config of its run"
            )

    def _reduced(self, slab: Slab) -> Tensor:
        """The slab's gradients in the type in which they were added up, which is the same on all ranks."""
        dtype = slab.kind.dtype if self._sums is None else _wide(slab.kind.dtype)
        return slab.reduced(self._grads(), dtype)

    def _grads(self) -> dict[str, Tensor | None]:
        """Of each parameter the sum over micro-batches, or its only gradient."""
        sums = self._sums or {}
        return {name: sums.get(name, p.grad) for name, p in self.parameters.items()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}


def _slabs(
    parameters: Mapping[str, nn.Parameter], sharded: set[str], config: OptimConfig, world: World
) -> Iterator[Slab]:
    """Matrices by shape, then all else by decay; within each by type, and by whether ranks hold different experts."""
    units: dict[tuple[Kind, tuple[int, int]], list[Unit]] = {}
    others: dict[Kind, dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        decayed = p.ndim > 1 and "embed_tokens" not in name
        split = name in sharded
        team = world.replicas if split else world.everyone
        kind = Kind(team, p.device, p.dtype, config.weight_decay if decayed else 0.0, split)
        shapes = muon.matrices(name, p) if config.optimizer == "muon" else []
        start = 0
        for m, n in shapes:
            units.setdefault((kind, (m, n)), []).append(Unit(name, start, (m, n)))
            start += m * n
        if not shapes:
            others.setdefault(kind, {})[name] = p
    held = {team: [0] * team.size for team in (world.everyone, world.replicas)}
    for (kind, _), same in units.items():
        yield from matrix_slabs(same, kind, held[kind.team])
    for kind, rest in others.items():
        yield from element_slabs(rest, kind)


def _state_keys(slab: Slab) -> dict[str, torch.dtype]:
    """What the owner of a slab keeps, with its type."""
    wide = _wide(slab.kind.dtype)
    keys = ("momentum",) if slab.shape else ("exp_avg", "exp_avg_sq")
    return dict.fromkeys(keys if wide == slab.kind.dtype else (*keys, "master"), wide)


def _square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all gradients, in fp32 or wider."""
    device = grads[0].device if grads else torch.device("cpu")
    squares = [torch.zeros((), device=device)]
    for dtype in sorted({g.dtype for g in grads}, key=str):
        norms = torch._foreach_norm([g for g in grads if g.dtype == dtype], 2.0, _wide(dtype))
        squares.append(torch.stack(norms).square().sum())
    return torch.stack([s.to(torch.promote_types(squares[-1].dtype, torch.float32)) for s in squares]).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
