"""Which texts hold benchmark items or held-out documents, by which method, and where.

In:  an index, rules, texts. Out: for each text the layer of `decontaminate` (its docstring says what the columns mean).

Methods, from the strongest evidence to the weakest; the thresholds were measured on GSM8K and MMLU (docs/decisions.md):

- `plain`: an equal run of RUN words, or `coverage` of a passage's NGRAM-word windows in equal runs;
- `masked`: the same with numbers hidden, for copies with other numbers: `masked_coverage` of a passage in this text, and a run
  of RUN words in which `masked_words` different words are neither numbers nor stop words and at most `masked_fraction` numbers;
- `short`: a question of fewer than RUN words, whole, with its answer within `answer_distance` words;
- `held_out`: `held_out_coverage` of a held-out document's sampled windows (`dedup.held_out`).
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.hashing import digest
from core.schema import SPANS, TEXT
from core.storage import Root
from dedup.held_out import HeldOut, HeldOutWindows, load_held_out
from dedup.overlap import Passages, Runs, ShortQuestions
from dedup.targets import MASKED, NGRAM, PLAIN, RUN, Targets, load
from dedup.words import Windows, Words, masked, original_bytes, words_of

METHODS = ("plain", "masked", "short", "held_out")
HELD_OUT = "held_out"  # stands in the column `benchmark` for held-out text
PIECE_BYTES = 2 << 20  # of text: some 400,000 words, whose columns take 30 MB
# items listed of one document; a whole benchmark on one page is listed up to here, and counted in full
MOST_FOUND = 1000

FOUND = pa.struct(
    [
        ("benchmark", TEXT), ("split", TEXT), ("item", TEXT), ("part", TEXT), ("method", TEXT),
        ("longest_run", pa.int32()), ("coverage", pa.float32()),
    ]
)  # fmt: skip
LAYER = pa.schema(
    [
        ("hit", pa.bool_()), ("held_out", pa.bool_()), ("benchmark", TEXT), ("split", TEXT), ("item", TEXT), ("method", TEXT),
        ("longest_run", pa.int32()), ("coverage", pa.float32()), ("items", pa.int32()), ("spans", SPANS),
        ("found", pa.large_list(FOUND)),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The thresholds."""

    coverage: float = 0.5
    masked_coverage: float = 0.7
    masked_words: int = 8
    masked_fraction: float = 0.4
    answer_distance: int = 50
    held_out_coverage: float = 0.5


class Hit(NamedTuple):
    """One text and one item. `spans`: word ranges (first, behind the last)."""

    text: int
    method: int
    name: tuple[str, str, str, str]  # benchmark, split, item, part
    longest: int
    coverage: float
    spans: list[tuple[int, int]]


class Finder:
    """Built once for each worker."""

    def __init__(self, targets: Targets, held_out: HeldOut, rules: Rules, fingerprint: str = "") -> None:
        self.rules, self.fingerprint = rules, fingerprint
        self._names = [
            tuple(row.values()) for row in targets.passages.select(["benchmark", "split", "item", "part"]).to_pylist()
        ]
        self._plain, self._masked = Passages(targets, PLAIN), Passages(targets, MASKED)
        self._short = ShortQuestions(targets)
        self._held_out = HeldOutWindows(held_out)
        content, numbers = (targets.passages.column(c).combine_chunks() for c in ("content", "numbers"))
        self._content, self._numbers = (
            np.asarray(c.values)[c.offsets[0].as_py() : c.offsets[-1].as_py()] for c in (content, numbers)
        )

    def layer(self, texts: pa.Array, targets: np.ndarray) -> pa.RecordBatch:
        """LAYER for each text. `targets` bool [n]: held-out documents, which held-out text does not contaminate."""
        rows: list[dict[str, Any]] = [
            {"hit": False, "held_out": bool(t), "items": 0, "spans": [], "found": []} for t in targets
        ]
        for low, high in _pieces(texts):
            words = words_of(texts.slice(low, high - low))
            by_text: dict[int, list[Hit]] = {}
            for hit in self._hits(words, targets[low:high]):
                by_text.setdefault(hit.text, []).append(hit)
            for i, hits in by_text.items():
                rows[low + i] |= _row(hits, texts[low + i].as_py(), words, words.edges[i])
        return pa.RecordBatch.from_pylist(rows, schema=LAYER)

    def hit(self, texts: pa.Array, targets: np.ndarray) -> np.ndarray:
        """bool [n]: the column `hit` alone."""
        out = np.zeros(len(texts), dtype=bool)
        for low, high in _pieces(texts):
            for found in self._hits(words_of(texts.slice(low, high - low)), targets[low:high]):
                out[low + found.text] = True
        return out

    def _hits(self, words: Words, targets: np.ndarray) -> list[Hit]:
        """All pairs of text and item, each once, by its strongest method; sorted by text."""
        windows = Windows(words.hashes)
        plain = self._by_plain(self._plain.runs(words, windows))
        hidden = masked(words)
        inner = self._by_masked(self._masked.runs(hidden, Windows(hidden.hashes)))
        short = _grouped(self._short.runs(words, windows, self.rules.answer_distance))
        found: dict[tuple[int, tuple[str, str, str, str]], Hit] = {}
        for method, groups in enumerate((plain, inner, short)):
            # A word of the masked text reaches over several of the plain one: from the bytes back to its words.
            back = (words.starts, hidden.starts, words.ends, hidden.ends) if method == 1 else None
            for group in groups:
                hit = Hit(
                    group.text,
                    method,
                    self._names[group.passage],
                    group.longest,
                    group.coverage,
                    _words_back(group.spans, back),
                )
                found.setdefault((hit.text, hit.name), hit)
        hits = [*found.values(), *self._by_held_out(words, windows, targets)]
        return sorted(hits, key=lambda h: (h.text, h.method, -h.longest, -h.coverage, h.name))

    def _by_plain(self, runs: Runs) -> "list[_Group]":
        groups = _grouped(runs, self._plain.lengths)
        return [g for g in groups if g.longest >= RUN or g.coverage >= self.rules.coverage]

    def _by_masked(self, runs: Runs) -> "list[_Group]":
        rules = self.rules
        begin = self._masked.offsets[runs.passage] + runs.position
        numbers = np.concatenate([[0], np.cumsum(self._numbers)])
        telling = (runs.length >= RUN) & (
            numbers[begin + runs.length] - numbers[begin] <= rules.masked_fraction * runs.length
        )
        for i in np.flatnonzero(telling).tolist():  # long runs only: few of a corpus
            at = slice(int(begin[i]), int(begin[i] + runs.length[i]))
            telling[i] = len(np.unique(self._masked.hashes[at][self._content[at]])) >= rules.masked_words
        groups = _grouped(runs, self._masked.lengths, telling)
        return [g for g in groups if g.telling and g.coverage >= rules.masked_coverage]

    def _by_held_out(self, words: Words, windows: Windows, targets: np.ndarray) -> list[Hit]:
        text, target, share, low, high = self._held_out.shares(words, windows)
        chosen = np.flatnonzero((share >= self.rules.held_out_coverage) & ~targets[text])
        return [
            Hit(
                int(text[i]),
                3,
                (HELD_OUT, HELD_OUT, self._held_out.doc_ids[int(target[i])].as_py(), "document"),
                int(high[i] - low[i]),
                float(share[i]),
                [(int(low[i]), int(high[i]))],
            )
            for i in chosen.tolist()
        ]


class _Group(NamedTuple):
    """The runs of one text and passage."""

    text: int
    passage: int
    longest: int
    coverage: float
    telling: bool
    spans: list[tuple[int, int]]


def _grouped(runs: Runs, lengths: np.ndarray | None = None, telling: np.ndarray | None = None) -> list[_Group]:
    """Runs by text and passage. Coverage is the share of the passage's windows that lie in a run; 1 without `lengths`."""
    if not len(runs.text):
        return []
    order = np.lexsort((runs.place, runs.position, runs.passage, runs.text))
    runs = runs.where(order)
    first = np.append(True, (runs.text[1:] != runs.text[:-1]) | (runs.passage[1:] != runs.passage[:-1]))
    begins = np.flatnonzero(first)
    number = np.cumsum(first) - 1
    longest = np.maximum.reduceat(runs.length, begins)
    said = np.zeros(len(begins), dtype=bool)
    if telling is not None:
        said = np.logical_or.reduceat(telling[order], begins)
    share = np.ones(len(begins))
    if lengths is not None:
        # Windows covered: each run adds what lies behind the furthest end before it in its group (runs are sorted by position).
        wide = np.int64(1) << 40
        end = runs.position + runs.length - NGRAM + 1 + number * wide
        reach = np.maximum.accumulate(end)
        reach = np.maximum(np.append(np.int64(-1), reach[:-1]), number * wide)
        fresh = np.maximum(end - np.maximum(reach, runs.position + number * wide), 0)
        share = np.add.reduceat(fresh, begins) / (lengths[runs.passage[begins]] - NGRAM + 1)
    ends = np.append(begins[1:], len(runs.text))
    return [
        _Group(
            int(runs.text[b]),
            int(runs.passage[b]),
            int(longest[g]),
            float(share[g]),
            bool(said[g]),
            list(zip(runs.place[b:e].tolist(), (runs.place[b:e] + runs.length[b:e]).tolist(), strict=True)),
        )
        for g, (b, e) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True))
    ]


def _words_back(spans: list[tuple[int, int]], back: tuple[np.ndarray, ...] | None) -> list[tuple[int, int]]:
    """Ranges of masked words as ranges of words."""
    if back is None:
        return spans
    starts, hidden_starts, ends, hidden_ends = back
    return [
        (int(np.searchsorted(starts, hidden_starts[a])), int(np.searchsorted(ends, hidden_ends[b - 1])) + 1)
        for a, b in spans
    ]


def _pieces(texts: pa.Array) -> list[tuple[int, int]]:
    """Ranges of rows of about PIECE_BYTES of text."""
    sizes = np.cumsum(pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)) // PIECE_BYTES
    edges = [0, *(np.flatnonzero(sizes[1:] != sizes[:-1]) + 1).tolist(), len(texts)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _row(hits: list[Hit], text: str, words: Words, edge: int) -> dict[str, Any]:
    """The layer's columns of one text from its hits, the strongest first."""
    best = hits[0]
    fields = [f.name for f in FOUND]
    items = {hit.name[:3] for hit in hits}
    listed = [(*h.name, METHODS[h.method], h.longest, h.coverage) for h in hits[:MOST_FOUND]]
    ranges = sorted((a, -b, i) for i, hit in enumerate(hits) for a, b in hit.spans)
    united: list[tuple[int, int, int]] = []
    for a, negative, i in ranges:
        if united and a <= united[-1][1]:
            united[-1] = united[-1][0], max(united[-1][1], -negative), united[-1][2]
        else:
            united.append((a, -negative, i))
    starts = words.starts[np.array([a for a, _, _ in united])] - edge
    ends = words.ends[np.array([b - 1 for _, b, _ in united])] - edge
    starts, ends = original_bytes(text, starts, ends)
    labels = ["/".join(hits[i].name[::2]) for _, _, i in united]
    return {
        "hit": True,
        "benchmark": best.name[0],
        "split": best.name[1],
        "item": best.name[2],
        "method": METHODS[best.method],
        "longest_run": best.longest,
        "coverage": best.coverage,
        "items": len(items),
        "spans": [
            {"start": a, "end": b, "replacement": None, "label": label}
            for a, b, label in zip(starts.tolist(), ends.tolist(), labels, strict=True)
        ],
        "found": [dict(zip(fields, row, strict=True)) for row in listed],
    }


def index_folder(instance: str) -> str:
    """Where an index lies in the root."""
    return f"indexes/{instance}"


def index_fingerprint(targets: Targets, held_out: HeldOut, rules: dict[str, Any]) -> str:
    return digest([targets.fingerprint, held_out.fingerprint, rules])


def open_finder(root: Root, instance: str) -> Finder:
    """The finder of a committed index. StageError from the root where there is none."""
    folder = index_folder(instance)
    about = root.read_json(f"{folder}/index.json")
    return Finder(load(root, folder), load_held_out(root, folder), Rules(**about["rules"]), about["fingerprint"])
