"""JSON lines out of kept documents, shard by shard: what the exports `sft` and `rl` share.

In: a dataset, a predicate, a function that makes a document one record or a reason against it. Out, below
`<folder>/<dataset>/`, for each shard of documents `<shard>.jsonl` (UTF-8, one record a line, in row order) and
`<shard>.docs.parquet`, which names the document behind each line. That file is written last; its metadata is the commit
record, so a killed run goes on where it was. With an index, what a record holds is looked at once more as it leaves: hits are
left out as `contaminated`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from core.dataset import Dataset, Shard
from core.engines.contract import Note, Report, Unit
from core.hashing import digest
from core.predicate import Predicate
from core.schema import TEXT
from mixtures.released import LastLook

DOCS = pa.schema(
    [
        pa.field("doc_id", TEXT, nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # row of the documents shard
        pa.field("domain", TEXT),
        pa.field("bytes", pa.int64(), nullable=False),  # of the line, newline included
    ]
)
SUFFIXES = ("jsonl", "docs.parquet")  # of the files of a shard
Made = dict[str, Any] | str  # a record, or why there is none


class Make(Protocol):
    """What an export makes of documents."""

    def __call__(self, document: dict[str, Any]) -> Made: ...

    def text(self, record: dict[str, Any]) -> str:
        """All text of a record that a model may learn from."""
        ...


@dataclass(frozen=True)
class LineUnits:
    """Writes the lines of one shard of documents. `value` = its manifest output. Picklable where `make` is."""

    dataset: Dataset
    folder: str
    where: str | None
    columns: tuple[str, ...]
    make: Make
    code: str
    batch_bytes: int
    look: LastLook | None = None

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        identity = self._identity(shard)
        found = self.dataset.root.note(self._name(shard, "docs.parquet"))
        resumed = bool(found and found["unit"] == identity and self._whole(shard, found))
        stored = found if found and resumed else self._write(shard, identity, note)
        value = {k: v for k, v in stored.items() if k != "unit"}
        return Report(
            unit.name, docs=value["considered"], bytes=0 if resumed else value["bytes"], resumed=resumed, value=value
        )

    def _name(self, shard: Shard, suffix: str) -> str:
        return f"{self.folder}/{self.dataset.name}/{shard.name}.{suffix}"

    def _whole(self, shard: Shard, stored: dict[str, Any]) -> bool:
        root, name = self.dataset.root, self._name(shard, "jsonl")
        return root.exists(name) and root.size(name) == stored["bytes"]

    def _identity(self, shard: Shard) -> str:
        """Code, documents, and the layers read for this shard."""
        layers = sorted({c.rpartition(".")[0] for c in self._needed() if "." in c})
        notes = {layer: self.dataset.root.note(self.dataset.layer_name(layer, shard)) for layer in layers}
        return digest([self.code, shard.content, {layer: n["content"] if n else "" for layer, n in notes.items()}])

    def _needed(self) -> list[str]:
        predicate = Predicate(self.where).columns if self.where else ()
        return list(dict.fromkeys(["doc_id", *self.columns, *([self.look.targets] if self.look else []), *predicate]))

    def _write(self, shard: Shard, identity: str, note: Note) -> dict[str, Any]:
        root = self.dataset.root
        root.remove(self._name(shard, "docs.parquet"))  # the old commit record must not vouch for new lines
        reasons: Counter[str] = Counter()
        domains: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        running = xxhash.xxh3_128()
        considered = 0
        with root.writing(self._name(shard, "jsonl")) as path, open(path, "wb") as out:
            for number, document, made in self._made(shard):
                considered += 1
                if isinstance(made, str):
                    reasons[made] += 1
                    continue
                line = json.dumps(made, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                running.update(line)
                domain = document.get("chat.domain")
                domains[domain or self.dataset.name] += 1
                rows.append({"doc_id": document["doc_id"], "row": number, "domain": domain, "bytes": len(line)})
                note(docs=1, bytes=len(line))
        stored = {
            "unit": identity,
            "content": digest([running.hexdigest(), [r["doc_id"] for r in rows]]),
            "rows": len(rows),
            "considered": considered,
            "bytes": sum(r["bytes"] for r in rows),
            "reasons": dict(sorted(reasons.items())),
            "domains": dict(sorted(domains.items())),
        }
        root.write_table(self._name(shard, "docs.parquet"), [pa.Table.from_pylist(rows, schema=DOCS)], DOCS, stored)
        return stored

    def _made(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any], Made]]:
        """(row, the named columns, what is made of them) of the documents for which `where` holds."""
        predicate = Predicate(self.where) if self.where else None
        start = 0
        for batch in self.dataset.read(shard, self._needed(), self.batch_bytes):
            at = np.flatnonzero(predicate.holds(batch)) if predicate else np.arange(batch.num_rows)
            documents = batch.take(pa.array(at)).to_pylist()
            made = self._clean(documents, [self.make(d) for d in documents])
            yield from zip((start + at).tolist(), documents, made, strict=True)
            start += batch.num_rows

    def _clean(self, documents: list[dict[str, Any]], made: list[Made]) -> list[Made]:
        """`made` with the reason in place of records that hold something of the index."""
        at = [i for i, m in enumerate(made) if not isinstance(m, str)]
        if self.look is None or not at:
            return made
        texts = [self.make.text(m) for m in made if not isinstance(m, str)]
        targets = pa.array([documents[i][self.look.targets] for i in at], pa.bool_())
        hits = {i for i, hit in zip(at, self.look.hit(texts, targets), strict=True) if hit}
        return ["contaminated" if i in hits else m for i, m in enumerate(made)]


def summed(outputs: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    """The counts under `name` of all outputs, by key."""
    total: Counter[str] = Counter()
    for out in outputs:
        total.update(out[name])
    return dict(sorted(total.items()))
