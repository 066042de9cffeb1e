"""Annotate stages over shards: documents are read once for all stages of a group, each writes its own layer.

A stage's function may raise on a batch: the batch is halved until the one document is found, which is rejected and named. A
document that kills the worker is found by the engine (see `core.engines.pool`), which then calls the unit with `poison`: numbers
of (row, stage) pairs, so that a killer costs the stage it killed and no other of the group.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import pyarrow as pa

from core.dataset import Dataset, Shard
from core.engines.contract import BATCH_BYTES, NO_ROW, Engine, Note, Report, Unit
from core.errors import ConfigError, RetryableError, StageError
from core.hashing import digest
from core.layer import committed, empty_rows, layer_output, layer_schema, write_layer
from core.predicate import Predicate
from core.records import well_formed
from core.schema import REJECTS
from core.stage import Artifacts, Reject, Resources, Stage

DETAIL_CHARS = 300  # of an exception's message in a reject

log = logging.getLogger("stepwell")


@dataclass(frozen=True)
class AnnotateRun:
    """One stage to compute on one dataset. `code` is the digest of its identity without the inputs."""

    stage: Stage
    layer: str
    config: Any
    artifacts: Artifacts
    code: str

    @cached_property
    def where(self) -> Predicate | None:
        return Predicate(self.config.where) if self.config.where else None

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return tuple(c for c in self.stage.columns(self.config) if not c.startswith("@"))  # models are opened, not read

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.reads, *(self.where.columns if self.where else ())]))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(sorted({c.rpartition(".")[0] for c in self.columns if "." in c}))

    def unit(self, dataset: Dataset, shard: Shard, fresh: dict[str, str]) -> str:
        """Identity of this stage's output for one shard: code, documents, and the layers it reads."""
        inputs = {}
        for layer in self.layers:
            if layer not in fresh:
                note = dataset.root.note(dataset.layer_name(layer, shard))
                fresh[layer] = note["content"] if note else ""
            inputs[layer] = fresh[layer]
        return digest([self.code, shard.content, inputs])


@dataclass(frozen=True)
class AnnotateUnits:
    """The function the engine runs on each shard. Commits one layer shard a stage, in order."""

    dataset: Dataset
    runs: tuple[AnnotateRun, ...]
    batch_bytes: int = BATCH_BYTES

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        notes: dict[str, dict[str, Any]] = {}
        fresh: dict[str, str] = {}
        todo = self._uncommitted(shard, notes, fresh)
        if todo:
            tables, rejects = self._compute(shard, todo, unit, note)
            for run in todo:
                self._write_rejects(shard, run.layer, rejects[run.layer])
                made = write_layer(
                    self.dataset,
                    run.layer,
                    shard,
                    run.stage.layer,
                    tables[run.layer],
                    run.unit(self.dataset, shard, fresh),
                )
                notes[run.layer] = made
                fresh[run.layer] = made["content"]
        value = {layer: layer_output(n) for layer, n in notes.items()}
        return Report(unit.name, docs=shard.rows, bytes=shard.text_bytes if todo else 0, resumed=not todo, value=value)

    def _uncommitted(self, shard: Shard, notes: dict[str, Any], fresh: dict[str, str]) -> list[AnnotateRun]:
        """The runs still to do. A run that reads the layer of one that is to do again is to do again."""
        todo: list[AnnotateRun] = []
        for run in self.runs:
            stale = any(other.layer in run.layers for other in todo)
            found = None if stale else committed(self.dataset, run.layer, shard, run.unit(self.dataset, shard, fresh))
            if found is None:
                todo.append(run)
            else:
                notes[run.layer], fresh[run.layer] = found, found["content"]
        return todo

    def _compute(
        self, shard: Shard, todo: Sequence[AnnotateRun], unit: Unit, note: Note
    ) -> tuple[dict[str, list[pa.Table]], dict[str, list[Reject]]]:
        made = {run.layer for run in todo}
        stored = sorted({c for run in todo for c in run.columns if c.rpartition(".")[0] not in made} | {"doc_id"})
        tables: dict[str, list[pa.Table]] = {run.layer: [] for run in todo}
        rejects: dict[str, list[Reject]] = {run.layer: [] for run in todo}
        start = 0
        for code in set(_states) - {run.code for run in self.runs}:
            del _states[code]  # models of stages that are over
        for run in todo:
            opened(run)  # a model that cannot be loaded stops the stage; inside a batch it would cost every document
        for batch in self.dataset.read(shard, stored, self.batch_bytes):
            columns = {name: batch.column(name) for name in batch.schema.names}
            for run in todo:
                seat = Seat(start, self.runs.index(run), len(self.runs), unit, note)
                table, bad = annotate_batch(run, columns, batch.num_rows, seat)
                tables[run.layer].append(table)
                rejects[run.layer] += bad
                columns.update({f"{run.layer}.{c}": table.column(c).combine_chunks() for c in table.column_names})
            start += batch.num_rows
            note(docs=batch.num_rows, bytes=batch.nbytes)
        return tables, rejects

    def _write_rejects(self, shard: Shard, layer: str, rejects: Sequence[Reject]) -> None:
        root, name = self.dataset.root, rejects_name(self.dataset.name, layer, shard.name)
        if not rejects:
            if root.exists(name):
                root.remove(name)
            return
        about = self.dataset.read_table(shard, ["doc_id", "origin"]).take([r.row for r in rejects])
        reasons = pa.array([r.reason for r in rejects], pa.large_string())
        details = pa.array([r.detail for r in rejects], pa.large_string())
        table = about.append_column("reason", reasons).append_column("detail", details)
        root.write_table(name, [table.cast(REJECTS)], REJECTS)


def annotate(engine: Engine, dataset: Dataset, runs: Sequence[AnnotateRun], stall_s: float) -> list[Report]:
    """Compute the layers of `runs` for every shard; reports in shard order, `value` = {layer: manifest output}."""
    units = [Unit(s.name, s, s.text_bytes) for s in dataset.shards]
    label = f"{dataset.name}: {', '.join(r.layer for r in runs)}"
    needs = reduce(Resources.joined, (r.stage.resources for r in runs))
    needs = needs.joined(Resources(load_once=any(r.stage.open is not None for r in runs)))
    return engine.run_units(AnnotateUnits(dataset, tuple(runs), engine.batch_bytes), units, label, stall_s, needs)


def forget_rejecting(dataset: Dataset, layer: str, reports: Sequence[Report]) -> None:
    """Shards with rejects are computed anew by the next run: the cause may be mended outside of anything an identity knows."""
    for shard, report in zip(dataset.shards, reports, strict=True):
        if report.value[layer]["rejected"]:
            dataset.root.remove(dataset.layer_name(layer, shard))


def rejects_name(dataset: str, stage: str, shard: str) -> str:
    return f"datasets/{dataset}/rejects/{stage}/{shard}.parquet"


_states: dict[str, Any] = {}  # once per worker: code digest -> what `open` returned


def opened(run: AnnotateRun) -> Any:
    """The stage's state in this process, opened on first use (a model is loaded once per worker)."""
    if run.stage.open is None:
        return run.config
    if run.code not in _states:
        _states[run.code] = run.stage.open(run.config, run.artifacts)
    return _states[run.code]


@dataclass(frozen=True)
class Seat:
    """Where a batch stands: its first row in the shard, and the number of its stage among the group's."""

    start: int
    number: int
    stages: int
    unit: Unit
    note: Note

    def poisoned(self) -> set[int]:
        """Rows of the shard that killed a worker in this stage."""
        return {p // self.stages for p in self.unit.poison if p % self.stages == self.number}

    def killed_last(self, row: int) -> bool:
        """Whether this row of the shard is the newest of those that killed: the others were named before."""
        return self.unit.poison[-1] == row * self.stages + self.number

    def sign(self, row: int) -> None:
        """Say which row of the batch is next, before it is touched."""
        self.note(row=(self.start + row) * self.stages + self.number)


def annotate_batch(run: AnnotateRun, columns: dict[str, Any], rows: int, seat: Seat) -> tuple[pa.Table, list[Reject]]:
    """Layer rows for one batch, and rejects by row of the shard."""
    live = run.where.holds(columns) if run.where else np.ones(rows, dtype=bool)
    errors: dict[int, tuple[str, str]] = {}
    for row in seat.poisoned():
        here = row - seat.start
        if 0 <= here < rows and live[here]:
            errors[here] = ("worker_lost", "the worker died or hung on this document")
            live[here] = False
            if seat.killed_last(row):
                log.warning("%s: document %s ended its worker and is rejected", run.layer, columns["doc_id"][here])
    at = np.flatnonzero(live)
    batch = pa.RecordBatch.from_arrays([columns[c] for c in run.reads], names=list(run.reads))
    batch = batch if len(at) == rows else batch.take(pa.array(at))
    pieces = list(_guarded(run, batch, at, errors, seat.sign if seat.unit.cautious else None))
    if seat.unit.cautious:
        seat.note(row=NO_ROW)  # whatever kills the worker from here on is not the last row's fault
    table = _scatter(run, pieces, rows, errors)
    return table, [Reject(seat.start + row, reason, detail) for row, (reason, detail) in sorted(errors.items())]


def _guarded(
    run: AnnotateRun,
    batch: pa.RecordBatch,
    at: np.ndarray,
    errors: dict[int, tuple[str, str]],
    sign: Callable[[int], None] | None,
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """(rows, layer batch) pieces; rows on which the stage raises go to `errors`. With `sign`, one row at a time."""
    if batch.num_rows == 0:
        return
    if sign is not None and batch.num_rows > 1:
        for i in range(batch.num_rows):
            yield from _guarded(run, batch.slice(i, 1), at[i : i + 1], errors, sign)
        return
    if sign is not None:
        sign(int(at[0]))
    try:
        made, rejects = run.stage.fn(opened(run), batch)
        if made.num_rows != batch.num_rows:
            raise ValueError(f"{run.stage.name}: gave {made.num_rows} rows for {batch.num_rows}")
    except (MemoryError, ConfigError, StageError, RetryableError):
        raise  # not one document's doing
    except Exception as e:  # noqa: BLE001 - whatever one document does, it costs that document only
        if batch.num_rows == 1:
            errors[int(at[0])] = (type(e).__name__, well_formed(str(e))[0][:DETAIL_CHARS])
            return
        half = batch.num_rows // 2
        yield from _guarded(run, batch.slice(0, half), at[:half], errors, sign)
        yield from _guarded(run, batch.slice(half), at[half:], errors, sign)
        return
    for reject in rejects:
        errors[int(at[reject.row])] = (reject.reason, well_formed(reject.detail)[0][:DETAIL_CHARS])
    yield at, made


def _scatter(
    run: AnnotateRun, pieces: Sequence[tuple[np.ndarray, pa.RecordBatch]], rows: int, errors: dict[int, tuple[str, str]]
) -> pa.Table:
    """One layer table of all rows: computed ones at their places, nulls elsewhere, errors where rejected."""
    own = run.stage.layer
    assert own is not None
    done = np.zeros(rows, dtype=bool)
    index = np.full(rows, -1, dtype=np.int64)
    offset = 0
    for at, _ in pieces:
        done[at] = True
        index[at] = offset + np.arange(len(at))
        offset += len(at)
    bad = list(errors)
    done[bad], index[bad] = False, -1
    if not pieces:
        table = empty_rows(own, rows)
    else:
        made = pa.Table.from_batches([p.select(own.names).cast(own) for _, p in pieces]).combine_chunks()
        taken = made.take(pa.array(index, mask=index < 0))
        head = [pa.array(done), pa.nulls(rows, pa.large_string())]
        table = pa.Table.from_arrays([*head, *taken.columns], schema=layer_schema(own))
    if errors:
        messages: list[str | None] = [None] * rows
        for row, (reason, detail) in errors.items():
            messages[row] = f"{reason}: {detail}"
        table = table.set_column(1, table.schema.field("error"), pa.array(messages, pa.large_string()))
    return table
