"""Sorted hashes that a stream of others is held against: a bit table first, binary search for what passes.

In:  sorted uint64 hashes, repeats allowed. Out: places and entries that are equal. The table has 16 to 32 bits for each hash, so
about one foreign hash in 25 is looked for in vain; 10^6 hashes make 4 MB of bits, which a core's cache holds.
"""

import numpy as np

from dedup.words import ragged

BITS_EACH = 16
_ONE, _SEVEN, _THREE = np.uint64(1), np.uint64(7), np.uint64(3)


class Lookup:
    """Built once for each worker."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes
        bits = max(10, int(len(hashes) * BITS_EACH).bit_length())
        self._shift = np.uint64(64 - bits)
        at = hashes >> self._shift
        table = np.zeros(1 << bits, dtype=bool)
        table[at] = True
        self._table = np.packbits(table, bitorder="little")

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Indexes into `hashes` that are probably in the table: all that are, and few others."""
        if not len(self.hashes) or not len(hashes):
            return np.empty(0, dtype=np.int64)
        at = hashes >> self._shift
        bits = self._table[at >> _THREE] >> (at & _SEVEN).astype(np.uint8)
        return np.flatnonzero(bits & np.uint8(1))

    def entries(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into `hashes`, index of an equal entry) for every equal pair, in that order."""
        low = np.searchsorted(self.hashes, hashes, side="left")
        counts = np.searchsorted(self.hashes, hashes, side="right") - low
        return np.repeat(np.arange(len(hashes)), counts), ragged(low, counts)
