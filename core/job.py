"""What a stage other than annotate is called with, and what it gives back to the runner."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from core.dataset import Dataset
from core.engines.contract import Align, Engine, Report
from core.layer import committed, layer_output, layer_schema, write_layer
from core.progress import Display, quiet
from core.rows import local_of
from core.schema import TEXT
from core.stage import Artifacts, Stage
from core.storage import Root


@dataclass(frozen=True)
class Job:
    """One stage to run. `identity` is the digest under which its scratch files live and its output is committed."""

    stage: Stage
    instance: str  # the stage's name in the config, such as select@final
    config: Any  # an instance of stage.config
    root: Root
    engine: Engine
    datasets: tuple[Dataset, ...]
    identity: str
    source: Any = None  # the source's config, for capture and ingest
    source_name: str = ""
    artifacts: Artifacts = field(default_factory=dict)
    display: Display = field(default_factory=quiet)
    policy: Mapping[str, Any] = field(default_factory=dict)  # the config's policy, for select
    code: str = ""  # digest of the identity without inputs: what a single unit's identity begins with
    stall_s: float = 600.0  # a worker that gives no sign for so long is replaced

    def dataset(self, name: str) -> Dataset:
        return next(d for d in self.datasets if d.name == name)

    def align(self, frame: Any, dataset: Dataset, layer: str, own: pa.Schema) -> dict[str, dict[str, Any]]:
        """Write `layer` of one dataset from a frame of `row` + `own` columns; rows without an entry are computed nulls.
        Returns the manifest outputs by shard."""
        write = _AlignedWriter(dataset, layer, own, self.identity)
        target = Align(write, len(dataset.shards), dataset.ordinal, f"{self.instance}: {dataset.name}.{layer}")
        reports = self.engine.align(frame, target)
        return {r.unit: layer_output(r.value) for r in sorted(reports, key=lambda r: r.unit)}


@dataclass(frozen=True)
class _AlignedWriter:
    dataset: Dataset
    layer: str
    own: pa.Schema
    unit: str

    def __call__(self, ordinal: int, rows: pa.Table) -> Report:
        shard = self.dataset.shards[ordinal]
        note = committed(self.dataset, self.layer, shard, self.unit)
        if note is not None:
            return Report(shard.name, docs=shard.rows, resumed=True, value=note)
        table = spread(rows, shard.rows, self.own)
        note = write_layer(self.dataset, self.layer, shard, self.own, [table], self.unit)
        return Report(shard.name, docs=shard.rows, value=note)


def spread(rows: pa.Table, count: int, own: pa.Schema) -> pa.Table:
    """A layer table of `count` computed rows: `rows` (sorted by `row`, each at most once) at their places, nulls elsewhere."""
    place = np.full(count, -1, dtype=np.int64)
    local = local_of(rows.column("row").to_numpy())
    if len(local) and (local[-1] >= count or np.any(np.diff(local) <= 0)):
        raise ValueError(f"align: rows must be unique and below {count}, got {len(local)} rows up to {local[-1]}")
    place[local] = np.arange(len(local))
    index = pa.array(place, mask=place < 0)
    columns = {f.name: rows.column(f.name).take(index) for f in own}
    head = [pa.array(np.ones(count, bool)), pa.nulls(count, TEXT)]
    return pa.Table.from_arrays([*head, *columns.values()], schema=layer_schema(own))


@dataclass
class Outcome:
    """What a job put out. `layers` maps (dataset, layer) to outputs by shard and becomes layer manifests."""

    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[tuple[str, str], dict[str, dict[str, Any]]] = field(default_factory=dict)
    accounts: dict[str, int] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)  # ingest: what each unit of input became
    cleanup: list[str] = field(default_factory=list)  # names to remove once the manifest is written


def total(reports: Iterable[Report]) -> dict[str, Any]:
    """The figures every stage reports, from its units."""
    docs = size = peak = resumed = 0
    busy_s = 0.0
    for r in reports:
        docs, size, resumed = docs + r.docs, size + r.bytes, resumed + r.resumed
        peak, busy_s = max(peak, r.peak_memory_bytes), busy_s + r.seconds
    return {
        "docs": docs,
        "bytes": size,
        "peak_memory_bytes": peak,
        "resumed_units": resumed,
        "busy_s": round(busy_s, 3),
    }
