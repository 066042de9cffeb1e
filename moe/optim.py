"""Optimiser, learning rate and the optimiser's state by parameter name.

In: a `Decoder` and an `OptimConfig`. Out: torch's AdamW over two groups, a pure function step -> rate, and state
tensors that a checkpoint stores under the names of the parameters they belong to.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe.config import OptimConfig

STATE = ("step", "exp_avg", "exp_avg_sq")


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; gains and embeddings are not decayed (Step 3.5 Flash decays gains too)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or "embed_tokens" in name else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of update `step`, counted from 0.

    Linear warm-up to `lr`, then a cosine that reaches lr * min_lr_fraction at the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    low = config.lr * config.min_lr_fraction
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`<parameter name>.<step, exp_avg or exp_avg_sq>`; empty before the first update."""
    return {
        f"{name}.{key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in STATE
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`; the caller has checked that the model's shapes are the checkpoint's."""
    if tensors:
        for name, p in model.named_parameters():
            optimizer.state[p] = {key: tensors[f"{name}.{key}"].clone() for key in STATE}
