"""What `exact` and `minhash` move: bytes a document in every exchange, and peak memory at four sizes of input.

    python -m benchmarks.shuffles [--mb 25 50 100 200] [--memory-gb 1] [--workers 2]

Both stages run on LocalEngine over `benchmarks.corpus`, `minhash` after `exact`, each size in a process of its own. Three figures
for each document: Arrow bytes that enter an exchange (what crosses a cluster's network, before any codec), bytes on disk of those
files (lz4), and bytes on disk of all frames, which the local engine writes besides. Peaks are VmHWM: of the largest worker over
all verbs, reset before each unit, and of the driver, reset before each stage.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.corpus import NAME
from benchmarks.measure import timed
from benchmarks.result import REPO, Cell, Check, Result, Table, alone
from benchmarks.spill import Watched
from core.dataset import open_dataset
from core.engines.contract import Frame
from core.engines.local import LocalFrame
from core.engines.measure import peak_memory, reset_peak_memory
from core.engines.spill import Cut
from core.job import Job
from core.stage import Stage
from core.storage import Root
from dedup import exact, minhash

STAGES: dict[str, Stage] = {"exact": exact.STAGE, "minhash": minhash.STAGE}
DRIVER = (
    "The driver holds Arrow, the kernels' modules, one note a part, and up to `max_edges` verified pairs, some 540 bytes each: "
    "below that ceiling it grows with the pairs, not with the text."
)
FLAT = 1.25  # peak at the largest input over the peak at the smallest


class Weighed(Watched):
    """A local engine that keeps how much each verb sends through an exchange, in Arrow bytes and on disk."""

    def begin(self, scratch: str | Path) -> None:
        super().begin(scratch)
        self.peaks, self.moved = {}, {}

    def _exchange(self, frames: Sequence[Frame], cut: Cut, label: str) -> LocalFrame:
        made = super()._exchange(frames, cut, label)
        arrow, disk = self.moved.get(label, (0, 0))
        disk += sum(Path(part.path).stat().st_size for part in made.parts)
        self.moved[label] = (arrow + made.bytes, disk)
        return made


def one(args: argparse.Namespace) -> dict[str, Any]:
    """All stages over one corpus, in this process and its workers."""
    folder = Path(tempfile.mkdtemp(prefix="stepwell-shuffles-", dir=args.scratch))
    root = Root(str(folder / "root"))
    command = [sys.executable, "-m", "benchmarks.corpus", root.url, "--mb", str(args.one)]
    command += [f"--folder={folder}" for folder in args.folder]  # in a process of its own: this one's peak is measured
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=REPO)
    dataset = open_dataset(root, NAME, 0)
    assert dataset is not None
    found: dict[str, Any] = {"docs": dataset.rows, "mb": dataset.text_bytes / 1e6, "stages": {}}
    engine = Weighed(folder / "scratch", args.workers, args.memory_gb)
    try:
        for name, stage in STAGES.items():
            engine.begin(folder / "scratch" / name)
            job = Job(stage, name, stage.config(), root, engine, (dataset,), "benchmark")
            reset_peak_memory()
            took = timed(lambda job=job: found.update(outcome=job.stage.fn(job)))  # type: ignore[misc]
            frames = sum(p.stat().st_size for p in engine.scratch.rglob("*.arrow"))
            found["stages"][name] = {
                "moved": engine.moved,
                "written": frames,
                "peaks": engine.peaks,
                "driver": peak_memory(),
                "observed": found.pop("outcome").observed,
                **vars(took),
            }
            engine.clear()
    finally:
        engine.close()
        shutil.rmtree(folder)
    return found


def in_a_process(mb: float, args: argparse.Namespace) -> dict[str, Any]:
    """`one` in a new process, so that no size inherits another's memory."""
    command = [sys.executable, "-m", "benchmarks.shuffles", "--one", str(mb)]
    command += ["--memory-gb", str(args.memory_gb), "--workers", str(args.workers)]
    command += [f"--folder={folder}" for folder in args.folder] + (
        [f"--scratch={args.scratch}"] if args.scratch else []
    )
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=REPO)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(args: argparse.Namespace) -> Result:
    runs = [in_a_process(mb, args) for mb in args.mb]
    if args.earlier:  # sizes that were measured before, on the same machine and commit
        runs = sorted([*json.loads(Path(args.earlier).read_text())["figures"]["runs"], *runs], key=lambda r: r["mb"])
    return result_of(runs, args)


def result_of(runs: list[dict[str, Any]], args: argparse.Namespace) -> Result:
    tables, checks = [], []
    for name in STAGES:
        stages = [(run, run["stages"][name]) for run in runs]
        columns = ("MB of text", "documents", "Arrow bytes a document", "of them on disk", "on disk with frames")
        tables.append(Table(f"`{name}`: traffic", columns, [_traffic(run, stage) for run, stage in stages]))
        last, stage = stages[-1]
        by_verb = [[label, *(size / last["docs"] for size in sizes)] for label, sizes in stage["moved"].items()]
        tables.append(
            Table(f"`{name}`: by exchange, largest input", ("exchange", "Arrow bytes a document", "on disk"), by_verb)
        )
        peaks = [(max(s["peaks"].values()), max(s["peaks"], key=s["peaks"].get), s["driver"]) for _, s in stages]
        rows: list[list[Cell]] = [
            [run["mb"], worker / 1e6, where, driver / 1e6, stage["cpu_s"]]
            for (run, stage), (worker, where, driver) in zip(stages, peaks, strict=True)
        ]
        tables.append(
            Table(f"`{name}`: peak memory", ("MB of text", "largest worker MB", "in", "driver MB", "CPU s"), rows)
        )
        workers, drivers = [p[0] for p in peaks], [p[2] for p in peaks]
        checks.append(Check(f"{name}: largest worker, largest input over smallest", workers[-1] / workers[0], FLAT))
        checks.append(Check(f"{name}: driver, largest input over smallest", drivers[-1] / drivers[0], FLAT))
    settings = {"workers": args.workers, "memory_gb": args.memory_gb}
    return Result("shuffles", settings, tables, checks, [DRIVER], figures={"runs": runs})


def _traffic(run: dict[str, Any], stage: dict[str, Any]) -> list[Cell]:
    arrow, disk = (sum(sizes[i] for sizes in stage["moved"].values()) for i in (0, 1))
    return [run["mb"], run["docs"], *(size / run["docs"] for size in (arrow, disk, stage["written"]))]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", type=float, nargs="+", default=[25, 50, 100, 200], help="million bytes of text")
    parser.add_argument("--memory-gb", type=float, default=1, help="memory shared by all workers (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="take text from here; may be repeated")
    parser.add_argument("--scratch", default=None, help="folder to work in (default: a temporary one)")
    parser.add_argument("--earlier", default=None, help="a kept result whose sizes are added to those measured now")
    parser.add_argument("--one", type=float, default=None, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    options(parser)
    args, _ = parser.parse_known_args(argv)
    if args.one is not None:
        print(json.dumps(one(args)))
    else:
        alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
