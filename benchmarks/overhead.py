"""What the runner costs over the bare kernel, and whether two workers of it gain what two bare processes gain.

    python -m benchmarks.overhead [--mb 200] [--stage signals] [--rounds 5]

Every contender reads the same Parquet shards of real text (`benchmarks.corpus`) and writes the same columns as Parquet:

- `bare`: one process that loops over the shards, reads a row group's columns, calls the stage's function, writes the result;
- `local`: `core.annotate.annotate` on LocalEngine, with all it does besides: identities, content hashes, commits, fsync.

Each with one and with two warm processes: started, modules imported, the stage opened, before the clock runs. All four take turns
(`benchmarks.measure`). Arrow is held to one thread a process on both sides. `cold` is one run of each that starts its processes,
`runner` the whole `pipelines.runner.Runner` with plan, locks and manifests, also cold.
"""

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import corpus
from benchmarks.measure import Sample, interleaved, median_cpu_s, median_wall_s, timed
from benchmarks.result import Check, Result, Table, alone
from core.annotate import AnnotateRun, annotate
from core.dataset import Dataset
from core.engines.local import LocalEngine
from core.storage import ZSTD_LEVEL, Root
from pipelines.config import EngineConfig, Pipeline, StageEntry
from pipelines.plan import artifacts_of
from pipelines.runner import Runner, RunOptions
from pipelines.stages import STAGES, load

OVERHEAD = 0.10  # most that one worker may cost over the bare loop
SPEED_UP = 0.92  # least share of the bare loop's speed-up by a second process
STALL_S = 600.0


@dataclass(frozen=True)
class Bare:
    """The kernel in a plain loop. Picklable: pool processes call it with the paths of a shard and of its result."""

    entry: StageEntry

    def __call__(self, paths: tuple[str, str]) -> int:
        source, target = paths
        stage, state, rows = self.entry.stage, _opened(self.entry), 0
        with (
            pq.ParquetFile(source, memory_map=True) as f,
            pq.ParquetWriter(target, stage.layer, compression="zstd", compression_level=ZSTD_LEVEL) as out,
        ):
            for group in range(f.num_row_groups):
                columns = list(stage.columns(self.entry.config))
                table = f.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
                for batch in table.to_batches():
                    made, _ = stage.fn(state, batch)
                    out.write_batch(made)
                    rows += made.num_rows
        return rows


_states: dict[str, Any] = {}


def _opened(entry: StageEntry) -> Any:
    if entry.stage.open is None:
        return entry.config
    if entry.instance not in _states:
        _states[entry.instance] = entry.stage.open(entry.config, artifacts_of(entry))
    return _states[entry.instance]


class Contest:
    """One stage on one dataset, every way of running it. `rows` of each run are checked against the dataset's."""

    def __init__(self, root: Root, dataset: Dataset, stage: str, folder: Path) -> None:
        self.root, self.dataset, self.folder = root, dataset, folder
        found = load(stage)
        self.entry = StageEntry(stage, found, found.config())
        self.annotate_run = AnnotateRun(found, stage, self.entry.config, artifacts_of(self.entry), f"bench {stage}")

    def paths(self) -> list[tuple[str, str]]:
        shards = self.dataset.shards
        return [
            (self.root.path(self.dataset.documents_name(s)), str(self.folder / f"{s.name}.parquet")) for s in shards
        ]

    def bare(self, pool: Any) -> None:
        self._check(sum(pool.imap_unordered(Bare(self.entry), self.paths(), chunksize=1)))

    def local(self, engine: LocalEngine) -> None:
        reports = annotate(engine, self.dataset, [self.annotate_run], STALL_S)
        self._check(sum(r.docs for r in reports if not r.resumed))

    def bare_cold(self, workers: int) -> None:
        with bare_pool(workers) as pool:
            self.bare(pool)

    def local_cold(self, workers: int) -> None:
        engine = LocalEngine(self.folder / "scratch", workers)
        try:
            self.local(engine)
        finally:
            engine.close()

    def runner_cold(self, workers: int) -> None:
        engine = EngineConfig(workers=workers)
        policy = {"priority": (), "withdrawn": None}
        pipeline = Pipeline(Path("bench.yaml"), self.root.url, engine, {corpus.NAME: None}, (self.entry,), policy)
        planned = Runner(pipeline, RunOptions("bench")).run()
        self._check(self.dataset.rows if all(p.run for p in planned) else 0)

    def forget(self) -> None:
        """Remove what `local` committed, so that the next run computes it again."""
        self.root.remove(f"datasets/{self.dataset.name}/layers/{self.entry.instance}")
        self.root.remove(f"datasets/{self.dataset.name}/manifests/{self.entry.instance}.json")

    def _check(self, rows: int) -> None:
        if rows != self.dataset.rows:
            raise RuntimeError(f"{self.entry.instance}: computed {rows} rows of {self.dataset.rows}")


def bare_pool(workers: int) -> Any:
    return multiprocessing.get_context("spawn").Pool(workers, pa.set_cpu_count, (1,))


def contest(c: Contest, rounds: int, cold: bool) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """(warm samples, cold samples) by contender."""
    pools = {n: bare_pool(n) for n in (1, 2)}
    engines = {n: LocalEngine(c.folder / "scratch", n) for n in (1, 2)}
    warm: dict[str, Callable[[], object]] = {}
    for n in (1, 2):
        warm[f"bare {n}"] = partial(c.bare, pools[n])
        warm[f"local {n}"] = partial(c.local, engines[n])
    try:
        for work in warm.values():  # processes start, modules are imported, files enter the page cache
            c.forget()
            work()
        samples = interleaved(warm, rounds, c.forget)
    finally:
        for pool in pools.values():
            pool.terminate()
            pool.join()
        for engine in engines.values():
            engine.close()
    return samples, cold_samples(c) if cold else {}


def cold_samples(c: Contest) -> dict[str, list[Sample]]:
    """One run of each contender with processes that start within it."""
    out: dict[str, list[Sample]] = {}
    for n in (1, 2):
        for name, start in (("bare", c.bare_cold), ("local", c.local_cold), ("runner", c.runner_cold)):
            c.forget()
            out[f"{name} {n} cold"] = [timed(partial(start, n))]
    return out


def ratios(samples: dict[str, list[Sample]]) -> dict[str, float]:
    """What is compared, from medians of the warm samples."""
    wall = {name: median_wall_s(s) for name, s in samples.items()}
    cpu = {name: median_cpu_s(s) for name, s in samples.items()}
    bare, local = wall["bare 1"] / wall["bare 2"], wall["local 1"] / wall["local 2"]
    return {
        "overhead_wall": wall["local 1"] / wall["bare 1"] - 1,
        "overhead_cpu": cpu["local 1"] / cpu["bare 1"] - 1,
        "overhead_wall_2": wall["local 2"] / wall["bare 2"] - 1,
        "bare_speed_up": bare,
        "local_speed_up": local,
        "speed_up_fraction": local / bare,
    }


def measure(args: argparse.Namespace) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="stepwell-overhead-"))
    try:
        root = Root(str(folder / "root"))
        made = corpus.make(root, args.mb, args.folder, args.shard_mb)
        settings = {"corpus": made.summary(), "rounds": args.rounds, "workers": "1 and 2"}
        result = Result("overhead", settings, [])
        for stage in args.stage or ["signals"]:
            _add(result, stage, Contest(root, made.dataset, stage, folder), args)
        return result
    finally:
        shutil.rmtree(folder)


def _add(result: Result, stage: str, c: Contest, args: argparse.Namespace) -> None:
    warm, cold = contest(c, args.rounds, args.cold)
    found = ratios(warm)
    mb = c.dataset.text_bytes / 1e6
    rows: list[list[Any]] = []
    for name, samples in {**warm, **cold}.items():
        spread = [s.wall_s for s in samples]
        wall = median_wall_s(samples)
        seconds = f"{min(spread):.2f} to {max(spread):.2f}" if len(spread) > 1 else "one run"
        rows.append([name, f"{wall:.2f}", seconds, f"{median_cpu_s(samples):.2f}", f"{mb / wall:.1f}"])
    result.tables.append(
        Table(
            f"`{stage}`, medians of {args.rounds}", ("contender, processes", "wall s", "range", "CPU s", "MB/s"), rows
        )
    )
    result.checks += [
        Check(f"{stage}: overhead of `local` 1 over `bare` 1, wall", found["overhead_wall"], OVERHEAD),
        Check(f"{stage}: the same in CPU seconds", found["overhead_cpu"], OVERHEAD),
        Check(
            f"{stage}: speed-up of `local` over that of `bare` ({found['local_speed_up']:.2f} and {found['bare_speed_up']:.2f})",
            found["speed_up_fraction"],
            SPEED_UP,
            at_least=True,
        ),
    ]
    result.figures[stage] = {**found, "samples": {n: [vars(s) for s in v] for n, v in {**warm, **cold}.items()}}


JUDGES = [line.name for line in STAGES if line.kind == "annotate"]


def options(parser: argparse.ArgumentParser) -> None:
    corpus.options(parser)
    parser.add_argument(
        "--stage", action="append", choices=JUDGES, help="stage to run (default signals); may be repeated"
    )
    parser.add_argument(
        "--no-cold", dest="cold", action="store_false", help="leave out runs that start their processes"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contender (default 5)")


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
