"""Percentiles by bytes from exact histograms: counts in int64, so that they are the same however the rows were spread.

A value's percentile is the middle of its own mass, (below + own / 2) / all. Where values hardly repeat, buckets are those of
Nemotron-CC (Su et al. 2024, arXiv 2412.02595; its code digitises at the inverted CDF of 5 %, 10 % .. 95 %). Where a rater says
the same of everything, the inverted CDF puts everything into the top bucket; the middle puts it into the middle.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

BUCKETS = 20  # Nemotron-CC


class Histogram(NamedTuple):
    """Bytes by value, values ascending."""

    value: np.ndarray  # int64 [n]
    mass: np.ndarray  # int64 [n]


def merged(a: pa.Table, b: pa.Table) -> pa.Table:
    """Sum of two tables of (keys.., mass, docs): associative and commutative."""
    keys = [c for c in a.column_names if c not in ("mass", "docs")]
    both = pa.concat_tables([a, b]).group_by(keys, use_threads=False).aggregate([("mass", "sum"), ("docs", "sum")])
    return both.rename_columns([*keys, "mass", "docs"]).select(a.column_names)


def summed(table: pa.Table) -> pa.Table:
    """One row for each key of a table of (keys.., mass, docs)."""
    return merged(table, table.slice(0, 0))


def histogram(value: np.ndarray, mass: np.ndarray) -> Histogram:
    """Masses of equal values added up."""
    values, of = np.unique(value, return_inverse=True)
    total = np.zeros(len(values), dtype=np.int64)
    np.add.at(total, of, mass)
    return Histogram(values, total)


def middle(h: Histogram) -> tuple[np.ndarray, int]:
    """(int64 [n]: twice the mass below the middle of each value, twice the mass of all)."""
    below = np.cumsum(h.mass) - h.mass
    return 2 * below + h.mass, 2 * int(h.mass.sum())


def buckets(h: Histogram, count: int = BUCKETS) -> np.ndarray:
    """int8 [n]: the bucket of each value, 0 to count - 1. No mass: all in the middle bucket."""
    twice, whole = middle(h)
    if whole == 0:
        return np.full(len(h.value), count // 2, dtype=np.int8)
    return np.minimum(twice * count // whole, count - 1).astype(np.int8)


def tiers(h: Histogram, shares: Sequence[float]) -> np.ndarray:
    """int8 [n]: the rank of each value, from 0; `shares` are the masses of the ranks from the lowest up."""
    twice, whole = middle(h)
    edges = np.cumsum(np.asarray(shares, dtype=np.float64))[:-1]
    place = twice / whole if whole else np.full(len(twice), 0.5)
    return np.searchsorted(edges, place, side="right").astype(np.int8)


def looked_up(h: Histogram, table: np.ndarray, value: np.ndarray) -> np.ndarray:
    """`table` [n] at the places of values that are all in `h`."""
    return table[np.searchsorted(h.value, value)]


def strata(docs: Mapping[str, int], floor: int, pooled: str) -> dict[str, str]:
    """language -> itself, or `pooled` where it has fewer than `floor` documents."""
    return {name: name if n >= floor else pooled for name, n in sorted(docs.items())}
