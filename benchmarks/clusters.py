"""A hundred thousand clusters over a million vectors, and quotas over them: seconds, and the memory of workers and driver.

    python -m benchmarks.clusters [--docs 1000000] [--dims 64] [--clusters 100000] [--workers 2]

The vectors are drawn around 2,000 random directions; one of them has 30 % of all, the others shares that fall by Zipf's law.
The stages `cluster` and `rebalance` run as in a pipeline, on the local engine, from and to layers in Parquet. Peaks are VmHWM.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Sample, timed
from benchmarks.redecide import NAME, documents, documents_path
from benchmarks.result import Check, Result, Table, alone
from benchmarks.spill import Watched
from core.dataset import DOCUMENTS_INSTANCE, Dataset, open_dataset
from core.engines.measure import peak_memory, reset_peak_memory
from core.hashing import table_digest
from core.job import Job, Outcome
from core.layer import layer_schema, write_layer
from core.manifest import Identity, Manifest, write_manifest
from core.schema import DOCUMENTS, TEXT
from core.stage import Stage
from core.storage import Root
from mixtures import cluster, embed, rebalance
from mixtures.static_vectors import to_int8

MODES = 2000
SKEW = 0.3  # share of the largest mode
NOISE = 0.7  # of a vector beside its direction; both random, so the mean cosine within a mode is 1 / (1 + 0.49)
SHARD_DOCS = 65_536


def make_root(root: Root, docs: int, dims: int) -> Dataset:
    """Documents with a word each, and the layer `embed`."""
    shards: dict[str, dict[str, Any]] = {}
    for start in range(0, docs, SHARD_DOCS):
        table = documents(start, min(docs, start + SHARD_DOCS))
        name = f"{NAME}-{len(shards):05d}"
        root.write_table(documents_path(name), [table], DOCUMENTS)
        shards[name] = {"rows": table.num_rows, "text_bytes": 8 * table.num_rows, "content": table_digest(table)}
    write_manifest(root, Manifest(DOCUMENTS_INSTANCE, NAME, Identity("clusters", 1, {}, {}), shards))
    dataset = open_dataset(root, NAME, 0)
    assert dataset is not None
    rng = np.random.default_rng(0)
    modes = rng.normal(size=(MODES, dims))
    shares = 1 / np.arange(1, MODES)
    shares = np.append(SKEW, (1 - SKEW) * shares / shares.sum())
    for shard in dataset.shards:
        at = rng.choice(MODES, shard.rows, p=shares)
        vectors = to_int8(1e3 * (modes[at] + NOISE * rng.normal(size=(shard.rows, dims))))
        head = [pa.array(np.ones(shard.rows, bool)), pa.nulls(shard.rows, TEXT)]
        own = [embed.vector_column(vectors), pa.array([embed.DISTILLED] * shard.rows, TEXT)]
        table = pa.Table.from_arrays([*head, *own], schema=layer_schema(embed.LAYER))
        write_layer(dataset, "embed", shard, embed.LAYER, [table], "clusters")
    return dataset


def run(stage: Stage, dataset: Dataset, engine: Watched, folder: Path, knobs: dict[str, Any]) -> dict[str, Any]:
    """One stage: its sample, outcome, and the peaks of the largest worker and of this process."""
    engine.begin(folder / "engine" / stage.name)
    engine.peaks = {}
    job = Job(stage, stage.name, stage.config(**knobs), dataset.root, engine, (dataset,), stage.name)
    found: list[Outcome] = []
    reset_peak_memory()
    sample = timed(lambda: found.append(stage.fn(job)))
    driver = peak_memory()
    engine.clear()
    return {"sample": sample, "outcome": found[0], "worker": max(engine.peaks.values(), default=0), "driver": driver}


def measure(args: argparse.Namespace) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="stepwell-clusters-"))
    engine = Watched(folder / "engine", args.workers, args.memory_gb)
    try:
        dataset = make_root(Root(str(folder / "root")), args.docs, args.dims)
        fitted = run(cluster.STAGE, dataset, engine, folder, {"clusters": args.clusters})
        balanced = run(rebalance.STAGE, dataset, engine, folder, {"keep_fraction": 0.5, "block_docs": 1 << 17})
        columns = ["cluster.cluster", "cluster.distance"]
        tables = [dataset.read_table(shard, columns) for shard in dataset.shards]
    finally:
        engine.close()
        shutil.rmtree(folder)
    return _result(args, pa.concat_tables(tables), {"cluster": fitted, "rebalance": balanced})


def _result(args: argparse.Namespace, found: pa.Table, runs: dict[str, dict[str, Any]]) -> Result:
    rows: list[list[Any]] = []
    for name, r in runs.items():
        s: Sample = r["sample"]
        memory = [f"{r['worker'] / 1e6:.0f}", f"{r['driver'] / 1e6:.0f}"]
        rows.append([name, f"{s.wall_s:.1f}", f"{s.cpu_s:.1f}", f"{args.docs / s.wall_s:,.0f}", *memory])
    observed = runs["rebalance"]["outcome"].observed
    made, kept = runs["cluster"]["outcome"].accounts["clusters"], runs["rebalance"]["outcome"].accounts["within_quota"]
    settings = {"documents": args.docs, "dims": args.dims, "clusters": args.clusters, "workers": args.workers}
    cosine = 1 - float(np.mean(found.column("cluster.distance").to_numpy()))
    columns = ("stage", "wall s", "CPU s", "documents/s", "peak MB of the largest worker", "peak MB of the driver")
    rates = [
        ["centroids", f"{made:,}"],
        ["clusters with documents", f"{observed['clusters']:,}"],
        ["mean cosine to the centroid", f"{cosine:.3f}"],
        ["Gini coefficient before, after", f"{observed['gini']:.3f}, {observed['kept_gini']:.3f}"],
        ["effective clusters before, after", f"{observed['effective']:,.0f}, {observed['kept_effective']:,.0f}"],
    ]
    checks = [
        Check("documents with a cluster", (args.docs - found.column(0).null_count) / args.docs, 1.0, at_least=True),
        Check("documents within quota, share of the target", kept / (args.docs // 2), 1.0),
    ]
    figures = {
        name: {"sample": vars(r["sample"]), "worker": r["worker"], "driver": r["driver"]} for name, r in runs.items()
    }
    tables = [Table("Clusters and quotas", columns, rows), Table("What came out", ("figure", "value"), rates)]
    return Result("clusters", settings, tables, checks, figures=figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--docs", type=int, default=1_000_000, help="vectors (default 1,000,000)")
    parser.add_argument("--dims", type=int, default=64, help="entries of a vector (default 64)")
    parser.add_argument("--clusters", type=int, default=100_000, help="clusters asked for (default 100,000)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--memory-gb", type=float, default=2, help="memory shared by all workers (default 2)")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
