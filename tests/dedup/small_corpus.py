"""Small datasets on disk, and what a dedup stage leaves beside them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from core.dataset import Dataset, Shard
from core.hashing import digest, document_id
from core.job import Job, Outcome
from core.schema import DOCUMENTS
from core.stage import Stage, identity_fields
from core.storage import Root


def documents(name: str, texts: Sequence[str]) -> pa.Table:
    """DOCUMENTS with ids from the texts and their places."""
    ids = [document_id(name, f"{i}.txt", t) for i, t in enumerate(texts)]
    columns = {
        "doc_id": ids,
        "text": list(texts),
        "url": [None] * len(texts),
        "source": [name] * len(texts),
        "kind": ["web"] * len(texts),
        "license": [None] * len(texts),
        "fetched_at": [None] * len(texts),
        "origin": [{"path": f"{i}.txt", "offset": None, "length": None} for i in range(len(texts))],
        "metadata": ["{}"] * len(texts),
    }
    return pa.Table.from_pydict(columns, schema=DOCUMENTS)


def write_dataset(
    root: Root, name: str, ordinal: int, table: pa.Table, shards: int, rng: np.random.Generator
) -> Dataset:
    table = table.take(rng.permutation(table.num_rows))
    found = []
    for i, rows in enumerate(np.array_split(np.arange(table.num_rows), shards)):
        part = table.take(rows)
        shard = Shard(f"{i:04d}", part.num_rows, part.column("text").nbytes, f"{name}-{i}-{rng.integers(1 << 40)}")
        root.write_table(
            Dataset(root, name, ordinal, ()).documents_name(shard), part.to_batches(max_chunksize=100), DOCUMENTS
        )
        found.append(shard)
    return Dataset(root, name, ordinal, tuple(found))


def run(stage: Stage, engine: Any, datasets: tuple[Dataset, ...], **config: Any) -> Outcome:
    """The outcome of one stage; its layers and relations lie in the root of the datasets."""
    chosen = stage.config(**config)
    identity = digest(identity_fields(chosen))
    return stage.fn(Job(stage, stage.name, chosen, datasets[0].root, engine, datasets, identity))


def layer(datasets: tuple[Dataset, ...], name: str) -> dict[str, dict]:
    """doc_id -> the stage's columns of one layer."""
    found = {}
    for d in datasets:
        for shard in d.shards:
            ids = d.read_table(shard, ["doc_id"]).column("doc_id").to_pylist()
            found |= dict(zip(ids, d.read_layer(name, shard).to_pylist(), strict=True))
    return found


def relation(datasets: tuple[Dataset, ...]) -> pa.Table:
    """All files of the relation that `minhash` wrote."""
    root, folder = datasets[0].root, "relations/minhash/edges"
    return pa.concat_tables([root.read_table(f"{folder}/{name}") for name in root.names(folder)])


def edges(datasets: tuple[Dataset, ...]) -> dict[tuple[str, str], float]:
    """(a, b) -> jaccard of the relation `minhash` wrote."""
    table = relation(datasets)
    pairs = zip(table.column("a").to_pylist(), table.column("b").to_pylist(), strict=True)
    return dict(zip(pairs, table.column("jaccard").to_pylist(), strict=True))
