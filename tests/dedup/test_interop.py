"""datasketch as the oracle: the same permutations, the same estimates, the same band collisions."""

import numpy as np
import pytest

from core.errors import InputError
from dedup.interop import from_lean, to_lean
from dedup.shingles import Shingles
from dedup.signatures import band_keys, signatures

datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed")


def unmixed(h: int) -> int:
    """The inverse of MurmurHash3's 32-bit finaliser, with which datasketch mixes every hash before it permutes."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 1 << 32) & 0xFFFFFFFF
    h ^= h >> 13 ^ h >> 26
    h = h * pow(0x85EBCA6B, -1, 1 << 32) & 0xFFFFFFFF
    return h ^ h >> 16


def sets(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    base = rng.integers(0, 1 << 32, 200, dtype=np.uint32)
    return [
        np.unique(np.concatenate([base[: 200 - 3 * i], rng.integers(0, 1 << 32, 3 * i, dtype=np.uint32)]))
        for i in range(n)
    ]


def signed(docs: list[np.ndarray]) -> np.ndarray:
    return signatures(Shingles(np.concatenate(docs), np.cumsum([0] + [len(d) for d in docs])), 112, seed=1)


def test_same_shingles_give_the_same_minima():
    docs = sets(5)
    for doc, ours in zip(docs, signed(docs), strict=True):
        theirs = datasketch.MinHash(num_perm=112, seed=1, scheme="affine32", hashfunc=unmixed)
        theirs.update_batch(doc.tolist())
        assert theirs.hashvalues.tolist() == ours.tolist()


def test_round_trip_and_estimates():
    signature = signed(sets(6))
    lean = to_lean(signature, 1)
    assert np.array_equal(from_lean(lean, 1), signature)
    assert lean[0].jaccard(lean[3]) == (signature[0] == signature[3]).mean()
    with pytest.raises(InputError, match="seed 1, expected 'affine32' with seed 2"):
        from_lean(lean, 2)


def test_band_keys_collide_where_datasketch_finds_neighbours():
    signature = signed(sets(40))
    lsh = datasketch.MinHashLSH(num_perm=112, params=(14, 8))
    lean = to_lean(signature, 1)
    for i, sketch in enumerate(lean):
        lsh.insert(i, sketch)
    keys = band_keys(signature, 14, 8)
    for i, sketch in enumerate(lean):
        assert set(lsh.query(sketch)) == set(np.flatnonzero((keys == keys[i]).any(axis=1)).tolist())
