"""A character n-gram language model with interpolated Kneser-Ney smoothing, counted and looked up as columns.

In: texts of one language. Out: a `Model`: for each order k the hashes of its n-grams, sorted, with the discounted probability of
their last character and the weight that they, as a history, pass to the next lower order:

    p_k(c | h) = max(n(hc) - D_k, 0) / n(h) + D_k N(h) / n(h) * p_{k-1}(c | h'),  p_0 = 1 / V

n is a count at the highest order, and below it the number of different n-grams one character longer that end so; N(h) is the
number of different characters after h; D_k = n1 / (n1 + 2 n2); V is the number of different characters and one for all others.
A history never seen passes everything on. Kneser and Ney 1995; Chen and Goodman 1998 (TR-10-98), section 4.1.6.

Characters, not words: a few hundred kB train order 5 in any script, and nothing is out of vocabulary. Text is folded: runs of
whitespace are one space, every digit is 0, letters are lower case. A text begins and ends in a space.

Cost on one core: training 1.7 MB/s, scoring 0.6 M characters a second, so `score` reads a bounded part of a text.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.raters.features import fold_table
from core.schema import TEXT
from core.text import WHITESPACE, Hashes, code_points

FIXED = 1 << 10  # log probabilities are summed as int64 in units of 2^-10 bit, so that no sum depends on its order


class Level(NamedTuple):
    """One order of a model, sorted by `key`."""

    key: np.ndarray  # uint64 [n]: hash of the n-gram
    share: np.ndarray  # float32 [n]: discounted probability of its last character; 0 where it is only a history
    passes: np.ndarray  # float32 [n]: what it passes on as a history; 1 where it never was one


class Model(NamedTuple):
    """All orders, lowest first; `base` is what the empty history passes on; `alphabet` is V."""

    levels: tuple[Level, ...]
    base: float
    alphabet: int


class Characters(NamedTuple):
    """The characters of some texts as `plain` has them; those of text d are `first[d]:first[d + 1]`."""

    hashes: Hashes
    at: np.ndarray  # int64 [n]
    room: np.ndarray  # int64 [n]: characters of the same text up to and with this one
    first: np.ndarray  # int64 [D + 1]


def plain(column: pa.Array) -> pa.Array:
    """Texts as the model reads them: one space for whitespace, a space at both ends."""
    flat = pc.ascii_trim(pc.replace_substring_regex(pc.fill_null(column, ""), pattern=WHITESPACE, replacement=" "), " ")
    return pc.binary_join_element_wise(pa.scalar("", TEXT), flat.cast(TEXT), pa.scalar("", TEXT), pa.scalar(" ", TEXT))


def characters(column: pa.Array) -> Characters:
    """The characters of each text; a text without any has none, not its two spaces."""
    text = code_points(plain(column))
    length = text.end - text.start
    length[length == 2] = 0
    first = np.concatenate([[0], np.cumsum(length)])
    offset = np.arange(first[-1]) - np.repeat(first[:-1], length)
    return Characters(Hashes(fold_table()[text.points]), np.repeat(text.start, length) + offset, offset + 1, first)


def train(column: pa.Array, order: int) -> Model:
    """The model of the texts in `column`, whatever their order. Texts shorter than `order` characters teach nothing."""
    found = characters(column)
    place = np.flatnonzero(found.room >= order)
    levels: list[Level] = []
    keys, passes = np.zeros(0, np.uint64), np.zeros(0)  # histories of the order above
    alphabet = 1
    for k in range(order, 0, -1):
        end = found.at[place] + 1
        key, once, count = np.unique(found.hashes.of(end - k, end), return_index=True, return_counts=True)
        place = place[once]  # one place of each n-gram: below, different n-grams are what is counted
        end = end[once]
        history, of = np.unique(found.hashes.of(end - k, end - 1), return_inverse=True)
        discount = _discount(count)
        total = np.bincount(of, weights=count, minlength=len(history))
        share = np.maximum(count - discount, 0) / total[of]
        levels.insert(0, _level(key, share, keys, passes))
        keys, passes = history, discount * np.bincount(of, minlength=len(history)) / total
        alphabet = 1 + len(key)
    return Model(tuple(levels), float(passes[0]) if len(passes) else 1.0, alphabet)


def _discount(count: np.ndarray) -> float:
    """D = n1 / (n1 + 2 n2) of Kneser and Ney; 0.5 where nothing was seen once or twice."""
    once, twice = int((count == 1).sum()), int((count == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


def _level(key: np.ndarray, share: np.ndarray, history: np.ndarray, passes: np.ndarray) -> Level:
    """n-grams and histories of one length as one sorted table."""
    every = np.union1d(key, history)
    shares, passed = np.zeros(len(every), np.float32), np.ones(len(every), np.float32)
    shares[np.searchsorted(every, key)] = share
    passed[np.searchsorted(every, history)] = passes
    return Level(every, shares, passed)


class Scorer:
    """A model ready to be looked up: the sorted keys of each order are found through their leading bits."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._index = [_leading(level.key) for level in model.levels]

    def bits(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [D]: -log2 of each text's probability in units of 1 / FIXED; int64 [D]: characters predicted)."""
        found = characters(column)
        sums = np.diff(np.concatenate([[0], np.cumsum(self.costs(found))])[found.first])
        return sums, np.maximum(np.diff(found.first) - 1, 0)

    def costs(self, found: Characters) -> np.ndarray:
        """int64 [n]: -log2 of each character's probability after those before it; 0 for the space that begins a text."""
        n = len(found.at)
        p = np.full(n, 1.0 / self.model.alphabet)
        passed = np.full(n, self.model.base)
        for k, (level, index) in enumerate(zip(self.model.levels, self._index, strict=True), start=1):
            place = np.flatnonzero(found.room >= k)
            row = _find(level.key, index, found.hashes.of(found.at[place] + 1 - k, found.at[place] + 1))
            known = row >= 0
            share, passes = np.zeros(n), np.ones(n)
            share[place[known]] = level.share[row[known]]
            passes[place[known]] = level.passes[row[known]]
            p[place] = share[place] + passed[place] * p[place]
            passed = np.ones(n)
            passed[1:] = passes[:-1]  # the history of a character is the n-gram that ends before it
        cost = np.rint(-np.log2(p) * FIXED).astype(np.int64)
        cost[found.room == 1] = 0
        return cost


def _leading(key: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each value of the leading bits begins among sorted keys: about one key a value."""
    bits = max(1, len(key).bit_length())
    edges = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
    return np.append(np.searchsorted(key, edges), len(key)), bits


def _find(key: np.ndarray, index: tuple[np.ndarray, int], wanted: np.ndarray) -> np.ndarray:
    """int64 [n]: the row of each wanted key, -1 where there is none. Three times as fast as a binary search."""
    starts, bits = index
    part = (wanted >> np.uint64(64 - bits)).astype(np.int64)
    row, stop = starts[part], starts[part + 1]
    out = np.full(len(wanted), -1, dtype=np.int64)
    open_ = np.flatnonzero(row < stop)
    while len(open_):
        at = row[open_]
        hit = key[at] == wanted[open_]
        out[open_[hit]] = at[hit]
        row[open_] += 1
        open_ = open_[~hit & (row[open_] < stop[open_])]
    return out
