"""Datasets, layers and engines for tests, made from a few lines of text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.annotate import AnnotateRun, annotate
from core.dataset import DOCUMENTS_INSTANCE, Dataset, Shard, open_dataset
from core.engines.contract import Unit
from core.hashing import digest, document_id, table_digest
from core.job import Job, Outcome
from core.layer import write_layer
from core.manifest import Identity, Manifest, read_manifest, write_manifest
from core.schema import DOCUMENTS
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from pipelines.config import StageEntry
from pipelines.plan import models_of, opened_with


def document(source: str, path: str, text: str, **more: Any) -> dict[str, Any]:
    """One row of `DOCUMENTS`; `more` overrides columns."""
    row = {
        "doc_id": document_id(source, path, text),
        "text": text,
        "url": None,
        "source": source,
        "kind": "other",
        "license": None,
        "fetched_at": None,
        "origin": {"path": path, "offset": None, "length": None},
        "metadata": "{}",
    }
    return {**row, **more}


def documents(source: str, texts: Iterable[str], start: int = 0) -> pa.Table:
    """A table of documents with the given texts."""
    rows = [document(source, f"{source}/{start + i:05d}", text) for i, text in enumerate(texts)]
    return pa.Table.from_pylist(rows, schema=DOCUMENTS)


def make_dataset(
    root: Root, name: str, shards: Sequence[Sequence[str] | pa.Table], ordinal: int = 0, row_group: int = 0
) -> Dataset:
    """A committed dataset with one shard for each sequence of texts (or table of documents)."""
    made, start = [], 0
    for i, texts in enumerate(shards):
        table = texts if isinstance(texts, pa.Table) else documents(name, texts, start)
        start += table.num_rows
        shard = Shard(f"s{i:03d}", table.num_rows, table.column("text").nbytes, table_digest(table))
        step = row_group or max(1, table.num_rows)
        groups = [table.slice(at, step) for at in range(0, table.num_rows, step)]
        root.write_table(f"datasets/{name}/documents/{shard.name}.parquet", groups, DOCUMENTS)
        made.append(shard)
    outputs = {s.name: {"rows": s.rows, "text_bytes": s.text_bytes, "content": s.content} for s in made}
    write_manifest(root, Manifest(DOCUMENTS_INSTANCE, name, Identity("test", 1, {}, {}), outputs))
    dataset = open_dataset(root, name, ordinal)
    assert dataset is not None
    return dataset


def make_layer(
    dataset: Dataset, layer: str, columns: Mapping[str, pa.Array], unit: str = "unit"
) -> list[dict[str, Any]]:
    """A layer whose columns are given for all rows of the dataset, in shard order."""
    own = pa.schema([pa.field(n, c.type) for n, c in columns.items()])
    notes, start = [], 0
    for shard in dataset.shards:
        head = {"computed": pa.array([True] * shard.rows, pa.bool_()), "error": pa.nulls(shard.rows, pa.large_string())}
        mine = {n: c.slice(start, shard.rows) for n, c in columns.items()}
        notes.append(write_layer(dataset, layer, shard, own, [pa.table({**head, **mine})], unit))
        start += shard.rows
    return notes


def make_job(
    root: Root, engine: Any, source: str = "src", datasets: tuple[Dataset, ...] = (), code: str = "code"
) -> Job:
    """A job of a stage that does nothing by itself."""
    stage = Stage(name="test", kind=Kind.RELATE, config=StageConfig, fn=lambda job: None)
    return Job(stage, "test", StageConfig(), root, engine, datasets, "identity", source_name=source, code=code)


def annotate_all(job: Job) -> Outcome:
    """An annotate stage on every dataset of a job, opened as the runner opens it. Accounts: rows, computed, rejected of all."""
    entry = StageEntry(job.instance, job.stage, job.config)
    models = {name: read_manifest(job.root, name[1:], None) for name in models_of(entry)}
    contents = {name: m.content() if m else None for name, m in models.items()}
    code = digest([job.stage.name, job.config.model_dump(mode="json"), contents])
    run = AnnotateRun(job.stage, job.instance, job.config, opened_with(entry, job.root), code)
    accounts = dict.fromkeys(("rows", "computed", "rejected"), 0)
    for dataset in job.datasets:
        made = {r.unit: r.value[job.instance] for r in annotate(job.engine, dataset, [run], stall_s=120.0)}
        write_manifest(job.root, Manifest(job.instance, dataset.name, Identity(job.stage.name, 1, {}, {}), made))
        accounts = {key: n + sum(out[key] for out in made.values()) for key, n in accounts.items()}
    return Outcome(accounts=accounts)


def tree_digest(root: Root, folder: str) -> dict[str, str]:
    """Logical content of every Parquet file below a folder of a local root, by relative name."""
    base = Path(root.path(folder))
    return {
        str(p.relative_to(base)): table_digest(root.read_table(f"{folder}/{p.relative_to(base)}"))
        for p in sorted(base.rglob("*.parquet"))
    }


def strays(root: Root) -> list[str]:
    """Temporary files below a local root."""
    return sorted(str(p) for p in Path(root.base).rglob("*.tmp"))


def table_units(*tables: pa.Table) -> list[Unit]:
    """Units whose payload is a table, for `engine.scan` with `rows_of`."""
    return [Unit(f"u{i}", t) for i, t in enumerate(tables)]


def rows_of(unit: Unit) -> list[pa.RecordBatch]:
    """What `table_units` hold."""
    return unit.payload.to_batches()
