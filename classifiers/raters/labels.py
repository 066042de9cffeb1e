"""Weak labels: which documents of a sample teach which rater what, by rules that anyone can read and dispute.

In: the sample of `sample.py`. Out: a `Task` a rater: texts, labels (1 good, 0 bad), the *group* that is held out together in the
card, language and half. Rules, in the words that the cards repeat, are `RULES`. None of them is a human judgement.

`educational` and `reference` are labelled by where a text came from, never by what it says; `knowledge` by a measure of the text
itself, so its AUC says how well the rater imitates the measure; `integrity` and `commercial` by what was done to the text.
"""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.raters import corrupt
from core.errors import ConfigError
from core.hashing import seeded, seeded_column
from core.schema import TEXT

LINEAR = ("educational", "knowledge", "reference", "commercial", "integrity")
RATERS = ("educational", "knowledge", "reference", "fluency", "commercial", "integrity")
TEACHING = (
    "tutorial tutorials guide guides howto lesson lessons course courses learn learning intro introduction start started "
    "quickstart primer exercise exercises example examples faq textbook lecture lectures handbook walkthrough basics"
)
NOT_TEACHING = (
    "release releases changelog changes news policy policies legal privacy terms login cart checkout shop store press jobs "
    "tag tags category categories archive archives search sitemap index contents api genindex"
)
CURATED = ("reference", "book", "paper")  # kinds of documents that somebody edited
# Marks of facts: numbers, names inside a sentence, and words that define. Weights chosen, untested.
NUMBER, NAME = r"\p{Nd}+", r"[\p{Ll}\p{N},;] \p{Lu}\p{L}+"
DEFINES = (
    r"(?i)\b(?:is an?|are|was an?|refers? to|defined as|known as|called|means|consists? of|named after|founded|discovered|"
    r"est une?|était|appelée?|désigne|es una?|fue|llamad[oa]|significa|ist eine?|war|genannt|bezeichnet|является|называется)\b"
)
DEFINES_WEIGHT = 3.0
RULES = {
    "educational": "1: a word of the URL's host or path names a tutorial, guide, lesson, exercise, question and the like; "
    "0: it names releases, news, policies, indexes, shops and the like; documents with both or neither are left out",
    "knowledge": "in lines that are sentences, numbers + names + 3 x defining words, per word of the text: 1 the upper third, "
    "0 the lower third of the documents of one language and kind; a measure of the text itself",
    "reference": "1: documents of kind reference, book or paper; 0: documents of kind web",
    "commercial": "1: documents as they are, unless they hold 3 phrases of the lexicon; 0: those that do, and documents "
    "whose lines were replaced by advertising made from one theme of the lexicon",
    "integrity": "1: documents as they are; 0: documents spoilt in one of six ways (boilerplate, menu, truncated, encoding, "
    "wrapped, repeated)",
    "fluency": "no labels: a language model of the sample; the card compares texts to themselves with words shuffled or "
    "letters swapped",
}
SENTENCE_ENDS = frozenset('.!?:。！？।…)"”»')
_WORDS = re.compile(r"[a-z]+")
_SECOND_LEVEL = frozenset(
    ("ac", "co", "com", "edu", "gov", "net", "org", "gouv", "or", "ne")
)  # as in .co.uk, .com.br, .gouv.fr
HALF_SEED, GOOD_SEED = 6101, 6102  # other draws than those of any other stage
LEXICON_HITS = 3  # different phrases in one document; chosen, untested


class Task(NamedTuple):
    """What one rater learns from."""

    texts: pa.Array
    label: np.ndarray  # int8 [n], 0 or 1
    group: list[str]
    language: list[str]
    half: np.ndarray  # int8 [n]: of the document; a document is scored by the weights of the other half


def site(url: str | None) -> str:
    """The name a site was registered under, about: its last two labels, three under `.co.uk` and the like."""
    host = (
        (url or "").partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2].partition(":")[0].lower()
    )
    labels = host.strip(".").split(".")
    deep = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SECOND_LEVEL
    return ".".join(labels[-3 if deep else -2 :])


def half_of(doc_ids: pa.Array) -> np.ndarray:
    """int8 [n]: 0 or 1 by hash of doc_id."""
    return (seeded_column(HALF_SEED, doc_ids) < 0.5).astype(np.int8)


def tasks(sample: pa.Table, curated: Sequence[str] = CURATED) -> dict[str, Task]:
    """A task for each linear rater. A rater without documents of both labels has a task that says so by its labels."""
    sample = sample.combine_chunks()
    sites = [site(u) or d for u, d in zip(*(sample.column(c).to_pylist() for c in ("url", "dataset")), strict=True)]
    labels = {
        "educational": _teaching(sample.column("url").to_pylist()),
        "knowledge": _dense(sample),
        "reference": _curated(sample.column("kind"), curated),
    }
    out = {}
    for name, label in labels.items():
        at = np.flatnonzero(label >= 0)
        out[name] = _task(sample, at, _texts(sample, at), label[at], [sites[i] for i in at])
    for name in ("commercial", "integrity"):
        out[name] = _spoilt(sample, name, sites)
    return {name: out[name] for name in LINEAR}


def _task(sample: pa.Table, at: np.ndarray, texts: pa.Array, label: np.ndarray, group: list[str]) -> Task:
    rows = pa.array(at)
    language = sample.column("language").take(rows).to_pylist()
    half = half_of(sample.column("doc_id").take(rows).combine_chunks())
    return Task(texts, label.astype(np.int8), group, language, half)


def _texts(sample: pa.Table, at: np.ndarray) -> pa.Array:
    column = sample.column("text").take(pa.array(at))
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _teaching(urls: Sequence[str | None]) -> np.ndarray:
    """int8 [n]: 1, 0 or -1 by the words of a URL."""
    teaching, other = frozenset(TEACHING.split()), frozenset(NOT_TEACHING.split())
    out = np.full(len(urls), -1, dtype=np.int8)
    for i, url in enumerate(urls):
        host, _, path = (url or "").partition("://")[2].lower().partition("/")
        # the top level, such as .example or .news, is no mark
        words = set(_WORDS.findall(f"{host.rpartition('.')[0]}/{path}"))
        teaches, does_not = not words.isdisjoint(teaching), not words.isdisjoint(other)
        if teaches != does_not:
            out[i] = teaches
    return out


def density(texts: pa.Array) -> np.ndarray:
    """float64 [n]: marks of facts in sentences, per word of the whole text: a list of names and prices states nothing."""
    stated = pa.array(["\n".join(filter(_is_sentence, text.split("\n"))) for text in texts.to_pylist()], TEXT)
    counted = [np.asarray(pc.count_substring_regex(stated, pattern)) for pattern in (NUMBER, NAME, DEFINES)]
    number, name, defines = (c.astype(np.float64) for c in counted)
    words = np.asarray(pc.count_substring_regex(texts, r"\S+")).astype(np.float64)
    return (number + name + DEFINES_WEIGHT * defines) / np.maximum(words, 1)


def _is_sentence(line: str) -> bool:
    line = line.rstrip()
    return line[-1:] in SENTENCE_ENDS and (line.count(" ") >= 7 or len(line) >= 40)


def _dense(sample: pa.Table) -> np.ndarray:
    """int8 [n]: 1 for the upper third of each language and kind, 0 for the lower, -1 between; ties by doc_id."""
    dense = density(_texts(sample, np.arange(sample.num_rows)))
    cells: dict[tuple[str, str], list[int]] = {}
    for i, cell in enumerate(zip(*(sample.column(c).to_pylist() for c in ("language", "kind")), strict=True)):
        cells.setdefault(cell, []).append(i)
    ids = sample.column("doc_id").to_pylist()
    out = np.full(sample.num_rows, -1, dtype=np.int8)
    for rows in cells.values():
        ordered = sorted(rows, key=lambda i: (dense[i], ids[i]))
        third = len(ordered) // 3
        out[ordered[:third]] = 0
        out[ordered[len(ordered) - third :]] = 1
    return out


def _curated(kinds: pa.ChunkedArray, curated: Sequence[str]) -> np.ndarray:
    good = np.asarray(pc.is_in(kinds, value_set=pa.array(list(curated), kinds.type)))
    web = np.asarray(pc.equal(kinds, "web"))
    return np.where(good, 1, np.where(web, 0, -1)).astype(np.int8)


def _spoilt(sample: pa.Table, rater: str, sites: Sequence[str]) -> Task:
    """Half of the documents as they are, the other half made worse: no text stands on both sides. The first are grouped by
    site, the others by what was done to them, so a rater is tested on sites and on ways that it has not seen."""
    texts, labels, groups, at = [], [], [], []
    rows = zip(*(sample.column(c).to_pylist() for c in ("doc_id", "text", "language")), strict=True)
    for i, (doc_id, text, language) in enumerate(rows):
        if not text.strip() or (rater == "commercial" and language not in corrupt.lexicon()):
            continue
        good = seeded(GOOD_SEED, f"{rater} {doc_id}") < 0.5
        group = sites[i]
        if rater == "commercial" and lexicon_hits(text, language) >= LEXICON_HITS:
            good = False
        elif not good and rater == "integrity":
            text, group = corrupt.spoil(text, doc_id)
        elif not good:
            text, group = corrupt.advertise(text, doc_id, language)
        texts.append(text)
        labels.append(int(good))
        groups.append(group)
        at.append(i)
    return _task(sample, np.array(at, dtype=np.int64), pa.array(texts, TEXT), np.array(labels, dtype=np.int8), groups)


def lexicon_hits(text: str, language: str) -> int:
    """How many different phrases of advertising a text holds."""
    low = text.lower()
    return sum(phrase in low for phrases in corrupt.lexicon()[language].values() for phrase in phrases)


def read_labelled(path: str, stage: str) -> list[dict[str, str | int]]:
    """Rows of a labelled JSONL file, plain or gzip: `text`, `label` 0 or 1, and optionally `language`, `source`, `id`."""
    rows: list[dict[str, str | int]] = []
    try:
        data = Path(path).read_bytes()
        lines = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{stage}: labelled file cannot be read, got {e}; expected UTF-8 JSONL, or that in gzip"
        ) from e
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["text"], str) or row["label"] not in (0, 1):
                raise ValueError("text must be a string, label 0 or 1")
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(
                f"{stage}: line {number} of {path} is no labelled document, got {line[:60]!r}, expected "
                '{"text": ..., "label": 0 or 1}'
            ) from e
        rows.append(row)
    return rows
