"""Signatures as datasketch's LeanMinHash and back.

The permutations of `dedup.signatures` are those of datasketch 2's `affine32` scheme with the same seed, so the values can be
compared, pickled and put into `MinHashLSH` beside each other. They agree with datasketch's own sketches of the same text only if
it is given the same 32-bit shingle values: its hash function and pre-mix differ (`tests/dedup/test_interop.py` shows both).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.errors import InputError

if TYPE_CHECKING:
    from datasketch import LeanMinHash

SCHEME = "affine32"


def to_lean(signature: np.ndarray, seed: int) -> "list[LeanMinHash]":
    """One LeanMinHash for each row of uint32 [n, permutations]."""
    from datasketch import LeanMinHash

    return [LeanMinHash(seed=seed, hashvalues=row, scheme=SCHEME) for row in signature.astype(np.uint32)]


def from_lean(sketches: "Sequence[LeanMinHash]", seed: int) -> np.ndarray:
    """uint32 [n, permutations]. InputError for a sketch of another scheme or seed: its values cannot be compared with ours."""
    for i, sketch in enumerate(sketches):
        if sketch.scheme != SCHEME or sketch.seed != seed:
            raise InputError(
                f"interop: sketch {i} has other permutations, got scheme {sketch.scheme!r} with seed {sketch.seed}, "
                f"expected {SCHEME!r} with seed {seed}; make it again with these"
            )
    return np.stack([sketch.hashvalues for sketch in sketches]).astype(np.uint32)
