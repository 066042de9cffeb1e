"""The stages `train` and `evaluate`, and `generate`: where the pipeline's mixtures meet `moe`.

A model's folder bears its identity, so a changed knob never meets a checkpoint of another shape, and the same run goes on from
the checkpoint it has. Outputs: `models/<phase>-<identity>/` (checkpoints, metrics.jsonl, tokenizer.json, evaluation.json). On an
object store each checkpoint is there before the next update begins, and what a machine takes with it is the work since then.

A pipeline may train through phases: `train@anneal: {phase: anneal, after: train}` starts from the weights that `train` left, and
`evaluate@anneal: {model: train@anneal}` measures what came of it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field

from core.cache import fetched
from core.errors import ConfigError
from core.job import Job, Outcome
from core.manifest import read_manifest
from core.stage import Kind, Resources, Stage, StageConfig, execution
from core.storage import Root
from core.workspace import mirrored, workspace

EVALUATION = "evaluation.json"


class TrainStageConfig(StageConfig):
    """Which phase to train on, for how long, and the model's shape."""

    phase: str = Field(default="pretrain", description="a phase of `mix`")
    after: str | None = Field(default=None, description="instance of train to go on from; null: new weights")
    preset: Literal["ci", "tiny"] = Field(
        default="tiny", description="named model shape; `model` overrides single values"
    )
    model: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.ModelConfig")
    optim: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.OptimConfig")
    steps: int | None = Field(default=None, ge=1, description="updates; null: until the phase's tokens are used up")
    max_steps: int = Field(default=400, ge=1, description="cap when `steps` is null")
    rows: int = Field(default=32, ge=1, description="packed rows of `context` tokens an update")
    shuffle: bool = Field(default=True, description="rows in a seeded order: a long document fills many rows in a row")
    seed: int = Field(default=0, description="of the initial weights, and of the order of rows")
    checkpoint_steps: int = execution(50, "updates between checkpoints")
    threads: int | None = execution(None, "CPU threads; null: torch's choice")


class EvaluateStageConfig(StageConfig):
    """What to measure on the trained model."""

    model: str = Field(default="train", description="instance of train that made it")
    prompts: tuple[str, ...] = Field(default=(), description="texts to continue; the continuations go into the report")
    max_tokens: int = Field(default=48, ge=1, description="length of a continuation")
    temperature: float = Field(default=0.8, ge=0, description="0 is greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus of a continuation's choices")
    seed: int = Field(default=0, description="of the continuations")


def train(job: Job) -> Outcome:
    """Train on one phase; the loss curve is `metrics.jsonl` in the model's folder."""
    from mixtures.reader import MixtureSource
    from moe.checkpoint import weights_digest
    from moe.config import OptimConfig, TrainConfig
    from moe.presets import preset
    from moe.trainer import train as train_model

    config: TrainStageConfig = job.config
    source = MixtureSource(job.root, config.phase)
    source.check()
    shape = preset(config.preset, vocab_size=source.vocab_size, eos=source.eos)
    model = type(shape)(**{**asdict(shape), **config.model})
    tokens = int(source.lengths().sum())
    available = tokens // (config.rows * model.context)
    steps = config.steps or min(config.max_steps, available)
    if steps < 1:
        raise ConfigError(
            f"train: phase {config.phase!r} holds {tokens:,} tokens, expected at least one update of "
            f"{config.rows * model.context:,}; lower `rows`, or put more documents into the mixture"
        )
    folder = f"models/{config.phase}-{job.identity[:12]}"
    start = model_folder(job.root, config.after) if config.after else None
    plan = TrainConfig(
        model=model,
        optim=OptimConfig(**config.optim),
        steps=steps,
        rows=config.rows,
        seed=config.seed,
        init=weights_digest(start) if start else None,
        shuffle=config.shuffle,
        repeat=steps > available,
        tokenizer=str(fetched(job.root, ["models/tokenizer/tokenizer.json"], source.tokenizer)[0]),
        threads=config.threads,
        checkpoint_steps=config.checkpoint_steps,
    )
    with (
        workspace(job.root, folder, apart=[EVALUATION]) as place,
        job.display.task(f"{job.instance}: {config.phase}", steps, 0) as advance,
    ):

        def on_step(row: dict[str, Any]) -> None:
            advance(0, 0, 1)
            if row["step"] % config.checkpoint_steps == 0:
                place.commit()

        summary = train_model(plan, source, place.path, on_step, start)
        place.commit()
        content = weights_digest(place.path)
    figures = {name: value for name, value in asdict(summary).items() if not isinstance(value, Path)}
    outputs = {"weights": {"content": content, "folder": folder}}
    accounts = {"train_tokens": summary.tokens, "steps": steps, "parameters": summary.parameters}
    return Outcome(outputs=outputs, accounts=accounts, observed=figures)


def model_folder(root: Root, instance: str) -> Path:
    """Where an instance of train left its model, on this machine."""
    trained = read_manifest(root, instance, None)
    if trained is None:
        raise ConfigError(f"train: no model of {instance!r} in {root.url}; list that stage before, or correct the name")
    return mirrored(root, trained.outputs["weights"]["folder"], apart=[EVALUATION])


def evaluate(job: Job) -> Outcome:
    """Bits per byte on the held-out documents of each source, and continued prompts."""
    from mixtures.reader import MixtureSource
    from moe.evaluate import evaluate as evaluate_model

    config: EvaluateStageConfig = job.config
    folder = model_folder(job.root, config.model)
    held_out = evaluate_model(folder, MixtureSource(job.root, "held_out"))
    samples = [
        {
            "prompt": p,
            "continuation": continue_prompt(
                folder, p, config.max_tokens, config.temperature, config.top_p, config.seed
            ),
        }
        for p in config.prompts
    ]
    name = f"models/{folder.name}/{EVALUATION}"
    job.root.write_json(name, {"held_out": held_out, "samples": samples})
    content = xxhash.xxh3_128_hexdigest(job.root.read_bytes(name))
    outputs = {"evaluation": {"content": content, "file": name}}
    accounts = {"held_out_docs": int(sum(d["docs"] for d in held_out.values()))}
    return Outcome(
        outputs=outputs, accounts=accounts, observed={"bits_per_byte": {k: d["bpb"] for k, d in held_out.items()}}
    )


def continue_prompt(folder: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> str:
    """The prompt's continuation by the model in `folder`."""
    from moe.generate import generate_text

    return generate_text(folder, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _train_reads(config: TrainStageConfig) -> tuple[str, ...]:
    return ("@mix", "@tokenize", "@tokenizer", *([f"@{config.after}"] if config.after else []))


TRAIN = Stage(
    name="train",
    version=2,  # 2: may begin from another stage's model
    kind=Kind.EXPORT,
    config=TrainStageConfig,
    fn=train,
    where=False,
    reads=_train_reads,
    libraries=("torch",),
    resources=Resources(cpus=2, memory_gb=2),
)

EVALUATE = Stage(
    name="evaluate",
    version=2,  # 2: losses are kept by document
    kind=Kind.EXPORT,
    config=EvaluateStageConfig,
    fn=evaluate,
    where=False,
    reads=lambda config: (f"@{config.model}", "@mix", "@tokenize"),
    libraries=("torch",),
)
