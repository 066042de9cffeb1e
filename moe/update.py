"""One update: micro-batches forward and backward, the optimiser's step, the routers' biases, and what was measured.

In: this rank's `Batch` and the step. Out: parameters changed in place, and `Figures` that are read from the device once. The loss
that is minimised, summed over micro-batches and ranks, is

    nll of the counted targets / their number over all ranks             (moe/loss.py; with z_loss)
    + mtp_loss * sum over heads of weight_h * (the same for head h)      weight_h = mtp_decay^h, normalised to sum 1
    + group_loss * sum over routed layers of their group loss            (moe/experts.py), the mean over micro-batches

so neither `micro_rows` nor the number of ranks changes it beyond rounding; but for the group loss, a product of means over
the tokens of one micro-batch. Padding has no part in the group loss, in the loads and in what is told of routing. Head h
(from 0) predicts at t the target of t + 1 + h, counted where that lies in the same segment and itself counts. With mtp_loss 0
heads are neither computed nor changed (moe/optim.py).

Between the start of an update and `read` nothing waits for a GPU, but the exchange of experts' rows (moe/exchange.py).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moe.config import TrainConfig
from moe.data import Batch
from moe.exchange import split_experts
from moe.experts import MoE
from moe.layers import Attention
from moe.loss import next_token_loss
from moe.model import Decoder
from moe.mtp import MTPHead
from moe.optim import Optimizer
from moe.parallel import World
from moe.schedule import bias_rate, learning_rate

PRECISION = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOAD_DIGITS = 5  # of the experts' shares in metrics.jsonl


@dataclass(frozen=True)
class Rows:
    """A batch on the device."""

    inputs: Tensor
    targets: Tensor
    segments: Tensor
    domains: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Rows":
        arrays = (batch.inputs, batch.targets, batch.segments, batch.domains, batch.mask)
        tensors = [torch.from_numpy(a) for a in arrays]
        if device.type == "cuda":
            tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return cls(*tensors)

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, low: int, count: int) -> "Rows":
        here = slice(low, low + count)
        return Rows(self.inputs[here], self.targets[here], self.segments[here], self.domains[here], self.mask[here])

    def filled(self, eos: int) -> Tensor:
        """[B, T], False in padding: an EOS behind an EOS that does not count (moe/data.py)."""
        return self.mask | (self.inputs != eos) | (self.targets != eos)

    def ahead(self, head: int) -> tuple[Tensor, Tensor]:
        """Targets [B, T] of an MTP head, and which of them count."""
        places = 1 + head
        targets, counts = torch.zeros_like(self.targets), torch.zeros_like(self.mask)
        targets[:, :-places] = self.targets[:, places:]
        counts[:, :-places] = self.mask[:, places:] & (self.segments[:, places:] == self.segments[:, :-places])
        return targets, counts


@dataclass(frozen=True)
class Figures:
    """What an update leaves on the device: sums over all ranks' targets, in fp64, until `read` brings them over."""

    step: int
    lr: float
    tokens: int
    heads: int
    domains: Sequence[str]
    grouped: bool  # whether experts are balanced by groups: with one group its loss is 1
    sums: Tensor  # [1 + heads nll, 1 + heads counted targets, 1 group loss, nll by domain, counted targets by domain]
    norm: Tensor
    violation: Tensor  # [routed layers]
    experts: dict[str, Tensor]  # [routed layers] each, `load` [routed layers, E]
    logit_bound: Tensor  # [layers], or empty

    def read(self) -> dict[str, Any]:
        """The fields of a metrics row; the one wait for the device."""
        parts = [self.sums, self.norm.view(1), self.violation, self.logit_bound, *self.experts.values()]
        values = torch.cat([part.double().flatten() for part in parts]).tolist()
        sums, (norm,), violation, logit_bound, *experts = _split(values, [part.numel() for part in parts])
        heads, size = 1 + self.heads, len(self.domains)
        nll, counted, (group,), by_domain, in_domain = _split(sums, [heads, heads, 1, size, size])
        losses = [n / max(c, 1.0) for n, c in zip(nll, counted, strict=True)]
        pairs = zip(self.domains, by_domain, in_domain, strict=True)
        row: dict[str, Any] = {"loss": losses[0], "lr": self.lr, "grad_norm": norm, "targets": int(counted[0])}
        row["domain_loss"] = {name: n / c for name, n, c in pairs if c}
        if self.heads:
            row["mtp_loss"] = losses[1:]
        if violation:
            row["load_violation"] = violation
        if violation and self.grouped:
            row["group_loss"] = group
        if experts:
            row["experts"] = dict(zip(self.experts, experts, strict=True))
            loads = [round(share, LOAD_DIGITS) for share in row["experts"]["load"]]
            row["experts"]["load"] = _split(loads, [len(loads) // len(violation)] * len(violation))
        if logit_bound:
            row["attention_logit_bound"] = logit_bound
        return row


def _split(values: list[float], sizes: Sequence[int]) -> list[list[float]]:
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class Updater:
    """Runs the updates of one run on one rank."""

    def __init__(
        self, config: TrainConfig, model: Decoder, optimizer: Optimizer, world: World, domains: Sequence[str]
    ) -> None:
        self.config, self.model, self.optimizer, self.world, self.domains = config, model, optimizer, world, domains
        weights = [config.optim.mtp_decay**h for h in range(len(model.mtp))] if config.optim.mtp_loss else []
        self.head_weights = [config.optim.mtp_loss * w / sum(weights) for w in weights]  # none: no head is computed

    def run(self, batch: Batch, step: int, watch: bool) -> Figures:
        """Update `step`, counted from 0; `watch` takes the experts' statistics too."""
        optim, rows = self.config.optim, Rows.of(batch, self.world.device)
        for layer in self.model.routed:
            layer.watch = watch or self.config.compile  # a compiled layer keeps to one course
        counted = self.world.sum(self._counted(rows))
        micro = self.config.micro_rows or len(rows)
        local = torch.zeros(
            2 + len(self.head_weights) + 2 * len(self.domains), dtype=torch.float64, device=rows.inputs.device
        )
        self.optimizer.zero_grad()
        for low in range(0, len(rows), micro):
            part = rows.part(low, micro)
            share = len(part) / (len(rows) * self.world.size)
            loss, sums = self._losses(part, counted, share)
            loss.backward()
            if micro < len(rows):
                self.optimizer.add_up()
            local += sums
        norm = self.optimizer.reduce()
        lr = learning_rate(step, self.config.steps, optim)
        self.optimizer.step(lr)
        loads_LE = self._rebalance(bias_rate(step, self.config.steps, optim))
        total, heads = self.world.sum(local), 1 + len(self.head_weights)
        return Figures(
            step=step,
            lr=lr,
            tokens=rows.inputs.numel() * self.world.size,
            heads=len(self.head_weights),
            domains=self.domains,
            grouped=optim.expert_groups > 1,
            sums=torch.cat((total[:heads], counted.double(), total[heads:])),
            norm=norm,
            violation=(loads_LE.amax(1) / loads_LE.mean(1) - 1) if len(loads_LE) else norm.new_zeros(0),
            experts=self._experts(loads_LE) if watch and len(loads_LE) else {},
            logit_bound=attention_logit_bounds(self.model) if watch else norm.new_zeros(0),
        )

    def _counted(self, rows: Rows) -> Tensor:
        """This rank's counted targets, of the next token and of each MTP head, int64."""
        masks = [rows.mask, *(rows.ahead(h)[1] for h in range(len(self.head_weights)))]
        return torch.stack([mask.sum() for mask in masks])

    def _losses(self, rows: Rows, counted: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The micro-batch's part of the loss, and its sums as in `Figures` without the numbers of targets."""
        model, optim = self.model, self.config.optim
        fused = self.config.compile
        filled_S, routed = rows.filled(model.config.eos).flatten(), model.routed
        for layer in routed:
            layer.counted = filled_S
        if self.head_weights:
            stream_BTD, states = model.all_states(rows.inputs, rows.segments)
        else:
            stream_BTD, states = model.states(rows.inputs, rows.segments), []
        for layer in routed:
            layer.counted = None
        loss, nll_S = next_token_loss(
            model.norm(stream_BTD).flatten(0, 1),
            model.lm_head.weight,
            rows.targets.flatten(),
            rows.mask.flatten(),
            z_loss=optim.z_loss,
            total=counted[0],
            compiled=fused,
        )
        sums = [nll_S.sum(dtype=torch.float64)]
        for h, state_BTD in enumerate(states):
            head, (targets_BT, counts_BT) = cast(MTPHead, model.mtp[h]), rows.ahead(h)
            x_SD = head.shared_head_norm(state_BTD).flatten(0, 1)
            ahead, ahead_nll_S = next_token_loss(
                x_SD,
                head.output.weight,
                targets_BT.flatten(),
                counts_BT.flatten(),
                total=counted[1 + h],
                compiled=fused,
            )
            loss = loss + self.head_weights[h] * ahead
            sums.append(ahead_nll_S.sum(dtype=torch.float64))
        group = sum((layer.group_loss for layer in model.routed if layer.group_loss is not None), loss.new_zeros(()))
        if optim.group_loss:
            loss = loss + optim.group_loss * share * group
        sums.append(group.detach().double() * share)
        return loss, torch.cat((torch.stack(sums), self._by_domain(nll_S, rows)))

    def _by_domain(self, nll_S: Tensor, rows: Rows) -> Tensor:
        """Sums of losses and numbers of counted targets, by domain.

        Comparisons instead of a scatter: the same bits from run to run on a GPU.
        """
        mask_S, domain_S = rows.mask.flatten(), rows.domains.flatten()
        nll, counts = [], []
        for d in range(len(self.domains)):
            here_S = (domain_S == d) & mask_S
            nll.append(torch.where(here_S, nll_S, 0).sum(dtype=torch.float64))
            counts.append(here_S.sum(dtype=torch.float64))
        return torch.stack(nll + counts)

    def _rebalance(self, rate: float) -> Tensor:
        """Moves the routers' biases by all ranks' loads [routed layers, E], which it returns."""
        layers = self.model.routed
        if not layers:
            return torch.zeros(0, 0)
        self.world.sum_loads(layers)
        loads_LE = torch.stack([layer.load.float() for layer in layers])
        for layer in layers:
            layer.rebalance(rate)
        return loads_LE

    def _experts(self, loads_LE: Tensor) -> dict[str, Tensor]:
        """Statistics of each routed layer in the last micro-batch, and the shares of all tokens.

        What compares experts is over all of them and all ranks' rows; what describes routing is the mean over ranks.
        """
        layers, team = self.model.routed, self.world.experts
        own = torch.stack([layer.activity for layer in layers if layer.activity is not None])
        parts = own.new_zeros(team.size, *own.shape)  # [ranks of a team, layers, experts of a rank, 2]
        parts[team.rank] = own
        activity = self.world.sum(parts).transpose(0, 1).flatten(1, 2)
        found = [layer.stats(activity_E2) for layer, activity_E2 in zip(layers, activity, strict=True)]
        means = {
            name: self.world.sum(torch.stack([one[name].float() for one in found])) / self.world.size
            for name in found[0]
        }
        return means | {"load": loads_LE / loads_LE.sum(1, keepdim=True)}


def placed(model: Decoder, config: TrainConfig, world: World) -> Decoder:
    """The model as it trains: on the device, in its precision, with this rank's experts, compiled layer by layer.

    A layer whose experts are split runs uncompiled: the rows that a rank takes differ from call to call, and so many
    shapes would be compiled anew until torch gave up.
    """
    model = model.to(world.device, PRECISION[config.precision]).train()
    for layer in model.routed:
        layer.expert_groups = config.optim.expert_groups
    split_experts(model, world)
    if config.compile:
        for block in (*model.model["layers"].children(), *model.mtp):
            if all(layer.exchange is None for layer in block.modules() if isinstance(layer, MoE)):
                block.compile(dynamic=False)
    return model


@torch.no_grad()
def attention_logit_bounds(model: Decoder) -> Tensor:
    """What no attention logit of a layer can exceed, [layers].

    q/k norm gives vectors of RMS 1 times the gains, and rotations keep lengths: sqrt(C) * max |1 + w_q| * max |1 + w_k|.
    """
    layers = [m for m in model.model["layers"].modules() if isinstance(m, Attention)]
    gains = [(1 + a.q_norm.weight.float()).abs().amax() * (1 + a.k_norm.weight.float()).abs().amax() for a in layers]
    return torch.stack(gains) * model.config.head_dim**0.5
