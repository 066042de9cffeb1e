"""A small mixture-of-experts decoder: training, evaluation and generation. torch is imported on use only."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.model import Decoder


def load(folder: str | Path) -> "Decoder":
    """The newest model of a run folder, in evaluation mode: token ids [B, T] int64 -> logits [B, T, V]."""
    from moe import checkpoint

    return checkpoint.load(Path(folder))
