"""How hard a task is for the models that tried it: pass rates as they came with the input.

In: a record's `passes` and `attempts`, or `pass_rate` with `attempts` (either may be missing). Out: `Difficulty`. The
interval is Wilson's (1927) for 95 %. A task is of use to RL where its rate lies strictly between `low` and `high` (open-r1
keeps 0.1 to 0.9); with fewer than `min_attempts` nothing is concluded. Tasks that every attempt solved are kept at a tenth by
a hash of their doc_id, so that what a model can do is not forgotten. Tasks that no attempt solved fall.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from core.hashing import seeded

Z = 1.959964  # 95 %


class Difficulty(NamedTuple):
    """What is known. `verdict`: fit, hard (below the band), easy (above it), solved (always), unsolved (never), few
    (attempts); null: no rate."""

    attempts: int | None
    rate: float | None
    low: float | None
    high: float | None
    verdict: str | None
    keep: bool | None


UNKNOWN = Difficulty(None, None, None, None, None, None)


def wilson(passes: float, attempts: int) -> tuple[float, float]:
    """The 95 % interval of a rate."""
    p, n = passes / attempts, attempts
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def difficulty(
    record: Mapping[str, Any], doc_id: str, band: tuple[float, float], min_attempts: int, solved_fraction: float
) -> Difficulty:
    """The verdict on one record. A rate outside 0..1, or more passes than attempts, is as good as none."""
    attempts, passes, rate = record.get("attempts"), record.get("passes"), record.get("pass_rate")
    attempts = attempts if _is_count(attempts) and attempts else None
    if _is_count(passes) and attempts and passes <= attempts:
        rate = passes / attempts
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        return UNKNOWN
    low, high = wilson(rate * attempts, attempts) if attempts else (None, None)
    if attempts is None or attempts < min_attempts:
        return Difficulty(attempts, rate, low, high, "few", None)
    if rate == 1:
        return Difficulty(attempts, rate, low, high, "solved", seeded(0, doc_id) < solved_fraction)
    if rate == 0:
        return Difficulty(attempts, rate, low, high, "unsolved", False)
    verdict = "hard" if rate <= band[0] else "easy" if rate >= band[1] else "fit"
    return Difficulty(attempts, rate, low, high, verdict, verdict == "fit")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
