"""The export `sft`: kept conversations as chat JSONL in the published schema, spans applied.

In: documents of sources of kind `chat` for which `where` holds, layer columns of spans. Out: `sft/<dataset>/<shard>.jsonl`,
one `{"conversations": [...], "images": [...]}` a line (see `crawl.sources.conversations`; with `provenance` also doc_id,
source, domain and licence), and what `mixtures.posttrain.lines` writes beside it. Contents, names, loss masks and tool
schemas are the input's; only spans change a text. Spans refer to the rendering and are taken back to the messages; a span
over what stands between messages changes nothing. A document whose text is not the rendering of its conversation is left out
as `rendering_differs`: spans would cut the wrong bytes. With `decontaminate` one whose messages, as they leave, hold a
benchmark item is left out as `contaminated`. Packing and templates are the trainer's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import Field, field_validator

from core.engines.contract import Unit
from core.hashing import digest
from core.job import Job, Outcome, total
from core.predicate import Predicate
from core.stage import Kind, Resources, Stage, StageConfig, execution, identity_fields
from core.text import Span
from crawl.sources.conversations import MESSAGE_KEYS, render, with_spans
from mixtures.posttrain.lines import SUFFIXES, LineUnits, Made, Make, summed
from mixtures.posttrain.parts import conversation_of
from mixtures.released import last_look, targets_column

ABOUT = ("doc_id", "text", "metadata", "source", "license")


class SftConfig(StageConfig):
    """Which conversations leave, and with which spans."""

    where: str | None = Field(default="fate@final", description="conversations to write")
    spans: tuple[str, ...] = Field(
        default=(), description="layer columns of spans to apply, earliest stage first: `pii.spans`"
    )
    decontaminate: str | None = Field(
        default=None,
        description="instance of `decontaminate` whose index the final text is held against; hits are left out",
        examples=["decontaminate"],
    )
    provenance: bool = Field(default=True, description="add doc_id, source, domain and license to each line")
    batch_bytes: int = execution(16 << 20, "text read at once")

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None


def reads(config: SftConfig) -> tuple[str, ...]:
    return (*ABOUT, "chat.domain", *knob_reads(config))


def knob_reads(config: SftConfig) -> tuple[str, ...]:
    """What an export reads because a knob names it."""
    index = config.decontaminate
    return (
        *(Predicate(config.where).columns if config.where else ()),
        *config.spans,
        *((f"@{index}", targets_column(index)) if index else ()),
    )


@dataclass(frozen=True)
class Line:
    """A document as a line of the export."""

    spans: tuple[str, ...]
    provenance: bool

    def __call__(self, document: dict[str, Any]) -> Made:
        found = conversation_of(document["metadata"])
        if found is None:
            return "no_conversation"
        conversation, _ = found
        messages = conversation["conversations"]
        text, _ = render(messages)
        if text != document["text"]:
            return "rendering_differs"
        if any(document[name] for name in self.spans):
            stages = [
                [Span(s["start"], s["end"], s["replacement"]) for s in document[name] or ()] for name in self.spans
            ]
            messages = with_spans(messages, stages)
        ordered = [{k: m[k] for k in MESSAGE_KEYS if k in m} for m in messages]
        record: dict[str, Any] = {"conversations": ordered, "images": conversation["images"]}
        if self.provenance:
            about = {"doc_id": "doc_id", "source": "source", "domain": "chat.domain", "license": "license"}
            record["provenance"] = {name: document[column] for name, column in about.items()}
        return record

    def text(self, record: dict[str, Any]) -> str:
        return render(record["conversations"])[0]


def sft(job: Job) -> Outcome:
    """Write the lines of all datasets."""
    config: SftConfig = job.config
    return export(job, Line(config.spans, config.provenance), (*ABOUT, "chat.domain", *config.spans))


def export(job: Job, make: Make, columns: tuple[str, ...]) -> Outcome:
    """Lines of all datasets that have conversations, as `make` makes them."""
    libraries = {name: version(name) for name in job.stage.libraries}
    look = last_look(job)
    code = digest([job.stage.version, identity_fields(job.config), look.fingerprint if look else "", libraries])
    outputs: dict[str, dict[str, Any]] = {}
    reports = []
    for dataset in job.datasets:
        work = LineUnits(dataset, job.instance, job.config.where, columns, make, code, job.config.batch_bytes, look)
        units = [Unit(s.name, s, s.text_bytes) for s in dataset.shards]
        made = job.engine.run_units(work, units, f"{job.instance}: {dataset.name}")
        outputs.update({f"{dataset.name}/{r.unit}": r.value for r in made})
        reports += made
    reasons, domains = (summed(list(outputs.values()), name) for name in ("reasons", "domains"))
    accounts = {
        "considered": sum(o["considered"] for o in outputs.values()),
        "records": sum(o["rows"] for o in outputs.values()),
        "bytes": sum(o["bytes"] for o in outputs.values()),
        **{f"left_out.{reason}": n for reason, n in reasons.items()},
        **{f"domain.{name}": n for name, n in domains.items()},
    }
    return Outcome(outputs, accounts=accounts, observed=total(reports), cleanup=_stale(job, outputs))


def _stale(job: Job, outputs: Mapping[str, Any]) -> list[str]:
    """Files of shards and datasets that are gone: who reads all lines of a folder must not meet them."""
    found = [f"{d}/{name}" for d in job.root.names(job.instance) for name in job.root.names(f"{job.instance}/{d}")]
    written = {f"{name}.{suffix}" for name in outputs for suffix in SUFFIXES}
    return [f"{job.instance}/{name}" for name in found if name not in written]


STAGE = Stage(
    name="sft",
    kind=Kind.EXPORT,
    config=SftConfig,
    fn=sft,
    version=2,  # 2: the final text may be held against an index
    reads=reads,
    resources=Resources(memory_gb=1.0),
)
