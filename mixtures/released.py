"""The text that leaves the house: documents as tokenizer, token shards and exports see them, with all spans applied.

`LastLook` holds that text against an index of `decontaminate` once more: what the policy let pass, or a replacement put
together, goes no further.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset, Shard
from core.errors import StageError
from core.job import Job
from core.manifest import read_manifest
from core.predicate import Predicate
from core.schema import TEXT
from core.storage import Root
from core.text import Span, apply_spans
from dedup.finder import Finder, open_finder


@dataclass(frozen=True)
class LastLook:
    """An index of `decontaminate`, opened once in each worker."""

    url: str  # of the root
    instance: str
    fingerprint: str

    @property
    def targets(self) -> str:
        """The column that says which documents are targets themselves; held-out text does not contaminate those."""
        return targets_column(self.instance)

    def hit(self, texts: Sequence[str], targets: pa.Array) -> np.ndarray:
        """bool [n]: which texts hold something of the index. `targets` holds the column of that name."""
        own = np.asarray(pc.fill_null(targets, False), dtype=bool)
        return _finder(self.url, self.instance, self.fingerprint).hit(pa.array(texts, TEXT), own)


def targets_column(instance: str) -> str:
    return f"{instance}.held_out"


def last_look(job: Job) -> LastLook | None:
    """The index that `decontaminate` of the config names, as its manifest has it; None where it names none."""
    instance = job.config.decontaminate
    if not instance:
        return None
    manifest = read_manifest(job.root, instance, None)
    if manifest is None:
        raise StageError(f"{job.instance}: no index of {instance!r} in {job.root.url}; run stage {instance} first")
    return LastLook(job.root.url, instance, str(manifest.outputs["index"]["content"]))


@lru_cache(maxsize=1)
def _finder(url: str, instance: str, fingerprint: str) -> Finder:
    """The index in this process; read again where another fingerprint is asked for."""
    finder = open_finder(Root(url), instance)
    if finder.fingerprint != fingerprint:
        raise StageError(
            f"{instance}: its index is not the one its manifest names, got {finder.fingerprint[:8]}, expected "
            f"{fingerprint[:8]}; run stage {instance} again"
        )
    return finder


def released(
    dataset: Dataset, shard: Shard, where: str | None, spans: Sequence[str], columns: Sequence[str], batch_bytes: int
) -> Iterator[tuple[np.ndarray, list[str], pa.RecordBatch]]:
    """(row numbers within the shard, texts after spans, `columns`) of the documents for which `where` holds, in row order.

    `spans` names layer columns, earliest stage first: where they overlap its replacement wins. Batches without such a document
    are left out."""
    predicate = Predicate(where) if where else None
    needed = dict.fromkeys([*columns, "text", *spans, *(predicate.columns if predicate else ())])
    start = 0
    for batch in dataset.read(shard, list(needed), batch_bytes):
        at = np.flatnonzero(predicate.holds(batch)) if predicate else np.arange(batch.num_rows)
        if len(at):
            chosen = batch if len(at) == batch.num_rows else batch.take(pa.array(at))
            yield start + at, applied(chosen, spans), chosen.select(list(columns))
        start += batch.num_rows


def applied(batch: pa.RecordBatch, spans: Sequence[str]) -> list[str]:
    """The texts of a batch with the spans of the named columns cut or replaced."""
    texts: list[str] = batch.column("text").to_pylist()
    marked = np.zeros(batch.num_rows, dtype=bool)
    for name in spans:
        lengths = batch.column(name).value_lengths().fill_null(0)
        marked |= np.asarray(lengths) > 0
    if marked.any():
        rows = np.flatnonzero(marked)
        stages = [batch.column(name).take(pa.array(rows)).to_pylist() for name in spans]
        for i, row in enumerate(rows):
            cuts = [[Span(s["start"], s["end"], s["replacement"]) for s in stage[i] or ()] for stage in stages]
            texts[row] = apply_spans(texts[row].encode(), cuts)
    return texts
