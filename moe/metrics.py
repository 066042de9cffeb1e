"""Metrics of a run: the rows of `metrics.jsonl`, and the same as TensorBoard event files.

In: one row an update, from rank 0 (moe/trainer.py says what it holds). Out: `metrics.jsonl`, and below `tensorboard/` one
scalar for each number, `experts/rms_max_median/2` for entry 2 of a list, at the update's step. A resume cuts the rows behind its
checkpoint from the file and hides them in TensorBoard (its `purge_step`).
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError, StageError
from moe import checkpoint

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
TIME_FIELDS = ("step_s", "tokens_per_s", "mfu", "memory_bytes")  # alone differ between equal runs


class MetricsFile:
    """Appends rows where `writes` (on rank 0); `sync` brings them to the disk before a checkpoint that counts on them."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, writes: bool = True) -> None:
        self._file = open(folder / METRICS if writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._writes = writes
        self._events = _events(folder / TENSORBOARD, step) if tensorboard and writes else None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in scalars(row):
                self._events.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        if self._writes:
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Each number of a row under its path."""
    for name, value in row.items():
        nested = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(nested, Mapping):
            yield from scalars({str(k): v for k, v in nested.items()}, f"{prefix}{name}/")
        elif isinstance(nested, int | float):
            yield f"{prefix}{name}", float(nested)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = (Path(folder) / METRICS).read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def cut_metrics(folder: Path, step: int) -> None:
    """Leaves the rows up to `step`: those behind it are written again."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
    if len(lines) < step:
        raise StageError(
            f"train: {path} lost rows, got {len(lines)}, expected {step} as the checkpoint says; "
            "restore it or train into a new folder"
        )
    checkpoint.replace_text(path, "".join(lines))


def check_tensorboard() -> None:
    """TensorBoard's writer is an extra: its absence is told before any work."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train: train.tensorboard needs its writer, got no module tensorboard; "
            "pip install tensorboard, or leave train.tensorboard off"
        )


def _events(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
