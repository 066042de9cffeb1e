"""Deciding again after a threshold moved: seconds and memory for a million documents' layers, and proof that no text is read.

    python -m benchmarks.redecide [--docs 1000000] [--sample-mb 20] [--rounds 3]

The layers `language` and `signals` hold values measured on a sample of real text, dealt out to the documents by seeded
permutations. The documents themselves bear a short text whose bytes in the Parquet files are then overwritten: whoever reads the
text column gets an error, which is checked, and `select` must finish all the same.

What is timed is `pipelines run stage select@eligible` as a user types it, in a new process with new workers, each time after
another threshold of the policy. Peak memory is that of the largest worker (its manifest says it).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import corpus
from benchmarks.measure import Sample, timed
from benchmarks.result import REPO, Check, Result, Table, alone
from core.dataset import DOCUMENTS_INSTANCE, Dataset, Shard, open_dataset
from core.hashing import document_id, table_digest
from core.layer import layer_output, layer_schema, write_layer
from core.manifest import Identity, Manifest, read_manifest, write_manifest
from core.schema import DOCUMENTS, TEXT
from core.stage import Stage
from core.storage import Root
from pipelines.stages import load

NAME = "web"
SELECT = "select@eligible"
STAGES = ("language", "signals")
SHARD_DOCS = 65_536  # about a shard's 256 MB at 4 kB a page, so that a shard weighs here what it weighs in a crawl
FETCHED = datetime(2026, 1, 1, tzinfo=UTC)
LAYER_SECONDS = 10.0  # "seconds" for a million documents
CONFIG = """\
root: {root}
engine: {{name: local, workers: {workers}, memory_gb: 2}}
sources:
  {name}: {{kind: files, path: .}}
stages:
  language: {{}}
  signals: {{}}
  {select}: {{}}
policy:
  eligible:
    - {{drop: "signals.words < {threshold}", reason: few_words}}
    - {{drop: "language.score < 0.65", reason: language_score}}
    - {{use: gopher_quality}}
    - {{use: gopher_repetition}}
    - {{use: fineweb}}
"""


def make_root(root: Root, docs: int, sample_mb: float, folder: Path) -> Dataset:
    """Dataset `web` of `docs` unreadable documents with whole layers."""
    sample = corpus.make(Root(str(folder / "sample")), sample_mb).dataset
    measured = {name: measured_layer(sample, load(name)) for name in STAGES}
    shards: dict[str, dict[str, Any]] = {}
    for start in range(0, docs, SHARD_DOCS):
        table = documents(start, min(docs, start + SHARD_DOCS))
        name = f"{NAME}-{len(shards):05d}"
        content = table_digest(table)
        root.write_table(documents_path(name), [table], DOCUMENTS, {"content": content})
        shards[name] = {"rows": table.num_rows, "text_bytes": corpus.text_bytes(table), "content": content}
    write_manifest(root, Manifest(DOCUMENTS_INSTANCE, NAME, Identity("redecide", 1, {}, {}), shards))
    dataset = open_dataset(root, NAME, 0)
    assert dataset is not None
    for name, values in measured.items():
        write_resampled(dataset, load(name), values)
    for shard in dataset.shards:
        destroy_text(Path(root.path(dataset.documents_name(shard))))
    return dataset


def documents_path(shard: str) -> str:
    return f"datasets/{NAME}/documents/{shard}.parquet"


def documents(start: int, stop: int) -> pa.Table:
    """Documents `start` to `stop`, all with one short text."""
    urls = [f"https://host{i % 997}.example/page/{i}" for i in range(start, stop)]
    n = stop - start
    origin = [pa.array(["crawl.warc.gz"] * n, TEXT), pa.array(np.arange(start, stop)), pa.array(np.ones(n, np.int64))]
    columns = {
        "doc_id": pa.array([document_id(NAME, url, "") for url in urls], TEXT),
        "text": pa.array(["withheld"] * n, TEXT),
        "url": pa.array(urls, TEXT),
        "source": pa.array([NAME] * n, TEXT),
        "kind": pa.array(["web"] * n, TEXT),
        "license": pa.nulls(n, TEXT),
        "fetched_at": pa.array([FETCHED] * n, DOCUMENTS.field("fetched_at").type),
        "origin": pa.StructArray.from_arrays(origin, fields=list(DOCUMENTS.field("origin").type)),
        "metadata": pa.array(["{}"] * n, TEXT),
    }
    return pa.table(columns, schema=DOCUMENTS)


def measured_layer(sample: Dataset, stage: Stage) -> pa.Table:
    """The stage's own columns over the sample."""
    config = stage.config()
    state = stage.open(config, stage.artifacts(config) if stage.artifacts else {}) if stage.open else config
    return pa.Table.from_batches(list(_measured(sample, stage, config, state)), stage.layer)


def _measured(sample: Dataset, stage: Stage, config: Any, state: Any) -> Iterator[pa.RecordBatch]:
    for shard in sample.shards:
        for batch in sample.read(shard, stage.columns(config)):
            yield stage.fn(state, batch)[0]


def write_resampled(dataset: Dataset, stage: Stage, values: pa.Table) -> None:
    """One layer whose rows are measured ones, each shard with its own seeded order of them."""
    assert stage.layer is not None
    outputs = {}
    for number, shard in enumerate(dataset.shards):
        order = np.random.default_rng([0, number]).permutation(shard.rows) % values.num_rows
        head = [pa.array(np.ones(shard.rows, bool)), pa.nulls(shard.rows, TEXT)]
        columns = values.take(pa.array(order)).columns
        table = pa.Table.from_arrays([*head, *columns], schema=layer_schema(stage.layer))
        outputs[shard.name] = layer_output(write_layer(dataset, stage.name, shard, stage.layer, [table], "redecide"))
    write_manifest(dataset.root, Manifest(stage.name, NAME, Identity(stage.name, stage.version, {}, {}), outputs))


def destroy_text(path: Path) -> None:
    """Overwrite the stored bytes of the text column; every other column stays as it is."""
    metadata = pq.read_metadata(path)
    with open(path, "r+b") as f:
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(DOCUMENTS.get_field_index("text"))
            assert column.path_in_schema == "text"
            first = column.dictionary_page_offset or column.data_page_offset
            f.seek(min(first, column.data_page_offset))
            f.write(b"\xff" * column.total_compressed_size)


def text_is_unreadable(dataset: Dataset, shard: Shard) -> bool:
    try:
        dataset.read_table(shard, ["text"])
    except OSError:
        return True
    return False


def thresholds(dataset: Dataset, count: int) -> list[int]:
    """`count` word counts from the first to the fourth decile of the documents, so that each drops more than the one before."""
    words = dataset.read_layer("signals", dataset.shards[0], ["words"]).column("words").to_numpy()
    return [int(q) for q in np.quantile(words, np.linspace(0.1, 0.4, count), method="higher")]


def decide(config: Path, root: Root, threshold: int, workers: int) -> dict[str, Any]:
    """Run select for one threshold in a new process; its sample, accounts and what the manifest observed."""
    config.write_text(CONFIG.format(root=root.base, workers=workers, name=NAME, select=SELECT, threshold=threshold))
    command = [sys.executable, "-m", "pipelines", "run", "stage", SELECT, "-c", str(config)]
    sample = timed(partial(subprocess.run, command, check=True, cwd=REPO, stdout=subprocess.DEVNULL))
    manifest = read_manifest(root, SELECT, None)
    assert manifest is not None
    return {"threshold": threshold, "sample": sample, "accounts": manifest.accounts, "observed": manifest.observed}


def measure(args: argparse.Namespace) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="stepwell-redecide-"))
    try:
        root = Root(str(folder / "root"))
        dataset = make_root(root, args.docs, args.sample_mb, folder)
        unreadable = all(text_is_unreadable(dataset, shard) for shard in dataset.shards)
        runs = [decide(folder / "pipeline.yaml", root, t, args.workers) for t in thresholds(dataset, args.rounds + 1)]
        return _result(args, dataset, runs, unreadable)
    finally:
        shutil.rmtree(folder)


def _result(args: argparse.Namespace, dataset: Dataset, runs: list[dict[str, Any]], unreadable: bool) -> Result:
    rows: list[list[Any]] = []
    for i, run in enumerate(runs):
        sample: Sample = run["sample"]
        o, a = run["observed"], run["accounts"]
        name = "first decision" if i == 0 else f"signals.words < {run['threshold']}"
        memory = f"{o['peak_memory_bytes'] / 1e6:.0f}"
        kept = f"{a['kept']:,}"
        rows.append([name, f"{sample.wall_s:.2f}", f"{o['seconds']:.2f}", f"{sample.cpu_s:.2f}", memory, kept])
    again = [r["sample"].wall_s for r in runs[1:]]
    fell = [r["accounts"].get("dropped.few_words", 0) for r in runs]
    settings = {"documents": dataset.rows, "shards": len(dataset.shards), "workers": args.workers}
    columns = ("decision", "command s", "of it in the stage", "CPU s", "peak MB a worker", "kept")
    checks = [
        Check("seconds of the command after a threshold moved, median", median(again), LAYER_SECONDS),
        Check("shards whose text can be read", 0.0 if unreadable else 1.0, 0.0),
        Check("share of decisions that differ from the one before", _moved(fell), 1.0, at_least=True),
    ]
    figures = {"runs": json.loads(json.dumps(runs, default=vars))}
    return Result("redecide", settings, [Table("Deciding again", columns, rows)], checks, figures=figures)


def _moved(counts: Sequence[int]) -> float:
    return sum(a != b for a, b in pairwise(counts)) / max(1, len(counts) - 1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--docs", type=int, default=1_000_000, help="documents (default 1000000)")
    parser.add_argument("--sample-mb", type=float, default=20, help="real text behind the layers' values (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="changed thresholds (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
