"""Facts that can be checked by string: numbers, months of dates, and names of a text, in one normal form.

`numbers("1,000 km on 5 March 2020")` holds 1000, 5, 2020 and, as a month, 3. A number has several readings where its mark may
be a separator or a decimal point (`1,500`); two numbers agree when they share one. Digits of any script are read. Small number
words may come from counting; from thirteen on they are facts. The enumeration of a list and `Question 3:` are none.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from core.schema import TEXT
from core.text import code_points, raw_words, words
from mixtures.augment.inventory import named_runs

UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {w: i for i, w in enumerate([*UNITS.split(), "nineteen"])} | {w: 10 * i for i, w in enumerate(TENS.split(), 2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
COUNTED = 12  # number words up to here may be a count of things that the source lists
MONTHS = "January February March April May June July August September October November December"
MONTH_OF = {part.lower(): i for i, name in enumerate(MONTHS.split(), 1) for part in (name, name[:3])} | {"sept": 9}
NUMBER = re.compile(r"\d{1,3}(?:[.,\u00a0\u202f']\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?")
ENUMERATION = re.compile(
    r"^[ \t]*(?:[-*\u2022][ \t]*)?(?:(?:Question|Answer|Q|A)[ \t]*\d{0,3}[ \t]*[:.)]|\d{1,3}[.)](?=\s))", re.M | re.I
)
_MONTH = "|".join(sorted((n.capitalize() for n in MONTH_OF), key=len, reverse=True))
DATE = re.compile(rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?(?:\s+of)?\s+)?(?P<month>{_MONTH})\b\.?(?:\s+\d{{1,4}})?")
ISO_DATE = re.compile(r"\b\d{4}-(?P<month>\d{2})-\d{2}\b|\b\d{1,2}[./](?P<other>\d{1,2})[./]\d{2,4}\b")
# code points by which two content words are compared: `invented` and `invention` agree. Chosen, untested
SENTENCE_WORD = 6
CONTENT_CHARS = 4  # shorter words are grammar


class Facts(NamedTuple):
    """What a text states."""

    numbers: tuple[frozenset[str], ...]  # each with its readings
    months: frozenset[int]


def facts(text: str, least: int = 0) -> Facts:
    """Numbers and months of dates; number words from `least` on."""
    plain = ENUMERATION.sub(" ", "".join(_ascii_digit(c) for c in text))
    written = [readings(m[0]) for m in NUMBER.finditer(plain)]
    spelled = [frozenset({str(n)}) for n in spelled_numbers(plain) if n >= least]
    months = {MONTH_OF[m["month"].lower()] for m in DATE.finditer(plain) if any(c.isdigit() for c in m[0])}
    return Facts((*written, *spelled), frozenset(months | set(_numeric_months(plain))))


def unfounded(answer: str, source: str) -> list[str]:
    """Numbers and months of the answer that the source does not state, in a readable form."""
    said, known = facts(answer, COUNTED + 1), facts(source)
    allowed = {reading for number in known.numbers for reading in number} | {str(m) for m in known.months}
    wrong = [min(number, key=lambda r: (len(r), r)) for number in said.numbers if not number & allowed]
    months = [MONTHS.split()[m - 1] for m in sorted(said.months - known.months) if 1 <= m <= 12]
    return wrong + months


def readings(text: str) -> frozenset[str]:
    """The values that digits and marks may mean: `1,500` is 1500 and 1.5; `1,000` is 1000; `1.50` is 1.5; `007` is 7."""
    joined = re.sub(r"[\u00a0\u202f']", "", text)
    mark = max(joined.rfind("."), joined.rfind(","))
    digits = re.sub(r"[.,]", "", joined)
    if mark < 0:
        return frozenset({_plain(digits)})
    part = joined[mark + 1 :]
    decimal = _plain(f"{re.sub(r'[.,]', '', joined[:mark])}.{part}")
    if re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", joined) is None:
        return frozenset({decimal})
    return frozenset({_plain(digits), decimal}) if part.strip("0") else frozenset({_plain(digits)})


def _plain(number: str) -> str:
    whole, _, part = number.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def spelled_numbers(text: str) -> Iterator[int]:
    """The values of runs of English number words: `twenty-five`, `two hundred and three`, `three million`."""
    total = current = 0
    inside = False
    for word in [*re.findall(r"[a-z]+|[^\sa-z-]", text.lower()), ""]:
        if word in WORDS:
            current, inside = current + WORDS[word], True
        elif word == "hundred" and inside:
            current *= 100
        elif word in SCALES and inside:
            total, current = total + current * SCALES[word], 0
        elif inside and not (word == "and" and (total or current >= 100)):
            yield total + current
            total, current, inside = 0, 0, False


def _numeric_months(text: str) -> Iterator[int]:
    for match in ISO_DATE.finditer(text):
        yield int(match["month"] or match["other"])


def _ascii_digit(char: str) -> str:
    return char if char.isascii() or not char.isdecimal() else str(unicodedata.decimal(char))


def names(text: str) -> set[str]:
    """Words of the names inside the sentences of a text, in lower case; none in scripts without case."""
    return {word.lower() for run in named_runs(pa.array([text], TEXT))[0] for word in re.findall(r"\w+", run)}


def all_words(text: str) -> list[str]:
    """Lower-case words of a text in order; each letter of a script without spaces is one."""
    lowered = text.lower()
    points = code_points(pa.array([lowered], TEXT))
    found = words(points, raw_words(points))
    return [lowered[s:e] for s, e in zip(found.start, found.end, strict=True)]


def content(found: list[str]) -> set[str]:
    """The content words among words, cut to a stem."""
    return {w[:SENTENCE_WORD] for w in found if len(w) >= CONTENT_CHARS or not w.isascii()}
