"""How much knowledge a passage holds: entities, numbers and definitions per 100 words, and whether its text compresses.

In: passages of a batch (`mixtures.augment.windows`). Out: one int64 a passage in millionths, so that order never hangs on the
last bit of a float: (entities + numbers + 4 x definitions per 100 words, each capped) x two factors in [0, 1], zlib and lines.

- *entity*: a run of capitalised words of which none begins a sentence or a line. Scripts without case have none.
- *number*: a word with a digit.
- *definition*: a phrase such as `is a`, `refers to`, `defined as`, `is called` (English).
- zlib: bytes after / before. Boilerplate and lists compress to 0.3 of their size and less, prose to about 0.5.
- lines: words in a line. Contents, menus and tables have few, prose many, also where it is wrapped at 72 columns.

The caps keep tables, indexes and logs from being the densest text of all. Weights, caps and ramps are chosen, untested.
Cost: about 12 MB/s on one core, most of it in zlib and RE2.
"""

import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.text import DIGIT, LETTER, LOWER, STOP, UPPER, CodePoints, Pieces, any_flags
from mixtures.augment.windows import NEWLINE, Passages

MILLION = 1_000_000
ENTITY_CAP, NUMBER_CAP, DEFINITION_CAP, DEFINITION_WEIGHT = 15.0, 8.0, 4.0, 4.0  # per 100 words
ZLIB_LOW, ZLIB_HIGH = 0.3, 0.5  # factor 0 at and below LOW, 1 at and above HIGH
LINE_LOW, LINE_HIGH = 4.0, 10.0  # words in a line: factor 0 at and below LOW, 1 at and above HIGH
LEAST_LETTER_WORDS = 0.6  # share of words with a letter: below it a passage is a table, and scores 0
DEFINITION = r"(?i)\b(?:is|are|was|were) (?:an?|the (?:name|process|study|term|art|branch)|defined|called|known)\b|\brefers? to\b"


def scores(found: Passages, texts: pa.Array, text: CodePoints, raw: Pieces) -> np.ndarray:
    """int64 [n]: density in millionths of every passage; `texts` holds their strings in the same order."""
    if not len(found.start):
        return np.zeros(0, np.int64)
    words = found.words
    flags = any_flags(text, raw.start, raw.end)
    hundreds = words / 100
    entities = _within(entity_starts(text, raw), found) / hundreds
    numbers = _within((flags & DIGIT) != 0, found) / hundreds
    definitions = np.asarray(pc.count_substring_regex(texts, DEFINITION)) / hundreds
    lettered = _within((flags & LETTER) != 0, found) / words
    facts = np.minimum(entities, ENTITY_CAP) + np.minimum(numbers, NUMBER_CAP)
    facts += DEFINITION_WEIGHT * np.minimum(definitions, DEFINITION_CAP)
    factor = np.clip((compressed(texts) - ZLIB_LOW) / (ZLIB_HIGH - ZLIB_LOW), 0.0, 1.0)
    factor *= np.clip((words / lines(text, raw, found) - LINE_LOW) / (LINE_HIGH - LINE_LOW), 0.0, 1.0)
    factor[lettered < LEAST_LETTER_WORDS] = 0.0
    return np.rint(facts * factor * MILLION).astype(np.int64)


def compressed(texts: pa.Array) -> np.ndarray:
    """float64 [n]: size after zlib (level 6) / size before, at most 1."""
    sizes = [(len(zlib.compress(data, 6)), len(data)) for data in texts.cast(pa.large_binary()).to_pylist()]
    after, before = np.array(sizes, np.float64).reshape(-1, 2).T
    return np.minimum(after / np.maximum(before, 1), 1.0)


def lines(text: CodePoints, raw: Pieces, found: Passages) -> np.ndarray:
    """int64 [n]: lines of each passage that hold a word."""
    newlines = np.concatenate([[0], np.cumsum(text.points == NEWLINE)])
    first_of_line = np.append(True, newlines[raw.start[1:]] > newlines[raw.end[:-1]])
    sums = np.concatenate([[0], np.cumsum(first_of_line)])
    return sums[found.end_word] - sums[found.first_word + 1] + 1


def capitalised(text: CodePoints, raw: Pieces) -> np.ndarray:
    """bool [words]: begins with an upper-case letter (behind quotes and brackets too) and does not begin a sentence or line."""
    first = _first_letter(text, raw)
    upper = (text.flags[first] & UPPER) != 0
    return upper & ~sentence_starts(text, raw)


def sentence_starts(text: CodePoints, raw: Pieces) -> np.ndarray:
    """bool [words]: the first word of a document, a line, or behind a word that ends a sentence."""
    out = np.zeros(len(raw.start), bool)
    if not len(out):
        return out
    out[0] = True
    newlines = np.concatenate([[0], np.cumsum(text.points == NEWLINE)])
    out[1:] = newlines[raw.start[1:]] > newlines[raw.end[:-1]]
    last = text.flags[raw.end - 1]
    inner = text.flags[np.maximum(raw.end - 2, raw.start)]  # a stop inside a closing quote or bracket
    closed = (last & (LETTER | DIGIT)) == 0
    out[1:] |= (((last & STOP) != 0) | (closed & ((inner & STOP) != 0)))[:-1]
    return out


def entity_starts(text: CodePoints, raw: Pieces) -> np.ndarray:
    """bool [words]: the first word of each run of capitalised words; a comma or another mark ends a run."""
    named = capitalised(text, raw)
    return named & ~goes_on(named, text, raw)


def goes_on(named: np.ndarray, text: CodePoints, raw: Pieces) -> np.ndarray:
    """bool [words]: the word before is capitalised as well and no mark stands between."""
    if not len(named):
        return named
    bare = (text.flags[raw.end - 1] & (LETTER | DIGIT)) != 0
    return np.concatenate([[False], (named & bare)[:-1]])


def _first_letter(text: CodePoints, raw: Pieces) -> np.ndarray:
    """The first letter or digit of each raw word; its first code point where it has neither."""
    solid = (text.flags & (LETTER | DIGIT | UPPER | LOWER)) != 0
    following = np.append(np.flatnonzero(solid), len(text.points))
    at = following[np.searchsorted(following, raw.start)] if len(raw.start) else raw.start
    return np.where(at < raw.end, at, raw.start)


def _within(marked: np.ndarray, found: Passages) -> np.ndarray:
    """Marked words of each passage."""
    sums = np.concatenate([[0], np.cumsum(marked)])
    return sums[found.end_word] - sums[found.first_word]
