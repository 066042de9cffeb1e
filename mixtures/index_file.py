"""`mixtures/<phase>/index.parquet`: which documents a phase reads, in training order.

Columns of `INDEX`; names are dictionary-encoded, so any Parquet reader shows them as strings. The file's metadata names the
tokenizer, the domains in order, and the content of every token shard it points into, so that a reader notices shards that were
written anew. No pydantic here: the model's machines read mixtures through `mixtures.reader`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StageError
from core.hashing import digest, table_digest
from core.schema import TEXT
from core.storage import Root

NAMES = pa.dictionary(pa.int32(), TEXT)
ROWS_PER_GROUP = 1 << 20
INDEX = pa.schema(
    [
        pa.field("dataset", NAMES, nullable=False),
        pa.field("shard", NAMES, nullable=False),
        pa.field("document", pa.int32(), nullable=False),  # ordinal in the shard's .idx
        pa.field("epoch", pa.int32(), nullable=False),  # from 0
        pa.field("tokens", pa.int32(), nullable=False),  # EOS included
        pa.field("bytes", pa.int64(), nullable=False),  # UTF-8 bytes of the text
        pa.field("domain", NAMES, nullable=False),  # the component's name; in held_out the dataset's
    ]
)


def index_name(phase: str) -> str:
    return f"mixtures/{phase}/index.parquet"


@dataclass(frozen=True)
class Entries:
    """An index in memory. `shard` and `domain` are ordinals in `shards` (dataset, shard) and `domains`."""

    shards: list[tuple[str, str]]
    domains: list[str]
    shard: np.ndarray  # int32 [n]
    domain: np.ndarray  # int32 [n]
    document: np.ndarray  # int32 [n]
    epoch: np.ndarray  # int32 [n]
    tokens: np.ndarray  # int32 [n]
    bytes: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.document)

    def only_used(self) -> "Entries":
        """The same entries with those shards only that they point into: what the content hash covers."""
        used, shard = np.unique(self.shard, return_inverse=True)
        shards = [self.shards[i] for i in used]
        return Entries(
            shards,
            self.domains,
            shard.astype(np.int32),
            self.domain,
            self.document,
            self.epoch,
            self.tokens,
            self.bytes,
        )


def write_index(
    root: Root, phase: str, entries: Entries, about: dict[str, Any], shard_contents: dict[str, str]
) -> dict[str, Any]:
    """Write the index of a phase and return its manifest output. `about` describes the tokenizer; `shard_contents` maps
    `dataset/shard` to the content hash of its tokens."""
    entries = entries.only_used()
    named = {f"{d}/{s}": shard_contents[f"{d}/{s}"] for d, s in entries.shards}
    plain = pa.table({c: getattr(entries, c) for c in ("shard", "domain", "document", "epoch", "tokens", "bytes")})
    content = digest([table_digest(plain), list(named.items()), entries.domains, about])
    out = {"content": content, "rows": len(entries), "tokens": int(entries.tokens.sum(dtype=np.int64))}
    columns = [
        _named(entries.shard, [d for d, _ in entries.shards]),
        _named(entries.shard, [s for _, s in entries.shards]),
        *(plain.column(c).combine_chunks() for c in ("document", "epoch", "tokens", "bytes")),
        _named(entries.domain, entries.domains),
    ]
    table = pa.Table.from_arrays(columns, schema=INDEX)
    groups = (table.slice(at, ROWS_PER_GROUP) for at in range(0, table.num_rows, ROWS_PER_GROUP))
    note = {**about, **out, "phase": phase, "domains": entries.domains, "shards": named}
    root.write_table(index_name(phase), groups, INDEX, note)
    return out


def read_index(root: Root, phase: str) -> tuple[Entries, dict[str, Any]]:
    """The entries of a phase and the note stored with them."""
    note = root.note(index_name(phase))
    if note is None:
        raise StageError(
            f"mixture {phase}: {root.url}/{index_name(phase)} is missing or no index of ours; run mix first"
        )
    table = root.read_table(index_name(phase))
    shards = [(d, s) for d, _, s in (name.partition("/") for name in note["shards"])]
    entries = Entries(
        shards,
        note["domains"],
        _pairs(table.column("dataset"), table.column("shard"), shards),
        _places(table.column("domain"), note["domains"]),
        *(table.column(c).to_numpy() for c in ("document", "epoch", "tokens", "bytes")),
    )
    return entries, note


def _pairs(datasets: pa.ChunkedArray, shards: pa.ChunkedArray, known: list[tuple[str, str]]) -> np.ndarray:
    """int32 [n]: the place of each (dataset, shard) in `known`."""
    names = [list(dict.fromkeys(part)) for part in zip(*known, strict=True)] or [[], []]
    place = [{name: i for i, name in enumerate(part)} for part in names]
    width = max(1, len(names[1]))
    numbers = np.array([place[0][d] * width + place[1][s] for d, s in known], dtype=np.int64)
    order = np.argsort(numbers)
    wanted = _places(datasets, names[0]).astype(np.int64) * width + _places(shards, names[1])
    return order[np.searchsorted(numbers[order], wanted)].astype(np.int32) if len(wanted) else wanted.astype(np.int32)


def _named(codes: np.ndarray, names: Sequence[str]) -> pa.Array:
    """A dictionary column; equal names share one entry, whatever their codes."""
    distinct = list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(distinct)}
    to = np.array([place[name] for name in names], dtype=np.int32)
    return pa.DictionaryArray.from_arrays(
        pa.array(to[codes] if len(codes) else codes, pa.int32()), pa.array(distinct, TEXT)
    )


def _places(column: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    """int32 [n]: the place of each value of a dictionary column in `names`, by its codes: no string per row."""
    found = [np.zeros(0, dtype=np.int32)]
    for chunk in column.chunks:
        place = pc.index_in(chunk.dictionary.cast(TEXT), value_set=pa.array(names, TEXT)).to_numpy()
        found.append(place[chunk.indices.to_numpy()].astype(np.int32))
    return np.concatenate(found)
