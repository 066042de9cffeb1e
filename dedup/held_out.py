"""Held-out documents as targets: training text that repeats one of them must be found before it is measured against.

In:  documents for which the predicate `held_out` holds. Out: `HeldOut`, a sample of each document's distinct `RUN`-word windows.

A document contributes the windows whose hash lies below `sample` of the range, and at least its `LEAST` smallest hashes, all if
it has fewer. A text is a hit when it holds `coverage` of one document's sampled windows. The choice is by hash, so a copy has the
same sample and is always found; a text with a share p of the windows of a document with s sampled ones is found with
probability P(Binomial(s, p) >= coverage * s): at s = LEAST = 32 and coverage 0.5, p = 0.4 gives 0.16, 0.5 gives 0.57, 0.6 gives
0.91, 0.7 gives 0.99. Short quotations are not found, by intent: neighbours of one site quote each other. Windows that
`common_docs` held-out documents or more have in their samples are boilerplate: they count as not found. So a copy of a document
of which half is boilerplate is not found; `searchable` counts the others.

Documents of fewer than RUN words have no window and are not looked for; they are counted. A held-out document is no
subject: it never contaminates itself or another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from core.dataset import Dataset
from core.engines.columns import key_starts
from core.engines.contract import Engine, Unit, rows_in
from core.hashing import combined, table_digest
from core.schema import TEXT
from core.storage import Root
from dedup.lookup import Lookup
from dedup.scopes import read_rows, source_units
from dedup.targets import RUN
from dedup.words import Windows, Words, window_places, words_of

LEAST = 32  # sampled windows of a document, where it has them: see the module for what they can tell
BATCH_BYTES = 4 << 20

SAMPLE = pa.schema([("hash", pa.int64()), ("doc_id", TEXT), ("sampled", pa.int32())])  # Spark has no uint64
HASHES = pa.schema([("hash", pa.uint64()), ("target", pa.int32())])
DOCUMENTS = pa.schema([("doc_id", TEXT), ("sampled", pa.int32())])


@dataclass(frozen=True)
class HeldOut:
    """The sampled windows of all held-out documents."""

    hashes: pa.Table  # HASHES, sorted
    documents: pa.Table  # DOCUMENTS, sorted

    @property
    def fingerprint(self) -> str:
        return combined([table_digest(self.hashes), table_digest(self.documents)])

    def searchable(self, coverage: float) -> int:
        """Documents with so many windows left that a copy of them is found."""
        left = np.bincount(np.asarray(self.hashes.column("target")), minlength=self.documents.num_rows)
        return int((left >= coverage * np.asarray(self.documents.column("sampled"))).sum())


def nothing_held_out() -> HeldOut:
    return HeldOut(HASHES.empty_table(), DOCUMENTS.empty_table())


def sampled(hashes: np.ndarray, documents: np.ndarray, sample: float) -> np.ndarray:
    """bool [n] over (document, hash) pairs sorted by both, without repeats: below the cut, or among its document's smallest."""
    first = np.flatnonzero(np.append(True, documents[1:] != documents[:-1])[: len(documents)])
    counts = np.diff(first, append=len(documents))
    rank = np.arange(len(documents)) - np.repeat(first, counts)
    return (hashes < np.uint64(sample * 2.0**63) * np.uint64(2)) | (rank < LEAST)


def read_sample(predicate: str, sample: float, unit: Unit) -> Iterator[pa.RecordBatch]:
    """SAMPLE of a shard's held-out documents."""
    for _, batch in read_rows(unit.payload, ["doc_id", "text"], predicate, BATCH_BYTES):
        words = words_of(batch.column("text"))
        at = window_places(words, RUN)
        pairs = np.stack([words.owners(at).astype(np.uint64), Windows(words.hashes).of(at, RUN)], axis=1)
        pairs = np.unique(pairs, axis=0) if len(pairs) else pairs
        chosen = pairs[sampled(pairs[:, 1], pairs[:, 0], sample)]
        owner = chosen[:, 0].astype(np.int64)
        ids = batch.column("doc_id").take(pa.array(owner))
        counts = np.bincount(owner, minlength=batch.num_rows)[owner].astype(np.int32)
        hashes = np.ascontiguousarray(chosen[:, 1]).view(np.int64)
        yield pa.RecordBatch.from_arrays([pa.array(hashes), ids, pa.array(counts)], schema=SAMPLE)


def _rare(common_docs: int, chunk: pa.Table) -> pa.Table:
    """The windows of fewer than `common_docs` documents, from whole keys."""
    first = np.flatnonzero(key_starts(chunk, ["hash"]))
    counts = np.diff(first, append=chunk.num_rows)
    return chunk.filter(pa.array(np.repeat(counts < common_docs, counts)))


class Sampling(NamedTuple):
    """How held-out documents are sampled."""

    predicate: str
    sample: float
    common_docs: int


def sample_held_out(
    engine: Engine, datasets: Sequence[Dataset], sampling: Sampling, label: str, check: partial[None]
) -> HeldOut:
    """The windows of all held-out documents, on the driver. `check(rows)` raises above the ceiling before they are collected."""
    units = source_units(datasets, dict.fromkeys((d.name for d in datasets), 0))
    found = engine.scan(
        partial(read_sample, sampling.predicate, sampling.sample), units, SAMPLE, f"{label}: sample held-out text"
    )
    rare = engine.persist(
        engine.shuffle(
            found,
            ["hash"],
            partial(_rare, sampling.common_docs),
            SAMPLE,
            order=["doc_id"],
            label=f"{label}: common windows",
        )
    )
    check(rows_in(engine, rare, f"{label}: count windows"))
    return indexed(engine.collect(rare))


def indexed(sample: pa.Table) -> HeldOut:
    """HeldOut from rows of SAMPLE in any order."""
    ids = sample.column("doc_id").combine_chunks().dictionary_encode()
    names = np.sort(np.asarray(ids.dictionary.to_pylist(), dtype=object)) if len(ids) else np.empty(0, dtype=object)
    place = np.searchsorted(names, ids.dictionary.to_pylist()) if len(ids) else np.empty(0, dtype=np.int64)
    target = place[np.asarray(ids.indices)].astype(np.int32) if len(ids) else np.empty(0, dtype=np.int32)
    hashes = np.ascontiguousarray(sample.column("hash").to_numpy()).view(np.uint64)
    order = np.lexsort((target, hashes))
    counts = np.zeros(len(names), dtype=np.int32)
    counts[target] = sample.column("sampled").to_numpy()
    return HeldOut(
        pa.table([hashes[order], target[order]], schema=HASHES),
        pa.table([pa.array(names, TEXT), counts], schema=DOCUMENTS),
    )


class HeldOutWindows:
    """What a worker holds of the sample."""

    def __init__(self, held_out: HeldOut) -> None:
        self.lookup = Lookup(np.asarray(held_out.hashes.column("hash")))
        self._target = np.asarray(held_out.hashes.column("target"))
        self._sampled = np.asarray(held_out.documents.column("sampled"))
        self.doc_ids = held_out.documents.column("doc_id")

    def shares(
        self, words: Words, windows: Windows
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(text, held-out document, share of its sampled windows, first word, word behind the last) of every pair that
        shares one, sorted by both."""
        hashes = windows.all(RUN)
        at = self.lookup.places(hashes)
        at = at[at + RUN <= words.offsets[words.owners(at) + 1]]
        found, entry = self.lookup.entries(hashes[at])
        at, target = at[found], self._target[entry].astype(np.int64)
        text = words.owners(at)
        order = np.lexsort((at, hashes[at], target, text))
        at, target, text = at[order], target[order], text[order]
        if not len(at):
            none = np.empty(0, dtype=np.int64)
            return none, none, none.astype(float), none, none
        pair = np.append(True, (text[1:] != text[:-1]) | (target[1:] != target[:-1]))
        fresh = pair | np.append(True, hashes[at][1:] != hashes[at][:-1])
        first = np.flatnonzero(pair)
        share = np.add.reduceat(fresh.astype(np.int64), first) / self._sampled[target[first]]
        low, high = np.minimum.reduceat(at, first), np.maximum.reduceat(at, first) + RUN
        return text[first], target[first], share, low, high


def save_held_out(root: Root, folder: str, held_out: HeldOut) -> None:
    root.write_table(f"{folder}/held_out.parquet", [held_out.hashes], HASHES)
    root.write_table(f"{folder}/held_out_documents.parquet", [held_out.documents], DOCUMENTS)


def load_held_out(root: Root, folder: str) -> HeldOut:
    hashes, documents = (root.read_table(f"{folder}/{name}.parquet") for name in ("held_out", "held_out_documents"))
    return HeldOut(hashes.combine_chunks(), documents.combine_chunks())
