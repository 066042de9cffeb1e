"""The stage behind an ablation: one small model for each arm and seed, judged on the same held-out documents.

In: the arms' mixtures (`mixtures/<NAME>_<ARM>/`), the base's token shards and tokenizer. Out, below `ablations/NAME/`:

    <arm>/seed-<seed>-<identity>/   checkpoints and metrics.jsonl (moe.trainer), `losses.parquet` when done
    result.json                     what was trained on what, and the comparisons (mixtures.compare)

`losses.parquet` has a row for each entry of the baseline's held-out index, in its order: domain, bytes, tokens, bits. A trial is
a unit of the engine: trials run side by side, one that was killed goes on from its checkpoint, one that is done is not repeated,
also when arms or seeds are added. Every trial takes the same number of updates of the same size. Trials of one seed share
initial weights. Rows are read in an order drawn by the seed, so a trial shorter than its mixture reads an even sample of it, and
the A/A arm, which draws another order, shows the noise of that sample too. Repeats thin out likewise: to see a document as often
as the full phase would, set `tokens` of the phase in the arms.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from core.engines.contract import Note, Report, Unit
from core.errors import StageError
from core.hashing import digest
from core.job import Job, Outcome, total
from core.predicate import Predicate
from core.schema import TEXT
from core.stage import Kind, Resources, Stage, StageConfig
from core.storage import Root
from core.workspace import workspace
from mixtures.compare import LEAST_DOCS
from mixtures.mix import phase_path
from mixtures.phases import HELD_OUT
from mixtures.reader import MixtureSource
from moe.config import TrainConfig, from_json, to_json
from moe.presets import preset
from pipelines.ablation.config import AA, TrialConfig

VERSION = 2  # 2: windowed layers, Muon
AA_ORDER = 1 << 32  # added to the seed: no seed of an order that a person would name
# An arm that keeps documents which were never tokenised is not quite the arm that was asked for. Re-elected survivors of
# duplicates are such documents even where an arm's rules only drop more.
MAX_UNTOKENISED_FRACTION = 0.02  # chosen, untested
CHECKPOINT_STEPS = 50
LOSSES_FILE = "losses.parquet"
LOSSES = pa.schema([("domain", TEXT), ("bytes", pa.int64()), ("tokens", pa.int64()), ("bits", pa.float64())])


class TrialsConfig(StageConfig):
    """What `design.py` makes of an ablation's file. The first arm is the baseline."""

    mixes: dict[str, str] = Field(description="arm -> instance of mix that made its mixture")
    phase: str = Field(description="phase of those mixtures")
    tokens: int = Field(description="training tokens of a trial")
    seeds: tuple[int, ...] = Field(description="of the trials")
    aa: bool = Field(description="the baseline once more, in another order")
    train: TrialConfig = Field(description="the model")
    fates: dict[str, str] = Field(default_factory=dict, description="arm -> its own fate, where it has one")
    tokenised: str | None = Field(default=None, description="which documents have tokens: `where` of tokenize")

    @property
    def control(self) -> str:
        return next(iter(self.mixes))

    @property
    def arms(self) -> list[str]:
        """All arms that are trained."""
        return [*self.mixes, *([AA] if self.aa else [])]

    def mixed_as(self, arm: str) -> str:
        """The arm whose mixture it reads."""
        return self.control if arm == AA else arm


@dataclass(frozen=True)
class Trial:
    """One arm under one seed."""

    arm: str
    seed: int
    mixture: str  # as `MixtureSource` names it
    plan: Mapping[str, Any]  # TrainConfig as JSON
    folder: str

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def losses(self) -> str:
        return f"{self.folder}/{LOSSES_FILE}"


def run_trials(job: Job) -> Outcome:
    """Train and evaluate every trial, then compare."""
    from pipelines.ablation.result import comparisons

    config: TrialsConfig = job.config
    untokenised = _untokenised(job)
    name = job.instance.partition("@")[2]
    sources = {arm: MixtureSource(job.root, phase_path(mix, config.phase)) for arm, mix in config.mixes.items()}
    for source in sources.values():
        source.check()
    held_out = _held_out(job.root, config)
    steps = _steps(config, sources)
    trials = [_trial(job, config, name, arm, seed, steps, sources) for arm in config.arms for seed in config.seeds]
    size = steps * _update_tokens(config)
    run = TrialUnits(job.root, held_out.phase, held_out.content)
    made = job.engine.run_units(run, [Unit(t.name, t) for t in trials], f"{job.instance}: trials", job.stall_s)
    by_name = {r.unit: r.value for r in made}
    notes = [by_name[t.name] for t in trials]
    result = {
        "name": name,
        "phase": config.phase,
        "baseline": config.control,
        "aa": AA if config.aa else None,
        "seeds": list(config.seeds),
        "steps": steps,
        "tokens": size,
        "parameters": notes[0]["parameters"],
        "held_out": {"content": held_out.content, "docs": len(held_out)},
        "arms": {arm: _about(job.root, config, arm, sources, untokenised) for arm in config.arms},
        **comparisons(job.root, config, trials),
    }
    job.root.write_json(result_name(name), result)
    outputs = {t.folder: {"content": note["content"]} for t, note in zip(trials, notes, strict=True)}
    outputs[result_name(name)] = {"content": digest(result)}
    rates = [note["tokens_per_s"] for note in notes if note["tokens_per_s"]]
    observed = {"tokens_per_s": float(np.mean(rates)) if rates else None, "resumed_units": total(made)["resumed_units"]}
    accounts = {"trials": len(trials), "tokens_each": size}
    return Outcome(outputs=outputs, accounts=accounts, observed=observed, cleanup=_stale(job.root, name, trials))


def result_name(name: str) -> str:
    return f"ablations/{name}/result.json"


@dataclass(frozen=True)
class TrialUnits:
    """Trains one trial and writes its losses, unless they are there."""

    root: Root
    held_out: str
    held_out_content: str

    def __call__(self, unit: Unit, note: Note) -> Report:
        trial: Trial = unit.payload
        done = self.root.note(trial.losses)
        if done is not None and done["held_out"] == self.held_out_content:
            return Report(unit.name, resumed=True, value=done)
        from moe.trainer import train

        plan, source = from_json(trial.plan), MixtureSource(self.root, trial.mixture)
        with workspace(self.root, trial.folder, apart=[LOSSES_FILE], keep=False) as folder:

            def on_step(row: dict[str, Any]) -> None:
                note()
                if row["step"] % plan.checkpoint_steps == 0:
                    folder.commit()

            summary = train(plan, source, folder.path, on_step)
            folder.commit()
            table = losses_table(self.root, folder.path, self.held_out)
        about = {
            "held_out": self.held_out_content,
            "content": digest([trial.folder, table.column("bits").to_pylist()]),
            "parameters": summary.parameters,
            "tokens": summary.tokens,
            "tokens_per_s": summary.tokens_per_s,
        }
        self.root.write_table(trial.losses, [table], LOSSES, about)
        return Report(unit.name, value=about)


def losses_table(root: Root, model: Path, held_out: str) -> pa.Table:
    """Rows of LOSSES of the model in the folder `model`."""
    from moe.evaluate import document_losses

    source = MixtureSource(root, held_out)
    losses = document_losses(model, source)
    domains = pa.array(source.domains, TEXT).take(pa.array(losses.domain))
    return pa.Table.from_arrays([domains, *map(pa.array, (losses.bytes, losses.tokens, losses.bits))], schema=LOSSES)


def train_config(
    config: TrialConfig, source: MixtureSource, steps: int, seed: int, order_seed: int | None
) -> TrainConfig:
    shape = asdict(preset(config.preset, vocab_size=source.vocab_size, eos=source.eos)) | config.model
    return from_json(
        {
            "model": shape,
            "optim": config.optim,
            "steps": steps,
            "rows": config.rows,
            "seed": seed,
            "order_seed": order_seed,
            "shuffle": True,
            "threads": config.threads,
            "checkpoint_steps": CHECKPOINT_STEPS,
            "keep": 1,
        }
    )


def _trial(
    job: Job, config: TrialsConfig, name: str, arm: str, seed: int, steps: int, sources: Mapping[str, MixtureSource]
) -> Trial:
    from importlib.metadata import version

    source = sources[config.mixed_as(arm)]
    plan = to_json(train_config(config.train, source, steps, seed, seed + AA_ORDER if arm == AA else None))
    identity = digest([VERSION, plan, source.content, version("torch")])
    return Trial(arm, seed, source.phase, plan, f"ablations/{name}/{arm}/seed-{seed}-{identity[:12]}")


def _update_tokens(config: TrialsConfig) -> int:
    context = config.train.model.get("context") or preset(config.train.preset, vocab_size=2, eos=0).context
    return int(config.train.rows * context)


def _steps(config: TrialsConfig, sources: Mapping[str, MixtureSource]) -> int:
    """Updates of every trial. A mixture that does not hold them is a StageError: no arm may repeat what another does not."""
    update = _update_tokens(config)
    steps = config.tokens // update
    available = {arm: int(source.lengths().sum()) for arm, source in sources.items()}
    short = min(available, key=lambda arm: available[arm])
    if not 0 < steps * update <= available[short]:
        raise StageError(
            f"ablation: {config.tokens} tokens are no whole updates of {update} that every arm holds, got {available[short]} "
            f"tokens in the mixture of {short!r}; change `tokens` or train.rows, or raise max_epochs there"
        )
    return steps


def _held_out(root: Root, config: TrialsConfig) -> MixtureSource:
    """The held-out documents, which must be the same for all arms."""
    found = {arm: MixtureSource(root, phase_path(mix, HELD_OUT)) for arm, mix in config.mixes.items()}
    first = found[config.control]
    other = [arm for arm, source in found.items() if source.content != first.content]
    if other:
        raise StageError(
            f"ablation: arm {other[0]!r} has other held-out documents than {config.control!r}, expected the same; "
            "set `held_out` and `held_out_docs` in the base only"
        )
    docs = np.bincount(np.array([first.domain(i) for i in range(len(first))], np.int64), minlength=1)
    if docs.max() < LEAST_DOCS:
        raise StageError(
            f"ablation: {len(first)} held-out documents leave nothing to compare, expected {LEAST_DOCS} or more of a dataset; "
            "raise held_out_fraction of `split` or held_out_docs of `mix`"
        )
    return first


def _untokenised(job: Job) -> dict[str, int]:
    """arm -> documents that its fate keeps and that have no tokens; too many are a StageError."""
    out = {}
    for arm, fate in job.config.fates.items():
        kept = lost = 0
        tokenised = Predicate(job.config.tokenised or "true == true")
        for dataset in job.datasets:
            for shard in dataset.shards:
                table = dataset.read_table(shard, sorted({*tokenised.columns, f"{fate}.keep"}))
                keeps = Predicate(fate).holds(table)
                kept += int(keeps.sum())
                lost += int((keeps & ~tokenised.holds(table)).sum())
        if lost > MAX_UNTOKENISED_FRACTION * kept:
            raise StageError(
                f"ablation: arm {arm!r} keeps {kept} documents, and {lost} of them have no tokens; let tokenize cover them "
                f"(now `where: {job.config.tokenised}`), as in `where: fate@eligible`, and name the fate in mix.where"
            )
        out[arm] = lost
    return out


def _about(
    root: Root, config: TrialsConfig, arm: str, sources: Mapping[str, MixtureSource], untokenised: Mapping[str, int]
) -> dict[str, Any]:
    """What an arm was trained on."""
    source = sources[config.mixed_as(arm)]
    report = root.read_json(f"mixtures/{source.phase}/report.json")
    shares = {c["name"]: c["actual_fraction"] for c in report["components"]}
    tokens = int(source.lengths().sum())
    return {
        "mixture": source.phase,
        "mixed_tokens": tokens,
        "shares": shares,
        "untokenised_docs": untokenised.get(arm, 0),
    }


def _stale(root: Root, name: str, trials: list[Trial]) -> list[str]:
    """Folders of arms and trials that this ablation no longer has."""
    top, now = f"ablations/{name}", {t.folder for t in trials}
    arms = [arm for arm in root.names(top) if "." not in arm]  # the others are its files
    gone = [f"{top}/{arm}" for arm in arms if arm not in {t.arm for t in trials}]
    kept = [
        f"{top}/{arm}/{trial}" for arm in arms if f"{top}/{arm}" not in gone for trial in root.names(f"{top}/{arm}")
    ]
    return gone + [folder for folder in kept if folder not in now]


def _reads(config: TrialsConfig) -> tuple[str, ...]:
    fates = sorted(f"{fate}.keep" for fate in config.fates.values())
    tokenised = Predicate(config.tokenised).columns if config.tokenised and fates else ()
    return (*fates, *tokenised, *(f"@{mix}" for mix in config.mixes.values()), "@tokenize", "@tokenizer")


STAGE = Stage(
    name="trials",
    kind=Kind.EXPORT,
    config=TrialsConfig,
    fn=run_trials,
    version=VERSION,
    reads=_reads,
    libraries=("torch", "scipy"),
    resources=Resources(cpus=1, memory_gb=2),
)
