"""What a run holds in memory, and what is said where there is too little: before it allocates, or when an allocation fails.

In: `TrainConfig`, a device; or an error. Out: bytes, exact but for the optimiser's even share a rank; problems and `StageError`s
in one line with the settings to change. Linux lends more than it has and kills who uses it, so on a CPU what cannot fit is best
told before.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import StageError
from moe import flops
from moe.config import TrainConfig

GIB = 2**30
WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes of a number in use
# Words of torch's plain RuntimeErrors: of the CPU, and of the CUDA runtime and its libraries outside torch's allocator.
SAID = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


@dataclass(frozen=True)
class Held:
    """Bytes on one rank's device from the first update to the last, and of the weights that it draws on the host."""

    weights: int
    gradients: int
    optimizer: int
    drawn: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def rows_at_once(config: TrainConfig, ranks: int) -> tuple[int, bool]:
    """Rows of the largest micro-batch of a rank, and whether some update has several."""
    most = max([config.rows, *(rows for _, rows in config.row_growth)]) // ranks
    rows = min(config.micro_rows or most, most)
    return rows, rows < most


def held(config: TrainConfig, ranks: int = 1) -> Held:
    """What training holds. MTP heads without a loss have weights only."""
    c = config.model
    total, _ = flops.parameters(c)
    trained, _ = flops.parameters(c, mtp=bool(config.optim.mtp_loss))
    elsewhere = (c.layers - c.dense_layers) * c.experts * 3 * c.dim * c.expert_dim
    elsewhere -= elsewhere // config.expert_ranks  # experts of other ranks
    width = WIDTHS[config.precision]
    heads = c.mtp_heads if config.optim.mtp_loss else 0
    adamw = trained if config.optim.optimizer == "adamw" else (2 + heads) * c.vocab_size * c.dim  # embedding, outputs
    state = 8 * adamw + 4 * max(0, trained - adamw) + (4 * trained if width == 2 else 0)
    # Several micro-batches in bfloat16 add up in fp32 (moe/optim.py).
    gradient = width + 4 if width == 2 and rows_at_once(config, ranks)[1] else width
    return Held(width * (total - elsewhere), gradient * (trained - elsewhere), state // ranks, 4 * total)


def memory_problems(config: TrainConfig, device: torch.device, ranks: int) -> list[str]:
    """Why a run cannot fit, whatever its rows and context; nothing where it may."""
    found, advice = held(config, ranks), "choose a smaller model, or train.precision bfloat16"
    places = [(found.total, device, "of weights, gradients and optimiser's state"), (found.drawn, None, "of weights")]
    return [
        f"train: the model does not fit into memory, got {need / GIB:.1f} GiB {what} a rank, expected at most "
        f"{total_bytes(place) / GIB:.1f} on {place or 'the host, where weights are drawn in float32'}; {advice}"
        for need, place, what in places
        if need > total_bytes(place)
    ][:1]


def total_bytes(device: torch.device | None) -> int:
    """Memory of a GPU, or of this machine as far as the process's group may use it."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in CGROUP_LIMITS:
        text = Path(name).read_text().strip() if Path(name).is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


@contextmanager
def memory_named(what: str, advice: str) -> Iterator[None]:
    """Running out of memory within is a `StageError`: what needed it, the words of who had none, what to change."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        words = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StageError(f"{what}, got {words}; {advice}") from error


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in SAID)


@contextmanager
def training_memory(config: TrainConfig, folder: Path, ranks: int) -> Iterator[None]:
    """`memory_named` for an update."""
    rows, context = rows_at_once(config, ranks)[0], config.model.context
    lower = "lower train.micro_rows, which changes no result beyond rounding, or model.context"
    advice = lower if rows > 1 else "micro_rows cannot be lower: lower model.context, or choose a smaller model"
    with memory_named(
        f"train: out of memory with train.micro_rows {rows} x model.context {context} tokens at once",
        f"{advice}; what {folder} holds stands, and the run goes on from there",
    ):
        yield
