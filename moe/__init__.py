"""A small mixture-of-experts decoder: training, evaluation and generation. torch is imported on use only."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.model import Decoder


def load(folder: str | Path) -> "Decoder":
    """The newest model of a run folder, or the model of a hub folder, in evaluation mode.

    Token ids [B, T] int64 -> logits [B, T, V].
    """
    from moe import checkpoint, hub

    folder = Path(folder)
    return hub.load(folder) if hub.is_hub_folder(folder) else checkpoint.load(folder)
