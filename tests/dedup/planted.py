"""Texts with known Jaccards over word 5-grams."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np


def words(rng: np.random.Generator, n: int) -> list[str]:
    """`n` words of a vocabulary so large that unrelated texts share no 5-gram."""
    return [f"w{i:x}" for i in rng.integers(0, 1 << 40, n)]


def pair(rng: np.random.Generator, jaccard: float, n: int = 300) -> tuple[str, str]:
    """Two texts of `n` words that share a beginning, so that about `jaccard` of their 5-grams are common."""
    shared = round((n - 4) * 2 * jaccard / (1 + jaccard)) + 4
    head = words(rng, shared)
    return " ".join(head + words(rng, n - shared)), " ".join(head + words(rng, n - shared))


def true_jaccards(texts: Sequence[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By Python sets of word tuples: no hash, no kernel. Texts are lower-case words between single spaces."""
    grams = [{tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))} for w in (t.split() for t in texts)]
    return np.array([len(grams[i] & grams[j]) / len(grams[i] | grams[j]) for i, j in zip(a, b, strict=True)])


def all_jaccards(texts: Sequence[str]) -> dict[tuple[int, int], float]:
    """(i, j) -> Jaccard of every pair that shares a 5-gram, i < j: all pairs by an inverted index of word tuples."""
    grams = [{tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))} for w in (t.split() for t in texts)]
    holders = defaultdict(list)
    for i, own in enumerate(grams):
        for gram in own:
            holders[gram].append(i)
    shared = Counter(pair for docs in holders.values() for pair in combinations(docs, 2))
    return {(i, j): n / (len(grams[i]) + len(grams[j]) - n) for (i, j), n in shared.items()}


def caught(jaccard: np.ndarray, bands: int = 14, rows: int = 8) -> np.ndarray:
    """The probability that a pair meets in a band."""
    return 1 - (1 - jaccard**rows) ** bands
