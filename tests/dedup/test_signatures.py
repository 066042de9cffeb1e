"""Signatures and bands: hand-computed minima, numpy against compiled, bias and error against theory."""

import numpy as np
import pytest

from dedup.shingles import Shingles, compiled_available
from dedup.signatures import EMPTY, band_keys, permutations, signatures

needs_numba = pytest.mark.skipif(not compiled_available(), reason="numba is not installed")


def flat(*docs: list[int] | np.ndarray) -> Shingles:
    values = np.concatenate([np.asarray(d, dtype=np.uint32) for d in docs])
    return Shingles(values, np.cumsum([0] + [len(d) for d in docs]).astype(np.int64))


def planted(rng: np.random.Generator, jaccard: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` shingles whose Jaccard is the nearest possible to `jaccard`."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    values = rng.choice(1 << 32, 2 * size - shared, replace=False).astype(np.uint32)
    return values[:size], values[size - shared :]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_minima_by_hand(compiled):
    a, b = (p.astype(object) for p in permutations(6, seed=3))
    docs = [[7, 4_000_000_000, 12], [], [5], list(range(1000, 1043))]
    want = [
        [min((x * ai + bi) % 2**32 for x in doc) if doc else EMPTY for ai, bi in zip(a, b, strict=True)] for doc in docs
    ]
    assert signatures(flat(*docs), 6, 3, compiled).tolist() == want


@needs_numba
def test_numpy_equals_compiled():
    rng = np.random.default_rng(1)
    docs = [rng.integers(0, 1 << 32, n, dtype=np.uint32) for n in (0, 1, 7, 8, 9, 70_000, 0, 3, 140_000, 500)]
    assert np.array_equal(signatures(flat(*docs), 112, 1, False), signatures(flat(*docs), 112, 1, True))


def test_repeats_and_order_change_nothing():
    doc = np.random.default_rng(2).integers(0, 1 << 32, 300, dtype=np.uint32)
    s = signatures(flat(doc, np.concatenate([doc[::-1], doc[:50]])), 112, 1)
    assert np.array_equal(s[0], s[1])


@pytest.mark.parametrize("size", [40, 1500])
@pytest.mark.parametrize("jaccard", [0.2, 0.5, 0.75, 0.95])
def test_estimator_is_unbiased_with_the_error_of_theory(jaccard, size):
    """Mean within 4 standard errors of J, RMSE within 25% of sqrt(J (1 - J) / 112), over 300 pairs."""
    rng = np.random.default_rng(int(jaccard * 100) + size)
    pairs = [planted(rng, jaccard, size) for _ in range(300)]
    true = len(np.intersect1d(*pairs[0])) / len(np.union1d(*pairs[0]))
    s = signatures(flat(*(doc for pair in pairs for doc in pair)), 112, seed=1)
    estimates = (s[0::2] == s[1::2]).mean(axis=1)
    sigma = np.sqrt(true * (1 - true) / 112)
    assert abs(estimates.mean() - true) < 4 * sigma / np.sqrt(300)
    assert 0.75 < np.sqrt(((estimates - true) ** 2).mean()) / sigma < 1.25


def test_bands_agree_exactly_where_their_minima_do():
    rng = np.random.default_rng(5)
    a = rng.integers(0, 1 << 32, (50, 112), dtype=np.uint32)
    b = a.copy()
    for i in range(50):
        b[i, rng.choice(112, 6, replace=False)] ^= 1
    keys = band_keys(a, 14, 8), band_keys(b, 14, 8)
    assert keys[0].dtype == np.int64
    assert np.array_equal(keys[0] == keys[1], (a == b).reshape(50, 14, 8).all(axis=2))


def test_bands_and_scopes_never_share_a_key():
    """Equal minima in another band, another place of the band or another scope give another key."""
    same = np.full((1, 112), 77, dtype=np.uint32)
    assert len(set(band_keys(same, 14, 8)[0].tolist() + band_keys(same, 14, 8, scope=1)[0].tolist())) == 28
    swapped = np.arange(16, dtype=np.uint32).reshape(2, 8)
    assert len(set(band_keys(np.stack([swapped.ravel(), swapped[:, ::-1].ravel()]), 2, 8).ravel().tolist())) == 4


def test_keys_of_random_signatures_do_not_collide():
    s = np.random.default_rng(6).integers(0, 1 << 12, (40_000, 112), dtype=np.uint32)
    s[:, 1::8] = 0  # structured minima: small values, constants
    assert len(np.unique(band_keys(s, 14, 8))) == 40_000 * 14
