"""Documents cut into passages: runs of raw words that end where a paragraph or a sentence does, as UTF-8 byte ranges.

In: a string column. Out: one row per passage, in reading order: the document's index in the batch, code point range, byte
range, words. Passages of one document never overlap. A raw word is that of `core.text` (each Han letter is one), so 256 to 512
words are about 350 to 700 tokens of English. What is left at the end of a document and shorter than `least` is no passage.

Cost: the code points and raw words of the batch, then one step of Python for each passage.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from core.text import STOP, CodePoints, Pieces, code_points, raw_words

NEWLINE = 10
WORD_BYTES = 16  # a passage above this many bytes a word is base64 or a table of keys, not text: chosen, untested


class Passages(NamedTuple):
    """Passages of a batch. `first_word` and `end_word` index the batch's raw words."""

    document: np.ndarray  # int64 [n], index in the batch
    start: np.ndarray  # int64 [n], UTF-8 byte offset in the document
    end: np.ndarray  # int64 [n]
    first_word: np.ndarray  # int64 [n]
    end_word: np.ndarray  # int64 [n]

    @property
    def words(self) -> np.ndarray:
        return self.end_word - self.first_word


def passages(column: pa.Array, least: int, most: int) -> tuple[Passages, CodePoints, Pieces]:
    """Passages of `least` to `most` raw words of every document, with the code points and raw words they index."""
    text = code_points(column)
    raw = raw_words(text)
    ends = _ends(text, raw)
    cuts = [
        (doc, first, end)
        for doc in range(len(column))
        for first, end in _cuts(ends[raw.first[doc] : raw.first[doc + 1]], int(raw.first[doc]), least, most)
    ]
    document, first, end = np.array(cuts, np.int64).reshape(-1, 3).T
    offsets = byte_offsets(text.points)
    base = offsets[text.start[document]]
    start_byte, end_byte = offsets[raw.start[first]] - base, offsets[raw.end[end - 1]] - base
    fits = end_byte - start_byte <= WORD_BYTES * most
    return Passages(*(a[fits] for a in (document, start_byte, end_byte, first, end))), text, raw


def byte_offsets(points: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each code point begins in UTF-8."""
    width = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width)])


def _ends(text: CodePoints, raw: Pieces) -> np.ndarray:
    """uint8 per raw word: 2 where a newline follows it, 1 where it ends a sentence, else 0."""
    out = np.zeros(len(raw.start), np.uint8)
    if len(out):
        out[(text.flags[raw.end - 1] & STOP) != 0] = 1
        newlines = np.concatenate([[0], np.cumsum(text.points == NEWLINE)])
        following = np.append(raw.start[1:], len(text.points))
        out[newlines[following] > newlines[raw.end]] = 2
    return out


def _cuts(ends: np.ndarray, base: int, least: int, most: int) -> list[tuple[int, int]]:
    """[first, end) word ranges: each ends at the last paragraph end within reach, else the last sentence end, else at
    `most` words."""
    out, at = [], 0
    while len(ends) - at >= least:
        window = ends[at + least - 1 : at + most]
        if at + most >= len(ends):
            end = len(ends)
        else:
            best = np.flatnonzero(window == max(1, window.max(initial=0)))
            end = at + least + int(best[-1]) if len(best) else at + most
        out.append((base + at, base + end))
        at = end
    return out
