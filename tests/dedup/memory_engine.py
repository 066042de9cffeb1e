"""The engine contract in memory, as naively as it can be written: rows in random order, keys handed out a few at a time.

It doubles as an oracle: whatever order, partitioning or chunking an engine chooses, the answer must be the one found here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.columns import join_tables, sortable, sorted_table
from core.engines.contract import Align, Report, Unit, write_shards


@dataclass
class Memory:
    table: pa.Table

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema


class OracleEngine:
    """`seed` decides every order the contract leaves open; `keys` is how many keys a chunk holds."""

    name = "oracle"

    def __init__(self, seed: int = 0, keys: int = 1_000_000) -> None:
        self.rng, self.keys, self.cut, self.moved = np.random.default_rng(seed), keys, {}, {}

    def mixed(self, tables: Iterable[pa.Table], schema: pa.Schema) -> Memory:
        table = pa.concat_tables([schema.empty_table(), *(t.select(schema.names).cast(schema) for t in tables)])
        return Memory(table.take(self.rng.permutation(table.num_rows)).combine_chunks())

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> Memory:
        return self.mixed([pa.Table.from_batches([b]) for u in units for b in fn(u)], schema)

    def table(self, table: pa.Table) -> Memory:
        return Memory(table)

    def map(self, frame: Memory, fn: Any, schema: pa.Schema, label: str = "map") -> Memory:
        edges = np.sort(self.rng.integers(0, frame.table.num_rows + 1, 3)).tolist()
        spans = zip([0, *edges], [*edges, frame.table.num_rows], strict=True)
        return self.mixed([fn(frame.table.slice(a, b - a)) for a, b in spans], schema)

    def shuffle(
        self,
        frames: Any,
        by: Any,
        fn: Any,
        schema: Any,
        order: Any = (),
        combine: Any = None,
        max_rows_per_key: Any = None,
        label="shuffle",
    ) -> Memory:
        tables = [f.table for f in (frames if isinstance(frames, list) else [frames])]
        table = sorted_table(pa.concat_tables(tables), [*by, *order])
        self.moved[label] = table.nbytes
        table = sorted_table(combine(table), [*by, *order]) if combine is not None else table
        return self.mixed([fn(c) for c in self.chunks(table, by, max_rows_per_key, label)], schema)

    def chunks(self, table: pa.Table, by: Sequence[str], most: int | None, label: str) -> Iterator[pa.Table]:
        values = list(zip(*(table.column(c).to_pylist() for c in by), strict=True))
        starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
        groups = [table.slice(a, b - a) for a, b in zip(starts, [*starts[1:], len(values)], strict=False)]
        self.cut[label] = sum(max(0, g.num_rows - most) for g in groups) if most else 0
        groups = [g.slice(0, most) for g in groups] if most else groups
        for i in range(0, len(groups), self.keys):
            yield pa.concat_tables(groups[i : i + self.keys]).combine_chunks()

    def join(self, left: Memory, right: Memory, on: Sequence[str], how: str = "inner", label: str = "join") -> Memory:
        self.moved[label] = left.table.nbytes + right.table.nbytes
        joined = join_tables(left.table, right.table, on, how)
        return self.mixed([joined], joined.schema)

    def align(self, frame: Memory, target: Align) -> list[Report]:
        table = sorted_table(frame.table, ["row"])
        assert set((table.column("row").to_numpy() >> 48).tolist()) <= {target.dataset}
        return write_shards(target, table, range(target.shards), lambda **_: None)

    def fold(self, frame: Memory, fn: Any, merge: Any, label: str = "fold") -> Any:
        n = frame.table.num_rows
        return merge(fn(frame.table.slice(0, n // 2)), fn(frame.table.slice(n // 2))) if n else None

    def persist(self, frame: Memory) -> Memory:
        return frame

    def release(self, frame: Memory) -> None:
        frame.table = None  # whoever reads it after this fails

    def collect(self, frame: Memory) -> pa.Table:
        return sorted_table(frame.table, sortable(frame.schema))

    def dropped_rows(self) -> dict[str, int]:
        return self.cut
