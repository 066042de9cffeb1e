"""Run the benchmarks one after another, keep their results, and write the tables of `docs/benchmarks.md` from them.

    python -m benchmarks [NAME ...]      all that can run here; results in benchmarks/results/NAME.json
    python -m benchmarks --write-docs    no runs: the kept results go into docs/benchmarks.md
    python -m benchmarks --toy           seconds instead of minutes, to see that everything runs

`python -m benchmarks.NAME --help` shows the knobs of one. Those that need pages with labels take them from `--data` or
STEPWELL_DATA and are skipped, with a line, where there is none; so is what needs a command that is not installed.
"""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import DOCS, RESULTS, Result, keep, kept, show, write_docs


@dataclass(frozen=True)
class Benchmark:
    """One line of the list below: a module of this package with `options(parser)` and `measure(args) -> Result`."""

    name: str
    about: str
    full: tuple[str, ...] = ()
    toy: tuple[str, ...] = ()
    needs_data: bool = False
    needs_command: str = ""

    def run(self, toy: bool, data: Path | None) -> Result:
        module = importlib.import_module(f"benchmarks.{self.name}")
        parser = argparse.ArgumentParser(prog=self.name)
        module.options(parser)
        given = [str(data)] if self.needs_data else []
        result: Result = module.measure(parser.parse_args([*given, *(self.toy if toy else self.full)]))
        return result


BENCHMARKS = (
    Benchmark(
        "overhead",
        "the runner beside the bare kernel",
        full=("--stage", "signals", "--stage", "language"),
        toy=("--mb", "0.2", "--shard-mb", "0.1", "--rounds", "1", "--no-cold"),
    ),
    Benchmark(
        "redecide",
        "a moved threshold over the layers of a million documents",
        toy=("--docs", "3000", "--sample-mb", "0.1", "--rounds", "1"),
    ),
    Benchmark(
        "engines",
        "the same jobs on local, ray, spark, and on datatrove's executors",
        full=("--sizes", "200", "2000", "--rounds", "3", "1"),
        toy=("--sizes", "1", "--rounds", "1", "--only", "local"),
    ),
    Benchmark(
        "capacity",
        "each stage by itself on one core, and what more text would take",
        toy=("--mb", "2", "--shard-mb", "1"),
    ),
    Benchmark("spill", "a shuffle larger than memory", full=("--gb", "10"), toy=("--gb", "0.002")),
    Benchmark(
        "store",
        "an object store on loopback beside a disk",
        toy=("--mb", "1", "--docs", "18", "--rounds", "1"),
        needs_command="weed",
    ),
    Benchmark(
        "minhash",
        "near duplicates beside datatrove, rensa and datasketch",
        toy=("--docs", "40", "--repeat", "1", "--only", "stepwell_numpy"),
    ),
    Benchmark(
        "shuffles",
        "what exact and minhash move, and their peak memory at four sizes",
        toy=("--mb", "0.1", "--workers", "1"),
    ),
    Benchmark(
        "components",
        "components of near-duplicates in memory and as stars",
        toy=("--edges", "0.002", "--here", "0.002", "--workers", "1"),
    ),
    Benchmark(
        "clusters",
        "100,000 clusters over a million vectors, and quotas over them",
        toy=("--docs", "3000", "--dims", "16", "--clusters", "40"),
    ),
    Benchmark("signals", "rule signals beside datatrove's filters", toy=("--mb", "0.05", "--rounds", "1")),
    Benchmark("decontaminate", "beside datatrove's n-gram filter", toy=("--mb", "0.05", "--rounds", "1")),
    Benchmark(
        "extraction", "text from pages beside resiliparse and trafilatura", toy=("--pages", "4"), needs_data=True
    ),
)


def found(command: str) -> str | None:
    """A command beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name(command)
    return str(beside) if beside.exists() else shutil.which(command)


def chosen(names: Sequence[str], data: Path | None) -> list[Benchmark]:
    """Those named, or all; the ones that lack their data are named on stderr and left out."""
    by_name = {b.name: b for b in BENCHMARKS}
    if unknown := [n for n in names if n not in by_name]:
        raise SystemExit(f"benchmarks: no benchmark {unknown[0]!r}; expected {', '.join(by_name)}")
    out = []
    for benchmark in [by_name[n] for n in names] if names else BENCHMARKS:
        if benchmark.needs_data and (data is None or not data.is_dir()):
            print(f"{benchmark.name}: skipped, no labelled pages; name their folder with --data", file=sys.stderr)
        elif benchmark.needs_command and not found(benchmark.needs_command):
            print(f"{benchmark.name}: skipped, no command `{benchmark.needs_command}`", file=sys.stderr)
        else:
            out.append(benchmark)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(f"{b.name}: {b.about}" for b in BENCHMARKS))
    parser.add_argument("--toy", action="store_true", help="small sizes; nothing is kept unless --results is given")
    parser.add_argument("--data", type=Path, default=os.environ.get("STEPWELL_DATA"), help="folder of labelled pages")
    parser.add_argument(
        "--results", type=Path, help=f"folder of the results (default {RESULTS.name}/ beside this file)"
    )
    parser.add_argument("--write-docs", action="store_true", help="write the kept results into the docs and stop")
    parser.add_argument("--docs", type=Path, default=DOCS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write_docs:
        for name in write_docs(kept(args.results or RESULTS), args.docs):
            print(f"{name}: {args.docs} has no marks for it", file=sys.stderr)
        return
    unmet = 0
    for benchmark in chosen(args.names, args.data and Path(args.data)):
        print(f"{benchmark.name}: {benchmark.about}", flush=True)
        result = benchmark.run(args.toy, args.data and Path(args.data))
        show(result)
        unmet += sum(not c.met for c in result.checks)
        if args.results or not args.toy:
            keep(result, args.results or RESULTS)
    if unmet:
        print(f"{unmet} bounds were not met", file=sys.stderr)


if __name__ == "__main__":
    main()
