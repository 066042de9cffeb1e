"""Trains a decoder on a mixture: same config, same mixture, same thread count, same bytes.

In: `TrainConfig`, a `TokenSource`, a folder. Out, in the folder: checkpoints (moe/checkpoint.py) and `metrics.jsonl`,
one line an update:

    step int, from 1          tokens int, so far       loss float, nats a token      lr float
    grad_norm float, before clipping                   load_violation [float], one per MoE layer (moe/experts.py)
    domain_loss {name: float}, domains of this batch   step_s, tokens_per_s float: alone differ between equal runs

A run may start from another run's last checkpoint, as one phase of training from the one before: it takes the weights,
router biases and optimiser moments, and begins its own schedule at step 1.

The same call on a folder with a checkpoint goes on from it, and ends with the weights and metrics of an undisturbed
run, bit for bit. A config or mixture that differs from the checkpoint's is refused. All checks come before the first
byte is written.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import ConfigError, StageError
from core.hashing import file_digest
from moe import checkpoint, optim
from moe.config import TrainConfig, differences
from moe.data import Batch, PackedRows, TokenSource
from moe.loss import next_token_loss
from moe.model import Decoder

METRICS = "metrics.jsonl"
TIME_FIELDS = ("step_s", "tokens_per_s")


@dataclass(frozen=True)
class TrainSummary:
    """`resumed_step` is None for a fresh run.

    `tokens_per_s` counts this call's updates only and is None without any.
    """

    checkpoint: Path
    steps: int
    resumed_step: int | None
    tokens: int
    loss: float
    parameters: int
    active_parameters: int
    threads: int
    train_s: float
    tokens_per_s: float | None


def train(
    config: TrainConfig,
    source: TokenSource,
    folder: Path,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    start: Path | None = None,
) -> TrainSummary:
    """Trains to `config.steps`, from the folder's checkpoint if it has one.

    A fresh run starts from the newest checkpoint in the folder `start`, whose weights have the hash `config.init`.
    `on_step` gets each metrics row after it is written.
    """
    rows = _preflight(config, source, start)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = _Run(config, rows, Path(folder))
    resumed = run.resume(start)
    began = time.perf_counter()
    with open(run.folder / METRICS, "a", encoding="utf-8") as metrics:
        for step in range(run.step, config.steps):
            row = run.update(rows.batch(step))
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            if run.step % config.checkpoint_steps == 0 or run.step == config.steps:
                os.fsync(metrics.fileno())
                run.save()
            if on_step is not None:
                on_step(row)
    return run.summary(resumed, time.perf_counter() - began)


class _Run:
    """Model, optimiser and step of one run folder."""

    def __init__(self, config: TrainConfig, rows: PackedRows, folder: Path) -> None:
        self.config, self.rows, self.folder, self.step = config, rows, folder, 0
        self.tokenizer = file_digest(config.tokenizer) if config.tokenizer else None
        self.model = Decoder(config.model, config.seed).train()
        self.optimizer = optim.build(self.model, config.optim)
        self.started_at_step = 0

    def resume(self, start: Path | None) -> int | None:
        """Takes the folder's checkpoint, or starts the folder with one of step 0.

        Returns the step it goes on from, None for a fresh run.
        """
        if not (self.folder / checkpoint.LATEST).is_file():
            checkpoint.check_empty(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.config.tokenizer:
                shutil.copyfile(self.config.tokenizer, self.folder / checkpoint.TOKENIZER)
            checkpoint.replace_text(self.folder / METRICS, "")
            if start is not None:
                checkpoint.restore(checkpoint.find(start), self.model, self.optimizer)
            self.save()
            return None
        path = checkpoint.find(self.folder)
        config, state = checkpoint.read(path)
        problems = differences(config, self.config)
        if state.mixture != self.rows.fingerprint:
            problems.append("mixture: the documents, their order or lengths are not those of the checkpoint")
        if state.tokenizer != self.tokenizer:
            problems.append(f"tokenizer: the checkpoint has {state.tokenizer}, this run {self.tokenizer}")
        if problems:
            raise ConfigError(
                f"train: {self.folder} holds another run, expected equal settings; use a new folder", *problems
            )
        checkpoint.restore(path, self.model, self.optimizer)
        self.step = self.started_at_step = state.step
        _cut_metrics(self.folder / METRICS, state.step)
        checkpoint.remove_old(self.folder, path.name, self.config.keep)
        return state.step

    def update(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step.

        Returns its metrics row. A loss or gradient that is not finite is a `StageError` and changes nothing.
        """
        began, optim_config = time.perf_counter(), self.config.optim
        lr = optim.learning_rate(self.step, self.config.steps, optim_config)
        x_BTD = self.model.hidden(torch.from_numpy(batch.inputs), torch.from_numpy(batch.segments))
        targets_S = torch.from_numpy(batch.targets).flatten()
        loss, nll_S = next_token_loss(x_BTD.flatten(0, 1), self.model.lm_head.weight, targets_S)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim_config.grad_clip)
        self._check_finite(loss.item(), grad_norm.item())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        violations = [layer.rebalance(optim_config.bias_rate) for layer in self.model.routed]
        self.step += 1
        step_s = time.perf_counter() - began
        return {
            "step": self.step,
            "tokens": self.step * targets_S.numel(),
            "loss": loss.item(),
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "load_violation": violations,
            "domain_loss": _domain_losses(nll_S.numpy(), batch.domains.ravel(), self.rows.source.domains),
            "step_s": step_s,
            "tokens_per_s": targets_S.numel() / step_s,
        }

    def save(self) -> None:
        checkpoint.save(
            self.folder,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            config=self.config,
            mixture=self.rows.fingerprint,
            tokenizer=self.tokenizer,
        )

    def summary(self, resumed_step: int | None, train_s: float) -> TrainSummary:
        batch_tokens = self.config.rows * self.config.model.context
        trained = (self.step - self.started_at_step) * batch_tokens
        total, active = self.model.parameter_counts()
        return TrainSummary(
            checkpoint=checkpoint.find(self.folder),
            steps=self.step,
            resumed_step=resumed_step,
            tokens=self.step * batch_tokens,
            loss=read_metrics(self.folder)[-1]["loss"],
            parameters=total,
            active_parameters=active,
            threads=torch.get_num_threads(),
            train_s=train_s,
            tokens_per_s=trained / train_s if trained else None,
        )

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise StageError(
                f"train: update {self.step + 1} is not finite, got loss {loss} and gradient norm {grad_norm}, "
                f"expected numbers; {checkpoint.find(self.folder).name} stands, lower optim.lr and use a new folder"
            )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def _cut_metrics(path: Path, step: int) -> None:
    """Leaves the rows up to `step`: those behind it are written again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
    if len(lines) < step:
        raise StageError(
            f"train: {path} lost rows, got {len(lines)}, expected {step} as the checkpoint says; "
            "restore it or train into a new folder"
        )
    checkpoint.replace_text(path, "".join(lines))


def _domain_losses(nll_S: np.ndarray, domains_S: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    tokens = np.bincount(domains_S, minlength=len(names))
    nats = np.bincount(domains_S, weights=nll_S, minlength=len(names))
    return {name: float(nats[d] / tokens[d]) for d, name in enumerate(names) if tokens[d]}


def _preflight(config: TrainConfig, source: TokenSource, start: Path | None) -> PackedRows:
    """All that can be wrong before any work, shown together."""
    model, problems = config.model, []
    if source.vocab_size > model.vocab_size:
        problems.append(
            f"train: the mixture's vocabulary exceeds the embedding, got {source.vocab_size} tokens, "
            f"expected at most {model.vocab_size}; raise model.vocab_size"
        )
    if source.eos != model.eos:
        problems.append(
            f"train: the mixture ends documents differently, got token {source.eos}, expected model.eos {model.eos}"
        )
    found = checkpoint.weights_digest(start) if start is not None else None
    if found != config.init:
        problems.append(
            f"train: the weights to start from are not those of the config, got {found} in {start}, expected {config.init}; "
            "set train.init to the hash of the weights there"
        )
    if config.tokenizer and not Path(config.tokenizer).is_file():
        problems.append(f"train: no tokenizer file, got {config.tokenizer}, expected a tokenizer.json")
    if problems:
        raise ConfigError(*problems)
    order_seed = config.seed if config.order_seed is None else config.order_seed
    rows = PackedRows(
        source, context=model.context, rows=config.rows, seed=order_seed, shuffle=config.shuffle, repeat=config.repeat
    )
    if rows.steps is not None and rows.steps < config.steps:
        raise ConfigError(
            f"train: the mixture is too short, got {rows.tokens} tokens = {rows.steps} steps of {config.rows} x "
            f"{model.context}, expected {config.steps}; lower train.steps, add tokens or set train.repeat"
        )
    return rows
