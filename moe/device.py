"""The device of a run: whether it is there, what it repeats, what it runs out of, what it could do at most.

In: `TrainConfig.device` and a few more settings. Out: a `torch.device`, and errors in words that name the settings to change.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from core.errors import ConfigError, StageError
from moe import flops
from moe.config import TrainConfig

CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # words of torch's plain RuntimeError


def device_of(name: str, knob: str = "train.device") -> torch.device:
    """The device that a knob names; one that is not here is a `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{knob}: unknown, got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{knob}: not supported, got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{knob}: no GPU here, got {name!r}, expected a CUDA device that torch {torch.__version__} can use; "
            f"set {knob} to auto or cpu, or look at the driver with nvidia-smi"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{knob}: no such GPU, got {name!r}, expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


@contextmanager
def repeatable(wanted: bool, device: torch.device) -> Iterator[None]:
    """The same bits from run to run within: a CPU gives them anyway, with the same number of threads."""
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS repeats itself only with a workspace of its own
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Warn only: the running sums behind the experts' statistics have no such kernel, and are in no weight.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def memory_named(config: TrainConfig, folder: Path, ranks: int) -> Iterator[None]:
    """Running out of memory within is a `StageError` that names what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).strip().partition("\n")[0]
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in words for w in CPU_OUT_OF_MEMORY)
        if not known:
            raise
        most = max([config.rows, *(rows for _, rows in config.row_growth)]) // ranks
        rows = min(config.micro_rows or most, most)
        raise StageError(
            f"train: out of memory with train.micro_rows {rows} x model.context {config.model.context} tokens at once, "
            f"got {words or type(error).__name__}; lower train.micro_rows, which changes no result beyond rounding, or "
            f"model.context; what {folder} holds stands, and the run goes on from there"
        ) from error


def utilisation(config: TrainConfig, tokens_per_s: float, device: torch.device, ranks: int) -> float | None:
    """Share of the devices' bf16 peak that goes into the model's own arithmetic (MFU); None where the peak is not known."""
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return flops.mfu(tokens_per_s, config.model, config.model.context, peak * ranks) if peak else None


def memory_bytes(device: torch.device) -> int:
    """The most that tensors took on the GPU, or that this process took on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
