"""Six buckets to one number. Kernels of `tiers`.

The ensemble of a document is the highest bucket that a positive rater gives it (Nemotron-CC, Su et al. 2024, arXiv 2412.02595:
one rater that is sure is enough), then the mean of all its buckets. Where a veto rater puts it into one of its lowest buckets
and, but for fluency, holds it for rather bad (a score below 0.5), it has that bucket instead. Where no positive rater applies,
the mean of the others stands in. No rater applies: 0; `tiers` leaves such documents out.
"""

from typing import NamedTuple

import numpy as np

from classifiers.percentiles import BUCKETS
from classifiers.raters.labels import RATERS

NOTHING = -1  # the score and the bucket of a rater that does not apply
POSITIVE = ("educational", "knowledge", "reference")
UNIT = 10_000  # raters round to four digits
# Veto raters and the score from which on they never veto: the logistic ones are fitted to labels of equal weight, so above one
# half a document is rather good, and a clean corpus has no worst twentieth. A perplexity has no such point.
VETO = {"commercial": UNIT // 2, "integrity": UNIT // 2, "fluency": UNIT + 1}
FINE = 1024  # steps of the mean of all buckets within one bucket of the maximum


class Stack(NamedTuple):
    """A fitted logistic regression over buckets."""

    weight: np.ndarray  # float64 [raters]
    bias: float


def vetoed(scores: np.ndarray, bucket: np.ndarray, veto_buckets: int) -> np.ndarray:
    """int64 [n]: the lowest bucket of a veto, BUCKETS where there is none."""
    worst = np.full(len(bucket), BUCKETS, dtype=np.int64)
    for name, least in VETO.items():
        k = RATERS.index(name)
        at = (bucket[:, k] >= 0) & (bucket[:, k] < veto_buckets) & (scores[:, k] < least)
        worst[at] = np.minimum(worst[at], bucket[at, k])
    return worst


def ensemble(bucket: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """int64 [n] in [0, BUCKETS * FINE): see the module. Only whole numbers: the mean is floored to FINE steps."""
    applies = bucket >= 0
    count = applies.sum(axis=1)
    mean = np.where(applies, bucket, 0).sum(axis=1) * FINE // np.maximum(count * BUCKETS, 1)
    top = bucket[:, [RATERS.index(r) for r in POSITIVE]].max(axis=1).astype(np.int64)
    top = np.where(top < 0, mean * BUCKETS // FINE, top)
    return np.where(count > 0, np.minimum(top, worst) * FINE + mean, 0)


def stacked(bucket: np.ndarray, stack: Stack) -> np.ndarray:
    """int64 [n] in [0, BUCKETS * FINE): the probability of a logistic regression over buckets; no rater: 0."""
    z = stack_inputs(bucket) @ stack.weight + stack.bias
    found = np.floor((BUCKETS * FINE - 1) / (1 + np.exp(-z))).astype(np.int64)
    return np.where((bucket >= 0).any(axis=1), found, 0)


def stack_inputs(bucket: np.ndarray) -> np.ndarray:
    """Buckets as numbers around 0; the middle where a rater does not apply."""
    return np.where(bucket >= 0, (bucket + 0.5) / BUCKETS - 0.5, 0.0)
