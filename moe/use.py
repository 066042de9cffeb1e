"""How a trained model is put to use: the options that generating, serving, examining and the harness share, defined once.

In: a folder that training wrote, or a hub folder, and what a person said of device and type. Out: the model where and as it
shall run. Command lines take names, defaults and help from here; torch is imported when a model is loaded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from core.errors import ConfigError

if TYPE_CHECKING:
    from moe.model import Decoder

Name = Literal["device", "dtype", "speculate", "compiled", "fused"]
DTYPES = ("auto", "float32", "bfloat16")
STORED = {"BF16": "bfloat16"}  # as safetensors call it; everything else is read as float32
HELP = {
    "device": "cpu, cuda or cuda:N; auto: a GPU if there is one",
    "dtype": "auto, float32 or bfloat16; auto: bfloat16 on a GPU, on a CPU what the folder holds",
    "speculate": "draft up to so many tokens a round, one by each MTP head, while that pays; 0: none",
    "compiled": "layers by torch.compile: the first answers wait for it, later ones come sooner",
    "fused": "decode by fused kernels; without either: where they can (a GPU with Triton)",
    "max_tokens": "new tokens at most",
    "temperature": "0 takes the likeliest token",
    "top_k": "only from so many of the likeliest tokens",
    "top_p": "only from the likeliest tokens that make up this share",
    "repetition_penalty": "above 1: tokens that were there become less likely",
    "stop": "ends the answer; may be given several times",
    "seed": "of the draws",
}


@dataclass(frozen=True)
class Use:
    """Where and as what a model runs, and how it decodes. A wrong value is a `ConfigError` when it is made."""

    device: str = "auto"
    dtype: str = "auto"
    speculate: int = 0
    compiled: bool = False
    fused: bool | None = None  # None: where the kernels can

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: unknown, got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.speculate < 0:
            raise ConfigError(f"--speculate: must not be negative, got {self.speculate}; 0 drafts nothing")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Use":
        """Those of the options that a command line has; the rest as they are by default."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})

    def load(self, folder: Path) -> "Decoder":
        """The folder's model, ready for use."""
        import torch

        import moe
        from moe.device import device_of
        from moe.memory import memory_named

        device, name = device_of(self.device, "--device"), self.dtype
        if name == "auto":
            name = stored_dtype(folder) if device.type == "cpu" else "bfloat16"
        dtype: torch.dtype = getattr(torch, name)
        with memory_named(
            f"moe: out of memory while {folder} is loaded in {name} on {device}",
            "use --dtype bfloat16, a device with more memory, or a smaller model",
        ):
            return moe.load(folder).to(device, dtype).eval()


def add_options(parser: argparse.ArgumentParser, names: Sequence[Name]) -> None:
    """Gives a command line these options of `Use`."""
    for name in names:
        default = getattr(Use, name)
        if default is None or isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=HELP[name])
        else:
            choices = DTYPES if name == "dtype" else None
            parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices, help=HELP[name])


def stored_dtype(folder: Path) -> str:
    """The type of the output matrix in a folder's safetensors: float32 or bfloat16."""
    from safetensors import safe_open

    from moe import checkpoint, hub

    if hub.is_hub_folder(folder):
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [checkpoint.find(folder) / checkpoint.WEIGHTS]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118 - it is no mapping
                return STORED.get(tensors.get_slice("lm_head.weight").get_dtype(), "float32")
    return "float32"
