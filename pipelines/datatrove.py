"""Any annotate stage as a step of a datatrove pipeline: documents pass through and get the stage's layer into their metadata.

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from pipelines.datatrove import Step

    if __name__ == "__main__":
        LocalPipelineExecutor(
            [
                JsonlReader("notes", glob_pattern="*.jsonl", add_file_path=False),
                Step("language"),
                Step("signals", config={"short_line_chars": 40}, drop="signals.words < 8 or language.score < 0.2"),
                JsonlWriter("judged"),
            ],
            tasks=2,
            workers=2,
        ).run()

In: datatrove Documents. Out: the same, in the same order; `metadata["signals"]` is the row that our runner would write into the
layer `signals`: `computed`, `error`, then the stage's columns. Values do not depend on batch sizes, tasks or workers.

- Columns that a stage reads: `text`; `doc_id` is the document's id; `url`, `source`, `kind`, `license` are looked for in the
  metadata and null where absent; `language.score` is what an earlier Step("language") wrote, null where none did. A stage that
  reads relations cannot run here, where one document is seen at a time; models that ours have made are read from `root`.
- A document on which the stage fails is kept, with the reason in `error`, and counted as `rejected` in datatrove's statistics.
- `drop` is a predicate as in a policy, over all of these columns and those of the stage. One that is unknown (null) drops nothing
  and is counted as `unjudged`. Dropped documents go to `exclusion_writer`, with `filter_reason` in their metadata.
- datatrove lets lone surrogates pass, and its writers fail on them: here they become U+FFFD, counted as `lone_surrogates`.
  A document without an id gets one from its content (`without_id`), one without a text an empty one (`without_text`). A value
  that an earlier step's layer cannot hold is null (`unreadable`).

The way back is a source `{kind: datatrove, reader: datatrove.pipeline.readers.JsonlReader, arguments: {add_file_path: false}}`.
Cost: that of the stage and 0.06 to 0.11 ms a document besides (1,634 pages of 8 kB: 9 to 17% of `language`, `signals`, `pii`).
Memory: one batch of documents, their columns and what the stage takes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.typeshelper import StatHints
from pydantic import ValidationError

from core.annotate import AnnotateRun, Seat, annotate_batch, opened
from core.engines.contract import Unit
from core.errors import ConfigError
from core.hashing import digest, document_id
from core.layer import layer_schema
from core.predicate import Predicate
from core.records import well_formed
from core.schema import TEXT
from core.stage import ROOT, Kind, Stage, StageConfig
from pipelines.stages import BY_NAME, load

BATCH_ROWS = 1000  # as datatrove's readers hand them on
BATCH_BYTES = 8 << 20  # of text; kernels cut further by themselves: chosen, untested
FROM_METADATA = ("url", "source", "kind", "license")
COLUMNS = ("text", "doc_id", *FROM_METADATA)


class Step(PipelineStep):
    """One annotate stage, by its name in `pipelines stages`; `signals@strict` is the stage `signals` under that layer name.

    ConfigError, before anything runs, for what cannot work in a datatrove pipeline."""

    type = "stepwell"

    def __init__(
        self,
        stage: str,
        config: Mapping[str, Any] | StageConfig | None = None,
        drop: str | None = None,
        reason: str | None = None,
        exclusion_writer: Any = None,
        root: str | None = None,
        batch_rows: int = BATCH_ROWS,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self.name = self.layer = stage
        super().__init__()
        self.config = _config(_stage(stage), config)
        self.drop = Predicate(drop) if drop else None
        self.reason = reason or stage
        self.exclusion_writer = exclusion_writer
        self.root = root
        self.batch_rows, self.batch_bytes = batch_rows, batch_bytes
        for column in self._annotation().columns:
            _type(stage, column)
        for predicate in (self.drop, Predicate(self.config.where) if self.config.where else None):
            if predicate:  # over no rows: types that cannot be compared are found now
                predicate.evaluate({column: pa.array([], _type(stage, column)) for column in predicate.columns})

    def run(self, data: Iterable[Document] | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents, annotated, without those that `drop` names."""
        run = self._annotation()
        opened(run)  # a model that cannot be loaded stops the task, not every document of it
        with self.exclusion_writer or nullcontext() as writer:
            for batch in self._batches(data or ()):
                with self.track_time("batch"):
                    falls = self._annotate(run, batch)
                for document, fallen in zip(batch, falls, strict=True):
                    self.stat_update(StatHints.total, StatHints.dropped if fallen else StatHints.forwarded)
                    if not fallen:
                        self.update_doc_stats(document)
                        yield document
                        continue
                    self.stat_update(f"dropped_{self.reason}")
                    if writer:
                        document.metadata["filter_reason"] = self.reason
                        writer.write(document, rank)

    def _annotation(self) -> AnnotateRun:
        """The stage as the runner would call it. Made where it is used: a worker gets the Step itself, which is small."""
        stage = _stage(self.layer)
        artifacts = dict(stage.artifacts(self.config) if stage.artifacts else {})
        reads = stage.columns(self.config)
        models = [column for column in reads if column.startswith("@")]
        if models and self.root is None:
            raise ConfigError(
                f"{self.layer}: reads {models[0]!r}, made by a stage of ours; name its finished root in `root`"
            )
        if models and self.root:
            artifacts[ROOT] = self.root
        stage = replace(stage, reads=tuple(column for column in reads if column not in models))
        code = digest([self.layer, stage.version, self.config.model_dump(mode="json"), artifacts])
        return AnnotateRun(stage, self.layer, self.config, artifacts, code)

    def _batches(self, data: Iterable[Document]) -> Iterator[list[Document]]:
        """Documents made fit for columns. A batch ends with the document that reaches one of the limits."""
        batch: list[Document] = []
        size = 0
        for document in data:
            batch.append(document)
            size += self._mend(document)
            if len(batch) >= self.batch_rows or size >= self.batch_bytes:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _mend(self, document: Document) -> int:
        """Valid UTF-8 and an id, in place; returns the bytes of text."""
        if not isinstance(document.text, str):
            document.text = ""
            self.stat_update("without_text")
        document.text, replaced = well_formed(document.text)
        if replaced:
            self.stat_update("lone_surrogates", value=replaced)
        if not document.id:
            source, url = (_text(document.metadata.get(name)) or "" for name in ("source", "url"))
            document.id = document_id(source, url, document.text)
            self.stat_update("without_id")
        return len(document.text.encode())

    def _annotate(self, run: AnnotateRun, batch: list[Document]) -> list[bool]:
        """Write the layer into each document's metadata; whether each is to be dropped."""
        wanted = dict.fromkeys([*run.columns, *(self.drop.columns if self.drop else ())])
        columns = {name: self._column(name, batch) for name in wanted if name.rpartition(".")[0] != self.layer}
        seat = Seat(0, 0, 1, Unit(self.layer), lambda **_: None)
        table, rejects = annotate_batch(run, columns, len(batch), seat)
        for document, row in zip(batch, table.to_pylist(), strict=True):
            document.metadata[self.layer] = row
        for reject in rejects:
            self.stat_update("rejected", f"rejected_{reject.reason}")
        if self.drop is None:
            return [False] * len(batch)
        columns |= {f"{self.layer}.{name}": table.column(name).combine_chunks() for name in table.column_names}
        falls = self.drop.evaluate(columns)
        if falls.null_count:
            self.stat_update("unjudged", value=falls.null_count)
        return [bool(f) for f in pc.fill_null(falls, False).to_pylist()]

    def _column(self, name: str, batch: list[Document]) -> pa.Array:
        """One column over a batch, from the documents or from what earlier steps wrote into their metadata."""
        layer, _, column = name.rpartition(".")
        if layer:
            found = [document.metadata.get(layer) for document in batch]
            values = [row.get(column) if isinstance(row, Mapping) else None for row in found]
        elif name in FROM_METADATA:
            values = [_text(document.metadata.get(name)) for document in batch]
        else:
            values = [document.text if name == "text" else well_formed(str(document.id))[0] for document in batch]
        kind = _type(self.layer, name)
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # another program's key of the same name
            fitting = [value if _fits(value, kind) else None for value in values]
            self.stat_update("unreadable", value=fitting.count(None) - values.count(None))
            return pa.array(fitting, kind)


def _stage(instance: str) -> Stage:
    name = instance.partition("@")[0]
    if name not in BY_NAME or BY_NAME[name].kind is not Kind.ANNOTATE:
        known = ", ".join(line.name for line in BY_NAME.values() if line.kind is Kind.ANNOTATE)
        raise ConfigError(f"Step: no annotate stage {name!r}, expected one of {known}")
    return load(instance)


def _config(stage: Stage, given: Mapping[str, Any] | StageConfig | None) -> StageConfig:
    try:
        config = given if isinstance(given, StageConfig) else stage.config.model_validate(dict(given or {}))
    except ValidationError as e:
        problems = [f"{stage.name}.{'.'.join(map(str, p['loc']))}: {p['msg']}, got {p['input']!r}" for p in e.errors()]
        raise ConfigError(*problems) from None
    if config.datasets is not None:
        raise ConfigError(f"{stage.name}.datasets: a datatrove pipeline has no datasets; leave it out")
    return config


def _type(stage: str, column: str) -> pa.DataType:
    """The Arrow type of a column; ConfigError for one that a datatrove document cannot have."""
    layer, _, name = column.rpartition(".")
    if not layer and column in COLUMNS:
        return TEXT
    known = BY_NAME.get(layer.partition("@")[0])
    if known is None or known.kind is not Kind.ANNOTATE:
        raise ConfigError(
            f"{stage}: reads {column!r}, which a datatrove pipeline does not have; expected one of {', '.join(COLUMNS)} "
            "or a column that an annotate stage before it has written"
        )
    own = load(layer).layer
    assert own is not None  # an annotate stage has one
    schema = layer_schema(own)
    if name not in schema.names:
        raise ConfigError(f"{stage}: layer {layer!r} has no column {name!r}, expected one of {', '.join(schema.names)}")
    return schema.field(name).type


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        return pa.array([value], kind) is not None
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False


def _text(value: Any) -> str | None:
    """A text of the metadata as valid UTF-8; None for what is no text."""
    return well_formed(value)[0] if isinstance(value, str) else None
