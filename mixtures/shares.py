"""The arithmetic of a phase: how many tokens each component gives, how often, and which documents of a partial epoch.

Numbers are tokens unless they say otherwise. Nothing is renormalised: a component that cannot give its share without passing its
most epochs gives what it can, the phase is shorter by that, and the report says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import ConfigError, StageError

WEIGHT_TOLERANCE = 1e-6  # of the sum of weights: decimal fractions in a config do not add up exactly


def check_weights(phase: str, names: Sequence[str], weights: Sequence[float]) -> None:
    """ConfigError unless the weights sum to 1."""
    total = sum(weights)
    if abs(total - 1.0) > WEIGHT_TOLERANCE:
        listed = ", ".join(f"{n} {w:g}" for n, w in zip(names, weights, strict=True))
        raise ConfigError(
            f"mix: weights of phase {phase!r} must sum to 1, got {total:.9g} ({listed}); they are never rescaled"
        )


@dataclass(frozen=True)
class Share:
    """What one component is asked for. `granted` is `wanted` or, if less, what its most epochs allow."""

    wanted: int
    granted: int
    available: int

    @property
    def shortfall(self) -> int:
        return self.wanted - self.granted


def shares(
    tokens: int | None, weights: Sequence[float], available: Sequence[int], max_epochs: Sequence[float]
) -> list[Share]:
    """The share of each component of a phase of `tokens`; None: the longest phase in which every weight holds."""
    limits = [int(most * n) for most, n in zip(max_epochs, available, strict=True)]
    if tokens is None:
        tokens = longest(weights, limits)
    out = []
    for weight, n, limit in zip(weights, available, limits, strict=True):
        wanted = round(weight * tokens)
        out.append(Share(wanted, min(wanted, limit), n))
    return out


def longest(weights: Sequence[float], limits: Sequence[int]) -> int:
    """Tokens of the longest phase in which no component is asked for more than its limit. Each weight must be positive."""
    tokens = min(int(limit / weight) for weight, limit in zip(weights, limits, strict=True))
    while tokens and any(round(weight * tokens) > limit for weight, limit in zip(weights, limits, strict=True)):
        tokens -= 1  # rounding: at most a few steps
    if not tokens:
        raise StageError("no tokens: a component has no tokenised document; check its `where`, or set `tokens`")
    return tokens


def epochs(tokens: np.ndarray, order: np.ndarray, granted: int) -> tuple[int, np.ndarray]:
    """Whole epochs over documents with `tokens` each, and the indices of the documents of the partial epoch after them.

    The partial epoch takes documents in the given `order` as long as they fit, so `granted` is never passed and missed by less
    than the first document that does not fit. A larger `granted` keeps every document that a smaller one took."""
    total = int(tokens.sum(dtype=np.int64))
    if total == 0:
        return 0, np.zeros(0, dtype=np.int64)
    whole, rest = divmod(granted, total)
    fitting = np.searchsorted(np.cumsum(tokens[order], dtype=np.int64), rest, side="right")
    return whole, order[:fitting]
