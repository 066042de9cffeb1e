"""The index of what must not be found: passages of benchmark items, in ROOT/indexes/<instance>/, small enough for every worker.

In:  items (`dedup.benchmark_files`), texts of a clean reference. Out, three tables and their description:

- `passages.parquet`: one row for each question and solution, by benchmark, then order of the file: benchmark, split, item, part,
  `words` and `masked` (hashes in reading order), for each masked word `content` (neither number nor stop word) and `numbers`,
  `answer` (hashes of the answer's first words, which a short question needs beside it).
- `grams.parquet`: stream (0 plain, 1 masked, 2 short), hash (uint64), passage, position, sorted. Plain and masked hold windows of
  `NGRAM` words of passages of at least `RUN` words; short holds one window of `ANCHOR` words of each short question, its rarest.
- `index.json`: counts, the rules, and the fingerprint over all of it.

Left out of plain and masked, since they say nothing: windows of fewer than `LEAST_WORDS` words that are no numbers, windows found
in `common_items` items or more (boilerplate such as `which of the following statements is true of the`), and windows of a clean
reference. Runs of words may pass through them; they only begin none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from core.hashing import combined, table_digest
from core.schema import TEXT
from core.storage import Root
from dedup.benchmark_files import Item
from dedup.words import Windows, Words, masked, ragged, window_places, words_of

NGRAM = 8  # words of an indexed window: PaLM (arXiv 2204.02311, 8.) and Llama 3 count 8-grams
RUN = 13  # GPT-3 (arXiv 2005.14165, C) and FineMath: 13 equal words. Passages shorter than this are short
ANCHOR = 4  # words of a short question's window; questions with fewer words are not searched for
ANSWER_WORDS = 8  # of an answer are compared. Chosen, untested
LEAST_WORDS = 3  # a window of numbers alone is in every table. Chosen, untested
PLAIN, MASKED, SHORT = 0, 1, 2
GRAM_BYTES = 16

PASSAGES = pa.schema(
    [
        ("benchmark", TEXT), ("split", TEXT), ("item", TEXT), ("part", TEXT),
        ("words", pa.large_list(pa.uint64())), ("masked", pa.large_list(pa.uint64())),
        ("content", pa.large_list(pa.bool_())), ("numbers", pa.large_list(pa.bool_())), ("answer", pa.large_list(pa.uint64())),
    ]
)  # fmt: skip
GRAMS = pa.schema([("stream", pa.int8()), ("hash", pa.uint64()), ("passage", pa.int32()), ("position", pa.int32())])

# Function words of English: a run of them and of numbers is no evidence. The commonest 120 of any corpus, by hand.
STOP_WORDS = (
    "a about after all also am an and any are as at be because been before being but by can could did do does doing down each "
    "few for from further had has have having he her here hers him his how i if in into is it its just many me more most much "
    "my no nor not now of off on once one only or other our out over own same she should so some such t s than that the their "
    "them then there these they this those through to too under until up us use very was we were what when where which while "
    "who whom why will with would you your yours two each every per between both using used let may must shall"
)


class Counted(NamedTuple):
    """How many items there were and what became of them."""

    items: int
    empty_items: int
    unsearchable_items: int  # too short, without an answer, or of common windows only
    passages: int
    short_questions: int
    ngrams: int


@dataclass(frozen=True)
class Targets:
    """What `build` makes and `load` reads."""

    passages: pa.Table
    grams: pa.Table
    counted: Counted

    @cached_property
    def fingerprint(self) -> str:
        return combined([table_digest(self.passages), table_digest(self.grams)])


def build(items: Sequence[Item], clean: Sequence[str] = (), common_items: int = 10) -> Targets:
    """The index over all items. Neither the order of files nor of calls moves a byte: items are sorted by benchmark first."""
    items = sorted(items, key=lambda i: i.benchmark)
    parts = [
        (n, part) for n, item in enumerate(items) for part in ("question", "solution") if getattr(item, part).strip()
    ]
    texts = [getattr(items[n], part) for n, part in parts]
    words = words_of(pa.array(texts, TEXT))
    hidden = masked(words)
    answers = _answers([items[n].answer if part == "question" else "" for n, part in parts])
    owners = np.array([n for n, _ in parts], dtype=np.int64)
    streams = []
    for kind, stream in ((PLAIN, words), (MASKED, hidden)):
        reference = masked(words_of(pa.array(clean, TEXT))) if kind == MASKED else words_of(pa.array(clean, TEXT))
        streams.append(_grams(kind, stream, np.diff(words.offsets) >= RUN, owners, reference, common_items))
    short = np.array([part == "question" for _, part in parts], dtype=bool) & (np.diff(words.offsets) < RUN)
    short &= pc.list_value_length(answers).to_numpy() > 0
    anchors = _anchors(words, np.flatnonzero(short))
    grams = pa.concat_tables([*streams, anchors]).combine_chunks()
    content = ~hidden.numbers & ~np.isin(hidden.hashes, words_of(pa.array([STOP_WORDS], TEXT)).hashes)
    named = [[getattr(items[n], column) for n, _ in parts] for column in ("benchmark", "split", "item")]
    columns = [
        *(pa.array(c, TEXT) for c in named),
        pa.array([part for _, part in parts], TEXT),
        _lists(words.hashes, words.offsets),
        *(_lists(values, hidden.offsets) for values in (hidden.hashes, content, hidden.numbers)),
        answers,
    ]
    searched = np.unique(owners[np.unique(grams.column("passage").to_numpy())]) if grams.num_rows else owners[:0]
    filled = len(np.unique(owners))
    counted = Counted(
        len(items), len(items) - filled, filled - len(searched), len(parts), anchors.num_rows, grams.num_rows
    )
    return Targets(pa.Table.from_arrays(columns, schema=PASSAGES), grams, counted)


def _answers(texts: Sequence[str]) -> pa.Array:
    """The hashes of the first words of each answer."""
    words = words_of(pa.array(texts, TEXT))
    counts = np.minimum(np.diff(words.offsets), ANSWER_WORDS)
    kept = words.hashes[ragged(words.offsets[:-1], counts)]
    return _lists(kept, np.concatenate([[0], np.cumsum(counts)]))


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), pa.array(values))


def _grams(kind: int, words: Words, long: np.ndarray, items: np.ndarray, clean: Words, common_items: int) -> pa.Table:
    """The windows of the long passages that say something, the first place of each in its passage."""
    at = window_places(words, NGRAM)
    passage = words.owners(at)
    at, passage = at[long[passage]], passage[long[passage]]
    spoken = np.concatenate([[0], np.cumsum(~words.numbers)])
    telling = spoken[at + NGRAM] - spoken[at] >= LEAST_WORDS
    at, passage = at[telling], passage[telling]
    hashes = Windows(words.hashes).of(at, NGRAM)
    known = ~np.isin(hashes, Windows(clean.hashes).of(window_places(clean, NGRAM), NGRAM))
    at, passage, hashes = at[known], passage[known], hashes[known]
    order = np.lexsort((at, passage, hashes))
    at, passage, hashes = at[order], passage[order], hashes[order]
    fresh = np.ones(len(hashes), dtype=bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (passage[1:] != passage[:-1])
    at, passage, hashes = at[fresh], passage[fresh], hashes[fresh]
    rare = _items_of(hashes, items[passage]) < common_items
    return _gram_table(kind, hashes[rare], passage[rare], (at - words.offsets[passage])[rare])


def _items_of(hashes: np.ndarray, items: np.ndarray) -> np.ndarray:
    """In how many distinct items each hash of a sorted column stands; a question and its solution are one item."""
    fresh = np.ones(len(hashes), dtype=bool)  # passages are in the order of items, so equal items are neighbours
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1])
    group = np.cumsum(np.append(True, hashes[1:] != hashes[:-1]))[: len(hashes)] - 1
    return np.bincount(group, weights=fresh, minlength=1)[group] if len(hashes) else np.zeros(0)


def _anchors(words: Words, short: np.ndarray) -> pa.Table:
    """For each short question the one window of ANCHOR words that the fewest short questions have; the first of equals."""
    at = window_places(words, ANCHOR)
    passage = words.owners(at)
    mine = np.isin(passage, short)
    at, passage = at[mine], passage[mine]
    hashes = Windows(words.hashes).of(at, ANCHOR)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.lexsort((at, counts[inverse], passage)) if len(at) else at
    at, passage, hashes = at[order], passage[order], hashes[order]
    first = np.ones(len(passage), dtype=bool)
    first[1:] = passage[1:] != passage[:-1]
    at, passage, hashes = at[first], passage[first], hashes[first]
    order = np.lexsort((passage, hashes))
    return _gram_table(SHORT, hashes[order], passage[order], (at - words.offsets[passage])[order])


def _gram_table(kind: int, hashes: np.ndarray, passage: np.ndarray, position: np.ndarray) -> pa.Table:
    kinds = np.full(len(hashes), kind, dtype=np.int8)
    return pa.table([kinds, hashes, passage.astype(np.int32), position.astype(np.int32)], schema=GRAMS)


def check_ceiling(stage: str, ngrams: int, most: int) -> None:
    """ConfigError above `most`, before anything is handed to workers."""
    if ngrams > most:
        raise ConfigError(
            f"{stage}: the index would hold {ngrams:,} n-grams ({ngrams * GRAM_BYTES / 1e6:,.0f} MB in every worker), expected "
            f"at most {most:,}; name fewer benchmarks, lower held_out_sample, or raise max_ngrams"
        )


def save(root: Root, folder: str, targets: Targets, about: dict[str, Any]) -> None:
    """Write the index; `index.json`, which readers open first, last."""
    root.write_table(f"{folder}/passages.parquet", [targets.passages], PASSAGES)
    root.write_table(f"{folder}/grams.parquet", [targets.grams], GRAMS)
    root.write_json(f"{folder}/index.json", {"counted": targets.counted._asdict(), **about})


def load(root: Root, folder: str) -> Targets:
    passages, grams = (root.read_table(f"{folder}/{name}.parquet") for name in ("passages", "grams"))
    return Targets(
        passages.combine_chunks(), grams.combine_chunks(), Counted(**root.read_json(f"{folder}/index.json")["counted"])
    )
