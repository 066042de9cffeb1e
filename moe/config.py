"""Configs of the model, its optimiser and a training run: plain frozen dataclasses, so that a GPU machine without
pydantic reads them.

In: Python or the `config.json` beside a checkpoint. Out: validated values; a wrong one is a `ConfigError` that names
all problems. Fields marked `execution` may differ between a checkpoint and the run that resumes it; all others are the
run's identity. The field names follow Step 3.5 Flash (arXiv 2602.10604, Table 6) where it has the same knob. Named
shapes are in `moe/presets.py`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import ConfigError
from moe.typed import build

EXECUTION = {"execution": True}
POSITIVE = (
    *("vocab_size", "context", "dim", "layers", "full_every", "window", "heads", "swa_heads", "kv_heads", "head_dim"),
    *("dense_dim", "experts", "top_k", "expert_dim", "shared_dim"),
)
MAX_MTP_HEADS = 3


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of full layers for a context beyond `original_context` (Llama 3's rule; released config.json)."""

    factor: float = 2.0
    original_context: int = 131_072
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 32.0

    def __post_init__(self) -> None:
        problems = []
        if self.factor < 1 or self.original_context < 1:
            problems.append(
                f"moe.rope_scaling: factor and original_context must be at least 1, got {self.factor} and "
                f"{self.original_context}"
            )
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            problems.append(
                f"moe.rope_scaling: low_frequency_factor must lie between 0 and high_frequency_factor, got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )
        _raise(problems)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder.

    Layer i sees all positions before it where i % full_every == 0, else the last `window`, itself counted. Layers below
    `dense_layers` have a dense SwiGLU, the others routed experts and a shared one.
    """

    vocab_size: int
    eos: int  # token id that ends a document, and starts the next one for the model
    context: int = 256  # longest input in training; generation and evaluation stay within it
    dim: int = 96
    layers: int = 5
    dense_layers: int = 1
    full_every: int = 4  # S3F1; 2 is S1F1, 1 full attention everywhere
    window: int = 512
    heads: int = 2  # query heads of full layers
    swa_heads: int = 3  # query heads of windowed layers, and of MTP heads
    kv_heads: int = 1
    head_dim: int = 32
    gate: bool = True  # head-wise sigmoid gate on the attention output
    dense_dim: int = 256
    experts: int = 8
    top_k: int = 2
    expert_dim: int = 96
    shared_dim: int = 96
    # Renormalised weights of k experts sum to 1, so their mixed output has RMS near 1/sqrt(k); the paper's 3.0 is near
    # sqrt(8) for its top-8 and lifts it back beside the shared expert. 1.5 does the same for top-2.
    routed_scale: float = 1.5
    # Bounds of SwiGLU's two factors, one a layer, 0: none; (): none anywhere (released config.json: 7 on the last two
    # layers, shared 16 on the last).
    routed_clip: tuple[float, ...] = ()
    shared_clip: tuple[float, ...] = ()
    rope_theta: float = 10_000.0  # of full layers; paper section 4.2.3: 1e4 at 4k, 1e6 at 32k, 5e6 at 128k
    swa_rope_theta: float = 10_000.0  # at every context
    rotary_fraction: float = 0.5  # of each head's width that full layers rotate; windowed ones rotate all
    rope_scaling: RopeScaling | None = None
    mtp_heads: int = 0  # head h predicts the token h + 1 places ahead
    norm_eps: float = 1e-5  # released config.json
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    # auto: the fastest that the device has (moe/attention.py, moe/experts.py); the others name one. Experts of auto on a
    # GPU: grouped products with the fused pieces of moe/kernels.py around them, where they fit.
    attention_backend: Literal["auto", "math", "sdpa", "flex", "varlen"] = field(default="auto", metadata=EXECUTION)
    experts_backend: Literal["auto", "grouped", "loop", "triton"] = field(default="auto", metadata=EXECUTION)

    def full(self, layer: int) -> bool:
        """Whether a layer sees its whole context; MTP heads, numbered from `layers`, never do."""
        return layer < self.layers and layer % self.full_every == 0

    def heads_of(self, layer: int) -> int:
        """Query heads of a layer."""
        return self.heads if self.full(layer) else self.swa_heads

    def routed_limit(self, layer: int) -> float | None:
        """Bound of the routed experts' factors in a layer, None without one."""
        return (self.routed_clip[layer] or None) if self.routed_clip else None

    def shared_limit(self, layer: int) -> float | None:
        """Bound of the shared expert's factors in a layer, None without one."""
        return (self.shared_clip[layer] or None) if self.shared_clip else None

    def __post_init__(self) -> None:
        problems = [
            f"moe.{name}: must be positive, got {getattr(self, name)}" for name in POSITIVE if getattr(self, name) < 1
        ]
        if not 0 <= self.eos < self.vocab_size:
            problems.append(
                f"moe.eos: must be a token of the vocabulary, got {self.eos}, expected 0 to {self.vocab_size - 1}"
            )
        problems += [
            f"moe.{name}: must be a multiple of kv_heads, got {getattr(self, name)} and {self.kv_heads}"
            for name in ("heads", "swa_heads")
            if self.kv_heads > 0 and getattr(self, name) % self.kv_heads
        ]
        if self.head_dim % 2 or not 0 < self.rotary_fraction <= 1 or self.head_dim * self.rotary_fraction % 2:
            problems.append(
                f"moe.head_dim: rotary positions need an even number of widths, got {self.head_dim} x "
                f"{self.rotary_fraction}"
            )
        if self.top_k > self.experts:
            problems.append(f"moe.top_k: must be at most experts, got {self.top_k} of {self.experts}")
        if not 0 <= self.dense_layers <= self.layers:
            problems.append(f"moe.dense_layers: must lie in 0 to layers, got {self.dense_layers} of {self.layers}")
        if not 0 <= self.mtp_heads <= MAX_MTP_HEADS:
            problems.append(f"moe.mtp_heads: must lie in 0 to {MAX_MTP_HEADS}, got {self.mtp_heads}")
        problems += [
            f"moe.{name}: must name one bound a layer, none negative, got {getattr(self, name)} for {self.layers} layers"
            for name in ("routed_clip", "shared_clip")
            if getattr(self, name) and (len(getattr(self, name)) != self.layers or min(getattr(self, name)) < 0)
        ]
        _raise(problems)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for matrices and AdamW for the rest, or AdamW for all; schedule, balancing and the weights of side losses.

    `lr` serves both: Muon's updates are scaled to AdamW's size (moe/muon.py).
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3  # chosen for the presets, no sweep behind it
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_fraction: float = 0.1
    warmup_steps: int = 50
    decay_fraction: float = 0.2  # of the run that wsd spends falling to min_lr_fraction, in a straight line
    weight_decay: float = 0.1  # paper section 4.2.3
    momentum: float = 0.95  # of Muon; released code
    beta1: float = 0.9  # paper section 4.2.3, as are beta2 and grad_clip
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    # The paper's 1e-3 is for 10^5 updates. `tiny` learns word frequencies in its first 50 and then sends all tokens to
    # the same experts; greatest violation after 48: 2.8 at 0.003, 3.0 (total collapse) at 0.01, 2.3 at 0.03, where it
    # has fallen to 0.9 after 60 (at 0.01: 2.9).
    bias_rate: float = 0.03
    bias_stop_fraction: float = 0.1  # of the run at its end without bias updates (the paper: none in annealing)
    group_loss: float = 0.0  # weight of the loss that balances groups of experts; the paper's 1e-3
    expert_groups: int = 1  # of that loss; the expert-parallel ranks, or as many virtual ones (1: it is constant)
    z_loss: float = 0.0  # weight of the squared log-partition of the output
    mtp_loss: float = 0.3  # weight of all MTP heads together; paper: 0.3, then 0.1
    # FastMTP's weights fall with the position; its paper's values are not those of ours (chosen, no sweep behind it)
    mtp_decay: float = 0.8
    freeze_router: bool = False  # the paper, in mid-training: router weights and biases stay

    def __post_init__(self) -> None:
        problems = [
            f"optim.{name}: must be positive, got {getattr(self, name)}"
            for name in ("lr", "eps", "grad_clip", "expert_groups", "mtp_decay")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"optim.{name}: must not be negative, got {getattr(self, name)}"
            for name in ("warmup_steps", "weight_decay", "bias_rate", "group_loss", "z_loss", "mtp_loss")
            if getattr(self, name) < 0
        ]
        problems += [
            f"optim.{name}: must lie in 0 to 1, got {getattr(self, name)}"
            for name in ("min_lr_fraction", "decay_fraction", "momentum", "beta1", "beta2", "bias_stop_fraction")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.group_loss > 0 and self.expert_groups == 1:
            problems.append(
                f"optim.group_loss: balances several groups, got {self.group_loss} with expert_groups 1, for which it is "
                "constant; set expert_groups, or group_loss to 0"
            )
        _raise(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: `steps` updates of `rows` packed rows of `model.context` tokens each."""

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 250
    rows: int = 32
    row_growth: tuple[tuple[int, int], ...] = ()  # (step, rows): from this update on, counted from 0, that many rows
    seed: int = 0
    order_seed: int | None = None  # of the rows' order; None: `seed`, which the initial weights always have
    init: str | None = None  # hash of the weights that it starts from; None: drawn by `seed`
    packing: Literal["stream", "best_fit"] = "stream"  # documents end to end, or few cut ones (moe/packing.py)
    shuffle: bool = False  # rows in a seeded order instead of the mixture's own
    repeat: bool = False  # read the mixture again from its start when it ends; otherwise that is an error
    fim_fraction: float = 0.0  # of documents in `fim_domains`, whose middle is moved to their end (moe/fim.py)
    fim_domains: tuple[str, ...] = ()
    fim_tokens: tuple[int, int, int] | None = None  # ids that mark prefix, middle and suffix
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: of weights in use; the optimiser's stay float32
    device: str = field(default="auto", metadata=EXECUTION)  # auto: a GPU if there is one
    compile: bool = field(default=False, metadata=EXECUTION)  # each layer by torch.compile
    deterministic: bool = field(default=True, metadata=EXECUTION)  # the same bits from run to run on a GPU too
    micro_rows: int | None = field(default=None, metadata=EXECUTION)  # rows a rank takes at once; None: all of its own
    expert_ranks: int = field(default=1, metadata=EXECUTION)  # ranks that share one set of experts
    tokenizer: str | None = field(default=None, metadata=EXECUTION)  # tokenizer.json, copied beside the checkpoints
    threads: int | None = field(default=None, metadata=EXECUTION)  # None leaves torch's own choice
    checkpoint_steps: int = field(default=100, metadata=EXECUTION)
    keep: int = field(default=2, metadata=EXECUTION)  # newest checkpoints that stay
    tensorboard: bool = field(default=False, metadata=EXECUTION)  # the metrics as event files beside metrics.jsonl

    def rows_of(self, step: int) -> int:
        """Rows of update `step`, counted from 0."""
        return next((rows for start, rows in reversed(self.row_growth) if step >= start), self.rows)

    def rank_problems(self, ranks: int) -> list[str]:
        """Why so many ranks cannot share the run; nothing when they can."""
        if ranks < 1:
            return [f"train: a run has at least one rank, got {ranks}"]
        out = []
        if uneven := [rows for rows in (self.rows, *(r for _, r in self.row_growth)) if rows % ranks]:
            out.append(
                f"train.rows: must divide among the ranks, got {uneven[0]} rows for {ranks} ranks; change train.rows or "
                "train.row_growth"
            )
        if ranks % self.expert_ranks:
            out.append(f"train.expert_ranks: must divide the ranks, got {self.expert_ranks} for {ranks} ranks")
        return out

    def __post_init__(self) -> None:
        problems = [
            f"train.{name}: must be positive, got {getattr(self, name)}"
            for name in ("steps", "rows", "checkpoint_steps", "keep", "expert_ranks", "threads", "micro_rows")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        starts = [start for start, _ in self.row_growth]
        if starts != sorted(set(starts)) or any(start < 1 or rows < 1 for start, rows in self.row_growth):
            problems.append(
                f"train.row_growth: pairs of a step and a number of rows, steps rising from 1, got {self.row_growth}"
            )
        if not 0 <= self.fim_fraction <= 1 or (self.fim_fraction and not (self.fim_domains and self.fim_tokens)):
            problems.append(
                "train.fim_fraction: lies in 0 to 1 and needs fim_domains and fim_tokens, "
                f"got {self.fim_fraction}, {self.fim_domains} and {self.fim_tokens}"
            )
        if self.model.experts % self.expert_ranks:
            problems.append(
                f"train.expert_ranks: must divide the experts, got {self.expert_ranks} for {self.model.experts}"
            )
        _raise(problems)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Nested JSON values of every field."""
    return dataclasses.asdict(config)


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_json`; what does not fit is a `ConfigError` of all problems (moe/typed.py)."""
    return build(TrainConfig, values, "train")


def differences(stored: TrainConfig, wanted: TrainConfig) -> list[str]:
    """One line for each field of the run's identity in which the two differ."""
    old, new = _identity(stored), _identity(wanted)
    return [
        f"{name}: the checkpoint has {old.get(name)!r}, this run {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _identity(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("execution"):
            continue
        if dataclasses.is_dataclass(value):
            flat |= _identity(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(*problems)
