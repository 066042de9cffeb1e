"""MinHash signatures and band keys from shingles.

In:  `Shingles`. Out: uint32 [n, bands * rows], the minimum over a document's shingles x of `a_p * x + b_p mod 2^32` for each
     permutation p; and int64 [n, bands], one key for each band of `rows` neighbouring minima (int64 because Spark has no uint64).
     A document without shingles has 2^32 - 1 everywhere and must not be compared.

The family is affine with an odd factor: a bijection of 32 bits, so it adds no collisions. It is 2-universal, not provably
min-wise independent; `tests/dedup/test_signatures.py` holds bias and RMSE to the theory (0.040 at 112 permutations, J = 0.75).
`a` and `b` are those of datasketch 2's `affine32` scheme for the same seed, so signatures travel as `LeanMinHash`
(`dedup.interop`). The minimum does not see how often a shingle occurs, so the multiset is used as it is.

Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.
"""

from functools import cache

import numpy as np

from dedup.shingles import Shingles, compiled_available

EMPTY = np.uint32(0xFFFFFFFF)
_BLOCK_SHINGLES = 1 << 16  # 256 KiB of shingles, permuted before the next block is touched
_KEY_SEED = 0x5EED  # of the factors that fold a band into a key; any value will do


@cache
def permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`a` (odd) and `b`, uint32 [count] each, in the order in which datasketch 2 draws them from numpy's frozen RandomState."""
    draw = np.random.RandomState(seed)
    a = draw.randint(0, 1 << 31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, draw.randint(0, 1 << 32, count, dtype=np.uint32)


def signatures(shingles: Shingles, count: int, seed: int, compiled: bool | None = None) -> np.ndarray:
    """Minima under `count` permutations, uint32 [n, count]. `compiled` as in `dedup.shingles.shingle`."""
    a, b = permutations(count, seed)
    out = np.full((len(shingles.offsets) - 1, count), EMPTY, dtype=np.uint32)
    if compiled_available() if compiled is None else compiled:
        from dedup.compiled import minima

        minima(shingles.values, shingles.offsets, a, b, out)
    else:
        _minima(shingles, a, b, out)
    return out


def _minima(shingles: Shingles, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """The numpy path: whole documents in blocks, one segmented minimum for each permutation."""
    offsets = shingles.offsets
    some = np.flatnonzero(np.diff(offsets))  # reduceat gives nonsense for empty segments
    block = (offsets[some] // _BLOCK_SHINGLES) if len(some) else np.empty(0, np.int64)
    for docs in np.split(some, np.flatnonzero(np.diff(block)) + 1):
        if not len(docs):
            continue
        low = offsets[docs[0]]
        x = shingles.values[low : offsets[docs[-1] + 1]]
        segments = offsets[docs] - low
        y = np.empty_like(x)
        for p in range(len(a)):
            np.multiply(x, a[p], out=y)
            y += b[p]
            out[docs, p] = np.minimum.reduceat(y, segments)


def band_keys(signature: np.ndarray, bands: int, rows: int, scope: int = 0) -> np.ndarray:
    """One key for each band, int64 [n, bands]. Equal keys mean equal (scope, band, minima) but for 64-bit collisions.

    The band and the scope are part of the key, so only documents of one scope that agree in the same band ever meet.
    """
    draw = np.random.RandomState(_KEY_SEED)
    factors = draw.randint(0, 1 << 63, (bands, rows), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    start = draw.randint(0, 1 << 63, bands, dtype=np.uint64) + np.uint64(scope * 0x9E3779B97F4A7C15 % (1 << 64))
    grouped = signature.reshape(-1, bands, rows).astype(np.uint64)
    grouped = grouped * np.uint64(0xD1342543DE82EF95) ^ (grouped << np.uint64(29))  # spread 32 bits over 64
    h = (grouped * factors).sum(axis=2, dtype=np.uint64) + start
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return (h ^ (h >> np.uint64(29))).view(np.int64)
