"""Scopes: which datasets are deduplicated against each other; and what every dedup stage begins and ends with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from core.dataset import Dataset
from core.engines.contract import Frame, Unit
from core.errors import ConfigError
from core.job import Job
from core.predicate import Predicate
from core.rows import of_dataset, pack

Scopes = tuple[tuple[str, ...], ...]


def scope_numbers(stage: str, scopes: Scopes, names: Sequence[str]) -> dict[str, int]:
    """The scope of each dataset in `names`. No scopes: one for all. A dataset that no scope names is a scope by itself."""
    if not scopes:
        return dict.fromkeys(names, 0)
    listed = [name for scope in scopes for name in scope]
    problems = [
        f"{stage}: scopes name the unknown dataset {n!r}, expected one of {list(names)}"
        for n in listed
        if n not in names
    ]
    problems += [
        f"{stage}: scopes name {n!r} twice; a dataset belongs to one scope" for n in set(listed) if listed.count(n) > 1
    ]
    if problems:
        raise ConfigError(*sorted(problems))
    numbers = {name: i for i, scope in enumerate(scopes) for name in scope}
    rest = [name for name in sorted(names) if name not in numbers]
    return numbers | {name: len(scopes) + i for i, name in enumerate(rest)}


@dataclass(frozen=True)
class Source:
    """What one unit of a scan reads: a shard and the scope of its dataset."""

    dataset: Dataset
    shard: int
    scope: int


def source_units(datasets: Sequence[Dataset], scopes: dict[str, int]) -> list[Unit]:
    """One unit for each shard."""
    return [
        Unit(f"{d.name}/{s.name}", Source(d, i, scopes[d.name]), s.text_bytes)
        for d in datasets
        for i, s in enumerate(d.shards)
    ]


def read_rows(
    source: Source, columns: Sequence[str], where: str | None, batch_bytes: int
) -> Iterator[tuple[Any, pa.RecordBatch]]:
    """(`row` int64 [n], batch of `columns`) of a shard, without the rows for which `where` does not hold."""
    predicate = Predicate(where) if where else None
    wanted = list(dict.fromkeys([*columns, *(predicate.columns if predicate else ())]))
    start = 0
    for batch in source.dataset.read(source.dataset.shards[source.shard], wanted, batch_bytes):
        rows = pack(source.dataset.ordinal, source.shard, np.arange(start, start + batch.num_rows))
        start += batch.num_rows
        if predicate is not None:
            live = predicate.holds({c: batch.column(c) for c in predicate.columns})
            rows, batch = rows[live], batch.filter(pa.array(live))
        if batch.num_rows:
            yield rows, batch.select(list(columns))


def align_all(job: Job, found: Frame, own: pa.Schema) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """The layer of every dataset from one frame of `row` + `own` columns over all of them."""
    layers = {}
    for dataset in job.datasets:
        mine = found
        if len(job.datasets) > 1:
            label = f"{job.instance}: rows of {dataset.name}"
            mine = job.engine.map(found, partial(of_dataset, dataset.ordinal), found.schema, label)
        layers[dataset.name, job.instance] = job.align(mine, dataset, job.instance, own)
    return layers
