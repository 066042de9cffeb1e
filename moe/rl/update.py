"""One update of the policy: forward and backward over trajectories, the optimiser's step, and what was measured.

In: trajectories with their snapshot's log-probabilities and advantages, and the step. Out: parameters changed in place, and the
fields of a metrics row. A row of the batch is the model's prefix, prompt and answer, padded behind; the loss (moe/rl/loss.py)
counts the answer's tokens, the one that ended it too. `micro_rows` changes nothing beyond rounding. An update in which no token
with an advantage stays changes no weight: momentum alone would go on moving them.

Legend: B trajectories, T positions of the longest row, A tokens of the longest answer, S real tokens of answers, D model width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import StageError
from moe.metrics import finite
from moe.model import Decoder
from moe.optim import Optimizer
from moe.rl.config import RLConfig
from moe.rl.loss import Masks, Policy, policy_loss, token_logprobs, token_weights
from moe.rl.rollouts import Trajectory
from moe.schedule import learning_rate
from moe.update import attention_logit_bounds

QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Rows:
    """Trajectories on the device."""

    inputs: Tensor  # [B, T]
    filled: Tensor  # [B, T] bool
    place: Tensor  # [B, A] position whose state predicts a token of the answer
    tokens: Tensor  # [B, A]
    real: Tensor  # [B, A] bool

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        start: Sequence[int],
        device: torch.device,
    ) -> "Rows":
        whole = [[*start, *p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
        inputs_BT, filled_BT = padded(whole, torch.int64)
        tokens_BA, real_BA = padded(answers, torch.int64)
        first_B1 = torch.tensor([len(start) + len(p) - 1 for p in prompts])[:, None]
        place_BA = (first_B1 + torch.arange(tokens_BA.shape[1])).clamp(max=inputs_BT.shape[1] - 1)
        return cls(*(t.to(device) for t in (inputs_BT, filled_BT, place_BA, tokens_BA, real_BA)))


@dataclass
class Seen:
    """What the micro-batches of an update showed, on the host."""

    loss: float = 0.0
    signal: int = 0  # tokens that stay and have an advantage
    logp: list[np.ndarray] = field(default_factory=list)  # of real tokens, as are the next four
    old: list[np.ndarray] = field(default_factory=list)
    sampler: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)
    ratio: list[np.ndarray] = field(default_factory=list)
    inside: list[np.ndarray] = field(default_factory=list)  # the token's own mask
    kept: list[np.ndarray] = field(default_factory=list)  # both masks
    trajectory_ratio: list[np.ndarray] = field(default_factory=list)
    trajectory_inside: list[np.ndarray] = field(default_factory=list)
    confidence: list[np.ndarray] = field(default_factory=list)  # [routed layers], with the tokens behind it
    filled: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, logp_BA: Tensor, entropy_S: Tensor, policy: Policy, found: Masks) -> None:
        real_BA = policy.real
        self.loss += loss.item()
        self.signal += int((found.kept & (policy.advantage != 0)[:, None]).sum())
        for into, values in (
            (self.logp, logp_BA.detach()[real_BA]), (self.old, policy.old[real_BA]), (self.entropy, entropy_S),
            (self.sampler, policy.sampler[real_BA]), (self.ratio, found.ratio[real_BA]),
            (self.inside, found.token[real_BA]), (self.kept, found.kept[real_BA]),
            (self.trajectory_ratio, found.trajectory_ratio), (self.trajectory_inside, found.trajectory),
        ):  # fmt: skip
            into.append(values.double().cpu().numpy())

    def row(self) -> dict[str, Any]:
        """The fields of a metrics row that come from the forward passes."""
        logp, old, sampler, ratio, whole = (
            np.concatenate(v) for v in (self.logp, self.old, self.sampler, self.ratio, self.trajectory_ratio)
        )
        difference = old - sampler
        out: dict[str, Any] = {
            "loss": self.loss,
            "answer_nll": float(-logp.mean()),
            "entropy": float(np.concatenate(self.entropy).mean()),
            "masked_token_fraction": float(1 - np.concatenate(self.inside).mean()),
            "masked_trajectory_fraction": float(1 - np.concatenate(self.trajectory_inside).mean()),
            "kept_token_fraction": float(np.concatenate(self.kept).mean()),
            "token_ratio": _quantiles(ratio),
            "trajectory_ratio": _quantiles(whole),
            # pi_old against the sampler: between two engines with the same weights it is their numerical mismatch.
            "mismatch": {
                "mean": float(np.abs(difference).mean()),
                "max": float(np.abs(difference).max()),
                "kl": float((np.expm1(difference) - difference).mean()),
            },
        }
        if self.confidence and len(self.confidence[0]):
            out["routing_confidence"] = np.average(self.confidence, axis=0, weights=self.filled).tolist()
        return out


class PolicyUpdater:
    """Runs the updates of one run."""

    def __init__(
        self, config: RLConfig, model: Decoder, optimizer: Optimizer, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.config, self.model, self.optimizer, self.prompts = config, model, optimizer, prompts
        self.device = model.lm_head.weight.device

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Of each answer's tokens, by the weights as they are."""
        self.model.eval()
        out: list[list[float]] = []
        for part in self._parts(trajectories):
            rows = self._rows(part)
            logp_BA, _ = self._forward(rows)
            out += [logp_A[real_A].tolist() for logp_A, real_A in zip(logp_BA, rows.real, strict=True)]
        self.model.train()
        return out

    def run(self, trajectories: Sequence[Trajectory], advantages: np.ndarray, step: int) -> dict[str, Any]:
        """Update `step`, counted from 0, on trajectories that are all in the loss. Returns fields of its metrics row.

        A loss or gradient that is not finite is a `StageError`, before any weight has changed.
        """
        lr = learning_rate(step, self.config.steps, self.config.optim)
        if not trajectories:
            return {"loss": 0.0, "lr": lr, "grad_norm": 0.0, "skipped": True}
        seen = self.backward(trajectories, advantages)
        norm = self.optimizer.reduce()
        row = seen.row() | {"lr": lr, "grad_norm": norm.item(), "skipped": self._skipped(seen, norm)}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise StageError(
                f"rl: update {step + 1} is not finite, got loss {row['loss']} and gradient norm {row['grad_norm']}, expected "
                "numbers; the newest checkpoint stands: lower optim.lr, in a new folder"
            )
        if not row["skipped"]:
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        return finite(row | self._watched())

    def backward(self, trajectories: Sequence[Trajectory], advantages: np.ndarray) -> Seen:
        """Leaves the loss's gradients in the parameters."""
        seen, lengths = Seen(), torch.tensor([len(t.tokens) for t in trajectories])
        self.optimizer.zero_grad()
        start = 0
        for part in self._parts(trajectories):
            policy = self._policy(part, advantages[start : start + len(part)], lengths)
            start += len(part)
            rows = self._rows(part)
            for layer in self.model.routed:
                layer.counted = rows.filled.flatten()
            logp_BA, entropy_S = self._forward(rows)
            loss, found = policy_loss(logp_BA, policy, self.config)
            loss.backward()
            if len(part) < len(trajectories):
                self.optimizer.add_up()
            seen.add(loss, logp_BA, entropy_S, policy, found)
            self._route(seen, int(rows.filled.sum()))
        return seen

    def _skipped(self, seen: Seen, norm: Tensor) -> bool:
        return not norm.item() if self.config.loss != "mispo" else not seen.signal

    def _parts(self, trajectories: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
        micro = self.config.micro_rows or len(trajectories)
        for low in range(0, len(trajectories), micro):
            yield trajectories[low : low + micro]

    def _rows(self, part: Sequence[Trajectory]) -> Rows:
        prompts = [self.prompts[t.task] for t in part]
        return Rows.of(prompts, [t.tokens for t in part], self.model.prefix, self.device)

    def _forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the answers' tokens [B, A], 0 in padding, and entropies [S]."""
        x_BTD = self.model.states(rows.inputs)
        for layer in self.model.routed:
            layer.counted = None
        index_S, at_S = rows.real.nonzero(as_tuple=True)
        x_SD = self.model.norm(x_BTD[index_S, rows.place[rows.real]])
        logp_S, entropy_S = token_logprobs(
            x_SD, self.model.lm_head.weight, rows.tokens[rows.real], self.config.temperature
        )
        return logp_S.new_zeros(rows.real.shape).index_put((index_S, at_S), logp_S), entropy_S

    def _policy(self, part: Sequence[Trajectory], advantages: np.ndarray, lengths: Tensor) -> Policy:
        old_BA, real_BA = padded([t.old_logprobs or () for t in part], torch.float64)
        sampler_BA, _ = padded([t.logprobs for t in part], torch.float64)
        tensors = (
            old_BA,
            sampler_BA,
            real_BA,
            torch.from_numpy(advantages),
            token_weights(lengths, real_BA, self.config),
        )
        wide = torch.promote_types(self.model.lm_head.weight.dtype, torch.float32)
        return Policy(*(t.to(self.device, wide if t.is_floating_point() else None) for t in tensors))

    def _route(self, seen: Seen, filled: int) -> None:
        found = [layer.routing["confidence"].item() for layer in self.model.routed if layer.routing is not None]
        seen.confidence.append(np.array(found))
        seen.filled.append(filled)

    def _watched(self) -> dict[str, Any]:
        """What alarms read of the experts (of the last micro-batch, but for the loads) and of attention."""
        layers = self.model.routed
        out: dict[str, Any] = {"attention_logit_bound": attention_logit_bounds(self.model).tolist()}
        if layers:
            stats = [layer.stats() for layer in layers]
            out["experts"] = {name: [one[name].item() for one in stats] for name in stats[0]}
            out["load_violation"] = [layer.rebalance(0.0).item() for layer in layers]
        return out


def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, longest], 0 behind each row's end, and which of it is real."""
    longest = max(len(row) for row in rows)
    values = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype)
    real = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return values, real


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))
