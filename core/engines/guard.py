"""A unit on workers that are not ours (Ray's, Spark's): its death can be watched, and the row that kills is found and rejected.

Two ways to run a unit there. First `watched`: in the worker itself, which ends by itself when the unit gives no sign of life for
too long. Where that worker died, whatever the reason, the engine runs the unit again `alone`: in a child process of the new
worker, under the same supervision as on `local` (`core.engines.pool`), so the same row is named and rejected, and the same bytes
come out. A node that was lost costs its units one slower run and nothing else.
"""

import faulthandler
import time

from core.engines.contract import Report, Unit, UnitFn
from core.engines.measure import measured
from core.engines.pool import Pool

REARM_S = 0.2  # a thread is started each time


def watched(fn: UnitFn, unit: Unit, stall_s: float) -> Report:
    """`fn(unit)`. This process exits if the unit gives no sign of life for `stall_s`, even where it holds the GIL."""

    last = float("-inf")

    def note(docs: int = 0, bytes: int = 0, row: int | None = None) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > min(REARM_S, stall_s / 10):
            faulthandler.dump_traceback_later(stall_s, exit=True)
            last = now

    note()
    try:
        return measured(fn, unit, note)
    finally:
        faulthandler.cancel_dump_traceback_later()


def alone(fn: UnitFn, unit: Unit, label: str, stall_s: float) -> Report:
    """`fn(unit)` in a child process. StageError names the unit where it dies again and again."""
    pool = Pool(1)
    try:
        return pool.run(fn, [unit], label, stall_s, lambda docs, bytes, units: None)[0]
    finally:
        pool.close()
