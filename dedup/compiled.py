"""The kernels of `dedup.shingles`, `dedup.signatures` and `dedup.verify` compiled by numba, imported only where it is installed.

Same results as the numpy paths, bit for bit (`tests/dedup/test_shingles.py`). All arithmetic is on unsigned 64 bits: numba turns
uint64 with a plain integer literal into float64, so every constant below is typed.
"""

import numpy as np
from numba import njit

from dedup.shingles import BYTE_BASE, SHINGLE_MIX, WORD_MIX

_SEPARATOR, _WORD, _ALONE = 0, 1, 2  # as in dedup.alphabet
_ZERO, _ONE, _S29, _S32 = np.uint64(0), np.uint64(1), np.uint64(29), np.uint64(32)


def shingle_bytes(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, powers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shingle hashes (uint32) and offsets of the documents `data[offsets[i] : offsets[i + 1]]`."""
    lengths = np.diff(offsets)
    room = int((lengths // 2 + 1).sum())  # two neighbouring words are at least two bytes apart
    values = np.empty(room, dtype=np.uint32)
    ends = np.zeros(len(offsets), dtype=np.int64)
    words = np.empty(int(lengths.max(initial=0)) // 2 + 1, dtype=np.uint64)
    used = _shingle_bytes(data, offsets, classes, powers, words, values, ends)
    return values[:used].copy(), ends


@njit(cache=True, nogil=True)
def _mix_word(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> _S32)) * WORD_MIX
    return h ^ (h >> _S29)


@njit(cache=True, nogil=True)
def _words(data, start, end, classes, out):  # type: ignore[no-untyped-def]
    """Hashes of the words of `data[start:end]` into `out`; returns their number."""
    n = _ZERO
    # unsigned: a signed index is tested for Python's negative ones at every byte
    i, stop = np.uint64(start), np.uint64(end)
    while i < stop:
        size, kind = _class_at(data, i, classes)
        h = _ZERO
        if kind == _ALONE:
            h = _feed(h, data, i, size)
        inside = kind == _WORD
        while inside:
            h = _feed(h, data, i, size)
            i += size
            inside = False
            if i < stop:
                size, following = _class_at(data, i, classes)
                inside = following == _WORD
        if kind != _SEPARATOR:
            out[n] = _mix_word(h)
            n += _ONE
        if kind != _WORD:
            i += size
    return np.int64(n)


@njit(cache=True, nogil=True, inline="always")
def _class_at(data, i, classes):  # type: ignore[no-untyped-def]
    """Bytes of the code point that begins at byte i of valid UTF-8, and its class."""
    if data[i] < 0x80:
        return _ONE, classes[data[i]]
    point, size = _code_point(data, i)
    return size, classes[point]


@njit(cache=True, nogil=True, inline="always")
def _feed(h, data, i, size):  # type: ignore[no-untyped-def]
    for j in range(i, i + size):
        h = h * BYTE_BASE + np.uint64(data[j])
    return h


@njit(cache=True, nogil=True)
def _code_point(data, i):  # type: ignore[no-untyped-def]
    """The code point of two to four bytes that begins at byte i of valid UTF-8, and its number of bytes."""
    b = np.int64(data[i])
    second = np.int64(data[i + _ONE]) & 0x3F
    if b < 0xE0:
        return (b & 0x1F) << 6 | second, np.uint64(2)
    third = np.int64(data[i + np.uint64(2)]) & 0x3F
    if b < 0xF0:
        return (b & 0x0F) << 12 | second << 6 | third, np.uint64(3)
    return (b & 0x07) << 18 | second << 12 | third << 6 | np.int64(data[i + np.uint64(3)]) & 0x3F, np.uint64(4)


@njit(cache=True, nogil=True)
def _shingle_bytes(data, offsets, classes, powers, words, values, ends):  # type: ignore[no-untyped-def]
    ngram = len(powers)
    used = 0
    for d in range(len(offsets) - 1):
        count = _words(data, offsets[d], offsets[d + 1], classes, words)
        shingles = count - ngram + 1 if count >= ngram else min(count, 1)
        width = min(count, ngram)
        for i in range(shingles):
            h = np.uint64(0)
            for k in range(width):
                h += words[i + k] * powers[k]
            values[used + i] = np.uint32(((h ^ (h >> _S29)) * SHINGLE_MIX) >> _S32)
        used += shingles
        ends[d + 1] = used
    return used


@njit(cache=True, nogil=True)
def minima(values, offsets, a, b, out):  # type: ignore[no-untyped-def]
    """`out[d, p] = min(out[d, p], min over the document's x of a[p] * x + b[p] mod 2^32)`, uint32 [documents, permutations].

    Eight shingles meet each permutation at once: 60 M shingles/s, against 12 M with the loops the other way round (LLVM does
    not vectorise that reduction) and 51 M with four.
    """
    for d in range(len(offsets) - 1):
        least = out[d]
        i, end = offsets[d], offsets[d + 1]
        while i + 8 <= end:
            x0, x1, x2, x3 = values[i], values[i + 1], values[i + 2], values[i + 3]
            x4, x5, x6, x7 = values[i + 4], values[i + 5], values[i + 6], values[i + 7]
            for p in range(len(a)):
                ap, bp = a[p], b[p]
                m = min(np.uint32(x0 * ap + bp), np.uint32(x1 * ap + bp))
                n = min(np.uint32(x2 * ap + bp), np.uint32(x3 * ap + bp))
                o = min(np.uint32(x4 * ap + bp), np.uint32(x5 * ap + bp))
                q = min(np.uint32(x6 * ap + bp), np.uint32(x7 * ap + bp))
                least[p] = min(least[p], min(min(m, n), min(o, q)))
            i += 8
        for j in range(i, end):
            for p in range(len(a)):
                least[p] = min(least[p], np.uint32(values[j] * a[p] + b[p]))


@njit(cache=True, nogil=True)
def common(values, starts_a, ends_a, starts_b, ends_b, out):  # type: ignore[no-untyped-def]
    """`out[i]` = number of values that `values[starts_a[i]:ends_a[i]]` and the b slice share; slices are sorted and unique."""
    for p in range(len(out)):
        i, j, found = starts_a[p], starts_b[p], 0
        while i < ends_a[p] and j < ends_b[p]:
            x, y = values[i], values[j]
            found += x == y
            i += x <= y
            j += y <= x
        out[p] = found
