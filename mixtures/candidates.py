"""Which tokenised documents each component of a mixture asks for.

In: `.docs.parquet` of the token shards, predicate columns of the documents' layers. Out: for each group (a component of a phase,
or a dataset's held-out documents) a table of its documents, sorted by doc_id, and how many were kept for a later phase. Workers
read predicates and doc_ids once for all groups; the driver holds about 100 bytes a candidate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset, Shard
from core.engines.contract import Unit
from core.errors import StageError
from core.job import Job
from core.predicate import Predicate
from core.schema import TEXT
from mixtures.encoder import TokenizerInfo
from mixtures.phases import Group
from mixtures.token_files import docs_name

CANDIDATES = pa.schema(
    [
        pa.field("group", pa.int32()),  # ordinal in `groups`
        pa.field("doc_id", TEXT),
        pa.field("shard", pa.int32()),  # ordinal in the dataset
        pa.field("document", pa.int32()),
        pa.field("tokens", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("held", pa.bool_()),  # kept for a later phase: no candidate after all
    ]
)


@dataclass(frozen=True)
class Found:
    """The candidates of one group: doc_id, shard (counted over all datasets), document, tokens, bytes, sorted by doc_id."""

    group: Group
    table: pa.Table
    held_docs: int
    held_tokens: int


def find(job: Job, groups: Sequence[Group], info: TokenizerInfo) -> list[Found]:
    """The candidates of each group, in the order given."""
    tables, first = [CANDIDATES.empty_table()], 0
    for dataset in job.datasets:
        mine = tuple((i, g) for i, g in enumerate(groups) if g.dataset == dataset.name)
        if mine and dataset.shards:
            units = [Unit(s.name, (i, s), s.rows) for i, s in enumerate(dataset.shards)]
            task = CandidateUnits(dataset, mine, info)
            frame = job.engine.scan(task, units, CANDIDATES, f"{job.instance}: {dataset.name}")
            table = job.engine.collect(frame)
            at = CANDIDATES.get_field_index("shard")
            shard = pc.add(table.column("shard"), pa.scalar(first, pa.int32()))
            tables.append(table.set_column(at, CANDIDATES.field(at), shard))
        first += len(dataset.shards)
    table = pa.concat_tables(tables)
    numbers = table.column("group").to_numpy()
    return [_found(g, table.filter(pa.array(numbers == i))) for i, g in enumerate(groups)]


def _found(group: Group, table: pa.Table) -> Found:
    held = table.filter(table.column("held"))
    free = table.filter(pc.invert(table.column("held"))).drop_columns(["group", "held"])
    tokens = int(held.column("tokens").to_numpy().sum(dtype=np.int64))
    return Found(group, free.sort_by("doc_id").combine_chunks(), held.num_rows, tokens)


@dataclass(frozen=True)
class CandidateUnits:
    """Yields the rows of CANDIDATES of one shard of documents."""

    dataset: Dataset
    parts: tuple[tuple[int, Group], ...]
    info: TokenizerInfo

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        ordinal, shard = unit.payload
        docs = self._docs(shard)
        if not docs.num_rows:
            return
        at = docs.column("row").to_numpy()
        claims = self._claims(shard, at)
        self._check_overlap([claimed & ~held for claimed, held in claims])
        for (i, _), (claimed, held) in zip(self.parts, claims, strict=True):
            chosen = np.flatnonzero(claimed)
            taken = docs.take(pa.array(chosen))
            columns = [
                pa.array(np.full(len(chosen), i, np.int32)),
                taken.column("doc_id"),
                pa.array(np.full(len(chosen), ordinal, np.int32)),
                pa.array(chosen.astype(np.int32)),
                taken.column("tokens"),
                taken.column("bytes"),
                pa.array(held[chosen]),
            ]
            yield from pa.Table.from_arrays(columns, schema=CANDIDATES).combine_chunks().to_batches()

    def _docs(self, shard: Shard) -> pa.Table:
        """What is tokenised of a shard. Tokens of other documents or of another tokenizer are a StageError."""
        root, name = self.dataset.root, docs_name(self.info.name, self.dataset.name, shard.name)
        note = root.note(name)
        if note is None or note["documents"] != shard.content or note["tokenizer"] != self.info.fingerprint:
            what = "is missing" if note is None else "was made from other documents or by another tokenizer"
            raise StageError(f"mix: {name} {what}; run tokenize first")
        return root.read_table(name, ["doc_id", "row", "tokens", "bytes"])

    def _claims(self, shard: Shard, at: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each group, which of the tokenised documents (rows `at` of the shard) are its own, and which of all documents
        are kept for a later phase."""
        texts = {text for _, g in self.parts for all_of in (g.where, *g.held) for text in all_of}
        predicates = {text: Predicate(text) for text in texts}
        columns = sorted({c for p in predicates.values() for c in p.columns})
        table = self.dataset.read_table(shard, columns) if columns else None
        holds = {text: p.holds(table)[at] for text, p in predicates.items() if table is not None}

        def claimed(where: tuple[str, ...]) -> np.ndarray:
            return np.logical_and.reduce([np.ones(len(at), bool), *(holds[w] for w in where)])

        nothing = np.zeros(len(at), bool)
        return [
            (claimed(g.where), np.logical_or.reduce([nothing, *(claimed(held) for held in g.held)]))
            for _, g in self.parts
        ]

    def _check_overlap(self, masks: list[np.ndarray]) -> None:
        for phase in dict.fromkeys(g.phase for _, g in self.parts):
            claims = [(g, mask) for (_, g), mask in zip(self.parts, masks, strict=True) if g.phase == phase]
            shared = int((np.sum([mask for _, mask in claims], axis=0) > 1).sum())
            if shared:
                names = [g.domain for g, _ in claims]
                raise StageError(
                    f"mix: components {names} of phase {phase!r} share documents of dataset {self.dataset.name}, "
                    f"got {shared} in one shard, expected none; make their predicates exclude each other"
                )
