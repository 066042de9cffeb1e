"""Which steps a pipeline has, in the order in which they run, and which datasets each of them sees.

Sources are datasets from the start; a made dataset (source of kind `made`) exists from the stage that makes it on. Annotate
stages listed before the maker run for it right after it was made; stages that work on all datasets at once see those that exist
at their place. A layer that by config is never computed for a dataset reads as nulls there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from core.dataset import DOCUMENTS_INSTANCE, Dataset, open_dataset
from core.errors import ConfigError
from core.layer import layer_schema
from core.schema import FATE
from core.stage import Kind
from core.storage import Root
from mixtures.select import SURVIVORS, duplicates_layer, fate_layer
from pipelines.config import Pipeline, StageEntry

DOCUMENT_KINDS = (Kind.INGEST, Kind.MAKE)  # their manifest is that of the documents


@dataclass(frozen=True)
class Step:
    """One stage on one dataset, or (`dataset` None) on the whole root."""

    entry: StageEntry
    dataset: str | None

    @property
    def name(self) -> str:
        return f"{self.entry.instance} [{self.dataset}]" if self.dataset else self.entry.instance

    @property
    def manifest(self) -> str:
        """The instance name its manifest bears: who makes documents, whatever it is called, leaves `documents`."""
        return DOCUMENTS_INSTANCE if self.entry.stage.kind in DOCUMENT_KINDS else self.entry.instance


def steps(pipeline: Pipeline) -> list[Step]:
    """All steps in the order in which they run."""
    out = []
    for place, entry in enumerate(pipeline.stages):
        out += [Step(entry, name) for name in scope(pipeline, entry)]
        if entry.stage.kind is Kind.MAKE:
            made = scope(pipeline, entry)
            before = [e for e in pipeline.stages[:place] if e.stage.kind is Kind.ANNOTATE]
            out += [Step(e, name) for e in before for name in made if _wants(e, str(name))]
    return out


def between(pipeline: Pipeline, first: str | None, last: str | None) -> list[Step]:
    """The steps from stage `first` to stage `last`, both included. What runs for a made dataset stands with its maker."""
    names = [e.instance for e in pipeline.stages]
    begin = names.index(pipeline.entry(first).instance) if first else 0
    end = names.index(pipeline.entry(last).instance) if last else len(names) - 1
    if begin > end:
        raise ConfigError(f"--from {first} stands after --until {last} in {pipeline.path}")
    return [
        s for s in steps(pipeline) if begin <= max(names.index(s.entry.instance), _born(pipeline, s.dataset)) <= end
    ]


def scope(pipeline: Pipeline, entry: StageEntry) -> list[str | None]:
    """The datasets a stage runs on one by one at its own place; [None] when it works on all at once."""
    kind, sources = entry.stage.kind, pipeline.sources
    if kind is Kind.MAKE:
        return [n for n, source in sources.items() if source.kind == "made" and source.stage == entry.instance]
    if kind is Kind.CAPTURE and entry.stage.per_dataset:
        return [n for n in sources if sources[n].kind == entry.instance and _wants(entry, n)]
    if kind is Kind.INGEST:
        return [n for n in sources if sources[n].kind != "made" and _wants(entry, n)]
    return list(present(pipeline, entry)) if kind is Kind.ANNOTATE else [None]


def present(pipeline: Pipeline, entry: StageEntry) -> list[str]:
    """The datasets that a stage may read: wanted by its config and made before its place, in the order of the config."""
    place = pipeline.stages.index(entry)
    return [n for n in pipeline.sources if _born(pipeline, n) < place and _wants(entry, n)]


def _wants(entry: StageEntry, name: str) -> bool:
    return entry.config.datasets is None or name in entry.config.datasets


def _born(pipeline: Pipeline, name: str | None) -> int:
    """Place of the stage that makes a dataset; -1 for what comes from outside."""
    source = pipeline.sources[name] if name else None
    if source is None or source.kind != "made":
        return -1
    return next(i for i, e in enumerate(pipeline.stages) if e.instance == source.stage)


def absent_layers(pipeline: Pipeline, name: str) -> dict[str, pa.Schema]:
    """The layers that by config a dataset never gets, each with its columns."""
    out: dict[str, pa.Schema] = {}
    for entry in pipeline.stages:
        judged = _wants(entry, name) if entry.stage.kind is Kind.ANNOTATE else name in present(pipeline, entry)
        if not judged:
            out.update((layer, schema) for layer, schema in layers_of(entry))
    return out


def layers_of(entry: StageEntry) -> Iterator[tuple[str, pa.Schema]]:
    """Name and columns of every layer that a stage writes."""
    if entry.stage.kind is Kind.DECIDE:
        yield duplicates_layer(entry.instance), layer_schema(SURVIVORS)
        yield fate_layer(entry.instance), layer_schema(FATE)
    elif entry.stage.layer is not None:
        yield entry.instance, layer_schema(entry.stage.layer)


def dataset_at(pipeline: Pipeline, root: Root, name: str) -> Dataset | None:
    """A committed dataset as this pipeline reads it, or None without documents."""
    found = open_dataset(root, name, list(pipeline.sources).index(name))
    if found is None:
        return None
    absent = absent_layers(pipeline, name)
    return Dataset(root, name, found.ordinal, found.shards, found.generation, absent)


def datasets_of(pipeline: Pipeline, root: Root, entry: StageEntry) -> tuple[Dataset, ...]:
    """The committed datasets a stage works on. One that is missing is an error that says what to run."""
    out = []
    for name in present(pipeline, entry):
        dataset = dataset_at(pipeline, root, name)
        if dataset is None:
            source = pipeline.sources[name]
            maker = source.stage if source.kind == "made" else "extract"
            raise ConfigError(f"{entry.instance}: dataset {name!r} has no documents yet; run stage `{maker}` first")
        out.append(dataset)
    return tuple(out)
