"""Trains a decoder on a mixture: same config, same mixture, same thread count, same bytes.

In: `TrainConfig`, a `TokenSource`, a folder. Out, in the folder: checkpoints (moe/checkpoint.py) and `metrics.jsonl`, one line an
update:

    step int, from 1          tokens int, so far            loss float, nats a counted target       targets int, of this update
    lr float                  grad_norm float, before clipping                  domain_loss {name: float}, domains of this batch
    mtp_loss [float] by head  load_violation [float] and group_loss float of the routed layers (moe/experts.py)
    experts {name: [float]}, attention_logit_bound [float] by layer: at the first, the last and each EXPERT_STEPS-th update
    alarms [{name, found, expected}], where some hold (moe/alarms.py)
    null: a number that was not finite, among the experts' only
    step_s, tokens_per_s, mfu float, memory_bytes int: alone differ between equal runs; mfu on known GPUs only

A run may start from another run's checkpoint (moe/start.py). The same call on a folder with a checkpoint goes on from it, on
any number of ranks. On one CPU rank the run then ends with the weights and metrics of an undisturbed one, bit for bit; on a GPU
too where `deterministic`; on another number of ranks within rounding. A config or mixture that differs from the checkpoint's is
refused. All checks come before the first byte is written; a run that an alarm or a number that is not finite stops overwrites
nothing. Ranks share the folder: rank 0 writes it, the others read it.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, StageError
from core.hashing import file_digest
from moe import checkpoint
from moe.alarms import Alarm, Alarms, Limits
from moe.config import TrainConfig, differences
from moe.data import PackedRows, ReadAhead, TokenSource, training_rows
from moe.device import device_of, memory_bytes, repeatable, utilisation
from moe.exchange import whole_weights
from moe.files import copy_file, replace_text
from moe.memory import memory_problems, training_memory
from moe.metrics import METRICS, MetricsFile, check_tensorboard, cut_metrics, finite, read_metrics
from moe.model import Decoder
from moe.optim import build
from moe.parallel import World
from moe.start import begin, start_problems
from moe.update import Updater, placed

EXPERT_STEPS = 10  # between readings of the experts' statistics; chosen, untested


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
    ranks: int
    device: str
    alarms: tuple[str, ...]
    train_s: float
    tokens_per_s: float | None


def train(
    config: TrainConfig,
    source: TokenSource,
    folder: Path,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    start: Path | None = None,
    world: World | None = None,
    *,
    limits: Limits | None = None,
) -> TrainSummary:
    """Trains to `config.steps`, from the folder's checkpoint if it has one; all ranks of `world` call it.

    A fresh run starts from the newest checkpoint in the folder `start`, whose weights have the hash `config.init`.
    `on_step` gets each metrics row after it is written. `limits` say when an alarm holds and which ones stop the run.
    """
    world = world or World.alone(device_of(config.device))
    folder = Path(folder)
    rows = _preflight(config, source, folder, start, world)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if world.device.type == "cuda" and world.device.index is not None:
        torch.cuda.set_device(world.device)
    with (
        _locked(folder, world),
        repeatable(config.deterministic, world.device),
        training_memory(config, folder, world.size),
    ):
        run = _Run(config, rows, folder, world, limits or Limits(), start)
        began = time.perf_counter()
        try:
            run.to_end(on_step)
        finally:
            gc.unfreeze()
    return run.summary(time.perf_counter() - began)


@contextmanager
def _locked(folder: Path, world: World) -> Iterator[None]:
    """The folder is this run's alone within: rank 0 holds it, and where it cannot every rank raises."""
    lock, problem = None, None
    try:
        if world.rank == 0:
            try:
                lock = checkpoint.lock(folder)
            except StageError as error:
                problem = str(error)
            except OSError as error:
                problem = _no_folder(folder, error)
        if problem := world.gather(problem)[0]:
            raise StageError(problem)
        yield
    finally:
        if lock is not None:
            os.close(lock)


class _Run:
    """Model, optimiser and step of one run folder."""

    def __init__(
        self, config: TrainConfig, rows: PackedRows, folder: Path, world: World, limits: Limits, start: Path | None
    ) -> None:
        self.config, self.rows, self.folder, self.world = config, rows, folder, world
        self.tokenizer = file_digest(config.tokenizer) if config.tokenizer else None
        found = self._found()
        self.resumed_step: int | None = None if found is None else found[1].step
        self.step = self.started_at_step = self.resumed_step or 0
        model = Decoder(config.model, config.seed)
        moments: dict[str, Tensor] | None = None
        if found is not None:
            weights, moments = checkpoint.load_tensors(found[0])
            checkpoint.put_weights(found[0].name, model, weights)
        elif start is not None:
            moments = begin(checkpoint.find(start), model, config)
        self.parameters, self.active_parameters = model.parameter_counts()
        self.model = placed(model, config, world)
        self.optimizer = build(self.model, config.optim, world, compiled=config.compile and world.device.type == "cuda")
        if moments:
            self.optimizer.load_state_tensors(moments)
        self.updater = Updater(config, self.model, self.optimizer, world, rows.source.domains)
        self.alarms = Alarms(limits, config.model.experts / config.model.top_k - 1)
        self.holding: list[Alarm] = []  # of the last update
        self.raised: set[str] = set()
        self._open(None if found is None else found[0].name)

    def to_end(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        """The updates that are left."""
        first, writes = self.step + 1, self.world.rank == 0
        with (
            ReadAhead(self.rows, self.world.rank, self.world.size) as batches,
            MetricsFile(self.folder, self.step, self.config.tensorboard, writes) as metrics,
        ):
            while self.step < self.config.steps:
                row = self.update(batches)
                metrics.write(row)
                self._stop_if_doomed()
                if self.step == self.config.steps or (
                    self.step % self.config.checkpoint_steps == 0 and self.alarms.calm
                ):
                    metrics.sync()
                    self.save()
                if on_step is not None:
                    on_step(row)
                if self.step == first:
                    # What lives now lives to the end; a full collection that looks at it stops the run for up to 0.5 s.
                    gc.collect()
                    gc.freeze()

    def update(self, batches: ReadAhead) -> dict[str, Any]:
        """One update. Returns its metrics row; one that is not finite is a `StageError`."""
        began, last = time.perf_counter(), self.step + 1 == self.config.steps
        watch = self.step == 0 or last or (self.step + 1) % EXPERT_STEPS == 0
        figures = self.updater.run(batches.batch(self.step), self.step, watch)
        values = figures.read()
        self.step += 1
        self._check_finite(values["loss"], values["grad_norm"])
        row: dict[str, Any] = {"step": self.step, "tokens": self.rows.first_row(self.step) * self.config.model.context}
        row |= finite(values)
        self.holding = self.alarms.see(row)
        if self.holding:
            self.raised |= {alarm.name for alarm in self.holding}
            row["alarms"] = [{"name": a.name, "found": a.found, "expected": a.expected} for a in self.holding]
        step_s = time.perf_counter() - began
        row |= {"step_s": step_s, "tokens_per_s": figures.tokens / step_s}
        share = utilisation(self.config, row["tokens_per_s"], self.world.device, self.world.size)
        return row | ({} if share is None else {"mfu": share}) | {"memory_bytes": memory_bytes(self.world.device)}

    def save(self) -> None:
        """Commits a checkpoint of the state that is there; all ranks call it and rank 0 writes."""
        weights, moments = whole_weights(self.model, self.world), self.optimizer.state_tensors()
        if self.world.rank == 0:
            checkpoint.save(
                self.folder,
                step=self.step,
                weights=weights,
                moments=moments,
                config=self.config,
                mixture=self.rows.fingerprint,
                tokenizer=self.tokenizer,
            )
        self.world.wait()

    def summary(self, train_s: float) -> TrainSummary:
        context = self.config.model.context
        trained = (self.rows.first_row(self.step) - self.rows.first_row(self.started_at_step)) * context
        return TrainSummary(
            checkpoint=checkpoint.find(self.folder),
            steps=self.step,
            resumed_step=self.resumed_step,
            tokens=self.rows.first_row(self.step) * context,
            loss=read_metrics(self.folder)[-1]["loss"],
            parameters=self.parameters,
            active_parameters=self.active_parameters,
            threads=torch.get_num_threads(),
            ranks=self.world.size,
            device=str(self.world.device),
            alarms=tuple(sorted(self.raised)),
            train_s=train_s,
            tokens_per_s=trained / train_s if trained else None,
        )

    def _found(self) -> tuple[Path, checkpoint.State] | None:
        """The folder's newest checkpoint, if it is one of this run; on every rank before any of them writes."""
        if not (self.folder / checkpoint.LATEST).is_file():
            checkpoint.check_empty(self.folder)
            metrics = self.folder / METRICS
            if metrics.is_file() and metrics.stat().st_size:
                raise StageError(
                    f"train: {metrics} belongs to a run without checkpoints, got {metrics.stat().st_size} bytes, expected none; "
                    f"put its checkpoints and {checkpoint.LATEST} back, or use a new folder"
                )
            self.world.wait()
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
        self.world.wait()
        return path, state

    def _open(self, name: str | None) -> None:
        """Brings the folder to where the run goes on: at a checkpoint's name, or at a fresh start with one of step 0."""
        if name is not None:
            self.raised |= self.alarms.replay(read_metrics(self.folder, self.step))
            self.world.wait()
            if self.world.rank == 0:
                cut_metrics(self.folder, self.step)
                checkpoint.remove_old(self.folder, name, self.config.keep)
            return
        if self.world.rank == 0:
            try:
                if self.config.tokenizer:
                    copy_file(Path(self.config.tokenizer), self.folder / checkpoint.TOKENIZER)
                replace_text(self.folder / METRICS, "")
            except OSError as error:
                raise StageError(_no_folder(self.folder, error)) from error
        self.save()

    def _stop_if_doomed(self) -> None:
        alarm = self.alarms.stops(self.holding)
        if alarm is not None:
            raise StageError(
                f"train: update {self.step}: {alarm} in a new folder that starts from {checkpoint.find(self.folder).name}, "
                f"which stands, or go on here with {alarm.name} left out of alarms.stop"
            )

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise StageError(
                f"train: update {self.step} is not finite, got loss {loss} and gradient norm {grad_norm}, "
                f"expected numbers; {checkpoint.find(self.folder).name} stands, lower optim.lr and use a new folder"
            )


def _no_folder(folder: Path, error: OSError) -> str:
    return f"train: the run's folder takes no file, got {error}, expected to write into {folder}; make room or choose another"


def _preflight(config: TrainConfig, source: TokenSource, folder: Path, start: Path | None, world: World) -> PackedRows:
    """All that can be wrong before any work, shown together."""
    problems = []
    if config.model.experts % config.optim.expert_groups:
        problems.append(
            f"optim.expert_groups: must divide the experts, got {config.optim.expert_groups} for {config.model.experts}"
        )
    problems += config.rank_problems(world.size) or memory_problems(config, world.device, world.size)
    if config.tokenizer and not Path(config.tokenizer).is_file():
        problems.append(f"train: no tokenizer file, got {config.tokenizer}, expected a tokenizer.json")
    if folder.exists() and not folder.is_dir():
        problems.append(f"train: the run's folder is a file, got {folder}, expected a folder or nothing there")
    if not (folder / checkpoint.LATEST).is_file():  # a run that goes on has its weights, and needs none to start from
        problems += start_problems(config, start)
    rows = None
    try:
        if config.tensorboard:
            check_tensorboard()
        rows = training_rows(config, source)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    if problems or rows is None:
        raise ConfigError(*problems)
    return rows
