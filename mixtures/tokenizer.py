"""A byte-level BPE trained on a hash sample of the documents that stay, or a given tokenizer file.

In: documents for which `where` holds, with spans applied. Out: `models/<instance>/tokenizer.json` and `tokenizer_config.json`.

Every text round-trips: nothing is normalised and all 256 bytes are in the vocabulary. Training depends on the counts of words
only, so neither shard order nor threads move a merge (`tests/mixtures/test_tokenizer.py` holds that). Each shard is sampled by
itself into scratch files, and the driver trains from those: 1 to 3 MB/s on one core, memory by the number of distinct words.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from core.dataset import Dataset, Shard
from core.engines.contract import Note, Report, Unit
from core.errors import ConfigError, StageError
from core.hashing import digest, seeded_column
from core.job import Job, Outcome, total
from core.predicate import Predicate
from core.schema import TEXT
from core.stage import Artifacts, ConfigPath, Kind, Resources, Stage, StageConfig, execution
from mixtures.encoder import TokenizerInfo, describe, info_name, tokenizer_name
from mixtures.released import released

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"
# Pre-tokens as in OpenAI's cl100k_base (tiktoken, MIT), without its English contractions: a letter run takes one leading mark
# or space with it, newlines end a pre-token. Numbers are single digits (as in Llama and PaLM) or runs of up to three.
PATTERN = r"{numbers}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LONG_WORD = re.compile(r"\w{256,}")  # base64 and keys: no word, and each costs a scan per merge. Chosen, untested
SAMPLE = pa.schema([pa.field("text", TEXT)])
SAMPLE_BATCH_BYTES = 16 << 20
# `split` holds out the lowest seeded(seed, doc_id): unsalted, too few would be drawn
SALT = pa.scalar("tokenizer", TEXT)


class TokenizerConfig(StageConfig):
    """Which tokenizer the shards use."""

    where: str | None = Field(
        default="fate@final and split.split == 'train'", description="documents that the sample is drawn from"
    )
    vocab_size: int = Field(
        default=65_408,
        description="entries, special tokens included; the default is the largest multiple of 128 in two bytes",
    )
    sample_bytes: int = Field(default=1 << 30, gt=0, description="text to train on, about; drawn by hash of doc_id")
    seed: int = Field(default=0, description="draws another sample")
    split_digits: bool = Field(default=True, description="each digit is a token; else runs of up to three")
    reserved: int = Field(default=14, ge=0, description="special tokens kept free for later training stages")
    spans: tuple[str, ...] = Field(
        default=(), description="layer columns of spans to apply, earliest stage first: `pii.spans`"
    )
    file: ConfigPath | None = execution(
        None, "a tokenizer.json to use instead of training one; its content enters the identity"
    )
    eos: str = Field(default=EOS, description="the token that ends a document; must exist in a given file")

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @model_validator(mode="after")
    def _fits(self) -> "TokenizerConfig":
        least = 256 + len(self.special_tokens())
        if self.file is None and self.vocab_size < least:
            raise ConfigError(f"tokenizer: vocab_size is too small, got {self.vocab_size}, expected at least {least}")
        return self

    def special_tokens(self) -> list[str]:
        """In the order of their ids, from 0."""
        return list(dict.fromkeys([self.eos, PAD, *(f"<|reserved_{i}|>" for i in range(self.reserved))]))


def reads(config: TokenizerConfig) -> tuple[str, ...]:
    if config.file:
        return ()
    return ("doc_id", "text", *(Predicate(config.where).columns if config.where else ()), *config.spans)


def artifacts(config: TokenizerConfig) -> Artifacts:
    return {"tokenizer": config.file} if config.file else {}


def make_tokenizer(job: Job) -> Outcome:
    """Write the tokenizer and its description."""
    sample_bytes, reports = 0, []
    if job.config.file:
        tokenizer = load_file(job.config.file)
    else:
        folder = f"exchange/{job.instance}-{digest([job.identity])[:12]}"
        reports = _sample(job, folder)
        sample_bytes = sum(r.value for r in reports)
        if not sample_bytes:
            raise StageError(f"{job.instance}: no text to train on where {job.config.where!r} holds; widen `where`")
        tokenizer = train(_texts(job, folder), job.config)
        job.root.remove(folder)
    info = describe(tokenizer, job.instance, job.config.eos)
    job.root.write_bytes(tokenizer_name(job.instance), tokenizer.to_str(pretty=True).encode())
    job.root.write_json(info_name(job.instance), _config_json(info))
    outputs = {
        "tokenizer.json": {"content": digest(tokenizer.to_str()), "rows": info.vocab_size},
        "tokenizer_config.json": {"content": digest(_config_json(info)), "rows": 1},
    }
    observed = {**total(reports), "vocab_size": info.vocab_size, "sample_bytes": sample_bytes}
    return Outcome(outputs, accounts={"vocab_size": info.vocab_size}, observed=observed)


def load_file(path: str) -> "Tokenizer":
    """A given tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception as e:  # the library raises plain Exception, for a missing file as for a broken one
        raise ConfigError(
            f"tokenizer: cannot read {path}: {e}; expected a tokenizer.json of the tokenizers library"
        ) from e


def train(texts: Iterator[str], config: TokenizerConfig) -> "Tokenizer":
    """A byte-level BPE of at most `vocab_size` entries; fewer where the texts hold fewer pairs."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = PATTERN.format(numbers=r"\p{N}" if config.split_digits else r"\p{N}{1,3}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=config.special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((LONG_WORD.sub(" ", t) for t in texts), trainer)
    return tokenizer


def _config_json(info: TokenizerInfo) -> dict[str, Any]:
    """The keys that `transformers` reads, and ours."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": info.eos_token,
        "eos_id": info.eos,
        "vocab_size": info.vocab_size,
        "fingerprint": info.fingerprint,
    }


def _sample(job: Job, folder: str) -> list[Report]:
    """Draw documents into scratch files, one a shard; `value` = bytes of text drawn."""
    count = partial(_over_shards, job, lambda d: CountUnits(d, job.config.where), "count")
    expected = sum(r.value for r in count())
    fraction = min(1.0, job.config.sample_bytes / max(1, expected))
    return _over_shards(job, lambda d: SampleUnits(d, job.config, fraction, folder), "sample")


def _over_shards(job: Job, make: Any, verb: str) -> list[Report]:
    reports = []
    for dataset in job.datasets:
        units = [Unit(s.name, s, s.text_bytes) for s in dataset.shards]
        reports += job.engine.run_units(make(dataset), units, f"{job.instance}: {verb} {dataset.name}")
    return reports


@dataclass(frozen=True)
class CountUnits:
    """`value` = about how many bytes of text `where` leaves of a shard, by its share of rows: the text is not read."""

    dataset: Dataset
    where: str | None

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        if not self.where or not shard.rows:
            return Report(unit.name, docs=shard.rows, value=shard.text_bytes)
        predicate = Predicate(self.where)
        kept = int(predicate.holds(self.dataset.read_table(shard, predicate.columns)).sum())
        note(docs=shard.rows)
        return Report(unit.name, docs=shard.rows, value=shard.text_bytes * kept // shard.rows)


@dataclass(frozen=True)
class SampleUnits:
    """Writes the drawn texts of a shard to `folder`."""

    dataset: Dataset
    config: TokenizerConfig
    fraction: float
    folder: str

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        name = sample_name(self.folder, self.dataset, shard)
        identity = digest([shard.content, self.fraction])
        found = self.dataset.root.note(name)
        if found and found["unit"] == identity:
            return Report(unit.name, resumed=True, value=found["bytes"])
        written: dict[str, Any] = {"unit": identity, "bytes": 0}

        def drawn() -> Iterator[pa.Table]:
            config = self.config
            for _, texts, about in released(
                self.dataset, shard, config.where, config.spans, ["doc_id"], SAMPLE_BATCH_BYTES
            ):
                keys = pc.binary_join_element_wise(SALT, about.column("doc_id"), pa.scalar(" ", TEXT))
                at = np.flatnonzero(seeded_column(config.seed, keys) < self.fraction)
                table = pa.table({"text": pa.array([texts[i] for i in at], TEXT)}, schema=SAMPLE)
                written["bytes"] += int(pc.sum(pc.binary_length(table.column("text"))).as_py() or 0)
                note(docs=len(texts))
                if len(at):
                    yield table

        rows = self.dataset.root.write_table(name, drawn(), SAMPLE, written)
        return Report(unit.name, docs=rows, bytes=shard.text_bytes, value=written["bytes"])


def sample_name(folder: str, dataset: Dataset, shard: Shard) -> str:
    return f"{folder}/{dataset.name}/{shard.name}.parquet"


def _texts(job: Job, folder: str) -> Iterator[str]:
    """The drawn texts, datasets and shards in order."""
    for dataset in job.datasets:
        for shard in dataset.shards:
            with job.root.parquet(sample_name(folder, dataset, shard)) as f:
                for batch in f.iter_batches(batch_size=256):
                    yield from batch.column("text").to_pylist()


STAGE = Stage(
    name="tokenizer",
    kind=Kind.EXPORT,
    config=TokenizerConfig,
    fn=make_tokenizer,
    reads=reads,
    artifacts=artifacts,
    libraries=("tokenizers",),
    resources=Resources(memory_gb=8.0),
)
