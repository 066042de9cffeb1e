"""Token shards: every document that stays, encoded once, spans applied, EOS between documents.

In: documents for which `where` holds, span columns, `models/<tokenizer>`. Out, below `tokens/<tokenizer>/<dataset>/`, for each
shard of documents: `.bin` + `.idx`, on demand `.ds` + `.ds.index` and `.levels` (see `mixtures.token_files`), and
`.docs.parquet` with the columns of `DOCS` in the same order. That file is written last and its metadata is the commit record, so
a killed run goes on from the next shard and a new shard of documents tokenises itself only. About 1.5 MB/s on one core.

With `decontaminate` the text is held against that stage's index once more, as it is after spans: a document that still holds a
benchmark item is left out and counted. What the policy let pass, or a replacement put together, goes no further.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field, field_validator

from core.dataset import Dataset, Shard
from core.engines.contract import Note, Report, Unit
from core.errors import ConfigError
from core.hashing import TableHash, digest
from core.job import Job, Outcome, total
from core.predicate import Predicate
from core.schema import TEXT, conform
from core.stage import Kind, Resources, Stage, StageConfig, execution, identity_fields
from core.text import Span
from mixtures.encoder import TokenizerInfo, open_encoder, read_info
from mixtures.levels import LevelsError, text_levels
from mixtures.released import LastLook, last_look, released, targets_column
from mixtures.token_files import docs_name, ds_index_bytes, index_bytes, shard_name

DOCS = pa.schema(
    [
        pa.field("doc_id", TEXT, nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # row of the documents shard
        pa.field("tokens", pa.int32(), nullable=False),  # EOS included
        pa.field("bytes", pa.int64(), nullable=False),  # UTF-8, after spans
        pa.field("source", TEXT, nullable=False),
        pa.field("kind", TEXT, nullable=False),
    ]
)
ABOUT = ("doc_id", "source", "kind")
DATA = {"megatron": "bin", "ds": "ds"}  # format -> suffix of its tokens
STORED = (
    "content",
    "rows",
    "tokens",
    "bytes",
    "words",
    "contaminated",
    "levels",
    "unmatched",
)  # in manifests, by shard
INDEXES = {"megatron": "idx", "ds": "ds.index"}


class TokenizeConfig(StageConfig):
    """What is tokenised and how it is stored."""

    where: str | None = Field(default="fate@final", description="documents to tokenise")
    tokenizer: str = Field(default="tokenizer", description="instance of the stage `tokenizer` whose output is used")
    spans: tuple[str, ...] = Field(
        default=(), description="layer columns of spans to apply, earliest stage first: `pii.spans`"
    )
    formats: tuple[Literal["megatron", "ds"], ...] = Field(
        default=("megatron",), description="`megatron` (.bin, .idx; mixtures read it), `ds` (datatrove) as well"
    )
    levels: bool = Field(
        default=False,
        description="store which tokens of dialogues and conversations are prompt or scaffold, so that a phase can leave "
        "them out of its loss (`learn` of mix)",
    )
    decontaminate: str | None = Field(
        default=None,
        description="instance of `decontaminate` whose index the final text is held against; hits are left out",
        examples=["decontaminate"],
    )
    batch_bytes: int = execution(16 << 20, "text read at once")

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @field_validator("formats")
    @classmethod
    def _mixable(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if "megatron" not in formats:
            raise ConfigError(
                f"tokenize: formats lack megatron, got {list(formats)}; mixtures are read from .bin and .idx"
            )
        return tuple(sorted(set(formats)))


def reads(config: TokenizeConfig) -> tuple[str, ...]:
    return (
        *ABOUT,
        "text",
        *(("metadata",) if config.levels else ()),
        *(Predicate(config.where).columns if config.where else ()),
        *config.spans,
        f"@{config.tokenizer}",
        *((f"@{config.decontaminate}", targets_column(config.decontaminate)) if config.decontaminate else ()),
    )


def tokenize(job: Job) -> Outcome:
    """Write the token shards of all datasets."""
    tokenizer = read_info(job.root, job.config.tokenizer)
    libraries = {name: version(name) for name in job.stage.libraries}
    look = last_look(job)
    index = look.fingerprint if look else ""
    code = digest([job.stage.version, identity_fields(job.config), tokenizer.fingerprint, index, libraries])
    outputs: dict[str, dict[str, Any]] = {}
    reports = []
    for dataset in job.datasets:
        units = [Unit(s.name, s, s.text_bytes) for s in dataset.shards]
        work = TokenizeUnits(dataset, job.config, tokenizer, code, look)
        made = job.engine.run_units(work, units, f"{job.instance}: {dataset.name}")
        outputs.update({f"{dataset.name}/{r.unit}": r.value for r in made})
        reports += made
    accounts = _sums(outputs)
    if job.config.decontaminate:
        accounts["contaminated_docs"] = sum(out["contaminated"] for out in outputs.values())
    if job.config.levels:
        accounts["unmatched_docs"] = sum(out["unmatched"] for out in outputs.values())
    return Outcome(outputs, accounts=accounts, observed={**total(reports), **_figures(reports)})


@dataclass(frozen=True)
class TokenizeUnits:
    """Tokenises one shard of documents. `value` = its manifest output."""

    dataset: Dataset
    config: TokenizeConfig
    tokenizer: TokenizerInfo
    code: str
    look: LastLook | None = None

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        identity = self._identity(shard)
        found = self.dataset.root.note(docs_name(self.tokenizer.name, self.dataset.name, shard.name))
        resumed = bool(found and found["unit"] == identity and self._whole(shard, found))
        stored = found if found and resumed else self._write(shard, identity, note)
        value = {key: stored[key] for key in STORED}
        return Report(
            unit.name, docs=value["rows"], bytes=0 if resumed else value["bytes"], resumed=resumed, value=value
        )

    def _whole(self, shard: Shard, stored: dict[str, Any]) -> bool:
        """Whether the committed token files are still there in full: someone may have removed or cut them."""
        root, name = self.dataset.root, shard_name(self.tokenizer.name, self.dataset.name, shard.name)
        data = [f"{name}.{DATA[form]}" for form in self.config.formats if stored["rows"]]
        indexes = [f"{name}.{INDEXES[form]}" for form in self.config.formats if stored["rows"]]
        size = stored["tokens"] * self.tokenizer.dtype.itemsize
        sizes = {**dict.fromkeys(data, size), **({f"{name}.levels": stored["tokens"]} if stored["levels"] else {})}
        return all(map(root.exists, (*sizes, *indexes))) and all(root.size(n) == of for n, of in sizes.items())

    def _identity(self, shard: Shard) -> str:
        """Code, documents, and the layers read for this shard."""
        layers = sorted({c.rpartition(".")[0] for c in reads(self.config) if "." in c})
        notes = {layer: self.dataset.root.note(self.dataset.layer_name(layer, shard)) for layer in layers}
        return digest([self.code, shard.content, {layer: n["content"] if n else "" for layer, n in notes.items()}])

    def _write(self, shard: Shard, identity: str, note: Note) -> dict[str, Any]:
        root, info = self.dataset.root, self.tokenizer
        name, docs = (f(info.name, self.dataset.name, shard.name) for f in (shard_name, docs_name))
        root.remove(docs)  # the old commit record must not vouch for new tokens if this run is killed between two files
        tables: list[pa.Table] = []
        running, running_levels = xxhash.xxh3_128(), xxhash.xxh3_128()
        words = contaminated = unmatched = highest = 0
        with self._opened(name) as (files, levels):
            for part in self._encoded(shard):
                for file in files:
                    file.write(part.tokens.data)
                running.update(part.tokens.data)
                if levels is not None:
                    levels.write(part.levels.data)
                    running_levels.update(part.levels.data)
                    highest = max(highest, int(part.levels.max(initial=0)))
                tables.append(part.table)
                words += part.words
                contaminated += part.contaminated
                unmatched += part.unmatched
                note(docs=part.table.num_rows, bytes=part.table.nbytes)
        if not highest:
            root.remove(f"{name}.levels")
        table = pa.concat_tables(tables).combine_chunks() if tables else DOCS.empty_table()
        self._write_indexes(name, table.column("tokens").to_numpy())
        content = TableHash(DOCS)
        content.update(table)
        stored = {
            "unit": identity,
            "documents": shard.content,
            "tokenizer": info.fingerprint,
            "content": digest(
                [
                    running.hexdigest(),
                    str(info.dtype),
                    list(self.config.formats),
                    content.hexdigest(),
                    running_levels.hexdigest() if highest else None,
                ]
            ),
            "rows": table.num_rows,
            "tokens": int(table.column("tokens").to_numpy().sum(dtype=np.int64)),
            "bytes": int(table.column("bytes").to_numpy().sum()),
            "words": words,
            "contaminated": contaminated,
            "levels": highest > 0,
            "unmatched": unmatched,
        }
        root.write_table(docs, [table], DOCS, stored)
        return stored

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[list[BinaryIO], BinaryIO | None]]:
        """The token files of all formats, and that of levels; they get their names when all is written."""
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            for suffix in (*(DATA[form] for form in self.config.formats), *(["levels"] if self.config.levels else [])):
                path = stack.enter_context(self.dataset.root.writing(f"{name}.{suffix}"))
                files.append(stack.enter_context(open(path, "wb")))
            yield (files[:-1], files[-1]) if self.config.levels else (files, None)

    def _encoded(self, shard: Shard) -> Iterator["Encoded"]:
        """The shard's documents batch by batch."""
        encoder = open_encoder(self.dataset.root.url, self.tokenizer)
        config = self.config
        spoken = ("text", "metadata", *config.spans) if config.levels else ()
        columns = [*ABOUT, *spoken, *([self.look.targets] if self.look else [])]
        for rows, texts, about in released(
            self.dataset, shard, config.where, config.spans, columns, config.batch_bytes
        ):
            clean = self._clean(texts, about)
            left_out = len(texts) - len(clean)
            if left_out:
                rows, texts, about = rows[clean], [texts[i] for i in clean], about.take(pa.array(clean))
            levels, unmatched = self._levels(texts, about)
            tokens, lengths, token_levels = encoder.encode_levels(texts, levels)
            sizes = [len(t.encode()) for t in texts]
            own = {**{c: about.column(c) for c in ABOUT}, "row": rows, "tokens": lengths, "bytes": sizes}
            words = sum(len(t.split()) for t in texts)
            yield Encoded(conform(pa.table(own), DOCS), tokens, token_levels, words, left_out, unmatched)

    def _levels(self, texts: list[str], about: pa.RecordBatch) -> tuple[list[np.ndarray | None], int]:
        """Levels of the characters of each text, and how many texts are others than their metadata says: those are
        learned whole."""
        if not self.config.levels:
            return [None] * len(texts), 0
        out: list[np.ndarray | None] = []
        unmatched = 0
        spans = [about.column(name).to_pylist() for name in self.config.spans]
        originals, metadata = (about.column(name).to_pylist() for name in ("text", "metadata"))
        for i, (text, original) in enumerate(zip(texts, originals, strict=True)):
            cuts = [[Span(s["start"], s["end"], s["replacement"]) for s in stage[i] or ()] for stage in spans]
            try:
                out.append(text_levels(original, text, metadata[i], cuts))
            except LevelsError:
                out.append(None)
                unmatched += 1
        return out, unmatched

    def _clean(self, texts: list[str], about: pa.RecordBatch) -> np.ndarray:
        """Which texts hold nothing of the index: all, where none is named."""
        if self.look is None:
            return np.arange(len(texts))
        return np.flatnonzero(~self.look.hit(texts, about.column(self.look.targets)))

    def _write_indexes(self, name: str, lengths: np.ndarray) -> None:
        """What stands beside the tokens; without documents nothing does, and the empty token files go."""
        root = self.dataset.root
        for form, data in DATA.items():
            if form in self.config.formats and len(lengths):
                megatron = form == "megatron"
                index = index_bytes(lengths, self.tokenizer.dtype) if megatron else ds_index_bytes(lengths)
                root.write_bytes(f"{name}.{INDEXES[form]}", index)
            else:
                root.remove(f"{name}.{data}")
                root.remove(f"{name}.{INDEXES[form]}")


@dataclass(frozen=True)
class Encoded:
    """A batch of documents."""

    table: pa.Table  # rows of DOCS
    tokens: np.ndarray  # end to end
    levels: np.ndarray  # uint8, one a token
    words: int
    contaminated: int  # documents left out
    unmatched: int  # documents whose levels are not known


def _sums(outputs: dict[str, dict[str, Any]]) -> dict[str, int]:
    names = {"rows": "docs", "tokens": "tokens", "bytes": "bytes"}
    return {name: sum(out[key] for out in outputs.values()) for key, name in names.items()}


def _figures(reports: list[Report]) -> dict[str, Any]:
    """Speed of what was encoded now, and how well the tokenizer fits all of it. Words are split at white space."""
    tokens, size, words = (sum(r.value[key] for r in reports) for key in ("tokens", "bytes", "words"))
    fresh = [r for r in reports if not r.resumed]
    busy_s = sum(r.seconds for r in fresh)
    return {
        "tokens": tokens,
        "tokens_per_busy_s": round(sum(r.value["tokens"] for r in fresh) / busy_s) if busy_s else None,
        "fertility": round(tokens / words, 4) if words else None,
        "bytes_per_token": round(size / tokens, 4) if tokens else None,
    }


STAGE = Stage(
    name="tokenize",
    kind=Kind.EXPORT,
    config=TokenizeConfig,
    fn=tokenize,
    version=3,  # 2: the final text may be held against an index; 3: tokens may have levels. Both are stored beside a shard
    reads=reads,
    libraries=("tokenizers",),
    resources=Resources(memory_gb=1.0),
)
