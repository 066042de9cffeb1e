"""The stage `augment`: valid answers become the documents of a made dataset, the next generation.

In: `@answers` (`captures/<instance>/answers.parquet`). Out: a dataset whose documents bear `parents` (doc_ids), `spans` (UTF-8
byte ranges in the parents), `generation`, `template`, `model`, `request` (hash of the prompt and its parameters),
`generator_license` in their metadata, and kind and licence of the parent. Answers that fall are drops with the reason of
`mixtures.augment.validate`; records = documents + drops. Each row group of the answers is one unit.

Nobody trusts these documents more than others: they pass every judging stage, are deduplicated and decontaminated.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pyarrow as pa
from pydantic import Field

from classifiers.language import LanguageConfig, LanguageState, find_model, language, open_language
from core.engines.contract import Unit
from core.errors import StageError
from core.hashing import table_digest
from core.ingest import Reader, ingest
from core.job import Job, Outcome
from core.records import Dropped, Failed, Found, Origin, Raw
from core.schema import TEXT
from core.stage import Artifacts, Kind, Resources, Stage, StageConfig
from core.storage import Root
from mixtures.augment.answers import answers_name
from mixtures.augment.prompts import TEMPLATES
from mixtures.augment.validate import Limits, Wrong, validate


class AugmentConfig(StageConfig):
    """Which answers become documents."""

    answers: str = Field(default="answers", description="instance of the stage `answers` that is read")
    generator_license: str | None = Field(
        default=None, description="licence that the model's maker puts on its answers, kept with each document"
    )
    max_copied_fraction: float = Field(
        default=0.6, ge=0, le=1, description="13-grams of an answer found in the passage"
    )
    min_recall_fraction: float = Field(default=0.35, ge=0, le=1, description="content words shared with the passage")
    max_novel_names_fraction: float = Field(
        default=0.1, ge=0, le=1, description="words in names that are not in the passage"
    )

    def limits(self) -> Limits:
        return Limits(self.max_copied_fraction, self.min_recall_fraction, self.max_novel_names_fraction)


def units(root: Root, name: str) -> list[Unit]:
    """One unit for each row group of the answers."""
    with root.parquet(name) as f:
        return [Unit(f"answers-{i:05d}", i, f.metadata.row_group(i).total_byte_size) for i in range(f.num_row_groups)]


def records(root: Root, name: str, unit: Unit) -> Iterator[Raw | Dropped | Failed]:
    """One record for each answer, named by its key."""
    with root.parquet(name) as f:
        for row in f.read_row_group(unit.payload, use_threads=False).to_pylist():
            yield Raw(Origin(f"{row['template']}/{row['key']}"), row)


def input_digest(root: Root, name: str, unit: Unit) -> str:
    """Hash of a row group's content."""
    with root.parquet(name) as f:
        return table_digest(f.read_row_group(unit.payload, use_threads=False))


def parse(config: AugmentConfig, model: str, generation: int, raw: Raw) -> Found | Dropped:
    """A document, or why there is none."""
    row: dict[str, Any] = raw.payload
    template = TEMPLATES.get(row["template"])
    if template is None or template.version != row["version"]:
        raise StageError(
            f"augment: no template {row['template']}/{row['version']}, expected one of {sorted(TEMPLATES)}; run `answers` again"
        )
    found = validate(
        row["answer"], row["finish_reason"], row["text"], template, partial(language_of, model), config.limits()
    )
    if isinstance(found, Wrong):
        return Dropped(raw.origin, found.reason, found.detail)
    text = f"{row['text'].strip()}\n\n{found}" if template.with_source else found
    about = {
        "parents": [row["doc_id"]],
        "spans": [[row["start"], row["end"]]],
        "generation": generation,
        "template": template.label,
        "model": row["model"],
        "served_model": row["served_model"],
        "request": row["key"],
        "generator_license": config.generator_license,
    }
    return Found(raw.origin, text, None, row["kind"], row["license"], metadata=about)


def language_of(model: str, text: str) -> tuple[str | None, float]:
    """(language, score) by the model that judges all documents."""
    batch = pa.record_batch([pa.array([text], TEXT)], names=["text"])
    found = language(_open(model), batch)[0]
    return found.column("language")[0].as_py(), found.column("score")[0].as_py() or 0.0


@cache
def _open(model: str) -> LanguageState:
    return open_language(LanguageConfig(), {"lid": model})


def augment(job: Job) -> Outcome:
    """Read the answers into documents and drops."""
    name, config = answers_name(job.config.answers), job.config
    generation = 1 + max((d.generation for d in job.datasets), default=0)
    model = job.artifacts["lid"]
    reader = Reader(
        job.source_name,
        partial(units, job.root, name),
        partial(records, job.root, name),
        partial(parse, config, model, generation),
        partial(input_digest, job.root, name),
    )
    return ingest(job, reader)


def artifacts(config: AugmentConfig) -> Artifacts:
    return find_model(LanguageConfig())


STAGE = Stage(
    name="augment",
    kind=Kind.MAKE,
    config=AugmentConfig,
    fn=augment,
    where=False,
    reads=lambda c: (f"@{c.answers}",),
    artifacts=artifacts,
    libraries=("fasttext",),
    resources=Resources(memory_gb=1.0),
)
