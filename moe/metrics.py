"""Metrics of a run: the rows of `metrics.jsonl`, and the same as TensorBoard event files.

In: one row an update, from rank 0 (moe/trainer.py says what it holds). Out: `metrics.jsonl`, where null stands for a number that
is not finite, and below `tensorboard/` one scalar for each number, `experts/rms_max_median/2` for entry 2 of a list, at the
update's step. A resume cuts the rows behind its checkpoint from the file and hides them in TensorBoard (its `purge_step`).
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from core.errors import ConfigError, StageError
from moe.files import replace_text

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
TIME_FIELDS = ("step_s", "tokens_per_s", "mfu", "memory_bytes")  # alone differ between equal runs


class MetricsFile:
    """Appends rows where `writes` (on rank 0); `sync` brings them to the disk before a checkpoint that counts on them."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, writes: bool = True) -> None:
        self._file = open(folder / METRICS if writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._writes, self._broken, self._folder = writes, False, folder
        self._events = _events(folder / TENSORBOARD, step) if tensorboard and writes else None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        # Rows that a full disk did not take are tried again here; the error of `write` has told of them.
        with suppress(OSError) if self._broken else nullcontext():
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._broken = True
            raise StageError(
                f"train: {self._folder / METRICS} takes no row, got {error}, expected to append update {row['step']}; "
                "the newest checkpoint stands: make room and run the same command"
            ) from error
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


def finite(value: Any) -> Any:
    """A row's value with null for each number that JSON does not have (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def read_metrics(folder: Path, rows: int | None = None) -> list[dict[str, Any]]:
    """The first `rows` rows of a run's `metrics.jsonl`, or all; a last line that a kill cut short is left out.

    A file that is missing, or holds something else, is a `StageError`.
    """
    out = []
    for i, line in enumerate(_lines(folder)[:rows], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "step" not in row or "loss" not in row:
            raise StageError(
                f"train: {Path(folder) / METRICS} is damaged, got {line[:60]!r} in line {i}, expected a row of an update; "
                "restore it or train into a new folder"
            )
        out.append(row)
    return out


def cut_metrics(folder: Path, step: int) -> None:
    """Leaves the rows up to `step`: those behind it are written again."""
    path, lines = folder / METRICS, _lines(folder)[:step]
    if len(lines) < step:
        raise StageError(
            f"train: {path} lost rows, got {len(lines)}, expected {step} as the checkpoint says; "
            "restore it or train into a new folder"
        )
    replace_text(path, "".join(line.decode() + "\n" for line in lines))


def _lines(folder: Path) -> list[bytes]:
    """Whole lines, without their ends."""
    try:
        return (Path(folder) / METRICS).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StageError(
            f"train: no metrics, got {error}, expected {METRICS} beside the checkpoints; restore it or train into a new folder"
        ) from error


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
