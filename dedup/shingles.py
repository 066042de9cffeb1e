"""Shingles: hashes of the word n-grams of documents, on columns, from UTF-8 bytes to flat integers.

In:  a `large_string` column of valid UTF-8. It is brought to NFC and lower case by Arrow, then cut into words by the classes
     of `dedup.alphabet`. Out: `Shingles(values uint32 [m], offsets int64 [n + 1])`, the multiset of each document's n-gram hashes
     in reading order. A document with fewer than n words but at least one has one shingle of all its words; without a word it
     has none.

A word's hash is a polynomial of its bytes modulo 2^64, mixed; a shingle's hash a second polynomial of its word hashes, mixed and
cut to 32 bits. Both are sums, so numpy gets them from one prefix sum over a whole block, bit for bit what the compiled kernel
(`dedup.compiled`, used when numba is installed) gets by Horner's rule. No seed: two runs, two roots, two engines agree.

32 bits make two different shingles of a pair of documents with 1,500 shingles each equal once in a thousand pairs.

Cost: some 90 MB/s compiled and 25 MB/s in numpy on one busy core (`benchmarks/minhash.py kernels`).
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup.alphabet import ALONE, CLASSES, SEPARATOR, UNSTABLE

# Arbitrary odd numbers of 64 bits. Changing one changes every signature: raise the version of the minhash stage.
BYTE_BASE = np.uint64(0x9F86E1B34A7C25D5)
WORD_BASE = np.uint64(0xC6A4F1D03B9E5867)
WORD_MIX = np.uint64(0xE9B5A36D1C47F28B)
SHINGLE_MIX = np.uint64(0xB37D0F5942E8C16B)

_ASCII_CLASSES = CLASSES[:256].tobytes()

# of text in a numpy block: 38 MB/s; 64 KiB 31, 256 KiB 11 (measured: temporaries leave the cache)
BLOCK_BYTES = 1 << 15


class Shingles(NamedTuple):
    """Flat hashes of several documents: those of document i are `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray  # uint32 [m]
    offsets: np.ndarray  # int64 [n + 1], offsets[0] == 0


@cache
def compiled_available() -> bool:
    """Whether the optional extra `fast` (numba) is installed."""
    return find_spec("numba") is not None


def shingle(texts: pa.Array, ngram: int, compiled: bool | None = None) -> Shingles:
    """The shingles of each text. `compiled` picks the kernel, None the fastest one installed; the result is the same.

    A null text has no shingles.
    """
    data, offsets = utf8(folded(texts))
    if compiled_available() if compiled is None else compiled:
        from dedup.compiled import shingle_bytes

        return Shingles(*shingle_bytes(data, offsets, CLASSES, word_powers(ngram)))
    words, counts = _word_hashes(data, offsets)
    return _combine(words, counts, ngram)


def folded(texts: pa.Array) -> pa.Array:
    """`texts` in NFC and lower case; nulls become empty texts."""
    return pc.utf8_lower(_normalised(*utf8(texts)))


def _normalised(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """The texts in NFC. Only runs of non-ASCII bytes that hold a doubtful code point are normalised, each with the ASCII
    character before it (which a mark may follow): Arrow normalises 30 to 60 MB/s, the rest of the kernel 100."""
    at_doubt = doubtful(data)
    high = np.flatnonzero(data >= 0x80) if len(at_doubt) else at_doubt
    fresh = (np.diff(high, prepend=-2) != 1) | np.isin(high, offsets)
    starts, ends = high[fresh], high[np.append(fresh[1:], True)[: len(high)]] + 1
    hit = np.searchsorted(at_doubt, starts) < np.searchsorted(at_doubt, ends)
    starts, ends = starts[hit] - ~np.isin(starts[hit], offsets), ends[hit]
    cuts = np.unique(np.concatenate([starts, ends, offsets]))
    pieces = pa.Array.from_buffers(pa.large_string(), len(cuts) - 1, [None, pa.py_buffer(cuts), pa.py_buffer(data)])
    chosen = pa.array(np.isin(cuts[:-1], starts))
    pieces = pc.replace_with_mask(pieces, chosen, pc.utf8_normalize(pieces.filter(chosen), form="NFC"))
    _, new_cuts, new_data = pieces.buffers()
    at = np.frombuffer(new_cuts, np.int64)[np.searchsorted(cuts, offsets)]
    return pa.Array.from_buffers(pa.large_string(), len(at) - 1, [None, pa.py_buffer(at), new_data])


def doubtful(data: np.ndarray) -> np.ndarray:
    """Positions of code points in UNSTABLE blocks. General Punctuation is looked at closely: its quotes and dashes are stable."""
    leads = np.flatnonzero(data >= 0xCC)  # first bytes of U+0300 and above: everything below is in NFC
    b0 = data[leads].astype(np.int64)
    b1 = data[np.minimum(leads + 1, len(data) - 1)].astype(np.int64) & 0x3F
    b2 = data[np.minimum(leads + 2, len(data) - 1)].astype(np.int64) & 0x3F
    blocks = [b0 & 0x1F, (b0 & 0x0F) << 6 | b1, (b0 & 0x07) << 12 | b1 << 6 | b2]
    block = np.select([b0 < 0xE0, b0 < 0xF0], blocks[:2], blocks[2])
    return leads[UNSTABLE[block] & ~((block == 0x80) & (b2 >= 2))]


@cache
def word_powers(ngram: int) -> np.ndarray:
    """Factors of the words of one shingle, uint64 [ngram], all odd."""
    return np.cumprod(np.full(ngram, WORD_BASE, dtype=np.uint64))


def utf8(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and offsets (from 0) of a `large_string` column without a copy; nulls are empty texts."""
    if texts.null_count:
        texts = pc.fill_null(texts, "")
    if len(texts) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _word_hashes(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Word hashes of all documents (uint64, reading order) and the number of words of each document (int64 [n])."""
    hashes, starts = [], []
    low = 0
    while low < len(data):
        high = block_end(data, offsets, low)
        inner = offsets[np.searchsorted(offsets, low, side="right") : np.searchsorted(offsets, high)]
        block_hashes, block_starts, _ = words_of_block(data[low:high], inner - low)
        hashes.append(block_hashes)
        starts.append(block_starts + low)
        low = high
    if not hashes:
        return np.empty(0, np.uint64), np.zeros(len(offsets) - 1, np.int64)
    return np.concatenate(hashes), np.diff(np.searchsorted(np.concatenate(starts), offsets))


def block_end(data: np.ndarray, offsets: np.ndarray, low: int) -> int:
    """Where a block that begins at `low` may end: at a document's end or behind an ASCII separator, so no word is split.

    A block grows past BLOCK_BYTES only while it holds neither, as in a single word of megabytes.
    """
    size = BLOCK_BYTES
    while low + size < len(data):
        edge = offsets[np.searchsorted(offsets, low + size, side="right") - 1]
        if edge > low:
            return int(edge)
        window = data[low : low + size]
        spaces = np.flatnonzero((window < 0x80) & (CLASSES[window] == SEPARATOR))
        if len(spaces):
            return low + int(spaces[-1]) + 1
        size *= 2
    return len(data)


def words_of_block(data: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, start bytes and end bytes of the words of a block; `borders` are the inner positions where a document begins."""
    n = len(data)
    begins = np.ones(n + 1, dtype=bool)  # byte i begins a code point; the end counts as a beginning
    np.not_equal(data & 0xC0, 0x80, out=begins[:n])
    classes = np.zeros(n + 2, dtype=np.uint8)  # a separator before the first and behind the last byte
    classes[1:-1] = byte_classes(data, begins[:n])
    fresh = classes[1:] != classes[:-1]  # [n + 1]: the class changes between byte i - 1 and i
    fresh[borders] = True
    fresh |= begins & (classes[1:] == ALONE)
    fresh[1:] |= begins[1:] & (classes[1:-1] == ALONE)
    starts = np.flatnonzero(fresh[:n] & (classes[1:-1] != SEPARATOR))
    ends = np.flatnonzero(fresh & (classes[:-1] != SEPARATOR))
    powers, inverses = byte_powers(table_size(n))
    sums = np.zeros(n + 1, dtype=np.uint64)
    np.cumsum(data * inverses[:n], out=sums[1:])
    return mix_words((sums[ends] - sums[starts]) * powers[ends - 1]), starts, ends


def byte_classes(data: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The class of the code point to which each byte belongs, uint8 [bytes]."""
    if not len(data) or data.max() < 0x80:
        return np.frombuffer(data.tobytes().translate(_ASCII_CLASSES), np.uint8)  # five times as fast as indexing
    at = np.flatnonzero(begins)
    padded = np.concatenate([data, np.zeros(3, np.uint8)])
    b0, b1, b2, b3 = (padded[at + i].astype(np.uint32) for i in range(4))
    two = (b0 & 0x1F) << 6 | b1 & 0x3F
    three = (b0 & 0x0F) << 12 | (b1 & 0x3F) << 6 | b2 & 0x3F
    four = (b0 & 0x07) << 18 | (b1 & 0x3F) << 12 | (b2 & 0x3F) << 6 | b3 & 0x3F
    points = np.select([b0 < 0x80, b0 < 0xE0, b0 < 0xF0], [b0, two, three], four)
    return np.repeat(CLASSES[points], np.diff(at, append=len(data)))


def mix_words(h: np.ndarray) -> np.ndarray:
    """The last step of a word's hash, uint64 to uint64, one to one."""
    h = (h ^ (h >> np.uint64(32))) * WORD_MIX
    return h ^ (h >> np.uint64(29))


def mix_shingles(h: np.ndarray) -> np.ndarray:
    """The last step of a shingle's hash, uint64 to uint32."""
    return (((h ^ (h >> np.uint64(29))) * SHINGLE_MIX) >> np.uint64(32)).astype(np.uint32)


def table_size(n: int) -> int:
    return max(BLOCK_BYTES, 1 << (n - 1).bit_length() if n else 1)


@cache
def byte_powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """BYTE_BASE^0, ^1, ... and BYTE_BASE^-0, ^-1, ... modulo 2^64, each uint64 [size]."""
    inverse = np.uint64(pow(int(BYTE_BASE), -1, 1 << 64))
    powers = np.ones((2, size), dtype=np.uint64)
    np.cumprod(np.full(size - 1, BYTE_BASE), out=powers[0, 1:])
    np.cumprod(np.full(size - 1, inverse), out=powers[1, 1:])
    return powers[0], powers[1]


def _combine(words: np.ndarray, counts: np.ndarray, ngram: int) -> Shingles:
    """Shingles from the word hashes of all documents and the number of words of each."""
    factors = word_powers(ngram)
    first = np.cumsum(counts) - counts
    padded = np.concatenate([words, np.zeros(ngram, np.uint64)])
    sums = sum((padded[k : k + len(words)] * factors[k] for k in range(ngram)), np.zeros(len(words), np.uint64))
    short = np.flatnonzero((counts > 0) & (counts < ngram))
    sums[first[short]] = sum(
        (np.where(k < counts[short], padded[first[short] + k] * factors[k], np.uint64(0)) for k in range(ngram)),
        np.zeros(len(short), np.uint64),
    )
    kept = np.where(counts >= ngram, counts - ngram + 1, np.minimum(counts, 1))
    edges = np.bincount(first, minlength=len(words) + 1) - np.bincount(first + kept, minlength=len(words) + 1)
    values = mix_shingles(sums[np.cumsum(edges[:-1]) > 0])
    return Shingles(values, np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))
