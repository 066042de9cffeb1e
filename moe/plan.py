"""What a run would be, before it: parameters, operations, memory, steps and hours.

In: `TrainConfig`, a source, the number of ranks. Out: figures, and the same as text. Counts are exact (moe/flops.py), and so is
the memory of weights and gradients, of the experts those that `expert_ranks` leave on a rank; the optimiser's is a rank's even
share; activations are an estimate, `ACTIVATION_WIDTHS` numbers of the model's width a token and layer. Hours are those of H100s
at `MFU_FLOOR`. No model is built.
"""

from dataclasses import dataclass

from core.errors import ConfigError
from moe import flops
from moe.config import TrainConfig
from moe.data import TokenSource, training_rows
from moe.memory import GIB, WIDTHS, held, rows_at_once

# 24 GiB at 32k tokens, 16 layers of width 1024 in bfloat16 (a prototype on an H100, nothing recomputed): 24 numbers each.
ACTIVATION_WIDTHS = 24
MFU_FLOOR = 0.3  # what the preset 1b is held to on one H100
H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one rank."""

    ranks: int
    parameters: int
    active_parameters: int
    flops_per_token: float  # of training
    steps: int
    tokens: int
    passes: float  # over the source
    padding_fraction: float  # of the rows
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    h100_hours: float  # of all ranks together, at MFU_FLOOR


def plan(config: TrainConfig, source: TokenSource, ranks: int = 1) -> Plan:
    """The figures of a run; what could not run is a `ConfigError`."""
    if problems := config.rank_problems(ranks):
        raise ConfigError(*problems)
    c, rows = config.model, training_rows(config, source)
    total, active = flops.parameters(c)
    need, at_once = held(config, ranks), rows_at_once(config, ranks)[0] * c.context
    tokens = rows.first_row(config.steps) * c.context
    per_token = flops.training_flops(c, c.context)
    peak = flops.peak_flops(H100)
    assert peak is not None
    return Plan(
        ranks=ranks,
        parameters=total,
        active_parameters=active,
        flops_per_token=per_token,
        steps=config.steps,
        tokens=tokens,
        passes=rows.first_row(config.steps) / rows.rows_per_pass,
        padding_fraction=1 - rows.packing.fill_fraction,
        weight_bytes=need.weights,
        gradient_bytes=need.gradients,
        optimizer_bytes=need.optimizer,
        activation_bytes=at_once * (c.layers + c.mtp_heads) * ACTIVATION_WIDTHS * c.dim * WIDTHS[config.precision],
        h100_hours=tokens * per_token / (peak * MFU_FLOOR) / 3600,
    )


def text(found: Plan) -> str:
    """A line for each figure."""
    f = found
    memory = f.weight_bytes + f.gradient_bytes + f.optimizer_bytes + f.activation_bytes
    lines = [
        ("parameters", f"{f.parameters:,}, {f.active_parameters:,} active"),
        ("operations", f"{f.flops_per_token:.4g} a token in training, {f.flops_per_token * f.tokens:.4g} in all"),
        ("updates", f"{f.steps:,}, {f.tokens:,} tokens"),
        ("data", f"{f.passes:.2f} passes over the source, {100 * f.padding_fraction:.1f} % of the rows padding"),
        ("memory a rank", f"about {memory / GIB:.2f} GiB"),
        ("  weights", f"{f.weight_bytes / GIB:.2f} GiB"),
        ("  gradients", f"{f.gradient_bytes / GIB:.2f} GiB"),
        ("  optimiser", f"{f.optimizer_bytes / GIB:.2f} GiB (over {f.ranks} ranks)"),
        ("  activations", f"about {f.activation_bytes / GIB:.2f} GiB; train.micro_rows lowers them"),
        ("H100 hours", f"{f.h100_hours:.3g} at {100 * MFU_FLOOR:.0f} % of the peak"),
    ]
    return "".join(f"{name:<16}{said}\n" for name, said in lines)
