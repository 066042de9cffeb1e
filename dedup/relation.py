"""The relation of near-duplicates on disk: verified pairs in numbered files of bounded size.

Out: `relations/<instance>/edges/00000.parquet` and on, each with the columns of `RELATION`, sorted by a, b, in one row group.

A pair lies in the file that its two doc_ids choose, of ceil(pairs / FILE_EDGES) files: a property of the pairs, so that the bytes
are the same whether the driver or the workers write them. The manifest of the stage names the files, and a reader takes one of
them as a unit. The order of one file says nothing about the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.columns import sorted_table
from core.engines.contract import Align, Engine, Frame, Report
from core.hashing import table_digest
from core.rows import ROW_BITS
from core.schema import TEXT
from core.storage import Root
from dedup.candidates import tie_of

RELATION = pa.schema(
    [
        ("a", TEXT),  # doc_id, the smaller one
        ("b", TEXT),
        ("a_copies", pa.int64()),
        ("b_copies", pa.int64()),
        ("jaccard", pa.float32()),
        ("component", TEXT),
    ]
)
FILED = pa.schema([("row", pa.int64()), *RELATION])  # `row`: the number of the file, where `align` expects a shard's

FILE_EDGES = 1 << 19  # on average; 70 MB in the memory of whoever writes or reads one, some 25 MB on disk


def edges_folder(instance: str) -> str:
    """Where the relation lies in the root."""
    return f"relations/{instance}/edges/"


def files_for(edges: int) -> int:
    """How many files hold so many pairs."""
    return max(1, -(-edges // FILE_EDGES))


def file_of(a: pa.ChunkedArray, b: pa.ChunkedArray, files: int) -> np.ndarray:
    """int64 [n]: the file of each pair. doc_ids are hashes, so the xor of two of them is spread evenly."""
    mixed = (tie_of(a) ^ tie_of(b)).view(np.uint64) >> np.uint64(32)
    return ((mixed * np.uint64(files)) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class EdgeFiles:
    """Writes one file of the relation; one that this unit committed before is taken as it is."""

    root: Root
    instance: str
    unit: str

    def __call__(self, number: int, pairs: pa.Table) -> Report:
        name = f"{edges_folder(self.instance)}{number:05d}.parquet"
        note = self.root.note(name)
        if note is not None and note["unit"] == self.unit:
            return Report(name, docs=note["rows"], resumed=True, value=note)
        pairs = sorted_table(pairs.select(RELATION.names), ["a", "b"])
        note = {"unit": self.unit, "rows": pairs.num_rows, "content": table_digest(pairs)}
        self.root.write_table(name, [pairs], RELATION, note)
        return Report(name, docs=pairs.num_rows, value=note)


def outputs(reports: list[Report]) -> dict[str, dict[str, Any]]:
    """What the manifest says of the files."""
    return {r.unit: {"rows": r.value["rows"], "content": r.value["content"]} for r in reports}


def write_here(write: EdgeFiles, pairs: pa.Table) -> list[Report]:
    """All files of a table of RELATION, one after the other."""
    return [write(number, part) for number, part in enumerate(_parts(pairs))]


def _parts(pairs: pa.Table) -> Iterator[pa.Table]:
    files = files_for(pairs.num_rows)
    file = file_of(pairs.column("a"), pairs.column("b"), files)
    by_file = np.argsort(file, kind="stable")
    borders = np.searchsorted(file[by_file], np.arange(files + 1))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        yield pairs.take(pa.array(by_file[first:end]))


def write_there(engine: Engine, write: EdgeFiles, pairs: Frame, edges: int, label: str) -> list[Report]:
    """All files of a frame of RELATION with `edges` rows, by the workers."""
    files = files_for(edges)
    filed = engine.map(pairs, _Filed(files), FILED, f"{label}: choose files")
    return engine.align(filed, Align(write, files, 0, f"{label}: write pairs"))


@dataclass(frozen=True)
class _Filed:
    files: int

    def __call__(self, pairs: pa.Table) -> pa.Table:
        row = file_of(pairs.column("a"), pairs.column("b"), self.files) << ROW_BITS
        return pa.Table.from_arrays([pa.array(row), *(pairs.column(c) for c in RELATION.names)], schema=FILED)
