"""The device of a run: whether it is there, what it repeats, what it could do at most.

In: `TrainConfig.device` and a few more settings. Out: a `torch.device`, and errors in words that name the settings to change.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.errors import ConfigError, StageError
from moe import flops
from moe.config import TrainConfig

NOT_REPEATABLE = ("does not have a deterministic implementation", "Deterministic behavior was enabled")  # torch's words


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
    """The same bits from run to run within: a CPU gives them anyway, with the same number of threads.

    An operation that has no such kernel on the GPU is a `StageError`. Only warned of, it would be used all the same, and
    attention's backward pass would keep its atomic additions without a word.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS repeats itself only with a workspace of its own
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip().partition("\n")[0]
        if not any(said in words for said in NOT_REPEATABLE):
            raise
        raise StageError(
            f"train: an operation does not repeat itself on this GPU, got {words}, expected equal bits as "
            "train.deterministic asks; set it to false, or choose other backends"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def unrepeatable() -> Iterator[None]:
    """Lifts `repeatable` within, where what comes out is kept in a file: sampling sums a distribution, and CUDA has no repeatable
    running sum of floats."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


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
