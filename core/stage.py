"""What a stage is: a function over Arrow data plus one frozen config. The runner and the engines know nothing else of it.

Two shapes of `fn`, told apart by the kind:

- *annotate*: `fn(state, batch) -> (layer batch, rejects)`. `batch` holds the columns named in `Stage.reads`; the layer batch
  holds the columns of `Stage.layer`, one row per input row, same order. `state = open(config, artifacts)` once per worker.
- every other kind: `fn(job: core.job.Job) -> core.job.Outcome`, which uses the verbs of `job.engine`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

if TYPE_CHECKING:  # `pipelines stages` reads this module, and answers before Arrow would be loaded
    import pyarrow as pa


class Kind(StrEnum):
    """What the runner may do with a stage: only annotate stages fuse and resume per shard; relate stages shuffle."""

    CAPTURE = "capture"  # crawl, harvest, paid answers: commits a log from which determinism starts
    INGEST = "ingest"  # records to documents
    ANNOTATE = "annotate"  # one document at a time: documents to a layer
    RELATE = "relate"  # documents to relations and aligned layers
    DECIDE = "decide"  # layers to a fate
    MAKE = "make"  # documents to new documents of the next generation
    EXPORT = "export"  # shards, mixtures, models, reports


def _beside_config(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    if folder is None or "://" in value:
        return value
    return str(Path(folder, Path(value).expanduser()))


# A local path or URL in a config; relative ones are meant from the config file's folder.
ConfigPath = Annotated[str, AfterValidator(_beside_config)]


class StageConfig(BaseModel):
    """Base of every stage's knobs. A field with `execution()` never enters the identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[str, ...] | None = Field(default=None, description="work on these datasets only; default: all")
    where: str | None = Field(
        default=None,
        description="compute only rows for which this predicate over layers holds, e.g. `fate@eligible`; refused by stages that "
        "choose no rows",
    )


def execution(default: Any, description: str) -> Any:
    """A config field that says how to run, not what to compute: workers, credentials, paths, batch sizes."""
    return Field(default=default, description=description, json_schema_extra={"execution": True})


def identity_fields(config: BaseModel) -> dict[str, Any]:
    """The config as JSON-like values without the fields marked `execution`, for the identity of a run."""
    skip = {
        name
        for name, f in type(config).model_fields.items()
        if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("execution")
    }
    return config.model_dump(mode="json", exclude=skip)


class Reject(NamedTuple):
    """One row of a batch on which a stage failed. `row` counts within the batch."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Resources:
    """What one worker of this stage needs. `ray` and `spark` reserve it on a cluster; `local` has what `engine.workers` says."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 1.0
    load_once: bool = False  # a model is loaded when a worker begins, so workers should live on from unit to unit

    def joined(self, other: "Resources") -> "Resources":
        """What one worker needs that does the work of both."""
        return Resources(
            max(self.cpus, other.cpus),
            max(self.gpus, other.gpus),
            max(self.memory_gb, other.memory_gb),
            self.load_once or other.load_once,
        )


Artifacts = Mapping[
    str, str
]  # name -> local path of a model, tokenizer or benchmark whose fingerprint enters the identity
ROOT = "root"  # artifact of annotate stages that read other stages' outputs ("@raters"): the URL of the root, in no identity


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline. `version` moves whenever the output for the same input and config could change."""

    name: str
    kind: Kind
    config: type[StageConfig]
    fn: Callable[..., Any]
    version: int = 1
    # Document columns ("text"), layer columns ("language.score"), and other stages' outputs ("@tokenizer"); what depends on
    # knobs is a function of the config. Everything read here enters the identity.
    reads: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    layer: "pa.Schema | None" = None  # the stage's own columns; `computed` and `error` are added by the writer
    open: Callable[[Any, Artifacts], Any] | None = None  # None: the state is the config itself
    artifacts: Callable[[Any], Artifacts] | None = None
    libraries: tuple[str, ...] = ()  # distributions whose versions enter the identity
    resources: Resources = field(default_factory=Resources)
    per_dataset: bool = False  # capture: once for each source whose kind is the stage's name, not once for the root
    where: bool = True  # whether the knob `where` has a meaning here; a config that sets it elsewhere is refused

    def columns(self, config: Any) -> tuple[str, ...]:
        """What this stage reads under `config`, in order."""
        return self.reads(config) if callable(self.reads) else self.reads
