"""The stages `train` and `evaluate`, and `generate`: where the pipeline's mixtures meet `moe`.

A model's folder bears its identity, so a changed knob never meets a checkpoint of another shape, and the same run goes on from
the checkpoint it has. Outputs: `models/<phase>-<identity>/` (checkpoints, metrics.jsonl, tokenizer.json), and in it an
`evaluation-<identity>.json` for all that `evaluate` was ever asked of the model: other questions, or another model beside it,
never write over what was found before. On an object store each checkpoint is there before the next update begins, and what a
machine takes with it is the work since then.

A pipeline may train through phases: `train@anneal: {phase: anneal, after: train}` starts from the weights that `train` left, and
`evaluate@anneal: {model: train@anneal}` measures what came of it. A later phase may have a longer context with its own positions
(`model: {context: 1024, rope_theta: 1.0e+6}`) and more MTP heads than the one before (moe/start.py).
"""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import xxhash
from pydantic import Field, model_validator

from core.cache import held
from core.errors import ConfigError
from core.job import Job, Outcome
from core.manifest import read_manifest
from core.stage import Kind, Resources, Stage, StageConfig, execution
from core.storage import Root
from core.workspace import mirrored, workspace
from moe.alarms import Limits
from moe.config import TrainConfig, from_json
from moe.presets import Name, preset
from moe.typed import build
from pipelines.questions import ProblemSet, QuestionSet, ask_all, question_artifacts

if TYPE_CHECKING:
    from mixtures.reader import MixtureSource

EVALUATIONS = "evaluation*.json"  # beside the model; without an identity in older roots
PLACEHOLDER_VOCABULARY = 2**20  # beyond that of any tokenizer: knobs are checked before there is one
# Knobs that are fields of moe.config.TrainConfig under the same name.
PLAN = (
    *(
        "rows",
        "row_growth",
        "seed",
        "shuffle",
        "packing",
        "fim_fraction",
        "fim_domains",
        "precision",
        "device",
        "compile",
    ),
    *("deterministic", "micro_rows", "threads", "checkpoint_steps", "keep", "tensorboard"),
)


class TrainStageConfig(StageConfig):
    """Which phase to train on, for how long, and the model's shape."""

    phase: str = Field(default="pretrain", description="a phase of `mix`")
    after: str | None = Field(default=None, description="instance of train to go on from; null: new weights")
    preset: Name = Field(default="tiny", description="named model shape; `model` overrides single values")
    model: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.ModelConfig")
    optim: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.OptimConfig")
    steps: int | None = Field(default=None, ge=1, description="updates; null: until the phase's tokens are used up")
    max_steps: int = Field(default=400, ge=1, description="cap when `steps` is null")
    rows: int = Field(default=32, ge=1, description="packed rows of `context` tokens an update")
    row_growth: tuple[tuple[int, int], ...] = Field(
        default=(), description="[update, rows] pairs: from that update on, counted from 0, that many rows"
    )
    packing: Literal["stream", "best_fit"] = Field(
        default="stream", description="documents end to end, or few of them cut"
    )
    shuffle: bool = Field(default=True, description="rows in a seeded order: a long document fills many rows in a row")
    fim_fraction: float = Field(
        default=0.0, ge=0, le=1, description="of documents in `fim_domains`, whose middle is moved to their end"
    )
    fim_domains: tuple[str, ...] = Field(default=(), description="datasets of code")
    fim_tokens: tuple[str, str, str] | None = Field(
        default=None, description="the tokenizer's special tokens for prefix, middle and suffix"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in use; the optimiser's stay float32"
    )
    seed: int = Field(default=0, description="of the initial weights, and of the order of rows")
    checkpoint_steps: int = execution(50, "updates between checkpoints")
    keep: int = execution(2, "newest checkpoints that stay")
    micro_rows: int | None = execution(None, "rows taken at once, for memory; null: all rows of an update")
    device: str = execution("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = execution(False, "each layer by torch.compile")
    deterministic: bool = execution(True, "the same bits from run to run on a GPU too")
    threads: int | None = execution(None, "CPU threads; null: torch's choice")
    tensorboard: bool = execution(False, "event files beside metrics.jsonl")
    alarms: dict[str, Any] = execution({}, "limits of moe.alarms.Limits that differ, and which alarms `stop` the run")

    @model_validator(mode="after")
    def _moe_takes_it(self) -> Self:
        """What `moe` says of its own knobs comes with the pipeline's other mistakes; the vocabulary is known only in `train`."""
        problems: list[str] = []
        given = {"steps": 1, "fim_tokens": (0, 1, 2) if self.fim_tokens else None}
        for made in (
            lambda: _with_knobs(self, PLACEHOLDER_VOCABULARY, 0, given),
            lambda: build(Limits, self.alarms, "alarms"),
        ):
            try:
                made()
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(*problems)
        return self


class EvaluateStageConfig(StageConfig):
    """What to measure on the trained model."""

    model: str = Field(default="train", description="instance of train that made it")
    prompts: tuple[str, ...] = Field(default=(), description="texts to continue; the continuations go into the report")
    max_tokens: int = Field(default=48, ge=1, description="length of a continuation")
    temperature: float = Field(default=0.8, ge=0, description="0 is greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus of a continuation's choices")
    seed: int = Field(default=0, description="of the continuations")
    questions: dict[str, QuestionSet] = execution(
        {}, "name -> file of questions with given answers; content and reading enter the identity, paths do not"
    )
    problems: dict[str, ProblemSet] = execution(
        {}, "name -> file of problems to be solved in writing; content and reading enter the identity, paths do not"
    )
    against: str | None = Field(
        default=None, description="instance of train to compare with on the same questions and problems; null: none"
    )

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if self.against is not None and not (self.questions or self.problems):
            raise ConfigError(
                f"evaluate: nothing to ask, got against {self.against!r} without questions or problems; name some files"
            )
        return self


def train(job: Job) -> Outcome:
    """Train on one phase; the loss curve is `metrics.jsonl` in the model's folder."""
    from mixtures.reader import MixtureSource
    from moe.checkpoint import weights_digest
    from moe.progress import live
    from moe.trainer import train as train_model

    config: TrainStageConfig = job.config
    source = MixtureSource(job.root, config.phase)
    source.check()
    folder = f"models/{config.phase}-{job.identity[:12]}"
    start = model_folder(job.root, config.after) if config.after else None
    limits = build(Limits, config.alarms, "alarms")
    with ExitStack() as stack:
        tokenizer = stack.enter_context(held(job.root, "models/tokenizer/tokenizer.json"))
        plan = train_plan(config, source, tokenizer, weights_digest(start) if start else None)
        place = stack.enter_context(workspace(job.root, folder, apart=[EVALUATIONS]))
        show = stack.enter_context(live(plan.steps, label=job.instance)) if job.display.live else None

        def on_step(row: dict[str, Any]) -> None:
            if show is not None:
                show(row)
            if row["step"] % config.checkpoint_steps == 0:
                place.commit()

        summary = train_model(plan, source, place.path, on_step, start, limits=limits)
        place.commit()
        content = weights_digest(place.path)
    figures = {name: value for name, value in asdict(summary).items() if not isinstance(value, Path)}
    outputs = {"weights": {"content": content, "folder": folder}}
    figures["passes"] = passes(plan, source)
    accounts = {"train_tokens": summary.tokens, "steps": plan.steps, "parameters": summary.parameters}
    return Outcome(outputs=outputs, accounts=accounts, observed=figures)


def train_plan(config: TrainStageConfig, source: "MixtureSource", tokenizer: Path, init: str | None) -> TrainConfig:
    """What the knobs say, with the steps that the phase holds."""
    from moe.data import training_rows

    given = {"steps": 1, "init": init, "tokenizer": str(tokenizer), "fim_tokens": _fim_ids(config, tokenizer)}
    plan = _with_knobs(config, source.vocab_size, source.eos, given)
    available = training_rows(plan, source).steps
    assert available is not None  # it does not repeat
    steps = config.steps or min(config.max_steps, available)
    return replace(plan, steps=steps, repeat=steps > available)


def passes(plan: TrainConfig, source: "MixtureSource") -> float:
    """How often the run reads the phase: above 1 where `steps` exceed it."""
    from moe.data import training_rows

    rows = training_rows(plan, source)
    return rows.first_row(plan.steps) / rows.rows_per_pass


def _with_knobs(config: TrainStageConfig, vocab_size: int, eos: int, given: dict[str, Any]) -> TrainConfig:
    """The knobs as a config of `moe`, with what is `given` of the rest; what does not fit is a `ConfigError`."""
    shape = asdict(preset(config.preset, vocab_size=vocab_size, eos=eos)) | config.model
    knobs = {name: getattr(config, name) for name in PLAN}
    return from_json(knobs | {"model": shape, "optim": config.optim} | given)


def _fim_ids(config: TrainStageConfig, tokenizer: Path) -> tuple[int, ...] | None:
    """Ids of the tokens that mark prefix, middle and suffix."""
    if config.fim_tokens is None:
        return None
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer))
    ids = {token: known.token_to_id(token) for token in config.fim_tokens}
    if missing := [token for token, number in ids.items() if number is None]:
        raise ConfigError(
            f"train: fim_tokens are not in the tokenizer, got {', '.join(missing)}; name three of its special tokens, such as "
            "<|reserved_0|>, <|reserved_1|> and <|reserved_2|>"
        )
    return tuple(int(number) for number in ids.values() if number is not None)


def model_folder(root: Root, instance: str) -> Path:
    """Where an instance of train left its model, on this machine."""
    trained = read_manifest(root, instance, None)
    if trained is None:
        raise ConfigError(f"train: no model of {instance!r} in {root.url}; list that stage before, or correct the name")
    return mirrored(root, trained.outputs["weights"]["folder"], apart=[EVALUATIONS])


def evaluate(job: Job) -> Outcome:
    """Bits per byte on the held-out documents of each source, continued prompts, and answers to the questions named."""
    import moe
    from mixtures.reader import MixtureSource
    from moe.evaluate import evaluate as evaluate_model
    from moe.examine import Asked
    from moe.generate import generate_batch, load_tokenizer, token_ids
    from moe.sampling import Sampling

    config: EvaluateStageConfig = job.config
    folder = model_folder(job.root, config.model)
    model = moe.load(folder)
    found: dict[str, Any] = {"held_out": evaluate_model(model, MixtureSource(job.root, "held_out")), "samples": []}
    sampling = Sampling(
        max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
    )
    if config.prompts:
        tokenizer = load_tokenizer(folder)
        for prompt in config.prompts:
            ids = token_ids(tokenizer, prompt)
            continuation = generate_batch(model, [ids], sampling, tokenizer=tokenizer)[0].text
            found["samples"].append({"prompt": prompt, "continuation": continuation})
    if config.questions or config.problems:
        beside = None if config.against is None else model_folder(job.root, config.against)
        other = None if beside is None else Asked(moe.load(beside), load_tokenizer(beside))
        found |= ask_all(Asked(model, load_tokenizer(folder)), other, config.questions, config.problems)
        found["against"] = config.against
    name = f"models/{folder.name}/evaluation-{job.identity[:12]}.json"
    job.root.write_json(name, found)
    content = xxhash.xxh3_128_hexdigest(job.root.read_bytes(name))
    outputs = {"evaluation": {"content": content, "file": name}}
    accounts = {"held_out_docs": int(sum(d["docs"] for d in found["held_out"].values()))}
    bits = {source: d["bpb"] for source, d in found["held_out"].items()}
    return Outcome(outputs=outputs, accounts=accounts, observed={"bits_per_byte": bits})


def _train_reads(config: TrainStageConfig) -> tuple[str, ...]:
    return ("@mix", "@tokenize", "@tokenizer", *([f"@{config.after}"] if config.after else []))


def _evaluate_reads(config: EvaluateStageConfig) -> tuple[str, ...]:
    return (f"@{config.model}", "@mix", "@tokenize", *([f"@{config.against}"] if config.against else []))


TRAIN = Stage(
    name="train",
    version=4,  # 2: may begin from another stage's model; 3: windowed layers, Muon, masks, MTP; 4: bf16 sums in fp32
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
    version=4,  # 2: losses by document; 3: windowed layers; 4: a file for each evaluation, null for what is unknown
    kind=Kind.EXPORT,
    config=EvaluateStageConfig,
    fn=evaluate,
    where=False,
    reads=_evaluate_reads,
    artifacts=lambda config: question_artifacts(config.questions, config.problems),
    libraries=("torch",),
)
