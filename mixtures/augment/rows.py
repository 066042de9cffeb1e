"""What the scans of `passages` share: the rows of a shard for which `where` holds, and the best rows of a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset
from core.engines.contract import Unit
from core.predicate import Predicate
from core.rows import pack

BATCH_BYTES = 4 << 20  # of text: code points and words of a batch take 25 bytes each


@dataclass(frozen=True)
class ShardOf:
    """What one unit of a scan reads."""

    dataset: Dataset
    shard: int


def shard_units(datasets: Sequence[Dataset]) -> list[Unit]:
    """One unit for each shard."""
    return [Unit(f"{d.name}/{s.name}", ShardOf(d, i), s.text_bytes) for d in datasets for i, s in enumerate(d.shards)]


@dataclass(frozen=True)
class WhereRows:
    """Reads (`row` int64 [n], batch of columns) of a shard, without the rows for which `where` does not hold."""

    where: str | None

    def __call__(self, unit: Unit, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        source: ShardOf = unit.payload
        predicate = Predicate(self.where) if self.where else None
        wanted = list(dict.fromkeys([*columns, *(predicate.columns if predicate else ())]))
        start = 0
        for batch in source.dataset.read(source.dataset.shards[source.shard], wanted, BATCH_BYTES):
            rows = pack(source.dataset.ordinal, source.shard, np.arange(start, start + batch.num_rows))
            start += batch.num_rows
            if predicate is not None:
                live = predicate.holds(batch)
                rows, batch = rows[live], batch.filter(pa.array(live))
            if batch.num_rows:
                yield rows, batch.select(list(columns))


Order = tuple[str | Any, Literal["ascending", "descending"]]


def best_rows(table: pa.Table, order: Sequence[Order], most: int) -> pa.Table:
    """The first `most` rows of a table by columns or arrays; together they must be a total order."""
    keys = {f"k{i}": table.column(by) if isinstance(by, str) else by for i, (by, _) in enumerate(order)}
    index = pc.sort_indices(pa.table(keys), sort_keys=[(f"k{i}", way) for i, (_, way) in enumerate(order)])
    return table.take(index.slice(0, most)).combine_chunks()
