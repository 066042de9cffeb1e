"""Seconds, CPU and memory of contenders that take turns, and the environment they ran in.

On a shared machine a single time means little: contenders are measured in turns (A B C, then C B A, and so on), so that a slow
minute falls on all of them, and what is compared is the median. CPU seconds are those of this process and all its living and
ended children; they barely move with the load, so a gap between wall and CPU shows a disturbed run.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

LIBRARIES = (
    "pyarrow",
    "numpy",
    "faiss-cpu",
    "fasttext",
    "zstandard",
    "datatrove",
    "pyspark",
    "ray",
    "trafilatura",
    "resiliparse",
    "rensa",
    "datasketch",
)


@dataclass(frozen=True)
class Sample:
    """One run of one contender."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Sample:
    """Wall and CPU seconds of `work`, children included."""
    gc.collect()
    cpu, begin = cpu_seconds(), time.perf_counter()
    work()
    return Sample(time.perf_counter() - begin, cpu_seconds() - cpu)


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[Sample]]:
    """`rounds` samples of every contender, in turns whose order is reversed each time. `prepare` runs untimed before each."""
    out: dict[str, list[Sample]] = {name: [] for name in contenders}
    for turn in range(rounds):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            prepare()
            out[name].append(timed(contenders[name]))
    return out


def median_wall_s(samples: list[Sample]) -> float:
    return statistics.median(s.wall_s for s in samples)


def median_cpu_s(samples: list[Sample]) -> float:
    return statistics.median(s.cpu_s for s in samples)


def cpu_seconds() -> float:
    """CPU seconds so far of this process, its living descendants and the ended ones that were waited for."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def environment() -> dict[str, Any]:
    """Where and when a benchmark ran: everything a reader needs to judge or repeat its figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: v for name in LIBRARIES if (v := _version(name)) is not None},
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
