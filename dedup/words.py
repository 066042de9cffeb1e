"""Words with their places: what a match is made of, and the way back from it to bytes of the text.

In:  a `large_string` column. Out: `Words`, flat over all documents: hash, byte range in the folded text, whether it has a digit.
Words are those of `dedup.shingles` (NFC, lower case, runs of letters, marks and numbers; punctuation separates). Scripts that
write without spaces give one word for each code point, so thirteen words of Chinese are thirteen characters.

`masked` is the same text with its numbers hidden: a word with an ASCII digit in it is a number, and a run of numbers is one, so
`2.5`, `1,000` and `48` are equal, and so are `2pm` and `11pm`. Digits of other scripts are not looked for.

`Windows` hashes any window of words from one prefix sum: the polynomial of `dedup.shingles` over word hashes, kept at 64 bits.
Two different windows of an index of 10^8 and a corpus of 10^12 words meet by chance some five times.

Cost: words, masks and windows are nearly all of what `decontaminate` takes, 22 MB/s on one core in numpy.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup.shingles import WORD_BASE, block_end, doubtful, folded, mix_words, utf8, words_of_block

NUMBER = np.uint64(0x5851F42D4C957F2D)  # hash of every number in a masked text; arbitrary, odd


class Words(NamedTuple):
    """Those of document i are `offsets[i] : offsets[i + 1]`."""

    hashes: np.ndarray  # uint64 [w]
    starts: np.ndarray  # int64 [w], bytes of the folded text, counted through all documents
    ends: np.ndarray  # int64 [w]
    numbers: np.ndarray  # bool [w]
    offsets: np.ndarray  # int64 [n + 1]
    edges: np.ndarray  # int64 [n + 1], bytes where the folded documents begin

    def owners(self, at: np.ndarray) -> np.ndarray:
        """The documents of the words at `at`."""
        return np.searchsorted(self.offsets, at, side="right") - 1


def words_of(texts: pa.Array) -> Words:
    """The words of each text; a null text has none."""
    data, edges = utf8(folded(texts))
    hashes, starts, ends, numbers = [], [], [], []
    low = 0
    while low < len(data):
        high = block_end(data, edges, low)
        inner = edges[np.searchsorted(edges, low, side="right") : np.searchsorted(edges, high)]
        block = data[low:high]
        block_hashes, block_starts, block_ends = words_of_block(block, inner - low)
        digits = np.zeros(len(block) + 1, dtype=np.int32)
        np.cumsum((block >= ord("0")) & (block <= ord("9")), out=digits[1:])
        hashes.append(block_hashes)
        starts.append(block_starts + low)
        ends.append(block_ends + low)
        numbers.append(digits[block_ends] > digits[block_starts])
        low = high
    if not hashes:
        none = np.empty(0, dtype=np.int64)
        return Words(none.astype(np.uint64), none, none, none.astype(bool), np.zeros(len(edges), np.int64), edges)
    begins = np.concatenate(starts)
    offsets = np.searchsorted(begins, edges)
    return Words(np.concatenate(hashes), begins, np.concatenate(ends), np.concatenate(numbers), offsets, edges)


def masked(words: Words) -> Words:
    """The same texts with each run of numbers as one word, whose range reaches from the first to the last of them."""
    if not words.numbers.any():
        return words
    follows = np.zeros(len(words.hashes), dtype=bool)
    follows[1:] = words.numbers[1:] & words.numbers[:-1]
    firsts = words.offsets[:-1]
    follows[firsts[firsts < len(follows)]] = False
    kept = np.flatnonzero(~follows)
    last = np.append(kept[1:], len(follows)) - 1
    hashes = np.where(words.numbers[kept], NUMBER, words.hashes[kept])
    offsets = np.searchsorted(kept, words.offsets)
    return Words(hashes, words.starts[kept], words.ends[last], words.numbers[kept], offsets, words.edges)


class Windows:
    """Hashes of windows over one array of word hashes, wherever they lie and however long they are."""

    def __init__(self, hashes: np.ndarray) -> None:
        powers, inverses = _powers(max(1 << 16, 1 << len(hashes).bit_length()))
        self._powers = powers
        self._sums = np.zeros(len(hashes) + 1, dtype=np.uint64)
        np.cumsum(hashes * inverses[: len(hashes)], out=self._sums[1:])

    def all(self, words: int) -> np.ndarray:
        """uint64 [w - words + 1]: the window at every place, those across two documents included."""
        n = max(0, len(self._sums) - words)
        return mix_words((self._sums[words:] - self._sums[:n]) * self._powers[:n]) if n else self._sums[:0]

    def of(self, starts: np.ndarray, words: np.ndarray | int) -> np.ndarray:
        """uint64 [n]: the windows of `words` words that begin at `starts`."""
        return mix_words((self._sums[starts + words] - self._sums[starts]) * self._powers[starts])


@cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """WORD_BASE^-0, ^-1, ... and WORD_BASE^0, ^1, ... modulo 2^64: the first undoes the second."""
    inverse = np.uint64(pow(int(WORD_BASE), -1, 1 << 64))
    out = np.ones((2, size), dtype=np.uint64)
    np.cumprod(np.full(size - 1, inverse), out=out[0, 1:])
    np.cumprod(np.full(size - 1, WORD_BASE), out=out[1, 1:])
    return out[0], out[1]


def ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[0], starts[0] + 1, ...` for `counts[0]` numbers, then those of the next, end to end."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def window_places(words: Words, length: int) -> np.ndarray:
    """Where windows of `length` words begin that lie inside one document."""
    counts = np.maximum(np.diff(words.offsets) - length + 1, 0)
    return ragged(words.offsets[:-1], counts)


def original_bytes(text: str, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte ranges of the folded text as ranges of the text itself, on code points.

    Folding keeps the length of nearly every code point. A text is cut before each code point that composes with none before
    it; pieces fold by themselves, so their lengths say where each came from. A range that begins inside a piece takes it whole.
    """
    data = np.frombuffer(text.encode(), np.uint8)
    if not len(data) or data.max() < 0x80:
        return starts, ends
    begins = (data & 0xC0) != 0x80
    begins[doubtful(data)] = False
    begins[0] = True
    cuts = np.append(np.flatnonzero(begins), len(data))
    pieces = pa.Array.from_buffers(pa.large_string(), len(cuts) - 1, [None, pa.py_buffer(cuts), pa.py_buffer(data)])
    lengths = pc.binary_length(pc.utf8_lower(pc.utf8_normalize(pieces, form="NFC"))).to_numpy()
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return cuts[np.searchsorted(edges, starts, side="right") - 1], cuts[np.searchsorted(edges, ends)]
