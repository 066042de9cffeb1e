"""Exact duplicates: documents of one scope whose normalised text (`core.text.normalise`) is equal form a clique.

In:  text. Out: the layer `exact`, for rows whose text occurs more than once:

- `clique`  large_string  the smallest doc_id with this text, on every member, itself included; null: the text is unique
- `copies`  int64         members of the clique, at least 2; null: the text is unique

Nothing is dropped here: `select` elects who stays. Equality is that of xxh3_128 over the normalised text with the scope as seed:
at 10^11 documents the chance of one false pair anywhere is 10^-17.

Cost: one pass over the text and one shuffle of 64 bytes a document; no limit on the size of a clique.
"""

import operator
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from core.engines.columns import key_starts
from core.engines.contract import Unit
from core.job import Job, Outcome
from core.schema import TEXT
from core.stage import Kind, Stage, StageConfig
from dedup.scopes import Scopes, align_all, read_rows, scope_numbers, source_units

BATCH_BYTES = 16 << 20

LAYER = pa.schema([("clique", TEXT), ("copies", pa.int64())])
KEYS = pa.schema([("high", pa.int64()), ("low", pa.int64()), ("doc_id", TEXT), ("row", pa.int64())])
FOUND = pa.schema([("row", pa.int64()), *LAYER])


class ExactConfig(StageConfig):
    """Knobs of `exact`."""

    scopes: Scopes = Field(
        default=(),
        description="lists of datasets that are deduplicated against each other; none: all datasets together",
    )


def read_keys(where: str | None, unit: Unit) -> Iterator[pa.RecordBatch]:
    """The text key, doc_id and row of every document of a shard."""
    for rows, batch in read_rows(unit.payload, ["doc_id", "text"], where, BATCH_BYTES):
        keys = text_keys(batch.column("text"), unit.payload.scope)
        columns = [pa.array(keys[:, 0]), pa.array(keys[:, 1]), batch.column("doc_id"), pa.array(rows)]
        yield pa.RecordBatch.from_arrays(columns, schema=KEYS)


def text_keys(texts: pa.Array, scope: int = 0) -> np.ndarray:
    """xxh3_128 of the normalised texts, int64 [n, 2]."""
    from core.text import normalise

    digest = xxhash.xxh3_128_digest
    digests = b"".join(digest(t, seed=scope) for t in normalise(texts).cast(pa.large_binary()).to_pylist())
    return np.frombuffer(digests, dtype=np.int64).reshape(-1, 2)


def cliques(chunk: pa.Table) -> pa.Table:
    """Members of cliques from whole keys sorted by doc_id; unique texts are left out."""
    first = np.flatnonzero(key_starts(chunk, ["high", "low"]))
    copies = np.diff(first, append=chunk.num_rows)
    members = np.repeat(copies > 1, copies)
    smallest = np.repeat(first, copies)[members]
    columns = [
        chunk.column("row").filter(pa.array(members)),
        chunk.column("doc_id").take(pa.array(smallest)),
        pa.array(np.repeat(copies, copies)[members]),
    ]
    return pa.Table.from_arrays(columns, schema=FOUND)


def _sizes(found: pa.Table) -> Counter[int]:
    """How many members belong to cliques of each size."""
    copies, members = np.unique(found.column("copies").to_numpy(), return_counts=True)
    return Counter(dict(zip(copies.tolist(), members.tolist(), strict=True)))


def exact(job: Job) -> Outcome:
    """Write the layer of every dataset; observed: documents in cliques, cliques, the largest."""
    config: ExactConfig = job.config
    scopes = scope_numbers(job.instance, config.scopes, [d.name for d in job.datasets])
    engine = job.engine
    keys = engine.scan(
        partial(read_keys, config.where), source_units(job.datasets, scopes), KEYS, f"{job.instance}: hash"
    )
    found = engine.shuffle(
        keys, ["high", "low"], cliques, FOUND, order=["doc_id", "row"], label=f"{job.instance}: group equal texts"
    )
    found = engine.persist(found)
    sizes: Counter[int] = engine.fold(found, _sizes, operator.add) or Counter()
    docs, groups, most = sizes.total(), sum(n // size for size, n in sizes.items()), max(sizes, default=0)
    layers = align_all(job, found, LAYER)
    observed = {
        "docs": sum(d.rows for d in job.datasets),
        "copied_docs": docs,
        "cliques": groups,
        "largest_clique_docs": most,
    }
    return Outcome(layers=layers, observed=observed | {"redundant_docs": docs - groups})


STAGE = Stage(
    name="exact",
    kind=Kind.RELATE,
    config=ExactConfig,
    fn=exact,
    reads=("doc_id", "text"),
    layer=LAYER,
    libraries=("pyarrow", "xxhash"),
)
