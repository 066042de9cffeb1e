"""Reinforcement learning of a decoder on tasks with a reward: generations of answers, and updates on them.

In: `RLConfig`, `Tasks`, a reward, the folder of a trained model. Out: the run's folder (moe/rl/folder.py), whose checkpoints are
read by all that reads a training run's, and in it `metrics.jsonl`, one line an update:

    step int, from 1        generation int, from 0        tokens int, trained on so far      skipped bool, no weight changed
    reward_mean, reward_std, truncated_fraction float, answer_tokens {mean, max}: of the whole generation's answers
    equal_groups, rejected_groups int: of the generation's groups, without advantages, and without rewards
    loss, answer_nll, entropy float, nats a token          lr, grad_norm (before clipping) float
    masked_token_fraction, masked_trajectory_fraction: outside their bounds; kept_token_fraction: inside both
    token_ratio, trajectory_ratio {min, p01, p50, p99, max}: pi_old / pi_sampler
    mismatch {mean, max, kl}: of log pi_old against log pi_sampler at the sampled tokens; with staleness 0 rounding alone
    routing_confidence, load_violation [float] of the routed layers, experts, attention_logit_bound, alarms as moe/trainer.py
    sample_s of the generation at its first update, step_s, tokens_per_s float, memory_bytes int: alone differ between equal runs

Fields from `loss` to `routing_confidence` but lr and grad_norm are absent where every group was dropped. `answer_nll` is what the
alarm `loss_spike` watches: a policy to which its own answers become unlikely.

A checkpoint follows each update (or each `checkpoint_steps`-th), and the same call goes on from the newest: on one CPU with the
bits of an undisturbed run, as a generation is a function of weights, seed and number, and lies in a file with its rewards. With
`staleness` n generation g is sampled by the weights from before generation g - n. One rank.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe
from core.errors import ConfigError, StageError
from core.hashing import file_digest
from moe import checkpoint
from moe.alarms import Alarm, Alarms, Limits
from moe.device import device_of, memory_bytes, repeatable
from moe.generate import load_tokenizer
from moe.memory import training_memory
from moe.metrics import TIME_FIELDS, MetricsFile, check_tensorboard, cut_metrics, read_metrics
from moe.model import Decoder
from moe.optim import build
from moe.parallel import World
from moe.rl import rollouts
from moe.rl.config import RLConfig, identity_digest
from moe.rl.folder import begin, held, newest, oldest_step, tokenizer_file
from moe.rl.rollouts import Generation
from moe.rl.tasks import WATCHED, Reward, Tasks
from moe.rl.update import PolicyUpdater
from moe.update import placed

TIMES = (*TIME_FIELDS, "sample_s")


@dataclass(frozen=True)
class RLSummary:
    """`resumed_step` is None for a fresh run; rewards are the means of the first and the last generation."""

    checkpoint: Path
    steps: int
    resumed_step: int | None
    first_reward: float
    last_reward: float
    masked_trajectory_fraction: float | None  # mean over updates
    skipped_updates: int  # that changed no weight: all of them where every answer is cut, or every reward equal
    alarms: tuple[str, ...]
    train_s: float


def reinforce(
    config: RLConfig,
    tasks: Tasks,
    reward: Reward,
    folder: Path,
    start: Path,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    *,
    limits: Limits | None = None,
) -> RLSummary:
    """Trains to `config.steps`, from the folder's checkpoint if it has one, else from the weights of `start`.

    `on_step` gets each metrics row after it is written. A config or tasks that differ from the folder's are refused, and all
    checks come before the first byte; a run that stops overwrites nothing.
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"rl: runs on one rank, got {ranks} of torchrun, expected 1; start it without torchrun")
    device = device_of(config.device, "rl.device")
    if config.tensorboard:
        check_tensorboard()
    folder, start = Path(folder), Path(start)
    found = newest(config, tasks, folder)
    if found is None and not start.is_dir():
        raise ConfigError(f"rl: nothing to start from, got {start}, expected the folder of a trained model")
    model = checkpoint.load(found[0]) if found is not None else moe.load(start)
    if found is None and (broken := checkpoint.not_finite(model.state_dict())):
        raise ConfigError(
            f"rl: {start} has weights that are not finite, got {broken}, expected numbers; choose another"
        )
    room = model.config.context - len(model.prefix) + 1
    rollouts.check_tasks(tasks, config, room, model.config.vocab_size)
    tokenizer = load_tokenizer(folder if found is not None else start)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    with held(folder):
        latest = checkpoint.find(folder) if (folder / checkpoint.LATEST).is_file() else None
        if latest != (None if found is None else found[0]):
            raise StageError(
                f"rl: another process trained in {folder} meanwhile, got {latest}, expected what was there before; run the "
                "same command again"
            )
        sizes = config.train_config(model.config, None, None)
        with repeatable(config.deterministic, device), training_memory(sizes, folder, 1):
            run = _Run(config, tasks, reward, folder, start, model, tokenizer, found, device, limits)
            began = time.perf_counter()
            run.to_end(on_step)
        return run.summary(time.perf_counter() - began)


class _Run:
    """Model, optimiser and step of one run folder."""

    def __init__(
        self,
        config: RLConfig,
        tasks: Tasks,
        reward: Reward,
        folder: Path,
        start: Path,
        model: Decoder,
        tokenizer: Any,
        found: tuple[Path, checkpoint.State] | None,
        device: torch.device,
        limits: Limits | None,
    ) -> None:
        self.config, self.tasks, self.reward, self.folder, self.tokenizer = config, tasks, reward, folder, tokenizer
        self.resumed_step = None if found is None else found[1].step
        self.step = self.resumed_step or 0
        init: str | None = None
        own: str | None = None
        if found is None:
            init, own = rollouts.weights_hash(model), file_digest(tokenizer_file(start))
        else:
            init, own = checkpoint.read(found[0])[0].init, found[1].tokenizer
        self.train_config, self.own_tokenizer = config.train_config(model.config, init, own), own
        self.model = placed(model, self.train_config, World.alone(device))
        self.optimizer = build(self.model, config.optim, World.alone(device))
        if found is not None and (moments := checkpoint.load_tensors(found[0])[1]):
            self.optimizer.load_state_tensors(moments)
        self.updater = PolicyUpdater(config, self.model, self.optimizer, tasks.prompts)
        worst = model.config.experts / model.config.top_k - 1
        self.alarms, self.raised = Alarms(limits or Limits(stop=WATCHED), worst), set[str]()
        self.holding: list[Alarm] = []  # of the last update
        self.tokens, self.sample_s = 0, 0.0
        self.generation: Generation | None = None
        self._open(found, start)

    def to_end(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        """The updates that are left."""
        with MetricsFile(self.folder, self.step, self.config.tensorboard) as metrics:
            while self.step < self.config.steps:
                row = self.update()
                metrics.write(row)
                self._stop_if_doomed()
                due = self.step % self.config.checkpoint_steps == 0 and self.alarms.calm
                if due or self.step == self.config.steps:
                    metrics.sync()
                    self.save()
                if on_step is not None:
                    on_step(row)

    def update(self) -> dict[str, Any]:
        """One update. Returns its metrics row."""
        began = time.perf_counter()
        number, part = divmod(self.step, self.config.updates)
        if self.generation is None or self.generation.number != number:
            self.generation = self._begun(number) if part == 0 else self._resumed(number)
        generation, found = self.generation, rollouts.advantages(self.generation.trajectories, self.config)
        size = len(generation.trajectories) // self.config.minibatches
        low = part % self.config.minibatches * size
        chosen = [i for i in range(low, low + size) if found.used[i]]
        trained = [generation.trajectories[i] for i in chosen]
        values = self.updater.run(trained, found.values[chosen], self.step)
        self.step += 1
        count = sum(len(t.tokens) for t in trained)
        self.tokens += count
        row = {"step": self.step, "generation": number, "tokens": self.tokens} | _rewards(generation, found) | values
        self.holding = self.alarms.see(_watched(row))
        if self.holding:
            row["alarms"] = [{"name": a.name, "found": a.found, "expected": a.expected} for a in self.holding]
            self.raised |= {alarm.name for alarm in self.holding}
        seconds = time.perf_counter() - began
        row |= {"sample_s": self.sample_s} if part == 0 else {}
        self.sample_s = 0.0
        return row | {
            "step_s": seconds,
            "tokens_per_s": count / seconds,
            "memory_bytes": memory_bytes(self.updater.device),
        }

    def save(self) -> None:
        """Commits a checkpoint of the state that is there, and removes generations that none needs."""
        checkpoint.save(
            self.folder,
            step=self.step,
            weights=self.model.state_dict(),
            moments=self.optimizer.state_tensors(),
            config=self.train_config,
            mixture=identity_digest(self.config, self.tasks.fingerprint),
            tokenizer=self.own_tokenizer,
        )
        rollouts.remove_before(self.folder, oldest_step(self.folder) // self.config.updates)

    def summary(self, train_s: float) -> RLSummary:
        rows = read_metrics(self.folder)
        masked = [r["masked_trajectory_fraction"] for r in rows if "masked_trajectory_fraction" in r]
        return RLSummary(
            checkpoint=checkpoint.find(self.folder),
            steps=self.step,
            resumed_step=self.resumed_step,
            first_reward=rows[0]["reward_mean"],
            last_reward=rows[-1]["reward_mean"],
            masked_trajectory_fraction=float(np.mean(masked)) if masked else None,
            skipped_updates=sum(r["skipped"] for r in rows),
            alarms=tuple(sorted(self.raised)),
            train_s=train_s,
        )

    def _begun(self, number: int) -> Generation:
        """A generation at its first update: those that are due now are sampled, and its snapshot is taken."""
        weights, ahead = rollouts.weights_hash(self.model), number + self.config.staleness
        for due in range(ahead if number else 0, ahead + 1):
            if due * self.config.updates < self.config.steps:
                self._sample(due, weights)
        generation = rollouts.read(self.folder, number)
        if generation is None:
            raise self._missing(number)
        if generation.snapshot != weights:
            size = len(generation.trajectories) // self.config.minibatches
            parts = [generation.trajectories[low : low + size] for low in range(0, len(generation.trajectories), size)]
            old = [logprobs for part in parts for logprobs in self.updater.logprobs(part)]
            generation = generation.with_old(old, weights)
            rollouts.write(self.folder, generation, self.tasks.names)
        return generation

    def _sample(self, number: int, weights: str) -> None:
        """Writes a generation, unless it is there, sampled by the very weights."""
        began, found = time.perf_counter(), rollouts.read(self.folder, number)
        if found is None or found.weights != weights:
            made = rollouts.sample(self.model, self.tokenizer, self.tasks, self.reward, self.config, number, weights)
            rollouts.write(self.folder, made, self.tasks.names)
        self.sample_s += time.perf_counter() - began

    def _resumed(self, number: int) -> Generation:
        """A generation that a resume finds itself in the middle of."""
        found = rollouts.read(self.folder, number)
        if found is None or found.snapshot is None:
            raise self._missing(number)
        return found

    def _missing(self, number: int) -> StageError:
        return StageError(
            f"rl: a generation is missing, got no {rollouts.path_of(self.folder, number)} with what update {self.step + 1} "
            "needs, expected the file that sampling wrote; restore it, or use a new folder"
        )

    def _open(self, found: tuple[Path, checkpoint.State] | None, start: Path) -> None:
        """Brings the folder to where the run goes on, or begins it."""
        if found is not None:
            rows = read_metrics(self.folder, self.step)
            self.raised |= self.alarms.replay(map(_watched, rows))
            self.tokens = rows[-1]["tokens"] if rows else 0
            cut_metrics(self.folder, self.step)
            checkpoint.remove_old(self.folder, found[0].name, self.config.keep)
            return
        begin(self.config, self.tasks, self.folder, start, self.model)
        self.save()

    def _stop_if_doomed(self) -> None:
        alarm = self.alarms.stops(self.holding)
        if alarm is not None:
            raise StageError(
                f"rl: update {self.step}: {alarm} in a new folder; {checkpoint.find(self.folder).name} stands, or go on here "
                f"with {alarm.name} left out of alarms.stop"
            )


def _rewards(generation: Generation, found: rollouts.Advantages) -> dict[str, Any]:
    """What a row says of its generation."""
    rewards = np.array([t.reward for t in generation.trajectories if t.reward is not None])
    lengths = [len(t.tokens) for t in generation.trajectories]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "truncated_fraction": float(np.mean([t.truncated for t in generation.trajectories])),
        "answer_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths)},
        "equal_groups": found.equal_groups,
        "rejected_groups": found.rejected_groups,
    }


def _watched(row: dict[str, Any]) -> dict[str, Any]:
    """A row as alarms read it: in the place of the loss, which has no level, how unlikely answers are to their own policy."""
    nll = row.get("answer_nll")
    return row if nll is None else row | {"domain_loss": {"answers": nll}}
