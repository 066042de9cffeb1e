"""Seconds and peak memory of one unit, as its report carries them to the manifest."""

import time
from collections.abc import Callable

from core.engines.contract import Report, Unit, UnitFn


def measured(fn: UnitFn, unit: Unit, note: Callable[..., None]) -> Report:
    """`fn(unit)` with its seconds and peak memory filled in."""
    reset_peak_memory()
    begin = time.perf_counter()
    report = fn(unit, note)
    report.seconds = time.perf_counter() - begin
    report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory())
    return report


def reset_peak_memory() -> None:
    """Let this process's peak start anew; where the kernel does not allow it the peak is since the process began."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return


def peak_memory() -> int:
    """Peak resident bytes of this process since the last reset."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
