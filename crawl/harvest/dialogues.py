"""The stage `dialogues`: changes of harvested datasets as dialogues of the next generation (see `crawl.harvest.templates`).

In: documents of kind `pull_request` for which `where` holds, and the base records behind them, found by place and proved by
digest. Out: documents of kind `pull_request`, at most one a template, with metadata `template`, `segments` ([start, end, role,
kind] in UTF-8 bytes), `parents`, `generation`, `repo`, `number`, `language`, `blocks`. An answer of `repair` is kept only if it
parses, and applied to the base files gives the head files byte for byte; this is checked for each. Cost: 300 changes/s on one
core, both templates.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field, field_validator

from core.dataset import Dataset, Shard
from core.engines.contract import Unit
from core.errors import ConfigError, InputError, StageError
from core.hashing import digest
from core.ingest import Reader, ingest
from core.job import Job, Outcome
from core.predicate import Predicate
from core.records import Dropped, Failed, Found, Origin, Raw
from core.stage import Kind, Stage, StageConfig
from crawl import sources
from crawl.harvest import templates
from crawl.harvest.blocks import MarkerCollisionError, apply, derive, parse, render
from crawl.harvest.documents import captures, masks_of, record_of
from crawl.harvest.record import Record, line_of, record_digest, some_paths
from crawl.harvest.templates import Segment
from crawl.sources.listing import Piece

COLUMNS = ("doc_id", "kind", "license", "origin", "metadata")


class DialoguesConfig(StageConfig):
    """Which dialogues are made, and how much of a repository they show."""

    templates: tuple[str, ...] = Field(default=templates.TEMPLATES, description="`localise`, `repair`")
    tree_paths: int = Field(default=400, ge=2, description="paths shown to `localise` (chosen)")
    whole_lines: int = Field(
        default=400, ge=0, description="files up to this long are shown whole to `repair` (chosen)"
    )
    around_lines: int = Field(default=10, ge=0, description="lines shown around an edit of a longer file (Agentless)")
    min_problem: int = Field(
        default=30, ge=0, description="characters of a problem; shorter ones tell nothing (chosen)"
    )
    max_chars: int = Field(default=200_000, ge=1000, description="longest dialogue (chosen)")
    max_lines: int = Field(default=1000, ge=1, description="changed lines of a change, as the harvest's rules")

    @field_validator("templates")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(given) - set(templates.TEMPLATES))
        if unknown or not given:
            raise ConfigError(f"dialogues: no template {unknown}, expected some of {list(templates.TEMPLATES)}")
        return tuple(t for t in templates.TEMPLATES if t in given)


@dataclass(frozen=True)
class Part:
    """A unit: one shard of documents."""

    dataset: Dataset
    shard: Shard


def units(datasets: tuple[Dataset, ...]) -> list[Unit]:
    """One a shard of each dataset, in the pipeline's order."""
    return [
        Unit(f"{dataset.name}-{shard.name}", Part(dataset, shard), shard.text_bytes)
        for dataset in datasets
        for shard in dataset.shards
    ]


def records(config: DialoguesConfig, unit: Unit) -> Iterator[Raw | Dropped | Failed]:
    """A record for each template and document that has a base record with files; others are none of this stage's."""
    part: Part = unit.payload
    wanted = _wanted(part, config)
    lines: dict[str, Iterator[Raw | Dropped | Failed]] = {}
    for row in wanted:
        origin = row["origin"]
        stream = lines.setdefault(origin["path"], _lines(part.dataset, origin["path"]))
        raw = next((r for r in stream if isinstance(r, Raw) and r.origin.offset == origin["offset"]), None)
        if raw is None:
            raise StageError(
                f"dialogues: captures/{part.dataset.name}/{origin['path']} has no record at {origin['offset']}, expected that of "
                f"document {row['doc_id']}; run the stages `harvest` and `extract` again"
            )
        for template in config.templates:
            yield Raw(Origin(f"{part.dataset.name}/{row['doc_id']}/{template}"), (template, row, raw.payload))


def _wanted(part: Part, config: DialoguesConfig) -> list[dict[str, Any]]:
    """Rows of the shard that come from a harvest and for which `where` holds, in the order of their records."""
    predicate = Predicate(config.where) if config.where else None
    out = []
    columns = list(dict.fromkeys((*COLUMNS, *(predicate.columns if predicate else ()))))
    for batch in part.dataset.read(part.shard, columns):
        held = predicate.holds(batch) if predicate else None
        for i, row in enumerate(batch.select(list(COLUMNS)).to_pylist()):
            if row["kind"] != "pull_request" or (held is not None and not held[i]):
                continue
            metadata = json.loads(row["metadata"])
            if "record" in metadata and metadata["files"]:
                out.append({**row, "metadata": metadata})
    return sorted(out, key=lambda r: (r["origin"]["path"], r["origin"]["offset"]))


def _lines(dataset: Dataset, path: str) -> Iterator[Raw | Dropped | Failed]:
    stored = captures(f"{dataset.root.url}/captures/{dataset.name}")
    return sources.records(stored, Unit(path, Piece((path,))))


def parse_dialogue(config: DialoguesConfig, generations: dict[str, int], raw: Raw) -> Found | Dropped:
    """One dialogue. InputError where the record is not the one that its document was made from."""
    template, row, value = raw.payload
    record = record_of(value)
    if record_digest(line_of(record)) != row["metadata"]["record"]:
        raise InputError("dialogues: the record is not the one that the document was made from; run `extract` again")
    made = dialogue(record, template, config)
    if isinstance(made, str):
        reason, _, detail = made.partition(": ")
        return Dropped(raw.origin, reason, f"{template}, {record.repo} {record.key} {detail}".strip(), record.url)
    segments, blocks = made
    text, spans = templates.joined(segments)
    if len(text) > config.max_chars:
        return Dropped(raw.origin, "too_long", f"{template}, {len(text)} characters", record.url)
    about = {
        k: row["metadata"][k] for k in ("repo", "number", "change", "language", "languages") if k in row["metadata"]
    }
    metadata = {
        **about,
        "template": template,
        "template_version": templates.VERSION,
        "segments": [list(s) for s in spans],
        "blocks": blocks,
        "parents": [row["doc_id"]],
        "generation": generations[raw.origin.path.partition("/")[0]] + 1,
    }
    return Found(raw.origin, text, None, "pull_request", row["license"], metadata=metadata)


def dialogue(record: Record, template: str, config: DialoguesConfig) -> tuple[list[Segment], int] | str:
    """The segments and the number of blocks, or `reason: detail` why there is no dialogue."""
    problem = templates.problem_of(record, masks_of(record))
    if all(f.base is None for f in record.files):
        return "only_new_files"
    if len(problem) < config.min_problem:
        return f"no_problem: {len(problem)} characters"
    if template == "localise":
        return _localise(record, problem, config)
    return _repair(record, problem, config)


def _localise(record: Record, problem: str, config: DialoguesConfig) -> tuple[list[Segment], int] | str:
    gold = templates.gold_paths(record.files)
    there = set(record.tree)
    if there <= set(gold):
        return "no_distractors"
    shown = some_paths(record.tree, gold, config.tree_paths)
    return templates.localise(problem, shown, max(record.tree_size, len(shown)), gold), 0


def _repair(record: Record, problem: str, config: DialoguesConfig) -> tuple[list[Segment], int] | str:
    try:
        blocks = {f.path: derive(f.path, f.base, f.head, config.max_lines) for f in record.files}
    except MarkerCollisionError as e:
        return f"marker_collision: {e}"
    except InputError as e:
        return f"too_many_lines: {e}"
    answer = render([b for f in record.files for b in blocks[f.path]])
    if not round_trips(record, answer):
        return "round_trip"
    shown = templates.windows(record.files, blocks, config.whole_lines, config.around_lines)
    return templates.repair(problem, shown, answer), sum(map(len, blocks.values()))


def round_trips(record: Record, answer: str) -> bool:
    """Whether the answer, parsed and applied to the base files, gives the head files byte for byte."""
    try:
        after = apply(parse(answer), {f.path: f.base for f in record.files})
    except InputError:
        return False
    return {k: _bytes(v) for k, v in after.items()} == {f.path: _bytes(f.head) for f in record.files}


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8")


def input_digest(config: DialoguesConfig, unit: Unit) -> str:
    """The documents of the shard, which name their records, and the layers that `where` reads."""
    part: Part = unit.payload
    columns = Predicate(config.where).columns if config.where else ()
    layers = sorted({c.rpartition(".")[0] for c in columns if "." in c} - set(part.dataset.absent))
    notes = {layer: part.dataset.root.note(part.dataset.layer_name(layer, part.shard)) for layer in layers}
    return digest([part.shard.content, {layer: n["content"] if n else "" for layer, n in notes.items()}])


def make(job: Job) -> Outcome:
    """All dialogues of the datasets that are there."""
    config: DialoguesConfig = job.config
    unknown = set(config.templates) - set(templates.TEMPLATES)
    if unknown:
        raise ConfigError(
            f"dialogues: no template {sorted(unknown)[0]!r}, expected some of {list(templates.TEMPLATES)}"
        )
    generations = {d.name: d.generation for d in job.datasets}
    return ingest(
        job,
        Reader(
            job.source_name,
            partial(units, job.datasets),
            partial(records, config),
            partial(parse_dialogue, config, generations),
            partial(input_digest, config),
        ),
    )


def reads(config: DialoguesConfig) -> tuple[str, ...]:
    return (*COLUMNS, *(Predicate(config.where).columns if config.where else ()))


STAGE = Stage(name="dialogues", kind=Kind.MAKE, config=DialoguesConfig, fn=make, reads=reads)
