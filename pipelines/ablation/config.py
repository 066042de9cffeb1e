"""One YAML file describes one ablation: a base pipeline, and arms that lay a policy or a mixture over it.

base: ../demo.yaml                # everything that the arms share
phase: pretrain                   # of the base's `mix`
tokens: 300000                    # the same for every arm
seeds: [0, 1]
aa: true                          # train the first arm once more, on another order of its data
train: {preset: tiny, rows: 16}
arms:
  plain: {}                       # the first arm is the baseline
  long:
    mix: {phases: {pretrain: {components: [{dataset: web, where: signals.words > 500, weight: 1.0}]}}}
  strict:
    policy: {final: [{drop: signals.words < 100, reason: too_short}]}

An arm's `mix` lies over `stages.mix` and its `policy` over `policy`: mappings merge, lists and values replace. All mistakes are
told at once, with the line in the file where they stand.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from core.errors import ConfigError
from core.stage import ConfigPath, Kind
from mixtures.phases import MixConfig
from moe.presets import Name
from pipelines.ablation.overlay import OverlaidLines, laid_over
from pipelines.config import Pipeline, StageEntry, checked, checked_as, load_pipeline, nearest, read_yaml
from pipelines.yaml_lines import Lines
from pipelines.yaml_lines import Path as Place

AA = "aa"  # the name of the A/A arm
NAME = r"^\w+$"  # part of the label of a stage


class ArmConfig(BaseModel):
    """What one arm lays over the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mix: dict[str, Any] = Field(default_factory=dict, description="over the knobs of the base's `mix`")
    policy: dict[str, Any] = Field(default_factory=dict, description="over the policy: rules of the last select")


class TrialConfig(BaseModel):
    """The model of every trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Name = Field(default="tiny", description="named model shape; `model` overrides values")
    model: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.ModelConfig")
    optim: dict[str, Any] = Field(default_factory=dict, description="fields of moe.config.OptimConfig")
    rows: int = Field(default=16, ge=1, description="packed rows of `context` tokens an update")
    threads: int = Field(default=1, ge=1, description="CPU threads of a trial; part of its identity, sums depend on it")


class AblationConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ConfigPath = Field(description="the pipeline that all arms share")
    name: str | None = Field(default=None, pattern=NAME, description="of the ablation; the file's name if not given")
    phase: str = Field(default="pretrain", description="the phase of `mix` that is trained on")
    tokens: int = Field(gt=0, description="training tokens of every trial")
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1, description="of the initial weights and of the order")
    aa: bool = Field(default=True, description="train the baseline again on another order: the noise of training")
    train: TrialConfig = Field(default_factory=TrialConfig, description="the model of every trial")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="name -> what it lays over the base; baseline first")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ConfigError(f"ablation: seeds must be distinct and not negative, got {list(seeds)}")
        return seeds


@dataclass(frozen=True)
class Arm:
    """One arm as a whole pipeline. `rules` are its own for the last select, None where the base's hold."""

    name: str
    pipeline: Pipeline
    rules: tuple[Any, ...] | None

    @property
    def mix(self) -> MixConfig:
        config = self.pipeline.entry("mix").config
        assert isinstance(config, MixConfig)
        return config


@dataclass(frozen=True)
class Ablation:
    """A validated ablation."""

    path: Path
    name: str
    config: AblationConfig
    base: Pipeline
    arms: tuple[Arm, ...]  # the first is the baseline

    @property
    def select(self) -> StageEntry:
        return last_select(self.base)


def load_ablation(path: str | Path) -> Ablation:
    """Read and check an ablation and its base. Raises ConfigError with one line a problem."""
    path = Path(path)
    data, lines = read_yaml(path)
    config: AblationConfig = checked_as(AblationConfig, path, data, lines)
    base = load_pipeline(config.base)
    below = read_yaml(Path(config.base))
    problems = _problems(config, base, lines)
    arms = []
    for name in config.arms:
        try:
            arms.append(_arm(name, data["arms"][name] or {}, base, below, lines))
        except ConfigError as e:
            problems += e.problems
    for arm in arms:
        if config.phase not in arm.mix.phases:
            near = nearest(config.phase, arm.mix.phases)
            problems.append(f"{lines.where(('phase',))}: phase: `mix` has no phase {config.phase!r}{near}")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return Ablation(path, config.name or path.stem.replace("-", "_"), config, base, tuple(arms))


def last_select(base: Pipeline) -> StageEntry:
    """The select whose fate is the last word before `tokenize`."""
    names = [e.instance for e in base.stages]
    before = base.stages[: names.index("tokenize")] if "tokenize" in names else base.stages
    return next(e for e in reversed(before) if e.stage.kind is Kind.DECIDE)


def _problems(config: AblationConfig, base: Pipeline, lines: Lines) -> list[str]:
    """What no schema sees."""
    import re

    out = [
        f"{lines.where(('arms', name))}: arms.{name}: an arm's name holds letters, digits and _, and is not {AA!r}"
        for name in config.arms
        if not re.match(NAME, name) or name == AA
    ]
    if len(config.arms) == 1 and not config.aa:
        out.append(f"{lines.where(('arms',))}: arms: one arm and no `aa` leave nothing to compare; add an arm")
    if len(config.seeds) < 2 and not config.aa:
        out.append(
            f"{lines.where(('seeds',))}: seeds: one seed without `aa` leaves the noise of training unknown; add one"
        )
    for stage in ("tokenizer", "tokenize", "mix"):
        if stage not in [e.instance for e in base.stages]:
            out.append(
                f"{lines.where(('base',))}: base: {base.path} has no stage {stage!r}; arms are mixed from its tokens"
            )
    if not any(e.stage.kind is Kind.DECIDE for e in base.stages):
        out.append(
            f"{lines.where(('base',))}: base: {base.path} has no select; name one that decides what is tokenised"
        )
    for part in ("model", "optim"):
        out += [f"{lines.where(('train', part))}: {problem}" for problem in _moe_problems(config.train, part)]
    if out:
        raise ConfigError(*out)  # arms cannot be read without these
    return out


def _moe_problems(train: TrialConfig, part: str) -> tuple[str, ...]:
    """What the model's own config says of its overrides."""
    from moe.config import OptimConfig, from_json
    from moe.presets import preset

    shape = asdict(preset(train.preset, vocab_size=2, eos=0))
    values = {"model": shape | (train.model if part == "model" else {}), "optim": asdict(OptimConfig())}
    values["optim"] |= train.optim if part == "optim" else {}
    try:
        from_json(values)
    except ConfigError as e:
        return e.problems
    except TypeError as e:  # a text where a number belongs
        return (f"train.{part}: {e}",)
    return ()


def _arm(name: str, given: dict[str, Any], base: Pipeline, below: tuple[dict[str, Any], Lines], lines: Lines) -> Arm:
    """The base with one arm's parts laid over it, checked as any pipeline is."""
    data, base_lines = below
    label = last_select(base).instance.partition("@")[2]
    policy = given.get("policy") or {}
    wrong = [
        f"{lines.where(('arms', name, 'policy', key))}: arms.{name}.policy.{key}: arms share all but the rules of "
        f"select@{label}{nearest(str(key), [label])}; expected {label!r}"
        for key in policy
        if key != label
    ]
    if wrong:
        raise ConfigError(*wrong)
    over = {"stages": {"mix": given.get("mix") or {}}, "policy": policy}
    places: dict[Place, Place] = {("stages", "mix"): ("arms", name, "mix"), ("policy",): ("arms", name, "policy")}
    merged = laid_over({**data, "policy": data.get("policy") or {}}, over)
    pipeline = checked(base.path, merged, OverlaidLines(base_lines, lines, places))
    return Arm(name, pipeline, tuple(pipeline.policy[label]) if policy else None)
