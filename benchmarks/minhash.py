"""MinHash end to end beside its peers: Parquet in, survivors out, in CPU seconds of the whole process and its children.

    python -m benchmarks.minhash make --out DIR --folder '/usr/share/doc/**/*' --folder '/usr/lib/python3*/**/*.py'
    python -m benchmarks.minhash run --data DIR                 # every contender in turn, medians of 3, a table
    python -m benchmarks.minhash kernels --data DIR             # shingles and signatures only, MB/s
    python -m benchmarks.minhash components                     # bytes per edge and node

`make` writes the text files that the globs find as documents Parquet files of a stepwell root; every contender reads just these.
Each measured run is a new process, imports included. Compiled kernels are compiled before (once per installation, as
numba caches them). All contenders use word 5-grams and 14 bands of 8 rows. What differs, and shows in the survivors:

- stepwell verifies the true Jaccard (>= 0.75) and drops a document only for an edge to one that stays;
- datatrove's four steps verify nothing and keep one document of each connected component. All its tokenizers need packages
  beyond its core (English: spaCy); here it is given `str.split`, which is faster than any of them;
- the rensa and datasketch scripts are what their manuals show: one document after the other asks the index for a match with an
  estimated Jaccard of 0.75, and enters it if there is none.
"""

import argparse
import glob
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the processes it starts by its path

from benchmarks.corpus import default_folders
from benchmarks.result import Result, Table, show
from core.engines.measure import peak_memory

NGRAM, BANDS, ROWS, JACCARD = 5, 14, 8, 0.75
WORDS = re.compile(r"\w+")
FOLDER = "datasets/files/documents"


def make(out: str, folders: list[str], docs: int, least_bytes: int, most_bytes: int) -> None:
    """Write up to `docs` distinct-by-path UTF-8 files as four documents Parquet files, in the order of a hash of their paths."""
    from core.hashing import document_id
    from core.schema import DOCUMENTS

    paths = sorted({p for pattern in folders for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)})
    rows: list[dict[str, Any]] = []
    for path in sorted(paths, key=lambda p: document_id("order", p, "")):
        if len(rows) == docs:
            break
        if least_bytes <= os.path.getsize(path) <= most_bytes:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            origin = {"path": path, "offset": None, "length": None}
            row = {"doc_id": document_id("files", path, text), "text": text, "source": "files", "kind": "other"}
            rows.append({**row, "origin": origin, "metadata": "{}"})
    table = pa.Table.from_pylist(rows, schema=DOCUMENTS)
    os.makedirs(f"{out}/{FOLDER}", exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(table.num_rows), 4)):
        pq.write_table(table.take(part), f"{out}/{FOLDER}/{i:05d}.parquet", compression="zstd", row_group_size=1000)
    print(f"{table.num_rows} documents, {text_bytes(out) / 1e6:.1f} MB of text in {out}")


def files(data: str) -> list[str]:
    found = sorted(glob.glob(f"{data}/{FOLDER}/*.parquet"))
    if not found:
        raise SystemExit(
            f"error: minhash: no Parquet files in {data}/{FOLDER}, expected what `make --out {data}` writes"
        )
    return found


def text_bytes(data: str) -> int:
    return sum(pc.sum(pc.binary_length(pq.read_table(f, columns=["text"]).column("text"))).as_py() for f in files(data))


def documents(data: str) -> Iterator[tuple[str, str]]:
    """(doc_id, text) one by one, as a script would read them."""
    for file in files(data):
        for batch in pq.ParquetFile(file).iter_batches(500, columns=["doc_id", "text"]):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)


def write_survivors(data: str, scratch: str, kept: set[str]) -> None:
    """The last step of every script: the kept documents as Parquet."""
    for i, file in enumerate(files(data)):
        table = pq.read_table(file, columns=["doc_id", "text"])
        table = table.filter(pc.is_in(table.column("doc_id"), pa.array(sorted(kept), pa.large_string())))
        pq.write_table(table, f"{scratch}/{i:05d}.parquet", compression="zstd")


def stepwell(data: str, scratch: str) -> dict[str, Any]:
    """The stage `minhash` on the local engine, the election by doc_id, and the kept documents."""
    from core.dataset import Dataset, Shard
    from core.engines.local import LocalEngine
    from core.job import Job
    from core.storage import Root
    from dedup.minhash import STAGE
    from dedup.survivors import elect

    source, root = Root(data), Root(scratch)
    os.makedirs(f"{scratch}/datasets/files")
    os.symlink(os.path.abspath(f"{data}/{FOLDER}"), f"{scratch}/{FOLDER}")
    shards = tuple(
        Shard(Path(f).stem, pq.read_metadata(f).num_rows, os.path.getsize(f), Path(f).stem) for f in files(data)
    )
    engine = LocalEngine(f"{scratch}/exchange", workers=0)
    dataset = Dataset(root, "files", 0, shards)
    outcome = STAGE.fn(
        Job(STAGE, "minhash", STAGE.config.model_validate({"exact": None}), root, engine, (dataset,), "benchmark")
    )
    spilled = sum(p.stat().st_size for p in Path(scratch, "exchange").rglob("*.arrow"))
    edges = pa.concat_tables([root.read_table(name, ["a", "b", "jaccard"]) for name in outcome.outputs])
    ids, ends = np.unique(
        np.concatenate([edges.column(c).to_numpy(zero_copy_only=False).astype("S32") for c in "ab"]),
        return_inverse=True,
    )
    half = edges.num_rows
    fallen = elect(ends[:half], ends[half:], edges.column("jaccard").to_numpy(), np.arange(len(ids)), JACCARD) >= 0
    dropped = set(ids[fallen].astype(str).tolist())
    kept = {d for f in files(data) for d in pq.read_table(f, columns=["doc_id"]).column(0).to_pylist()} - dropped
    write_survivors(str(source.base), scratch, kept)
    return {"observed": outcome.observed, "spilled_bytes": spilled}


def stepwell_numpy(data: str, scratch: str) -> dict[str, Any]:
    """The same without numba."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # what an installation without the extra `fast` looks like
    return stepwell(data, scratch)


def datatrove(data: str, scratch: str) -> dict[str, Any]:
    """datatrove's four steps, one task a file, in this process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.hashing import HashConfig

    from benchmarks.split import Split

    config = MinhashConfig(
        n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(hash_fc="xxhash")
    )
    folders = {name: f"{scratch}/{name}" for name in ("signatures", "buckets", "remove", "kept")}
    reader = ParquetReader(f"{data}/{FOLDER}", text_key="text", id_key="doc_id", batch_size=500, doc_progress=False)
    tasks = len(files(data))
    steps = [
        ([reader, MinhashDedupSignature(folders["signatures"], config=config, language=Split())], tasks),
        ([MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=config)], BANDS),
        ([MinhashDedupCluster(folders["buckets"], folders["remove"], config=config)], 1),
        ([reader, MinhashDedupFilter(folders["remove"]), ParquetWriter(folders["kept"], compression="zstd")], tasks),
    ]
    for pipeline, count in steps:
        LocalPipelineExecutor(pipeline, tasks=count, workers=1, logging_dir=f"{scratch}/logs-{id(pipeline)}").run()
    for f in Path(folders["kept"]).glob("*.parquet"):
        table = pq.read_table(f, columns=["id", "text"]).rename_columns(["doc_id", "text"])
        pq.write_table(table, f"{scratch}/{f.name}")
    return {}


def grams(text: str) -> list[str]:
    words = WORDS.findall(text.lower())
    return [" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))] if words else []


def rensa(data: str, scratch: str) -> dict[str, Any]:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=JACCARD, num_perm=BANDS * ROWS, num_bands=BANDS)
    sketches: list[Any] = []
    kept = set()
    for doc_id, text in documents(data):
        shingles = grams(text)
        sketch = RMinHash(num_perm=BANDS * ROWS, seed=1)
        sketch.update(shingles)
        if not shingles or not any(sketch.jaccard(sketches[i]) >= JACCARD for i in index.query(sketch)):
            kept.add(doc_id)
            if shingles:
                index.insert(len(sketches), sketch)
                sketches.append(sketch)
    write_survivors(data, scratch, kept)
    return {}


def datasketch(data: str, scratch: str) -> dict[str, Any]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    empty = MinHash(num_perm=BANDS * ROWS, seed=1)
    sketches: dict[str, Any] = {}
    kept = set()
    for doc_id, text in documents(data):
        shingles = grams(text)
        sketch = empty.copy()
        sketch.update_batch([s.encode() for s in shingles])
        if not shingles or not any(sketch.jaccard(sketches[i]) >= JACCARD for i in index.query(sketch)):
            kept.add(doc_id)
            if shingles:
                index.insert(doc_id, sketch)
                sketches[doc_id] = sketch
    write_survivors(data, scratch, kept)
    return {}


CONTENDERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    f.__name__: f for f in (stepwell, stepwell_numpy, datatrove, rensa, datasketch)
}


def one(name: str, data: str, scratch: str) -> None:
    """A measured process: run, then say what survived."""
    started = time.perf_counter()
    extra = CONTENDERS[name](data, scratch)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    wall = time.perf_counter() - started
    kept = [
        i
        for f in sorted(glob.glob(f"{scratch}/*.parquet"))
        for i in pq.read_table(f, columns=["doc_id"]).column(0).to_pylist()
    ]
    # Of this process VmHWM: ru_maxrss begins at what the process that started this one held, and would name that.
    peak = max(peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    Path(scratch, "result.json").write_text(
        json.dumps({"cpu_s": cpu, "wall_s": wall, "peak": peak, "kept": kept, **extra})
    )


def measured(name: str, data: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "one", "--name", name, "--data", data, "--out", scratch]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if name == "datatrove" else None
        )
        result: dict[str, Any] = json.loads(Path(scratch, "result.json").read_text())
        return result


def run(data: str, names: list[str], repeat: int) -> Result:
    size = text_bytes(data)
    every = {d for f in files(data) for d in pq.read_table(f, columns=["doc_id"]).column(0).to_pylist()}
    if "stepwell" in names:
        measured("stepwell", data)  # compiles
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeat):
        for name in names if turn % 2 == 0 else names[::-1]:
            found[name].append(measured(name, data))
    cpu = {name: statistics.median(r["cpu_s"] for r in results) for name, results in found.items()}
    dropped = {name: every - set(results[0]["kept"]) for name, results in found.items()}
    rows: list[list[str | int | float]] = []
    notes = []
    for name, results in found.items():
        seconds = sorted(r["cpu_s"] for r in results)
        both, either = len(dropped[name] & dropped[names[0]]), len(dropped[name] | dropped[names[0]])
        times = f"{cpu['datatrove'] / cpu[name]:.1f}" if "datatrove" in cpu else "-"
        wall, peak = statistics.median(r["wall_s"] for r in results), max(r["peak"] for r in results) / 1e6
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        speed = f"{size / 1e6 / cpu[name]:.1f}"
        kept = len(results[0]["kept"])
        rows.append(
            [name, f"{cpu[name]:.2f}", spread, speed, f"{wall:.1f}", f"{peak:.0f}", kept, f"{both} / {either}", times]
        )
        if "spilled_bytes" in results[0]:
            moved = results[0]["spilled_bytes"] / len(every)
            notes.append(f"{name}: {moved:.0f} bytes a document written to the exchange (lz4).")
    columns = (
        "contender", "CPU s", "range", "MB/s", "wall s", "peak MB", "kept", "dropped by it and the first / by either",
        "x datatrove",
    )  # fmt: skip
    table = Table(f"Medians of {repeat}; MB/s are per CPU second", columns, rows)
    settings = {"documents": len(every), "MB": round(size / 1e6, 1), "rounds": repeat}
    samples = {n: [{k: r[k] for k in ("cpu_s", "wall_s", "peak")} for r in rs] for n, rs in found.items()}
    return Result("minhash", settings, [table], notes=notes, figures={"samples": samples})


def measure(args: argparse.Namespace) -> Result:
    """`run` on `--data`, or on what `make` finds on this machine."""
    if args.data:
        return run(args.data, args.only, args.repeat)
    with tempfile.TemporaryDirectory(prefix="stepwell-minhash-") as folder:
        globs = args.folder or [f"{f}/**/*{end}" for f in default_folders() for end in (".txt", ".md", ".rst", ".py")]
        make(folder, globs, args.docs, args.least_bytes, args.most_bytes)
        return run(folder, args.only, args.repeat)


def kernels(data: str, repeat: int) -> None:
    """MB/s of CPU time for shingles and signatures, both kernels, in batches as the stage reads them."""
    from dedup.minhash import BATCH_BYTES
    from dedup.shingles import shingle
    from dedup.signatures import signatures

    column = pa.concat_arrays(
        [c for f in files(data) for c in pq.read_table(f, columns=["text"]).column("text").chunks]
    )
    size = text_bytes(data)
    step = max(1, len(column) * BATCH_BYTES // size)
    batches = [column.slice(i, step) for i in range(0, len(column), step)]
    steps: dict[str, Callable[[pa.Array, bool], Any]] = {
        "shingles": lambda t, compiled: shingle(t, NGRAM, compiled),
        "shingles + signatures": lambda t, compiled: signatures(shingle(t, NGRAM, compiled), BANDS * ROWS, 1, compiled),
    }
    for compiled in (True, False):
        for name, work in steps.items():
            work(batches[0], compiled)
            seconds = []
            for _ in range(repeat):
                started = time.process_time()
                for batch in batches:
                    work(batch, compiled)
                seconds.append(time.process_time() - started)
            print(f"{'numba' if compiled else 'numpy'} {name}: {size / 1e6 / statistics.median(seconds):.1f} MB/s")


def measure_components(edges: int = 4_000_000) -> None:
    """Peak memory of `components` over random edges between as many nodes / 2."""
    from dedup.components import components

    rng = np.random.default_rng(0)
    nodes = edges // 2
    a, b = rng.integers(0, nodes, edges), rng.integers(0, nodes, edges)
    keys = np.arange(nodes)
    ids = np.array([f"{i:032x}".encode() for i in range(nodes)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    components(a, b, keys, ids, np.ones(nodes, dtype=np.int64))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{edges} edges, {nodes} nodes: {peak / edges:.0f} bytes an edge above the inputs, "
        f"{time.process_time() - started:.1f} CPU s"
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="", help="what `make` wrote; without it documents of this machine are taken")
    parser.add_argument("--folder", action="append", default=[], help="glob of text files, may be repeated")
    parser.add_argument("--docs", type=int, default=20_500, help="at most so many (default 20,500)")
    parser.add_argument("--least-bytes", type=int, default=500, help="of a text (default 500)")
    parser.add_argument("--most-bytes", type=int, default=24_000, help="of a text (default 24,000)")
    parser.add_argument(
        "--only", nargs="*", default=list(CONTENDERS), help="contenders to run, the first is compared with"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender (default 3)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "run", "kernels", "components", "one"], nargs="?", default="run")
    options(parser)
    parser.add_argument("--out", default="", help="folder that `make` writes")
    parser.add_argument("--name", default="stepwell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "make":
        make(args.out, args.folder, args.docs, args.least_bytes, args.most_bytes)
    elif args.command == "one":
        one(args.name, args.data, args.out)
    elif args.command == "run":
        show(measure(args))
    elif args.command == "kernels":
        kernels(args.data, args.repeat)
    else:
        measure_components()


if __name__ == "__main__":
    main()
