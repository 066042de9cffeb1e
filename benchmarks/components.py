"""Components of near-duplicates: what an edge costs in the memory of the driver, and what it costs the workers as stars.

    python -m benchmarks.components [--edges 2.5 5 10 20] [--here 0.5 1 2 4] [--memory-gb 1] [--workers 2]

The graph is made on the workers, one unit a million edges, no two of them the same: half the edges in families of 2 to 12
documents, a fifth around one hub, the others at random among as many documents as there are such edges: they grow into a giant.
Stars: `dedup.stars.settled` over links on LocalEngine; peaks are VmHWM of the largest worker, reset before each unit. In memory:
`dedup.minhash.collect_edges` and `components_of` in a process of its own; its peak above what it held before, for each edge.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Sample, timed
from benchmarks.result import REPO, Check, Result, Table, alone
from benchmarks.spill import Watched
from core.engines.contract import Unit
from core.engines.measure import peak_memory, reset_peak_memory
from core.schema import TEXT
from dedup.labels import links_of
from dedup.stars import LINKS, settled
from dedup.verify import EDGES

UNIT_EDGES = 1_000_000
FLAT = 1.25  # largest peak over smallest


def ends(seed: int, edges: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the edges of one unit, as numbers of documents."""
    rng = np.random.default_rng(seed)
    family, hub = edges // 2, edges // 5
    rest = edges - family - hub
    own = (seed + 1) << 24
    members = rng.integers(2, 13, family)
    head = own + np.repeat(np.cumsum(members), members - 1)[:family]
    spoke = own + (np.cumsum(members) - members)[np.repeat(np.arange(family), members - 1)[:family]]
    spoke = spoke + 1 + (np.arange(family) - np.searchsorted(head, head))
    around = own + (1 << 23) + np.arange(hub)
    wide = rng.integers(0, units * rest, (2, rest))
    a = np.concatenate([head, np.full(hub, 1 << 45), wide[0] + (1 << 46)])
    b = np.concatenate([np.minimum(spoke, head - 1), around, wide[1] + (1 << 46)])
    kept = a != b
    return a[kept], b[kept]


def rows_of(numbers: np.ndarray) -> np.ndarray:
    """Numbers of documents as rows below 2^62 in no order: times an odd number, which is one to one."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) & np.uint64((1 << 62) - 1)).astype(np.int64)


def edges_of(unit: Unit) -> Iterator[pa.RecordBatch]:
    """EDGES of one unit; payload is (seed, edges, units)."""
    a, b = (rows_of(x) for x in ends(*unit.payload))
    for first in range(0, len(a), 1 << 16):
        x, y = a[first : first + (1 << 16)], b[first : first + (1 << 16)]
        ids = [pa.array([f"{v:032x}" for v in side.tolist()], TEXT) for side in (np.minimum(x, y), np.maximum(x, y))]
        ones = pa.array(np.ones(len(x), dtype=np.int64))
        likeness = pa.array(np.full(len(x), 0.9, np.float32))
        columns = [*ids, pa.array(np.minimum(x, y)), pa.array(np.maximum(x, y)), ones, ones, likeness]
        yield pa.RecordBatch.from_arrays(columns, schema=EDGES)


def link_rows(unit: Unit) -> Iterator[pa.RecordBatch]:
    """LINKS of one unit."""
    a, b = (pa.array(rows_of(x)) for x in ends(*unit.payload))
    yield from links_of(pa.table({"a_row": a, "b_row": b})).to_batches(1 << 16)


def units_of(edges: int) -> list[Unit]:
    count = max(1, -(-edges // UNIT_EDGES))
    return [Unit(f"{i:05d}", (i, min(UNIT_EDGES, edges - i * UNIT_EDGES), count)) for i in range(count)]


def by_stars(edges: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, rounds and peaks of the stars of one graph."""
    scratch = Path(tempfile.mkdtemp(prefix="stepwell-stars-", dir=args.scratch))
    engine = Watched(scratch, args.workers, args.memory_gb)
    found: dict[str, Any] = {}
    try:
        links = engine.scan(link_rows, units_of(edges), LINKS, "make links")
        made = dict(engine.peaks)
        reset_peak_memory()
        took = timed(lambda: found.update(rounds=settled(engine, links, "stars")[1]))
        driver = peak_memory()
    finally:
        engine.close()
        shutil.rmtree(scratch)
    peaks = {label: peak for label, peak in engine.peaks.items() if label not in made}
    return {"edges": edges, "peak": max(peaks.values()), "driver": driver, "took": took, **found}


def in_memory(edges: int) -> dict[str, Any]:
    """The same for the algorithm of the driver, in a new process."""
    command = [sys.executable, "-m", "benchmarks.components", "--one", str(edges)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=REPO)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def one(edges: int) -> dict[str, Any]:
    """This process holds all edges in a frame on disk, collects them and finds the components."""
    from dedup.minhash import collect_edges, components_of

    with tempfile.TemporaryDirectory() as scratch:
        engine = Watched(scratch, 0)
        frame = engine.scan(edges_of, units_of(edges), EDGES, "make edges")
        pa.default_memory_pool().release_unused()
        reset_peak_memory()
        before = peak_memory()
        took = timed(lambda: components_of(collect_edges(engine, frame)))
    return {"edges": edges, "bytes": peak_memory() - before, "cpu_s": took.cpu_s, "wall_s": took.wall_s}


def measure(args: argparse.Namespace) -> Result:
    here = [in_memory(int(m * 1e6)) for m in args.here]
    there = []
    for million in args.edges:
        there.append(by_stars(int(million * 1e6), args))
        print(f"components: {million:g} million edges as stars, {there[-1]['took'].wall_s:.0f} s", file=sys.stderr)
    memory = Table(
        "In the memory of the driver",
        ("million edges", "peak MB above the start", "bytes an edge", "CPU us an edge"),
        [[r["edges"] / 1e6, r["bytes"] / 1e6, r["bytes"] / r["edges"], r["cpu_s"] / r["edges"] * 1e6] for r in here],
    )
    rows = [
        [r["edges"] / 1e6, r["rounds"], r["took"].wall_s, *_each(r), r["peak"] / 1e6, r["driver"] / 1e6] for r in there
    ]
    columns = ("million edges", "rounds", "wall s", "wall us an edge and round", "CPU us an edge and round")
    stars = Table("As stars", (*columns, "largest worker MB", "driver MB"), rows)
    share = args.memory_gb * 1e9 / max(1, args.workers)
    checks = [
        Check("stars: largest worker, share of its part of memory_gb", max(r["peak"] for r in there) / share, 1.0),
        Check("stars: largest worker, most edges over fewest", there[-1]["peak"] / there[0]["peak"], FLAT),
    ]
    settings = {"workers": args.workers, "memory_gb": args.memory_gb}
    figures = {"here": here, "there": [{**r, "took": vars(r["took"])} for r in there]}
    return Result("components", settings, [memory, stars], checks, figures=figures)


def _each(run: dict[str, Any]) -> tuple[float, float]:
    took: Sample = run["took"]
    per = run["edges"] * run["rounds"] / 1e6
    return took.wall_s / per, took.cpu_s / per


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edges", type=float, nargs="+", default=[2.5, 5, 10, 20], help="millions, for the stars")
    parser.add_argument(
        "--here", type=float, nargs="+", default=[0.5, 1, 2, 4], help="millions, for the driver's memory"
    )
    parser.add_argument("--memory-gb", type=float, default=1, help="memory shared by all workers (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--scratch", default=None, help="folder to spill to (default: a temporary one)")


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--one"]:
        print(json.dumps(one(int(given[1]))))
        return
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
