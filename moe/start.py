"""How a run begins from the weights of another: as a later phase, at a longer context, with more MTP heads.

In: a checkpoint of the earlier run. Out: its weights and moments in the new run's model and optimiser, whose schedule begins at
update 1. Between the two may change

- the context and its positions: `context`, `rope_theta`, `rope_scaling` (no weight depends on them),
- the bounds `routed_clip` and `shared_clip` (what an exploding expert is answered with),
- `mtp_heads`, upwards: a head that the earlier run lacks begins as a copy of its first one, moments too (MTP-1 to MTP-3, Step
  3.5 Flash, section 2), or fresh where it had none,
- what is no shape: data, precision, optimiser. Another optimiser begins without moments.

Every other difference of the model is refused, all of them named.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe import checkpoint, muon
from moe.config import ModelConfig, TrainConfig
from moe.model import Decoder
from moe.optim import frozen

FREE = ("context", "rope_theta", "rope_scaling", "routed_clip", "shared_clip", "mtp_heads")
FIRST_HEAD = "mtp.0."
UPDATES, MASTER = "updates", "master"  # of the optimiser's state (moe/optim.py)


def start_problems(config: TrainConfig, start: Path | None) -> list[str]:
    """Why a run cannot begin from the folder `start`; nothing when it can, or has none to begin from."""
    found = checkpoint.weights_digest(start) if start is not None else None
    if found != config.init:
        return [
            f"train: the weights to start from are not those of the config, got {found} in {start}, expected {config.init}; "
            "set train.init to the hash of the weights there"
        ]
    if start is None:
        return []
    stored, _ = checkpoint.read(checkpoint.find(start))
    old, new = stored.model, config.model
    out = [
        f"train: model.{f.name} may not change between runs, got {getattr(new, f.name)!r}, expected "
        f"{getattr(old, f.name)!r} as in {start}; {', '.join(FREE)} may"
        for f in dataclasses.fields(ModelConfig)
        if not f.metadata.get("execution") and f.name not in FREE and getattr(old, f.name) != getattr(new, f.name)
    ]
    if new.mtp_heads < old.mtp_heads:
        out.append(
            f"train: model.mtp_heads may not fall between runs, got {new.mtp_heads}, expected at least {old.mtp_heads} "
            f"as in {start}"
        )
    return out


def begin(path: Path, model: Decoder, config: TrainConfig) -> dict[str, Tensor]:
    """Puts a checkpoint's weights into a fresh model, whole and in fp32, and returns the moments to begin with, or none.

    `start_problems` found none.
    """
    stored, _ = checkpoint.read(path)
    weights, moments = checkpoint.load_tensors(path)
    # A run in bfloat16 keeps its exact weights with the optimiser.
    weights = {name: moments.get(f"{name}.{MASTER}", tensor) for name, tensor in weights.items()}
    weights, moments = (with_heads(tensors, stored.model, config.model) for tensors in (weights, moments))
    weights = model.state_dict() | weights
    checkpoint.put_weights(path.name, model, weights)
    if stored.optim.optimizer != config.optim.optimizer or UPDATES not in moments:
        return {}
    return _moments(model, weights, moments, config)


def _moments(
    model: Decoder, weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], config: TrainConfig
) -> dict[str, Tensor]:
    """What the optimiser of the new run keeps (moe/optim.py): stored where it was, zero where it is new."""
    out = {UPDATES: stored[UPDATES]}
    for name, p in model.named_parameters():
        if frozen(name, config.optim):
            continue
        is_matrix = config.optim.optimizer == "muon" and muon.matrices(name, p)
        for key in ("momentum",) if is_matrix else ("exp_avg", "exp_avg_sq"):
            out[f"{name}.{key}"] = stored.get(f"{name}.{key}", torch.zeros(p.shape))
        if config.precision == "bfloat16":
            out[f"{name}.{MASTER}"] = weights[name].float()
    return out


def with_heads(tensors: Mapping[str, Tensor], stored: ModelConfig, wanted: ModelConfig) -> dict[str, Tensor]:
    """Tensors by parameter name, with copies of the first MTP head's for the heads that `wanted` has beyond `stored`'s.

    Where `stored` has no head nothing is added.
    """
    first = {name: tensor for name, tensor in tensors.items() if name.startswith(FIRST_HEAD)}
    out = dict(tensors)
    for head in range(stored.mtp_heads, wanted.mtp_heads):
        out |= {f"mtp.{head}.{name.removeprefix(FIRST_HEAD)}": tensor for name, tensor in first.items()}
    return out
