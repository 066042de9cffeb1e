"""Config of a run of reinforcement learning: how answers are sampled, what they are worth, which tokens count.

In: Python, or the run file (moe/rl/tasks.py). Out: validated values; a wrong one is a `ConfigError` that names all problems.
Fields marked `execution` may differ between a run and the one that resumes it; all others are its identity. Where the report
(Step 3.5 Flash, arXiv 2602.10604, section 5.2) publishes a value it is the default, or stands beside the one chosen for small
runs. Not published, so chosen here: the mean that the loss takes, every value for a model of this size. Not built: its critic,
whose place the group's mean takes, and its KL term, which the report has in the last stage only.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import ConfigError
from core.hashing import digest
from moe.config import EXECUTION, ModelConfig, OptimConfig, TrainConfig

# Muon with weight decay 0.1, rate 2e-6, 20 updates of warm-up, constant since no decay is published (section 5.2.3). That the
# router and the MTP heads stay is chosen: the report freezes the router in mid-training and SFT, and says nothing of RL.
OPTIM = OptimConfig(
    lr=2e-6, warmup_steps=20, schedule="constant", bias_rate=0.0, mtp_loss=0.0, freeze_router=True
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """`steps` updates. A generation is `prompts` tasks with `samples` answers each, and serves `minibatches * epochs` updates."""

    steps: int = 100
    prompts: int = 16  # the report: 256
    samples: int = 8  # the report: 16
    minibatches: int = 1  # updates on parts of a generation; the report: 4
    epochs: int = 1  # passes over a generation
    # generations that sampling runs ahead of training; the report's async agents bear about 20 updates
    staleness: int = 0
    max_tokens: int = 64  # of an answer, its end included; the report: 128k
    temperature: float = 1.0  # the report; above and below it the policy that is trained is the tempered one
    stop: tuple[str, ...] = ()  # strings that end an answer, as EOS does
    loss: Literal["mispo", "ppo", "reinforce"] = "mispo"  # the other two are for comparison
    # Bounds, both included, of pi_old / pi_sampler at a token, and of its geometric mean over a trajectory. A Qwen3-1.7B study
    # outside the report found the second so tight that stale runs learn next to nothing: watch the rejected share and widen it.
    token_ratio: tuple[float, float] = (0.5, 2.0)
    trajectory_ratio: tuple[float, float] = (0.996, 1.001)
    ratio_of: Literal["snapshot", "current"] = "snapshot"  # whose numerator: weights at the generation's start, or now
    ppo_clip: float = 0.2  # released code
    # reward less the group's mean, as it is or over its deviation
    advantage_scale: Literal["none", "deviation"] = "deviation"
    equal_groups: Literal["drop", "keep"] = "drop"  # a group of equal rewards: out of the loss's mean, or zeros in it
    # An answer that `max_tokens` cuts: the report's R := V(s_T) is the group's mean here, so that it teaches nothing.
    truncated: Literal["baseline", "reward"] = "baseline"
    mean_over: Literal["tokens", "trajectories"] = "tokens"  # each token alike, or each answer alike
    seed: int = 0
    optim: OptimConfig = OPTIM
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: of weights in use; the optimiser's stay float32
    device: str = field(default="auto", metadata=EXECUTION)
    deterministic: bool = field(default=True, metadata=EXECUTION)
    # trajectories taken at once; None: all of an update
    micro_rows: int | None = field(default=None, metadata=EXECUTION)
    # answers written side by side; another number may turn a near tie
    slots: int = field(default=64, metadata=EXECUTION)
    threads: int | None = field(default=None, metadata=EXECUTION)
    checkpoint_steps: int = field(default=1, metadata=EXECUTION)
    keep: int = field(default=2, metadata=EXECUTION)  # newest checkpoints that stay, and the generations that they need
    tensorboard: bool = field(default=False, metadata=EXECUTION)

    @property
    def updates(self) -> int:
        """That one generation serves."""
        return self.minibatches * self.epochs

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume must share, as JSON values by dotted name."""
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "optim":
                flat |= {f"optim.{name}": v for name, v in dataclasses.asdict(value).items()}
            elif not f.metadata.get("execution"):
                flat[f.name] = list(value) if isinstance(value, tuple) else value
        return flat

    def train_config(self, model: ModelConfig, init: str | None, tokenizer: str | None) -> TrainConfig:
        """What checkpoints of the run say of themselves, so that all that reads a training run's reads them."""
        return TrainConfig(
            model=model, optim=self.optim, steps=self.steps, rows=self.prompts * self.samples // self.minibatches,
            seed=self.seed, init=init, precision=self.precision, device=self.device, deterministic=self.deterministic,
            micro_rows=self.micro_rows, tokenizer=tokenizer, threads=self.threads,
            checkpoint_steps=self.checkpoint_steps, keep=self.keep, tensorboard=self.tensorboard,
        )  # fmt: skip

    def __post_init__(self) -> None:
        positive = ("steps", "prompts", "minibatches", "epochs", "max_tokens", "slots", "checkpoint_steps", "keep")
        optional = ("micro_rows", "threads")
        problems = [
            f"rl.{name}: must be positive, got {getattr(self, name)}"
            for name in (*positive, *optional)
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.samples < 2:
            problems.append(f"rl.samples: a group's mean needs two answers at least, got {self.samples}")
        if self.staleness < 0:
            problems.append(f"rl.staleness: must not be negative, got {self.staleness}")
        if self.minibatches > 0 and self.prompts % self.minibatches:
            problems.append(
                f"rl.minibatches: must divide the prompts of a generation, got {self.minibatches} for {self.prompts}"
            )
        if not 0.01 <= self.temperature <= 100:
            problems.append(
                f"rl.temperature: must lie in 0.01 to 100, got {self.temperature}; greedy answers teach nothing"
            )
        if not 0 < self.ppo_clip < 1:
            problems.append(f"rl.ppo_clip: must lie between 0 and 1, got {self.ppo_clip}")
        if not all(self.stop):
            problems.append(f"rl.stop: strings that are not empty, got {self.stop}")
        problems += [
            f"rl.{name}: a low and a high bound around 1, got {low} and {high}"
            for name, (low, high) in (("token_ratio", self.token_ratio), ("trajectory_ratio", self.trajectory_ratio))
            if not 0 <= low <= 1 <= high
        ]
        if self.optim.bias_rate or self.optim.mtp_loss or self.optim.group_loss:
            problems.append(
                "rl.optim: bias_rate, mtp_loss and group_loss are 0 here, got "
                f"{self.optim.bias_rate}, {self.optim.mtp_loss} and {self.optim.group_loss}; leave them out"
            )
        if self.optim.z_loss:
            problems.append(f"rl.optim: z_loss is 0 here, got {self.optim.z_loss}; leave it out")
        if problems:
            raise ConfigError(*problems)


def rl_differences(stored: dict[str, Any], config: RLConfig) -> list[str]:
    """One line for each field of the identity in which a run's record and a config differ."""
    wanted = config.identity
    return [
        f"rl.{name}: the run has {stored.get(name)!r}, this config {wanted.get(name)!r}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]


def identity_digest(config: RLConfig, tasks: str) -> str:
    """Of config and tasks: what a checkpoint has in the place of a mixture's fingerprint."""
    return digest([config.identity, tasks])
