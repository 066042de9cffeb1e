"""What the linear raters see of a text: hashed n-grams of its tokens and of their shapes. Columns in, columns out.

A token is a run of letters, digits and marks; a run of one symbol; or a run of newlines. A letter of a script written without
spaces is a token by itself (`core.text`). Letters are folded to lower case and every digit is `0`. The *shape* of a token is
what is left when its letters are forgotten: capitals, digits, letters outside ASCII, a class of length, or which symbol it is.
Shapes are the same in every language, so `. \\n` and a menu of short capitalised lines are known where no word is.

In: a string column. Out: for each document the ids, in [0, 2^bits), of its token 1- and 2-grams and its shape 2- and 3-grams,
in order and with repetitions. Cost: about 7 MB/s on one core, some 60 bytes per code point while a batch is worked on.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from core.text import (
    ALONE,
    DIGIT,
    LOWER,
    MARK,
    SPACE,
    SYMBOL,
    UPPER,
    CodePoints,
    Hashes,
    Pieces,
    any_flags,
    code_points,
    pieces,
)

NEWLINE = 0x0A
LENGTHS = np.array([2, 3, 4, 6, 9, 13, 20, 40])  # edges of the classes of token length; chosen, untested
MIX = np.uint64(0xFF51AFD7ED558CCD)  # the finaliser of MurmurHash3
STEP = np.uint64(0x9E3779B97F4A7C15)  # digits of the golden ratio
SALTS = tuple(np.uint64(s) for s in (0x11, 0x22, 0x33, 0x44))  # one a family: a word and a shape never mean each other


class Tokens(NamedTuple):
    """Tokens of a batch; those of document d are `first[d]:first[d + 1]`."""

    word: np.ndarray  # uint64 [n]: hash of the folded characters
    shape: np.ndarray  # uint64 [n]
    first: np.ndarray  # int64 [D + 1]


class Features(NamedTuple):
    """Feature ids of one family for a batch; those of document d are `first[d]:first[d + 1]`."""

    ids: np.ndarray  # int32 [m]
    first: np.ndarray  # int64 [D + 1]


@cache
def fold_table() -> np.ndarray:
    """uint32 [0x110000]: each code point in lower case where that is one code point, every decimal digit as `0`."""
    from core.text import classes

    table = np.arange(0x110000, dtype=np.uint32)
    for point in np.flatnonzero((classes() & UPPER) != 0).tolist():
        low = chr(point).lower()
        if len(low) == 1:
            table[point] = ord(low)
    table[(classes() & DIGIT) != 0] = ord("0")
    table.flags.writeable = False
    return table


def token_pieces(text: CodePoints) -> Pieces:
    """Where the tokens lie (see the module)."""
    flags, points = text.flags, text.points
    newline = points == NEWLINE
    kind = np.where(newline, 3, np.where((flags & SPACE) != 0, 0, np.where((flags & SYMBOL) != 0, 2, 1))).astype(
        np.uint8
    )
    begins = kind != 0
    alone, mark = (flags & ALONE) != 0, (flags & MARK) != 0
    same = kind[1:] == kind[:-1]
    same &= (kind[1:] != 2) | (points[1:] == points[:-1])
    same &= ~(alone[1:] | ((alone | mark)[:-1] & ~mark[1:] & (kind[1:] == 1)))
    begins[1:] &= ~same
    begins[text.start] = kind[text.start] != 0
    begins[text.end] = True  # the newline between documents: no run of newlines reaches across it
    start = np.flatnonzero(begins)
    solid_end = np.flatnonzero((kind != 0) & np.append(begins[1:] | (kind[1:] == 0), True)) + 1
    inside = ~np.isin(start, text.end, assume_unique=True)
    return pieces(text, start[inside], solid_end[inside])


def tokens(column: pa.Array) -> Tokens:
    """The tokens of a batch as hashes."""
    text = code_points(column)
    found = token_pieces(text)
    word = Hashes(fold_table()[text.points]).of(found.start, found.end)
    return Tokens(word, _shapes(text, found), found.first)


def _shapes(text: CodePoints, found: Pieces) -> np.ndarray:
    """uint64 [n]: the shape of each token as a small number."""
    flags = any_flags(text, found.start, found.end).astype(np.uint64)
    first = text.flags[found.start]
    points = text.points[found.start].astype(np.uint64)
    length = np.digitize(found.end - found.start, LENGTHS).astype(np.uint64)
    capital = ((first & UPPER) != 0).astype(np.uint64)
    low = ((flags & LOWER) != 0).astype(np.uint64)
    digit = ((flags & DIGIT) != 0).astype(np.uint64)
    foreign = (points > 127).astype(np.uint64)
    worded = length | capital << np.uint64(4) | low << np.uint64(5) | digit << np.uint64(6) | foreign << np.uint64(7)
    symbol = (flags & SYMBOL) != 0
    newline = points == NEWLINE
    marked = points << np.uint64(8) | (np.minimum(length, 3) << np.uint64(32))
    return np.where(symbol | newline, marked, worded)


def features(column: pa.Array, bits: int) -> tuple[Features, ...]:
    """The four families of ids of every document: word 1, word 2, shape 2, shape 3. No token, no id."""
    found = tokens(column)
    word2 = found.word * STEP + np.roll(found.word, -1)
    shape2 = found.shape * STEP + np.roll(found.shape, -1)
    shape3 = shape2 * STEP + np.roll(found.shape, -2)
    families = ((found.word, 1), (word2, 2), (shape2, 2), (shape3, 3))
    return tuple(_ids(key, n, found.first, salt, bits) for salt, (key, n) in zip(SALTS, families, strict=True))


def _ids(key: np.ndarray, n: int, first: np.ndarray, salt: np.uint64, bits: int) -> Features:
    """Ids of the n-grams that begin at each token and end in the same document."""
    count = np.diff(first)
    there = np.repeat(first[1:], count) - np.arange(len(key)) >= n
    mixed = (key[there] + salt) * MIX
    mixed ^= mixed >> np.uint64(32)
    ids = ((mixed * STEP) >> np.uint64(64 - bits)).astype(np.int32)
    return Features(ids, np.concatenate([[0], np.cumsum(np.maximum(count - n + 1, 0))]))
