"""What `benchmarks.engines` runs: one contender on one job in this process, importable by the workers of every engine.

    python -m benchmarks.engine_jobs CONTENDER JOB DATA SCRATCH WORKERS MEMORY_GB

In: DATA, a root with dataset `files` (`benchmarks.corpus`). Out: `result.json` in SCRATCH with seconds until the engine was
ready, seconds of the work, and a digest of what came out.

- job `map`: words of each text by a regular expression, their mean length, xxh3 of the text: a Python loop over documents, the
  same function for all contenders. stepwell writes a layer of three columns through its runner; datatrove writes documents with
  the three values in their metadata, and is spared writing the text.
- job `minhash`: word 5-grams, 14 bands of 8 rows. stepwell verifies every pair, writes the relation and the layer; datatrove's
  four steps write the documents that stay.

An engine of ours is ready once every worker has run a unit that imports what the job needs. datatrove starts its processes within
each step, so its start-up is only this process's imports and, for its Ray executor, `ray.init`.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from benchmarks import corpus
from core.annotate import AnnotateRun, annotate
from core.dataset import Dataset, Shard, open_dataset
from core.engines.contract import Engine, Note, Report, Unit
from core.hashing import digest
from core.job import Job
from core.stage import Kind, Reject, Stage, StageConfig
from core.storage import Root

WORD = re.compile(r"\w+")
WORDS = pa.schema([("words", pa.int64()), ("mean_chars", pa.float64()), ("xxh3", pa.large_string())])
SHINGLE_WORDS, BANDS, BAND_ROWS = 5, 14, 8
ENGINES = ("local", "ray", "spark")


def facts(text: str) -> tuple[int, float, str]:
    """What the map job computes of one text."""
    words = WORD.findall(text)
    return len(words), sum(map(len, words)) / max(1, len(words)), xxhash.xxh3_128_hexdigest(text.encode())


def words_kernel(state: object, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    columns = zip(*map(facts, batch.column("text").to_pylist()), strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, WORDS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=WORDS), []


MAP = Stage("words", Kind.ANNOTATE, StageConfig, words_kernel, reads=("text",), layer=WORDS)


def warm(unit: Unit, note: Note) -> Report:
    """Imports what the jobs need; long enough that each worker gets one."""
    from dedup.shingles import shingle
    from dedup.signatures import signatures

    signatures(shingle(pa.array(["a b c d e f g"], pa.large_string()), SHINGLE_WORDS), BANDS * BAND_ROWS, 1)
    time.sleep(0.2)
    return Report(unit.name)


def stepwell(name: str, job: str, data: Path, scratch: Path, workers: int, memory_gb: float) -> dict[str, Any]:
    """One of our engines."""
    from core.progress import quiet
    from pipelines.knobs import EngineConfig
    from pipelines.runner import make_engine

    began = time.perf_counter()
    engine = make_engine(EngineConfig(name=name, workers=workers, memory_gb=memory_gb), scratch / "exchange", quiet())
    engine.begin(scratch / "exchange" / job)
    engine.run_units(warm, [Unit(str(i)) for i in range(2 * workers)], "warm")
    start_s = time.perf_counter() - began
    began = time.perf_counter()
    dataset = _linked(data, scratch)
    made = {"map": _map, "minhash": _minhash}[job](engine, dataset)
    work_s = time.perf_counter() - began
    engine.clear()
    engine.close()
    return {"start_s": start_s, "work_s": work_s, "made": made}


def _linked(data: Path, scratch: Path) -> Dataset:
    """The dataset in a root of its own: documents are read from DATA, layers are written to SCRATCH."""
    root = scratch / "root"
    for folder in (f"datasets/{corpus.NAME}/documents", f"datasets/{corpus.NAME}/manifests"):
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(data / folder, root / folder)
    dataset = open_dataset(Root(str(root)), corpus.NAME, 0)
    assert dataset is not None
    return dataset


def _map(engine: Engine, dataset: Dataset) -> str:
    run = AnnotateRun(MAP, "words", StageConfig(), {}, "benchmark")
    return digest([r.value for r in annotate(engine, dataset, [run], 600.0)])


def _minhash(engine: Engine, dataset: Dataset) -> str:
    from dedup.minhash import STAGE

    config = STAGE.config.model_validate({"exact": None})
    outcome = STAGE.fn(Job(STAGE, "minhash", config, dataset.root, engine, (dataset,), "benchmark"))
    layers = {f"{name}/{layer}": out for (name, layer), out in outcome.layers.items()}
    return digest([outcome.outputs, layers])


def datatrove(name: str, job: str, data: Path, scratch: Path, workers: int, memory_gb: float) -> dict[str, Any]:
    """datatrove's local or Ray executor."""
    began = time.perf_counter()
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.executor.ray import RayPipelineExecutor

    from benchmarks.engine_peers import map_steps, minhash_steps

    if name == "datatrove-ray":
        import ray

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    start_s = time.perf_counter() - began
    began = time.perf_counter()
    for i, (pipeline, tasks) in enumerate((map_steps if job == "map" else minhash_steps)(data, scratch)):
        logs = str(scratch / f"logs-{i}")
        if name == "datatrove-ray":
            RayPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs, mem_per_cpu_gb=1).run()
        else:
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs).run()
    work_s = time.perf_counter() - began
    made = sum(1 for _ in (scratch / "made").glob("*.parquet"))
    return {"start_s": start_s, "work_s": work_s, "made": f"{made} files"}


def shards_of(data: Path) -> tuple[Shard, ...]:
    dataset = open_dataset(Root(str(data)), corpus.NAME, 0)
    assert dataset is not None
    return dataset.shards


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = {"contender": str, "job": str, "data": Path, "scratch": Path, "workers": int, "memory_gb": float}
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind, metavar=name.upper())
    given = parser.parse_args()
    run: Callable[..., dict[str, Any]] = stepwell if given.contender in ENGINES else datatrove
    began, folder = time.perf_counter(), given.scratch
    found = run(given.contender, given.job, given.data, folder, given.workers, given.memory_gb)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    (folder / "result.json").write_text(json.dumps({**found, "whole_s": time.perf_counter() - began}))


if __name__ == "__main__":
    from benchmarks.engine_jobs import (
        main as run_main,
    )  # under its importable name, so that workers find what it pickles

    run_main()
