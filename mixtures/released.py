"""The text that leaves the house: documents as tokenizer, token shards and exports see them, with all spans applied."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from core.dataset import Dataset, Shard
from core.predicate import Predicate
from core.text import Span, apply_spans


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
