"""Text as columns: code points and words of a whole batch as flat arrays, one normal form, and spans cut into text.

In: `large_string` columns of valid UTF-8. Out: numpy arrays over all documents of the batch with offsets per document, so that
a stage calls numpy some hundred times per batch and never once per word.

- *raw word*: a longest run of code points other than whitespace (`str.isspace`), except that each letter of a script that is
  written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar, Tibetan, ...) is a raw word by itself, together with the
  combining marks behind it. Without that rule a Chinese page is a handful of "words" and every word statistic is void.
- *word*: a raw word without the symbols at both ends; a raw word of symbols only is no word. Symbols are all code points but
  letters, numbers and combining marks, so emoji and U+FFFD are symbols.

Character classes come from Python's `unicodedata`, so a new Python may move counts on rare scripts. Cost: `code_points` and
`words` together read about 28 MB/s on one core; memory is about 25 bytes per code point while a batch is worked on.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPACE, LETTER, DIGIT, UPPER, LOWER, SYMBOL, ALONE, MARK, STOP = (1 << i for i in range(9))

# Scripts written without spaces between words, as code point ranges (Unicode 15, Scripts.txt; unassigned gaps included).
UNSPACED = (
    "E00-EDF F00-FFF 1000-109F 1780-17FF 1950-19DF 1A20-1AAF 1B00-1B7F 2E80-2FDF 3005 3007 3021-3029 3038-303B 3041-30FF "
    "3105-312F 31A0-31BF 31F0-31FF 3400-4DBF 4E00-9FFF A000-A4CF A980-A9FF AA00-AADF F900-FAFF FF66-FF9F 16FE0-16FFF "
    "1B000-1B16F 20000-323AF"
)
VARIATION = "FE00-FE0F E0100-E01EF 20E3"  # they dress the code point before them and say nothing alone
# Marks that end a sentence: the Unicode property Sentence_Terminal (PropList.txt), without U+2024 (a leader dot), with U+0964.
SENTENCE_STOPS = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D5 1803 1809 "
    "1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E 2E3C 2E53-2E54 3002 A4FF "
    "A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01 FF0E FF1F FF61 "
    "10A56-10A57 10F55-10F59 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 "
    "1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11C41-11C42 11EF7-11EF8 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
    "16E98 1BC9F 1DA88"
)
ASSIGNED = ((0, 0x323B0), (0xE0000, 0xE01F0))  # beyond these planes lie private use and unassigned points only: symbols
WHITESPACE = r"[\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}]+"  # RE2; the same set as str.isspace

BLOCK = 1 << 16  # code points hashed at a time: the temporaries stay in the second-level cache
BASE = 0x9E3779B97F4A7C15 | 1  # odd, hence invertible modulo 2^64; the digits of the golden ratio
MASK64 = (1 << 64) - 1
FINAL = np.uint64(0xFF51AFD7ED558CCD)  # the finaliser of MurmurHash3
SPREAD = np.uint64(0xC2B2AE3D27D4EB4F)  # a prime of xxHash64


def code_point_ranges(text: str) -> Iterable[tuple[int, int]]:
    """(first, last) of each `HEX` or `HEX-HEX` in `text`."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield int(first, 16), int(last or first, 16)


@cache
def classes() -> np.ndarray:
    """uint16 [0x110000]: the class bits of each code point. Built once per process, in about 0.15 s."""
    table = np.full(0x110000, SYMBOL, dtype=np.uint16)
    for low, high in ASSIGNED:
        for point in range(low, high):
            table[point] = _class_of(chr(point))
    for low, high in code_point_ranges(UNSPACED):
        part = table[low : high + 1]
        part[(part & LETTER) != 0] |= ALONE
        part[(part & (LETTER | DIGIT | SYMBOL | SPACE)) == 0] |= MARK
    for low, high in code_point_ranges(VARIATION):
        table[low : high + 1] = SYMBOL | MARK
    for low, high in code_point_ranges(SENTENCE_STOPS):
        table[low : high + 1] |= STOP
    table.flags.writeable = False
    return table


def _class_of(char: str) -> int:
    kind = unicodedata.category(char)
    if char.isspace():
        return SPACE
    if kind[0] == "L":
        return LETTER | (UPPER if kind in ("Lu", "Lt") else LOWER if kind == "Ll" else 0)
    if kind[0] in "NM":
        return DIGIT if kind == "Nd" else 0
    return SYMBOL


class CodePoints(NamedTuple):
    """Documents laid end to end, each followed by one newline that belongs to none: nothing can reach across documents."""

    points: np.ndarray  # uint32 [N]
    flags: np.ndarray  # uint16 [N], see `classes`
    start: np.ndarray  # int64 [D]
    end: np.ndarray  # int64 [D], without the separating newline


class Pieces(NamedTuple):
    """Ranges of code points in reading order; those of document d are `first[d]:first[d + 1]`."""

    start: np.ndarray  # int64 [n]
    end: np.ndarray  # int64 [n]
    first: np.ndarray  # int64 [D + 1]


def code_points(column: pa.Array) -> CodePoints:
    """The documents of a string column as code points; null counts as empty."""
    column = pc.fill_null(column, "")
    length = pc.utf8_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    text = "".join(f"{t}\n" for t in column.to_pylist())
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    end = np.cumsum(length + 1) - 1
    return CodePoints(points, classes()[points], end - length, end)


def pieces(text: CodePoints, start: np.ndarray, end: np.ndarray) -> Pieces:
    """`start` and `end` (ascending) with the offsets of each document."""
    return Pieces(start, end, np.append(np.searchsorted(start, text.start), len(start)))


def raw_words(text: CodePoints) -> Pieces:
    """The raw words of every document (see the module)."""
    flags = text.flags
    solid = (flags & SPACE) == 0
    begins = solid.copy()
    alone, mark = (flags & ALONE) != 0, (flags & MARK) != 0
    begins[1:] &= ~solid[:-1] | alone[1:] | ((alone | mark)[:-1] & ~mark[1:])
    ends = solid
    if len(solid):
        ends[:-1] &= ~solid[1:] | begins[1:]
    return pieces(text, np.flatnonzero(begins), np.flatnonzero(ends) + 1)


def words(text: CodePoints, raw: Pieces) -> Pieces:
    """The words within `raw`: symbols at both ends stripped, words of symbols only left out."""
    flags, start, end = text.flags, raw.start.copy(), raw.end.copy()
    bare = np.concatenate([[False], (flags & (SYMBOL | SPACE)) == 0])
    edge = np.flatnonzero(bare[1:] != bare[:-1])
    # runs of neither symbol nor space, and a guard
    low, high = np.append(edge[0::2], len(flags)), np.append(edge[1::2], 0)
    dressed = np.flatnonzero(((flags[start] | flags[end - 1]) & SYMBOL) != 0)
    s, e = start[dressed], end[dressed]
    s = np.maximum(s, low[np.searchsorted(high[:-1], s, side="right")])
    last_run = np.searchsorted(low[:-1], e, side="left") - 1
    start[dressed], end[dressed] = s, np.where(s < e, np.minimum(e, high[last_run]), s)
    keep = start < end
    return pieces(text, start[keep], end[keep])


def any_flags(text: CodePoints, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """uint16 [n]: the union of the class bits within each range; ranges are ascending, not empty and do not overlap."""
    if len(start) == 0:
        return np.zeros(0, dtype=np.uint16)
    return np.bitwise_or.reduceat(text.flags, np.stack([start, end], axis=1).ravel())[::2]


class Hashes:
    """64-bit hashes of any ranges of a batch's code points, O(1) each after one pass: equal ranges have equal hashes.

    A polynomial over spread code points modulo 2^64, as prefix sums; dividing by BASE^start makes it independent of where
    the range lies. Unequal ranges collide with probability about 2^-64: accepted everywhere in this project.
    """

    def __init__(self, points: np.ndarray) -> None:
        power, _ = _powers()
        self._prefix = np.zeros(len(points) + 1, dtype=np.uint64)
        for low in range(0, len(points), BLOCK):
            part = points[low : low + BLOCK].astype(np.uint64) + np.uint64(1)
            part *= SPREAD
            part ^= part >> np.uint64(29)
            part *= FINAL
            part *= power[: len(part)] * np.uint64(pow(BASE, low, 1 << 64))
            part[:1] += self._prefix[low : low + 1]
            np.cumsum(part, out=self._prefix[low + 1 : low + 1 + len(part)])

    def of(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """uint64 [n]: the hashes of `points[start:end]`."""
        _, inverse = _powers()
        blocks = -(-len(self._prefix) // BLOCK)
        step = pow(BASE, -BLOCK, 1 << 64)
        coarse = np.array([pow(step, b, 1 << 64) for b in range(blocks)], dtype=np.uint64)
        h = self._prefix[end] - self._prefix[start]
        h *= inverse[start % BLOCK] * coarse[start // BLOCK]
        h ^= h >> np.uint64(33)
        return h * FINAL


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """BASE^k and BASE^-k modulo 2^64 for k below BLOCK."""
    out = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        factors = np.full(BLOCK, base & MASK64, dtype=np.uint64)
        factors[0] = 1
        out.append(np.cumprod(factors))
    return out[0], out[1]


def normalise(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The text that exact deduplication compares: NFC, each run of whitespace one space, trimmed. Case and punctuation stay.

    Two captures of one page differ in layout and encoding; a difference in case is a difference in text and left to
    near-duplicate detection. Idempotent. About 25 MB/s, most of it in RE2.
    """
    composed = pc.utf8_normalize(column, form="NFC")
    return pc.ascii_trim(pc.replace_substring_regex(composed, pattern=WHITESPACE, replacement=" "), " ")


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LONE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> tuple[str, int]:
    """`text` as valid Unicode and the number of lone surrogates that became U+FFFD. Whole pairs become their character."""
    if text.isascii():
        return text, 0
    joined = _PAIR.sub(lambda m: m[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
    return _LONE.subn("\ufffd", joined)


class Span(NamedTuple):
    """A UTF-8 byte range on code point boundaries and what stands in its place (None: nothing)."""

    start: int
    end: int
    replacement: str | None = None


def unite_spans(stages: Sequence[Sequence[Span]]) -> list[Span]:
    """Spans of several stages, earliest stage first, as ascending spans that do not overlap.

    Spans that share a byte become one; it carries the replacement of the earliest stage in it, and within a stage of the
    first span. Spans that only touch stay two. Empty spans cut nothing and are left out.
    """
    flat = sorted(
        ((s.start, s.end, rank, s.replacement) for rank, spans in enumerate(stages) for s in spans if s.start < s.end),
        key=lambda s: (*s[:3], s[3] or ""),
    )
    united: list[tuple[Span, int]] = []
    for start, end, rank, replacement in flat:
        if not united or start >= united[-1][0].end:
            united.append((Span(start, end, replacement), rank))
            continue
        last, best = united[-1]
        text = replacement if rank < best else last.replacement
        united[-1] = Span(last.start, max(last.end, end), text), min(rank, best)
    return [span for span, _ in united]


def apply_spans(text: bytes, stages: Sequence[Sequence[Span]]) -> str:
    """`text` (UTF-8) with the united spans of all stages replaced. A span outside or inside a character is a ValueError."""
    out, at = [], 0
    for start, end, replacement in unite_spans(stages):
        if start < 0 or end > len(text):
            raise ValueError(f"spans: range {start}..{end} lies outside the text, got {len(text)} bytes")
        if any(edge < len(text) and text[edge] & 0xC0 == 0x80 for edge in (start, end)):
            raise ValueError(f"spans: range {start}..{end} splits a character; offsets are UTF-8 bytes on code points")
        out += [text[at:start], (replacement or "").encode()]
        at = end
    return b"".join([*out, text[at:]]).decode()
