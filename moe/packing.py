"""Which tokens of which documents make a row: documents laid end to end, or packed so that few are cut.

In: int [n] tokens of each document, EOS included. Out: for each row of a pass its pieces (document, first token, one
behind its last) from left to right. Both depend on the lengths and the context alone.

- `Stream` cuts the documents' stream every `context` tokens: rows are full, and a border divides the document under it.
- `BestFit` (Ding et al. 2024, arXiv 2404.10830) divides only documents longer than the context, into pieces of a
  context and a rest, and packs pieces best-fit-decreasing: the longest first, each into the row with the least room
  that holds it. What stays free at a row's end is padding. The mixture is packed in windows of `WINDOW` pieces, so
  beyond the result memory is bounded by the window and a row holds documents of one window. Within it rows stand in the
  order of their longest pieces and pieces in the mixture's, so a mixture in random order gives rows in random order;
  the order in which best fit opens them would put long documents first.

Memory: `Stream` 8 bytes a document; `BestFit` 8 a document, 4 a piece (8 beyond 2^32 pieces) and 8 a row. Best fit works
on all pieces of one length at once: a window costs a sort and some steps for each length and each amount of room that
occurs, not for each document. 10^7 documents of log-normal lengths (median 540 tokens) took 5.6 s for a context of 4k and
14.6 s for one of 32k, on one busy core.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from core.hashing import seeded

# Pieces packed together. Of those lengths a window of 2^12, 2^16 and 2^20 fills 0.99937, 0.99996 and 0.99999 of a context
# of 4k, 0.9964, 0.9997 and 0.99997 of one of 32k; beyond, there is nothing to gain.
WINDOW = 1 << 20
NARROW = 1 << 32  # pieces that an uint32 numbers

FEISTEL_ROUNDS = 4  # Luby and Rackoff 1988: four rounds make a strong pseudo-random permutation

Piece = tuple[int, int, int]  # document, first token, one behind its last


class Packing(Protocol):
    """The rows of one pass over the documents."""

    @property
    def rows(self) -> int: ...

    @property
    def fill_fraction(self) -> float:
        """Of the rows' places, those that hold a token."""
        ...

    @property
    def cut_docs(self) -> int:
        """Documents that no row holds whole."""
        ...

    def pieces(self, row: int) -> Iterator[Piece]: ...


class Stream:
    """Rows of the stream of all documents; the last `tokens % context` tokens are in none."""

    fill_fraction = 1.0

    def __init__(self, lengths: np.ndarray, context: int) -> None:
        self.context = context
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.rows = int(self._ends[-1]) // context if len(self._ends) else 0

    @property
    def cut_docs(self) -> int:
        """Documents of which a row's border divides the tokens, the pass's last border included."""
        begins = np.concatenate(([0], self._ends[:-1]))
        borders = (self._ends - 1) // self.context - begins // self.context
        return int(np.count_nonzero((borders > 0) & (self._ends > begins)))

    def pieces(self, row: int) -> Iterator[Piece]:
        start, stop = row * self.context, (row + 1) * self.context
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        begin = int(self._ends[first - 1]) if first else 0
        for i in range(first, last + 1):
            end = int(self._ends[i])
            if end > begin:
                yield i, max(start - begin, 0), min(stop, end) - begin
            begin = end


class BestFit:
    """Rows of whole documents as far as they fit (see the module)."""

    def __init__(self, lengths: np.ndarray, context: int, window: int = WINDOW) -> None:
        self.context = context
        self._lengths = lengths
        counts = -(-lengths.astype(np.int64) // context)
        self._first = np.concatenate(([0], np.cumsum(counts)))  # piece with which a document begins
        pieces = int(self._first[-1])
        self._order = np.empty(pieces, dtype=np.uint32 if pieces < NARROW else np.int64)  # pieces row after row
        sizes = [np.zeros(1, dtype=np.int64)]
        for start in range(0, pieces, window):
            stop = min(start + window, pieces)
            row = best_fit(self._piece_lengths(start, stop), context)
            self._order[start:stop] = np.argsort(row, kind="stable") + start
            sizes.append(np.bincount(row))
        self._starts = np.cumsum(np.concatenate(sizes))  # place in `_order` where a row begins
        self.rows = len(self._starts) - 1
        self.fill_fraction = float(lengths.sum(dtype=np.int64) / (self.rows * context)) if self.rows else 0.0
        self.cut_docs = int(np.count_nonzero(counts > 1))

    def pieces(self, row: int) -> Iterator[Piece]:
        here = self._order[self._starts[row] : self._starts[row + 1]].astype(np.int64)
        documents = np.searchsorted(self._first, here, side="right") - 1
        lows = (here - self._first[documents]) * self.context
        for i, low in zip(documents.tolist(), lows.tolist(), strict=True):
            yield i, low, min(low + self.context, int(self._lengths[i]))

    def _piece_lengths(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: tokens of each piece from `start` to `stop`."""
        first, last = np.searchsorted(self._first, (start, stop - 1), side="right") - 1
        counts = np.diff(np.clip(self._first[first : last + 2], start, stop))
        documents = np.repeat(np.arange(first, last + 1), counts)
        lows = (np.arange(start, stop) - self._first[documents]) * self.context
        return np.minimum(self._lengths[documents] - lows, self.context)


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """int64 [n]: the row of each piece of 1 to `context` tokens, best-fit-decreasing.

    Rows are numbered in the order of their longest pieces. Pieces of equal length are placed together: the fullest row
    that takes one takes as many as it holds, for each leaves it the fullest still.
    """
    row = np.empty(len(lengths), dtype=np.int64)
    longest: list[np.ndarray] = []  # of each row, its first piece
    room = _Room()
    order = np.argsort(-lengths, kind="stable")
    opened = 0
    for pieces in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = int(lengths[pieces[0]]) if len(pieces) else 0
        while len(pieces):
            free = room.least(length) or context
            each = free // length
            wanted = -(-len(pieces) // each)
            if room.least(length):
                rows = room.take(free, wanted)
            else:
                rows = np.arange(opened, opened + wanted)
                longest.append(pieces[::each])
                opened += wanted
            here, pieces = pieces[: len(rows) * each], pieces[len(rows) * each :]
            row[here] = np.repeat(rows, each)[: len(here)]
            spare = len(rows) * each - len(here)  # places for `length` tokens that the last row keeps
            room.put(free - each * length, rows[:-1] if spare else rows)
            room.put(free - (each - spare) * length, rows[-1:] if spare else rows[:0])
    number = np.empty(opened, dtype=np.int64)
    if opened:
        number[np.argsort(np.concatenate(longest))] = np.arange(opened)
    return number[row]


class _Room:
    """Rows by the tokens that they still take. An integer's bits say which amounts occur, so the least is one shift."""

    def __init__(self) -> None:
        self._rows: dict[int, list[np.ndarray]] = {}
        self._occurs = 0

    def least(self, length: int) -> int:
        """The least room of any row that takes `length` tokens; 0 where none does."""
        enough = self._occurs >> length
        return length + (enough & -enough).bit_length() - 1 if enough else 0

    def take(self, free: int, wanted: int) -> np.ndarray:
        """At most `wanted` of the rows with `free` tokens of room, one at least."""
        stack = self._rows[free]
        rows = stack.pop()
        if len(rows) > wanted:
            stack.append(rows[wanted:])
        if not stack:
            self._occurs ^= 1 << free
        return rows[:wanted]

    def put(self, free: int, rows: np.ndarray) -> None:
        if free and len(rows):
            self._rows.setdefault(free, []).append(rows)
            self._occurs |= 1 << free


def permuted(index: int, n: int, seed: int, turn: int = 0) -> int:
    """Where a seeded permutation of range(n) sends `index`; `turn` gives each pass its own order.

    A Feistel cipher over the next power of four, walked until inside n (at most four walks on average). It needs no
    table, so row r of a pass of 10^10 rows costs the same as row 0.
    """
    half = max(1, (n.bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ int(seeded(seed, f"{turn}/{r}/{right}") * (mask + 1))
        index = left << half | right
        if index < n:
            return index
