"""What texts share with the passages of an index: equal runs of words, their lengths, how much of a passage they make.

In:  `Targets` and the words of some texts. Out: `Runs`, one row for each equal run of a text and a passage.

An indexed window of a text proposes a diagonal (place in the text minus place in the passage). The whole passage is compared
along it, word for word, so a run is as long as it is, through common windows too; a run counts if an indexed window lies in it.
For one text and passage the `MOST_DIAGONALS` diagonals with the most windows are compared: a text that repeats a line a million
times costs no more.

Short questions have no diagonals: the whole question must stand in the text, and the first words of its answer within
`answer_distance` words before or behind it.
"""

import itertools
from typing import NamedTuple

import numpy as np

from dedup.lookup import Lookup
from dedup.targets import ANCHOR, MASKED, NGRAM, SHORT, Targets
from dedup.words import Windows, Words, ragged

MOST_DIAGONALS = 16  # chosen: a passage quoted in 16 pieces is far above any threshold
CHUNK_WORDS = 1 << 22  # words of passages compared at once


class Runs(NamedTuple):
    """Equal runs, sorted by text, passage and place. All int64 [r]."""

    text: np.ndarray
    passage: np.ndarray
    position: np.ndarray  # first word in the passage
    place: np.ndarray  # first word in the flat words of all texts
    length: np.ndarray

    @classmethod
    def none(cls) -> "Runs":
        return cls(*(np.empty(0, dtype=np.int64) for _ in cls._fields))

    def where(self, chosen: np.ndarray) -> "Runs":
        return Runs(*(column[chosen] for column in self))


class Passages:
    """One stream of the passages of an index with its windows."""

    def __init__(self, targets: Targets, stream: int) -> None:
        column = targets.passages.column("masked" if stream == MASKED else "words").combine_chunks()
        self.hashes = column.values.to_numpy()[column.offsets[0].as_py() : column.offsets[-1].as_py()]
        self.offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
        self.lengths = np.diff(self.offsets)
        mine = np.asarray(targets.grams.column("stream")) == stream
        self.lookup, self.passage, self.position = (
            Lookup(np.asarray(targets.grams.column("hash"))[mine]),
            *(np.asarray(targets.grams.column(c))[mine].astype(np.int64) for c in ("passage", "position")),
        )

    def matches(self, words: Words, windows: Windows, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in the texts, passage, position) of every indexed window of `length` words that a text holds."""
        hashes = windows.all(length)
        at = self.lookup.places(hashes)
        at = at[at + length <= words.offsets[words.owners(at) + 1]]
        found, entry = self.lookup.entries(hashes[at])
        return at[found], self.passage[entry], self.position[entry]

    def runs(self, words: Words, windows: Windows) -> Runs:
        """Equal runs of at least NGRAM words."""
        place, passage, position = self.matches(words, windows, NGRAM)
        if not len(place):
            return Runs.none()
        text, diagonal = words.owners(place), place - position
        order = np.lexsort((position, diagonal, passage, text))
        text, passage, diagonal, position = text[order], passage[order], diagonal[order], position[order]
        fresh = np.append(True, _differs(text) | _differs(passage) | _differs(diagonal))
        first = np.flatnonzero(fresh)
        number = np.cumsum(fresh) - 1
        kept = _most_matched(text[first], passage[first], np.bincount(number))
        parts = []
        for low, high in _chunks(self.lengths[passage[first]]):
            window = kept[number] & (number >= low) & (number < high)
            chosen = np.flatnonzero(kept[low:high]) + low
            seats = np.cumsum(kept) - 1 - (int(kept[:low].sum()))
            lines = (text[first[chosen]], passage[first[chosen]], diagonal[first[chosen]])
            parts.append(self._compare(words, *lines, seats[number[window]], position[window]))
        return Runs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _compare(
        self,
        words: Words,
        text: np.ndarray,
        passage: np.ndarray,
        diagonal: np.ndarray,
        line: np.ndarray,
        position: np.ndarray,
    ) -> Runs:
        """The runs on some diagonals that hold one of the windows (`line`: which diagonal, `position`: in its passage)."""
        lengths = self.lengths[passage]
        starts = np.cumsum(lengths) - lengths
        at = ragged(diagonal, lengths)
        inside = (at >= np.repeat(words.offsets[text], lengths)) & (at < np.repeat(words.offsets[text + 1], lengths))
        mine = self.hashes[ragged(self.offsets[passage], lengths)]
        equal = np.zeros(len(at) + 1, dtype=bool)
        equal[:-1] = inside
        equal[:-1][inside] = words.hashes[at[inside]] == mine[inside]
        begins = equal[:-1].copy()
        begins[1:] &= ~equal[:-2]
        begins[starts] = equal[starts]
        run = np.maximum.accumulate(np.where(begins, np.arange(len(at)), 0))  # the flat place where each run begins
        stops = np.flatnonzero(~equal | np.append(begins, True))  # where a run cannot go on
        seen = starts[line] + position
        begin = np.unique(run[seen[equal[seen]]])
        end = stops[np.searchsorted(stops, begin, side="right")]
        of = np.searchsorted(starts, begin, side="right") - 1
        return Runs(text[of], passage[of], begin - starts[of], diagonal[of] + begin - starts[of], end - begin)


def _differs(column: np.ndarray) -> np.ndarray:
    return column[1:] != column[:-1]


def _most_matched(text: np.ndarray, passage: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """bool: the diagonals of each text and passage with the most windows; of equal ones the first."""
    order = np.lexsort((np.arange(len(text)), -matched, passage, text))
    fresh = np.append(True, _differs(text[order]) | _differs(passage[order]))
    begins = np.flatnonzero(fresh)
    rank = np.arange(len(text)) - begins[np.cumsum(fresh) - 1]
    kept = np.zeros(len(text), dtype=bool)
    kept[order[rank < MOST_DIAGONALS]] = True
    return kept


def _chunks(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of diagonals whose passages together have about CHUNK_WORDS words."""
    number = np.cumsum(lengths) // CHUNK_WORDS
    edges = [0, *(np.flatnonzero(_differs(number)) + 1).tolist(), len(lengths)]
    return list(itertools.pairwise(edges))


class ShortQuestions:
    """Questions that are too short to be evidence by themselves, with the first words of their answers."""

    def __init__(self, targets: Targets) -> None:
        self.passages = Passages(targets, SHORT)
        p = self.passages
        self._hash = Windows(p.hashes).of(p.offsets[:-1], p.lengths)
        column = targets.passages.column("answer").combine_chunks()
        offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
        self._answer_words = np.diff(offsets)
        values = column.values.to_numpy()[column.offsets[0].as_py() :]
        self._answer = Windows(values).of(offsets[:-1], self._answer_words)

    def runs(self, words: Words, windows: Windows, distance: int) -> Runs:
        """Two runs for every question that stands in a text with its answer near: the question (position 0) and the answer
        (position -1). The nearest answer counts, behind the question before in front of it."""
        place, passage, position = self.passages.matches(words, windows, ANCHOR)
        start, length = place - position, self.passages.lengths[passage]
        text = words.owners(place)
        low, high = words.offsets[text], words.offsets[text + 1]
        whole = np.flatnonzero((start >= low) & (start + length <= high))
        whole = whole[windows.of(start[whole], length[whole]) == self._hash[passage[whole]]]
        start, passage, length, text = start[whole], passage[whole], length[whole], text[whole]
        if not len(whole):
            return Runs.none()
        answer = self._nearest(words, windows, start, length, passage, text, distance)
        found = answer >= 0
        start, passage, length, text, answer = (x[found] for x in (start, passage, length, text, answer))
        both = (
            np.concatenate([text, text]), np.concatenate([passage, passage]),
            np.concatenate([np.zeros(len(text), np.int64), np.full(len(text), -1)]),
            np.concatenate([start, answer]), np.concatenate([length, self._answer_words[passage]]),
        )  # fmt: skip
        return Runs(*both).where(np.lexsort((both[3], both[1], both[0])))

    def _nearest(
        self,
        words: Words,
        windows: Windows,
        start: np.ndarray,
        length: np.ndarray,
        passage: np.ndarray,
        text: np.ndarray,
        distance: int,
    ) -> np.ndarray:
        """The place of each question's answer, -1 where there is none."""
        count = self._answer_words[passage]
        steps = np.arange(distance + 1)
        behind = (start + length)[:, None] + steps
        before = (start - count)[:, None] - steps
        at = np.stack([behind, before], axis=2).reshape(len(start), -1)  # 0 behind, 0 before, 1 behind, ...
        inside = (at >= words.offsets[text][:, None]) & (at + count[:, None] <= words.offsets[text + 1][:, None])
        equal = np.zeros(at.shape, dtype=bool)
        row, _ = np.nonzero(inside)
        equal[inside] = windows.of(at[inside], count[row]) == self._answer[passage[row]]
        return np.where(equal.any(axis=1), at[np.arange(len(start)), equal.argmax(axis=1)], -1)
