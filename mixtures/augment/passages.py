"""The stage `passages`: where the documents are densest in knowledge, and which entities they speak of.

In: documents for which `where` holds, span columns. Out, below `relations/<instance>/`:

- `inventory.parquet` (INVENTORY): what is worth knowing, see `mixtures.augment.inventory`.
- `passages.parquet` (PASSAGES), best first: the passage's id, where it lies (`doc_id`, `row`, UTF-8 bytes `start` to `end`),
  its words, density in millionths, the entities of the inventory in it (named there, or near it as vectors), its text with
  the spans applied, and what its document says of itself. Text leaves the house from here, so spans are applied here.

Every passage is scored, a fold keeps the densest `candidates`, and a greedy walk over these takes at most `passages`: each must
hold an entity that fewer than `per_entity` taken ones hold. Candidates and chosen passages pass through the driver: 2 kB each.
Cost: two passes over the text, 3 MB/s for the inventory and about 4 MB/s for the scores on one core.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from core.engines.contract import Unit
from core.errors import ConfigError, StageError
from core.hashing import digest, table_digest
from core.job import Job, Outcome
from core.predicate import Predicate
from core.rows import dataset_of, shard_of
from core.schema import TEXT
from core.stage import Artifacts, ConfigPath, Kind, Resources, Stage, StageConfig, execution
from core.text import Span, apply_spans
from mixtures.augment.coverage import choose
from mixtures.augment.density import scores
from mixtures.augment.embedder import Embedder, HashedWords, ModelVectors, nearest, quantised
from mixtures.augment.inventory import INVENTORY, mine, read_file, runs_of, with_file
from mixtures.augment.rows import Order, ShardOf, WhereRows, best_rows, shard_units
from mixtures.augment.windows import Passages
from mixtures.augment.windows import passages as cut

ABOUT = ("source", "kind", "license")
CANDIDATES = pa.schema(
    [
        pa.field("doc_id", TEXT),
        pa.field("row", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("words", pa.int64()),
        pa.field("score", pa.int64()),  # density in millionths
        pa.field("entities", pa.large_list(TEXT)),
        pa.field("generation", pa.int64()),
        *(pa.field(name, TEXT) for name in ABOUT),
    ]
)
PASSAGES = pa.schema([pa.field("passage", TEXT), *CANDIDATES, pa.field("text", TEXT)])
TEXTS = pa.schema([pa.field("passage", TEXT), pa.field("text", TEXT)])
ORDER: tuple[Order, ...] = (("score", "descending"), ("doc_id", "ascending"), ("start", "ascending"))
EMBED_ROWS = 512  # passages embedded at once: their cosines with 20,000 entities take 80 MB as float64


class PassagesConfig(StageConfig):
    """Which passages are taken."""

    where: str | None = Field(
        default="fate@final and split.split == 'train'", description="documents that passages are taken from"
    )
    passages: int = Field(default=1000, ge=1, description="most passages taken")
    min_words: int = Field(default=192, ge=16, description="words of the shortest passage (256 tokens of English)")
    max_words: int = Field(default=384, ge=16, description="words of the longest passage (512 tokens of English)")
    min_score: float = Field(default=0.0, ge=0, description="least density: facts per 100 words, see the module")
    inventory: ConfigPath | None = execution(
        None, "file of entities to cover, one a line; its content enters the identity"
    )
    min_docs: int = Field(default=2, ge=1, description="documents an entity must stand in to enter the inventory")
    max_entities: int = Field(default=20_000, ge=1, description="entities mined for the inventory")
    per_entity: int = Field(default=3, ge=1, description="passages taken for the sake of one entity")
    per_document: int = Field(default=2, ge=1, description="passages taken from one document")
    candidates: int = Field(default=20, ge=1, description="densest passages looked at, for each one taken")
    embedder: str | None = Field(
        default=None,
        description="instance of `embedder` whose vectors find entities in passages; null: words hashed, no model",
    )
    min_similarity: float = Field(
        default=0.45,
        ge=0,
        le=1,
        description="least cosine of an entity found by its vector; chosen for hashed words, a model's cosines differ",
    )
    similar_entities: int = Field(default=3, ge=0, description="entities found by vectors, at most, in one passage")
    spans: tuple[str, ...] = Field(
        default=(), description="layer columns of spans to apply, earliest stage first: `pii.spans`"
    )

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @model_validator(mode="after")
    def _fits(self) -> "PassagesConfig":
        if self.max_words < self.min_words:
            raise ConfigError(
                f"passages: max_words is below min_words, got {self.max_words}, expected at least {self.min_words}"
            )
        return self


def reads(config: PassagesConfig) -> tuple[str, ...]:
    where = Predicate(config.where).columns if config.where else ()
    models = (f"@{config.embedder}",) if config.embedder else ()
    return ("doc_id", "text", "metadata", *ABOUT, *where, *config.spans, *models)


def artifacts(config: PassagesConfig) -> Artifacts:
    return {"inventory": config.inventory} if config.inventory else {}


@dataclass(frozen=True)
class Scorer:
    """The passages of a shard as CANDIDATES: those of a batch that pass `min_score`, with their entities."""

    config: PassagesConfig
    entities: tuple[str, ...]
    vectors: Any  # float32 [entities, d], quantised
    embedder: Embedder

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        source: ShardOf = unit.payload
        known = {name: i for i, name in enumerate(self.entities)}
        for rows, batch in WhereRows(self.config.where)(unit, ["doc_id", "text", *ABOUT]):
            found, texts, named, density = passages_of(batch.column("text"), self.config)
            if not len(found.start):
                continue
            held = self._held(texts, named, known)
            at = pa.array(found.document)
            columns = {
                "doc_id": batch.column("doc_id").take(at),
                "row": rows[found.document],
                "start": found.start,
                "end": found.end,
                "words": found.words,
                "score": density,
                "entities": pa.array(held, pa.large_list(TEXT)),
                "generation": [source.dataset.generation] * len(held),
                **{name: batch.column(name).take(at) for name in ABOUT},
            }
            arrays = [pa.array(columns[f.name], f.type) for f in CANDIDATES]
            made = pa.RecordBatch.from_arrays(arrays, schema=CANDIDATES)
            yield made.filter(pa.array(density >= round(self.config.min_score * 1_000_000)))

    def _held(self, texts: pa.Array, named: list[set[str]], known: dict[str, int]) -> list[list[str]]:
        """Entities of the inventory in each passage, sorted: those named in it and those whose vectors are near."""
        near: list[list[int]] = []
        for first in range(0, len(texts), EMBED_ROWS):
            vectors = quantised(self.embedder.embed(texts.slice(first, EMBED_ROWS).to_pylist()))
            near += nearest(vectors, self.vectors, self.config.min_similarity, self.config.similar_entities)
        return [
            sorted({n for n in names if n in known} | {self.entities[j] for j in js})
            for names, js in zip(named, near, strict=True)
        ]


def passages_of(column: pa.Array, config: PassagesConfig) -> tuple[Passages, pa.Array, list[set[str]], Any]:
    """(passages, their texts, the names in each, density int64 [n]) of a column of documents."""
    found, text, raw = cut(column, config.min_words, config.max_words)
    data = [memoryview(column[i].as_buffer()) for i in range(len(column))]
    pieces = [bytes(data[d][s:e]) for d, s, e in zip(found.document, found.start, found.end, strict=True)]
    texts = pa.array(pieces, pa.large_binary()).cast(TEXT)
    # names by passage: odd ranges lie between passages
    by_passage = raw._replace(start=raw.start, end=raw.end, first=_borders(found, len(raw.start)))
    named = [set(names) for names in runs_of(text, by_passage)[::2]]
    return found, texts, named, scores(found, texts, text, raw)


def _borders(found: Passages, words: int) -> Any:
    """Word ranges as borders: passage, gap, passage, gap, ... to the last word."""
    inner = np.stack([found.first_word, found.end_word], axis=1).ravel()
    return np.append(inner, words) if len(inner) else np.zeros(1, np.int64)


def passages(job: Job) -> Outcome:
    """Write the inventory and the passages."""
    config: PassagesConfig = job.config
    units = shard_units(job.datasets)
    mined = mine(
        job.engine, units, WhereRows(config.where), config.min_docs, config.max_entities, f"{job.instance}: inventory"
    )
    inventory = with_file(mined, read_file(config.inventory))
    best = _best(job, units, inventory)
    taken = choose(
        best.column("entities").to_pylist(),
        best.column("doc_id").to_pylist(),
        config.passages,
        config.per_entity,
        config.per_document,
    )
    chosen = best.take(pa.array(taken, pa.int64()))
    table = _with_text(job, chosen)
    outputs = {
        name: _written(job, name, made, schema)
        for name, made, schema in (
            (inventory_name(job.instance), inventory, INVENTORY),
            (passages_name(job.instance), table, PASSAGES),
        )
    }
    covered = {e for held in table.column("entities").to_pylist() for e in held}
    accounts = {
        "entities": inventory.num_rows,
        "candidates": best.num_rows,
        "passages": table.num_rows,
        "covered_entities": len(covered),
    }
    observed = {"docs": sum(d.rows for d in job.datasets), "bytes": sum(d.text_bytes for d in job.datasets)}
    return Outcome(outputs=outputs, accounts=accounts, observed=observed)


def _best(job: Job, units: list[Unit], inventory: pa.Table) -> pa.Table:
    """The densest candidates of all shards, best first."""
    config: PassagesConfig = job.config
    embedder: Embedder = HashedWords()
    if config.embedder:
        embedder = ModelVectors(job.root.url, config.embedder, job.identity)
    names = inventory.column("entity").to_pylist()
    said = [f"{n}. {d}" if d else n for n, d in zip(names, inventory.column("definition").to_pylist(), strict=True)]
    vectors = quantised(embedder.embed(said))
    scorer = Scorer(config, tuple(names), vectors, embedder)
    most = config.passages * config.candidates
    frame = job.engine.scan(scorer, units, CANDIDATES, f"{job.instance}: score")
    best = job.engine.fold(
        frame, partial(best_rows, order=ORDER, most=most), partial(_merged, most=most), f"{job.instance}: densest"
    )
    return best if best is not None else CANDIDATES.empty_table()


def _merged(a: pa.Table, b: pa.Table, most: int) -> pa.Table:
    return best_rows(pa.concat_tables([a, b]), ORDER, most)


def _with_text(job: Job, chosen: pa.Table) -> pa.Table:
    """PASSAGES from the chosen candidates: their ids, and their text with the spans applied."""
    rows = chosen.to_pylist()
    ids = [passage_id(r["doc_id"], r["start"], r["end"]) for r in rows]
    wanted: dict[int, list[tuple[str, int, int]]] = {}
    for name, r in zip(ids, rows, strict=True):
        wanted.setdefault(r["row"], []).append((name, r["start"], r["end"]))
    fetch = TextUnits(wanted, job.config)
    units = [u for u in shard_units(job.datasets) if fetch.concerns(u)]
    frame = job.engine.scan(fetch, units, TEXTS, f"{job.instance}: texts")
    found = job.engine.collect(frame)
    texts = dict(zip(found.column("passage").to_pylist(), found.column("text").to_pylist(), strict=True))
    if len(texts) != len(ids):
        raise StageError(f"{job.instance}: {len(ids) - len(texts)} passages were not found again; run `extract` again")
    columns = [pa.array(ids, TEXT), *chosen.columns, pa.array([texts[i] for i in ids], TEXT)]
    return pa.Table.from_arrays(columns, schema=PASSAGES).combine_chunks()


@dataclass(frozen=True)
class TextUnits:
    """Reads the wanted byte ranges of a shard: `row` -> (passage, start, end)."""

    wanted: dict[int, list[tuple[str, int, int]]]
    config: PassagesConfig

    def concerns(self, unit: Unit) -> bool:
        source: ShardOf = unit.payload
        rows = np.array(sorted(self.wanted), np.int64)
        return bool(((dataset_of(rows) == source.dataset.ordinal) & (shard_of(rows) == source.shard)).any())

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        spans = list(self.config.spans)
        for rows, batch in WhereRows(self.config.where)(unit, ["text", *spans]):
            made: list[tuple[str, str]] = []
            for i, row in enumerate(rows):
                for name, start, end in self.wanted.get(int(row), ()):
                    cuts = [batch.column(n)[i].as_py() or () for n in spans]
                    stages = [[Span(s["start"], s["end"], s["replacement"]) for s in c] for c in cuts]
                    text = bytes(memoryview(batch.column("text")[i].as_buffer()))
                    made.append((name, released_range(text, stages, start, end)))
            if made:
                yield pa.RecordBatch.from_arrays([pa.array(c, TEXT) for c in zip(*made, strict=True)], schema=TEXTS)


def released_range(text: bytes, stages: list[list[Span]], start: int, end: int) -> str:
    """Bytes `start` to `end` of a document with its spans applied; a span across an edge is applied to the part inside."""
    inside = [[_shifted(s, start, end) for s in spans if s.start < end and s.end > start] for spans in stages]
    return apply_spans(text[start:end], inside)


def _shifted(span: Span, start: int, end: int) -> Span:
    return Span(max(span.start, start) - start, min(span.end, end) - start, span.replacement)


def passage_id(doc_id: str, start: int, end: int) -> str:
    """32 hex digits that name a byte range of a document."""
    return digest([doc_id, start, end])


def passages_name(instance: str) -> str:
    return f"relations/{instance}/passages.parquet"


def inventory_name(instance: str) -> str:
    return f"relations/{instance}/inventory.parquet"


def _written(job: Job, name: str, table: pa.Table, schema: pa.Schema) -> dict[str, Any]:
    made = table.cast(schema)
    job.root.write_table(name, [made], schema, {"unit": job.identity})
    return {"rows": made.num_rows, "content": table_digest(made)}


STAGE = Stage(
    name="passages",
    kind=Kind.RELATE,
    config=PassagesConfig,
    fn=passages,
    reads=reads,
    artifacts=artifacts,
    libraries=("numpy", "pyarrow", "tokenizers"),
    resources=Resources(memory_gb=2.0),
)
