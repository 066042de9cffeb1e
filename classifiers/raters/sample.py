"""Draws the documents that raters learn from: by hash of doc_id, as much of each dataset, and of long texts four windows.

In: documents for which `where` holds, `language`. Out: a table of SAMPLE sorted by doc_id, the same on every engine. Memory on
the driver: `sample_bytes`, and some ten times that while the matrix of one rater is built.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.language import sample
from core.dataset import Dataset
from core.engines.contract import Unit
from core.hashing import seeded_column
from core.job import Job
from core.predicate import Predicate
from core.schema import TEXT

BATCH_BYTES = 16 << 20
SALT = pa.scalar("raters", TEXT)  # other stages draw the lowest hashes too: unsalted, all would see the same documents
SAMPLE = pa.schema([(name, TEXT) for name in ("doc_id", "dataset", "kind", "language", "url", "text")])
COLUMNS = ("doc_id", "kind", "url", "text", "language.language")


class Draw(NamedTuple):
    """One shard and how much of it is drawn."""

    dataset: Dataset
    shard: int
    fraction: float


def windows(column: pa.Array, most: int) -> pa.Array:
    """Texts above `most` bytes as four windows spread evenly from start to end, all others as they are. A rater reads as much
    when it learns as when it judges: its logit grows with the root of what it read."""
    column = pc.fill_null(column, "").cast(TEXT)
    if not (np.asarray(pc.binary_length(column)) > most).any():
        return column
    data = column.cast(pa.large_binary())
    return pa.array([sample(memoryview(value.as_buffer()), most) for value in data], TEXT)


def draw(job: Job) -> pa.Table:
    """The sample of all datasets of a job."""
    share = job.config.sample_bytes / max(1, len(job.datasets))
    units = [
        Unit(f"{d.name}/{s.name}", Draw(d, i, min(1.0, share / max(1, d.text_bytes))), s.text_bytes)
        for d in job.datasets
        for i, s in enumerate(d.shards)
    ]
    fn = partial(_drawn, job.config.where, job.config.max_bytes, job.config.seed)
    return job.engine.collect(job.engine.scan(fn, units, SAMPLE, f"{job.instance}: sample"))


def _drawn(where: str | None, max_bytes: int, seed: int, unit: Unit) -> Iterator[pa.RecordBatch]:
    """Rows of SAMPLE of one shard."""
    source: Draw = unit.payload
    predicate = Predicate(where) if where else None
    wanted = tuple(dict.fromkeys([*COLUMNS, *(predicate.columns if predicate else ())]))
    for batch in source.dataset.read(source.dataset.shards[source.shard], wanted, BATCH_BYTES):
        keys = pc.binary_join_element_wise(SALT, batch.column("doc_id"), pa.scalar(" ", TEXT))
        live = seeded_column(seed, keys) < source.fraction
        if predicate is not None:
            live &= predicate.holds({c: batch.column(c) for c in predicate.columns})
        live &= np.asarray(pc.is_valid(batch.column("language.language")))
        chosen = batch.filter(pa.array(live))
        if chosen.num_rows:
            columns = {
                "doc_id": chosen.column("doc_id"),
                "dataset": pa.repeat(pa.scalar(source.dataset.name, TEXT), chosen.num_rows),
                "kind": chosen.column("kind"),
                "language": chosen.column("language.language"),
                "url": chosen.column("url"),
                "text": windows(chosen.column("text"), max_bytes),
            }
            yield pa.RecordBatch.from_arrays([columns[c].cast(TEXT) for c in SAMPLE.names], schema=SAMPLE)
