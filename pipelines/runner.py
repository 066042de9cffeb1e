"""Runs the steps of a plan in order: locks, engines, manifests. What is committed is never computed again.

Consecutive annotate stages of a dataset share one pass over its documents. Every step ends with its manifest, written last.
"""

import contextlib
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import stopping
from core.annotate import AnnotateRun, annotate, forget_rejecting
from core.captures import staging
from core.dataset import Dataset
from core.engines.contract import Engine, told_by
from core.engines.measure import peak_memory, reset_peak_memory
from core.errors import ConfigError, StageError
from core.ingest import check_budget
from core.job import Job, Outcome, total
from core.manifest import Identity, Manifest, manifest_name, write_manifest
from core.progress import Display, quiet
from core.stage import Kind
from core.storage import Root
from pipelines.config import EngineConfig, Pipeline
from pipelines.plan import Planned, artifacts_of, code_of, identity_of, opened_with, plan_step
from pipelines.preflight import find_artifacts, preflight, scratch_folder
from pipelines.scope import DOCUMENT_KINDS, Step, dataset_at, datasets_of, steps
from pipelines.shard_groups import part_of, part_summary, step_lock

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a config."""

    run_id: str
    dataset: str | None = None
    shards: tuple[int, int] | None = None
    force: bool = False


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def make_engine(config: EngineConfig, scratch: Path, display: Display) -> Engine:
    """The engine a config names."""
    workers = config.workers or len(os.sched_getaffinity(0))
    sizes = {"partition_bytes": int(config.partition_mb * 2**20), "batch_bytes": int(config.batch_mb * 2**20)}
    if config.name == "local":
        from core.engines.local import LocalEngine

        return LocalEngine(scratch, workers, config.memory_gb, display, **sizes)
    if config.name == "ray":
        from core.engines.ray import RayEngine

        return RayEngine(scratch, workers, config.memory_gb, display, config.address, **sizes)
    from core.engines.spark import SparkEngine

    return SparkEngine(scratch, workers, config.memory_gb, display, config.address, **sizes)


class Runner:
    """One run of (part of) a pipeline."""

    def __init__(
        self, pipeline: Pipeline, options: RunOptions, display: Display | None = None, say: Say | None = None
    ) -> None:
        self.pipeline, self.options = pipeline, options
        self.root = Root(pipeline.root)
        self.display = display or quiet()
        self.say: Say = say or (lambda line: None)
        self._engine: Engine | None = None
        self._at = ""  # the steps that run now
        self._done = self._todo = 0
        self._scratch = scratch_folder(pipeline, self.root)

    def run(self, chosen: Sequence[Step] | None = None) -> list[Planned]:
        """Run the chosen steps (default all) and return what was planned for each."""
        todo = list(steps(self.pipeline) if chosen is None else chosen)
        if self.options.dataset:
            todo = [s for s in todo if s.dataset in (None, self.options.dataset)]
        preflight(self.root)
        find_artifacts(todo)
        done: list[Planned] = []
        self._todo = len(todo)
        try:
            for group in grouped(todo):
                stopping.check()
                self._at, self._done = ", ".join(step.name for step in group), len(done)
                done += self._annotate(group) if group[0].entry.stage.kind is Kind.ANNOTATE else [self._step(group[0])]
        finally:
            if self._engine is not None:
                self._engine.close()
        return done

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = make_engine(self.pipeline.engine, self._scratch, self.display)
            stopping.reclaim()
        return self._engine

    def position(self) -> str:
        """How far the run is, for a person."""
        return f"{self._done} of {self._todo} steps are done" + (f", then came {self._at}" if self._at else "")

    def _step(self, step: Step) -> Planned:
        if not self.options.force:
            planned = plan_step(self.pipeline, self.root, step)
            if not planned.run:
                self._sweep(step, planned.identity)
                self.say(f"{step.name}: up to date")
                return planned
        with self._held(step):
            if self.options.force:
                remove_output(self.root, step)
            planned = plan_step(self.pipeline, self.root, step)  # another run may have ended since the first look
            if planned.run:
                self._execute(step, planned.identity or identity_of(self.pipeline, self.root, step))
        return planned

    @contextlib.contextmanager
    def _held(self, step: Step) -> Iterator[None]:
        """The step's lock. A stop that is asked for while it is taken or released waits until that is done."""
        lock = contextlib.ExitStack()
        try:
            with stopping.patiently():
                lock.enter_context(step_lock(self.root, _lock_name(step), self.options.shards, self.options.run_id))
            yield
        finally:
            with stopping.patiently():
                lock.close()

    def _execute(self, step: Step, identity: Identity) -> None:
        began, clock = datetime.now(UTC), time.perf_counter()
        reset_peak_memory()
        job = self._job(step, identity)
        self.engine.begin(self._scratch_of(step, identity))
        outcome = step.entry.stage.fn(job)
        if step.entry.stage.kind is Kind.MAKE:
            outcome.accounts["generation"] = 1 + max((d.generation for d in job.datasets), default=0)
        observed = self._observed(began, clock, {**outcome.observed, **told_by(self.engine)})
        for (dataset, layer), outputs in sorted(outcome.layers.items()):
            write_manifest(self.root, Manifest(layer, dataset, identity, outputs, _layer_accounts(outputs), observed))
        manifest = Manifest(
            step.manifest, step.dataset, identity, outcome.outputs, outcome.accounts, observed, units=outcome.units
        )
        write_manifest(self.root, manifest)
        for name in outcome.cleanup:
            self.root.remove(name)
        self.engine.clear()
        self.say(f"{step.name}: {summary(outcome, observed)}")

    def _scratch_of(self, step: Step, identity: Identity) -> Path:
        name = step.name.replace(" ", "").replace("[", "-").replace("]", "")
        return self._scratch / f"{name}-{identity.digest()[:12]}"

    def _sweep(self, step: Step, identity: Identity | None) -> None:
        """Remove the scratch of a run that was stopped after it had written its manifest: nobody will ask for it again."""
        assert identity is not None  # the plan compared it
        scratch, staged = self._scratch_of(step, identity), staging(step.dataset or "")
        is_staged = step.entry.stage.kind in DOCUMENT_KINDS and self.root.exists(staged)
        if scratch.exists() or is_staged:
            with self._held(step):
                shutil.rmtree(scratch, ignore_errors=True)
                if is_staged:
                    self.root.remove(staged)

    def _job(self, step: Step, identity: Identity) -> Job:
        entry = step.entry
        from_outside = (
            entry.stage.kind is not Kind.MAKE and step.dataset is not None
        )  # one source, captured or ingested
        datasets = () if from_outside else datasets_of(self.pipeline, self.root, entry)
        return Job(
            stage=entry.stage,
            instance=entry.instance,
            config=entry.config,
            root=self.root,
            engine=self.engine,
            datasets=datasets,
            identity=identity.digest(),
            source=self.pipeline.sources.get(step.dataset or ""),
            source_name=step.dataset or "",
            artifacts=artifacts_of(entry),
            display=self.display,
            policy=self.pipeline.policy,
            code=code_of(identity),
            stall_s=self.pipeline.engine.stall_s,
        )

    def _annotate(self, group: Sequence[Step]) -> list[Planned]:
        """One dataset's consecutive annotate stages in one pass."""
        with contextlib.ExitStack() as locks:
            if self.options.force:
                for step in group:
                    locks.enter_context(self._held(step))
                for step in group:
                    remove_output(self.root, step)
            planned = self._planned(group)
            todo = [p for p in planned if p.run]
            if not todo:
                return planned
            name = group[0].dataset or ""
            dataset = dataset_at(self.pipeline, self.root, name)
            if dataset is None:
                raise ConfigError(f"{group[0].name}: dataset {name!r} has no documents yet; run stage `extract` first")
            part = part_of(dataset, self.options.shards)
            for p in todo if not self.options.force else ():
                locks.enter_context(self._held(p.step))
            self._annotate_dataset(dataset, part, todo)
        return planned

    def _planned(self, group: Sequence[Step]) -> list[Planned]:
        """What is to be done for stages of which later ones may read what earlier ones are to write."""
        planned: list[Planned] = []
        running: set[tuple[str | None, str]] = set()
        for step in group:
            planned.append(plan_step(self.pipeline, self.root, step, running))
            if planned[-1].run:
                running.add((step.dataset, step.manifest))
            else:
                self.say(f"{step.name}: up to date")
        return planned

    def _annotate_dataset(self, dataset: Dataset, part: Dataset, todo: Sequence[Planned]) -> None:
        began, clock = datetime.now(UTC), time.perf_counter()
        reset_peak_memory()
        self.engine.begin(self._scratch / "units")  # a name only: units leave nothing there. Peaks count from here
        runs = []
        for p in todo:
            entry = p.step.entry
            code = code_of(identity_of(self.pipeline, self.root, p.step, with_inputs=False))
            runs.append(AnnotateRun(entry.stage, entry.instance, entry.config, opened_with(entry, self.root), code))
        reports = annotate(self.engine, part, runs, self.pipeline.engine.stall_s)
        figures = total(reports)
        for run, p in zip(runs, todo, strict=True):
            outputs = {r.unit: r.value[run.layer] for r in reports}
            accounts = _layer_accounts(outputs)
            try:  # a part has the budget of the whole: what is too much for all is too much already
                check_budget(run.layer, dataset.name, accounts["rejected"], dataset.rows)
            except StageError:
                forget_rejecting(part, run.layer, reports)
                raise
            if self.options.shards:
                self.say(f"{p.step.name}: {part_summary(part, dataset, figures)}")
                continue
            identity = identity_of(self.pipeline, self.root, p.step)
            observed = self._observed(began, clock, {**figures, "fused": [r.layer for r in runs]})
            write_manifest(self.root, Manifest(run.layer, dataset.name, identity, outputs, accounts, observed))
            self.say(f"{p.step.name}: {summary(Outcome(accounts=accounts), observed)}")

    def _observed(self, began: datetime, clock: float, figures: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - clock
        out = {
            **figures,
            "run_id": self.options.run_id,
            "began": began.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "host": socket.gethostname(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "engine": self.pipeline.engine.name,
        }
        if figures.get("docs"):
            out["docs_per_s"] = round(figures["docs"] / max(seconds, 1e-9), 1)
        if figures.get("bytes"):
            out["mb_per_s"] = round(figures["bytes"] / 1e6 / max(seconds, 1e-9), 2)
        workers = max(figures.get("peak_memory_bytes", 0), getattr(self._engine, "peak_memory_bytes", 0))
        out["peak_memory_bytes"] = workers or peak_memory()  # crawl, train and evaluate work in this process
        return out


def grouped(todo: Sequence[Step]) -> Iterator[list[Step]]:
    """Runs of annotate stages of the pipeline, regrouped by dataset; every other step by itself."""
    i = 0
    while i < len(todo):
        if todo[i].entry.stage.kind is not Kind.ANNOTATE:
            yield [todo[i]]
            i += 1
            continue
        j = i
        while j < len(todo) and todo[j].entry.stage.kind is Kind.ANNOTATE:
            j += 1
        for name in dict.fromkeys(s.dataset for s in todo[i:j]):
            yield [s for s in todo[i:j] if s.dataset == name]
        i = j


def remove_output(root: Root, step: Step) -> None:
    """Forget that a step was run and what it wrote beside the documents, so that it runs anew, every shard of it."""
    instance, kind = step.entry.instance, step.entry.stage.kind
    if kind is Kind.CAPTURE:
        raise ConfigError(
            f"{step.name}: a capture is not made again; to start afresh remove its folder below captures/ and "
            f"{manifest_name(step.manifest, step.dataset)}"
        )
    root.remove(manifest_name(step.manifest, step.dataset))
    label = instance.partition("@")[2]
    layers = [f"fate@{label}", f"duplicates@{label}"] if kind is Kind.DECIDE else [instance]
    for dataset in [step.dataset] if step.dataset else root.names("datasets"):
        for layer in layers if kind not in DOCUMENT_KINDS else []:
            root.remove(f"datasets/{dataset}/layers/{layer}")
            root.remove(manifest_name(layer, dataset))
    own = [instance] if instance in ("sft", "rl") else []  # JSON lines, which vouch for themselves shard by shard
    for folder in (f"relations/{instance}", "tokens" if instance == "tokenize" else f"models/{instance}", *own):
        root.remove(folder)


def summary(outcome: Outcome, observed: dict[str, Any]) -> str:
    """One line for a person."""
    parts = [f"{k.replace('_', ' ')} {v:,}" for k, v in outcome.accounts.items() if "." not in k and k != "rows"]
    if observed.get("resumed_units"):
        parts.append(f"{observed['resumed_units']} units were committed before")
    if observed.get("docs_per_s"):
        parts.append(f"{observed['docs_per_s']:,.0f} docs/s")
    if observed.get("mb_per_s"):
        parts.append(f"{observed['mb_per_s']:,.1f} MB/s")
    return ", ".join([*parts, f"{observed['seconds']:.1f} s"])


def _layer_accounts(outputs: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {key: sum(out.get(key, 0) for out in outputs.values()) for key in ("rows", "computed", "rejected")}


def _lock_name(step: Step) -> str:
    return f"{step.dataset or 'root'}.{step.entry.instance}"
