"""The statistics that comparisons share: intervals, paired differences, least detectable effects.

Numpy and scipy only, no randomness. `mixtures.compare` and `moe.choices` say what they are used for, and why.
"""

import math
from collections.abc import Sequence

import numpy as np

ALPHA = 0.05
POWER = 0.8  # Bloom 1995; custom


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Interval of a share at `ALPHA` (Wilson, JASA 22, 1927): inside 0 to 1, and not empty where all or none succeed."""
    from scipy.stats import norm

    if not n:
        return 0.0, 1.0
    z = float(norm.ppf(1 - ALPHA / 2))
    share, spread = successes / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down p-values, in the order given."""
    out, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        out[i] = most
    return out


def paired_variance(difference_bits: np.ndarray, text_bytes: np.ndarray) -> float:
    """Variance of sum(difference) / sum(bytes) over samples of documents (Cochran's ratio estimator)."""
    n, total = len(text_bytes), float(text_bytes.sum())
    rest = difference_bits - difference_bits.sum() / total * text_bytes
    return float(n / (n - 1) * np.square(rest).sum() / total**2)


def satterthwaite(variances: Sequence[float], df: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variances; infinite if all are zero."""
    below = sum(v * v / d for v, d in zip(variances, df, strict=True))
    return sum(variances) ** 2 / below if below else math.inf


def least_effect(error: float, df: float) -> float:
    """The true effect that a two-sided test at `ALPHA` finds with probability `POWER`."""
    from scipy.stats import t

    return float((t.ppf(1 - ALPHA / 2, df) + t.ppf(POWER, df)) * error)
