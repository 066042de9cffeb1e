"""How much of each cluster stays, and how even a division is. Integers in, integers out.

- `water_fill`: one cap for all clusters, as in the balanced sampling of Vo et al. 2024 (arXiv 2405.15613); small clusters
  stay whole, large ones are cut to the same size.
- `power_law`: a cluster of size n gets a share in proportion to n^alpha (temperature sampling), so large ones stay larger.

Both are monotone: a larger target never gives any cluster less, so raising it never drops a document that was kept. Neither
passes the target. Cost: a hundred passes over the clusters' sizes.
"""

import numpy as np

from core.hashing import seeded

ROUNDS = 128  # of bisection: more than the bits of a double
SALT = "rebalance cluster"


def water_fill(sizes: np.ndarray, target: int, seed: int = 0) -> np.ndarray:
    """int64 [k]: min(size, cap) with the largest cap that does not pass `target`, and one more for as many of the larger
    clusters, in an order drawn by `seed`, as it takes to reach it. They sum to min(target, all)."""
    sizes = sizes.astype(np.int64)
    if target >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())
    while high - low > 1:  # the cap `low` fits, `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= target else (low, middle)
    quotas = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)
    drawn = np.argsort([seeded(seed, f"{SALT} {c}") for c in larger.tolist()], kind="stable")
    quotas[larger[drawn[: target - int(quotas.sum())]]] += 1
    return quotas


def power_law(sizes: np.ndarray, target: int, alpha: float, floor: int = 0, seed: int = 0) -> np.ndarray:
    """int64 [k]: min(size, max(floor, scale x size^alpha)) rounded down, with the largest scale that does not pass `target`.

    They sum to `target` less than one a cluster. A target that cannot give `floor` to all is filled like water."""
    sizes = sizes.astype(np.int64)
    if target >= sizes.sum():
        return sizes.copy()
    least = np.minimum(sizes, floor)
    if least.sum() > target:
        return water_fill(least, target, seed)
    shares = np.power(sizes.astype(np.float64), alpha)

    def quotas(scale: float) -> np.ndarray:
        return np.minimum(sizes, np.maximum(least, (shares * scale).astype(np.int64)))

    low, high = 0.0, float(sizes.max()) + 1.0  # at `high` even a cluster of one passes its size
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if quotas(middle).sum() <= target else (low, middle)
    return quotas(low)


def gini(sizes: np.ndarray) -> float:
    """How uneven clusters are: 0 where all are equal, near 1 where one holds all. Empty clusters are left out."""
    some = np.sort(sizes[sizes > 0]).astype(np.float64)
    n = len(some)
    if n == 0:
        return 0.0
    return float(2 * (np.arange(1, n + 1) * some).sum() / (n * some.sum()) - (n + 1) / n)


def effective(sizes: np.ndarray) -> float:
    """exp of the Shannon entropy of the division: how many equal clusters would be as diverse."""
    some = sizes[sizes > 0].astype(np.float64)
    if len(some) == 0:
        return 0.0
    p = some / some.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
