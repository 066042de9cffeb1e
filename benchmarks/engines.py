"""The same jobs on every engine, and beside datatrove's executors: start-up apart from work, CPU seconds, memory.

    python -m benchmarks.engines [--sizes 200 2000] [--rounds 3 1] [--only local ray ...]

Each measured run is a new process in a session of its own; `benchmarks.engine_jobs` says what it does. Memory is the
proportional set size (PSS) of all its processes together, so what they share counts once; CPU seconds are the sum of what each of
them had used when last seen. Both are sampled twice a second. Contenders take turns. `work` begins when an engine's workers are
ready. The three engines of ours must give the same digest. Peers run fewer rounds (`--peer-rounds`), as one takes minutes.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from benchmarks import corpus
from benchmarks.engine_jobs import ENGINES
from benchmarks.result import REPO, Check, Result, Table, alone
from core.storage import Root

PEERS = ("datatrove", "datatrove-ray")
JOBS = ("map", "minhash")
SAMPLE_S = 0.5
LIMIT_S = 3600.0  # a run that takes longer hangs
GOAL = 1.3  # work of ray and spark over that of local


class Watch(threading.Thread):
    """Samples memory and CPU of a process and all its descendants until `end` is set."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_bytes, self.end = pid, 0, threading.Event()
        self._cpu_s: dict[int, float] = {}  # what each process had used when it was last seen

    def run(self) -> None:
        while not self.end.wait(SAMPLE_S):
            family = _family(self.pid)
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss, family)))
            for pid in family:
                self._cpu_s[pid] = max(self._cpu_s.get(pid, 0), _cpu_s(pid))

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())


def _family(pid: int) -> list[int]:
    try:
        return [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def one(name: str, job: str, data: Path, workers: int, memory_gb: float) -> dict[str, Any]:
    """One run of one contender: what its process says, and the peak of its memory."""
    with tempfile.TemporaryDirectory(prefix="stepwell-engines-") as scratch:
        command = [
            sys.executable,
            "-m",
            "benchmarks.engine_jobs",
            name,
            job,
            str(data),
            scratch,
            str(workers),
            str(memory_gb),
        ]
        log = Path(scratch, "log.txt")
        env = {**os.environ, "PYTHONPATH": str(REPO), "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        watch = Watch(process.pid)
        watch.start()
        try:
            code = process.wait(LIMIT_S)
        finally:
            watch.end.set()
            _end(process.pid)
        if code:
            raise RuntimeError(f"{name} {job}: exit code {code}: {log.read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(Path(scratch, "result.json").read_text())
        return {**found, "cpu_s": watch.cpu_s, "peak_bytes": watch.peak_bytes}


def _end(group: int) -> None:
    """Whatever a run left behind must not run beside the next."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    time.sleep(1)


def contest(job: str, data: Path, rounds: int, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs by contender, in turns whose order is reversed each time."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for turn in range(rounds):
        for name in args.only if turn % 2 == 0 else list(args.only)[::-1]:
            if name in PEERS and turn >= args.peer_rounds:
                continue
            try:
                found[name].append(one(name, job, data, args.workers, args.memory_gb))
            except (RuntimeError, subprocess.TimeoutExpired) as e:  # a row of its own: the other runs are hours of work
                print(f"{name} {job}: {e}", file=sys.stderr)
                found[name].append({"failed": str(e).strip().rpartition("\n")[2]})
    return found


def table(title: str, found: dict[str, list[dict[str, Any]]], mb: float) -> Table:
    rows: list[list[Any]] = []
    for name, all_runs in found.items():
        runs = [r for r in all_runs if "failed" not in r]
        if not runs:
            rows.append([name, *["-"] * 6, f"failed: {all_runs[0]['failed']}"])
            continue
        middle = {k: statistics.median(r[k] for r in runs) for k in ("start_s", "work_s", "cpu_s", "whole_s")}
        spread = f"{min(r['work_s'] for r in runs):.1f} to {max(r['work_s'] for r in runs):.1f}"
        rows.append(
            [
                name,
                f"{middle['start_s']:.1f}",
                f"{middle['work_s']:.1f}",
                spread if len(runs) > 1 else "one run",
                f"{middle['cpu_s']:.1f}",
                f"{mb / middle['work_s']:.1f}",
                f"{middle['whole_s']:.1f}",
                f"{max(r['peak_bytes'] for r in runs) / 1e6:,.0f}",
            ]
        )
    columns = ("contender", "start s", "work s", "range", "CPU s in all", "MB/s", "whole s", "peak MB")
    return Table(title, columns, rows)


def measure(args: argparse.Namespace) -> Result:
    settings = {
        "MB": ", ".join(f"{mb:g}" for mb in args.sizes),
        "rounds": ", ".join(map(str, args.rounds)),
        "rounds of peers": args.peer_rounds,
    }
    result = Result("engines", {**settings, "workers": args.workers, "memory_gb": args.memory_gb}, [])
    with tempfile.TemporaryDirectory(prefix="stepwell-engines-data-") as folder:
        for mb, rounds in zip_longest(args.sizes, args.rounds[: len(args.sizes)], fillvalue=args.rounds[-1]):
            data = Path(folder, f"{mb:g}")
            made = corpus.make(Root(str(data)), mb, args.folder, args.shard_mb)
            size = made.dataset.text_bytes / 1e6
            for job in args.jobs:
                found = contest(job, data, rounds, args)
                result.tables.append(table(f"`{job}` over {made.summary()}", found, size))
                result.checks += _checks(f"{job}, {mb:g} MB", found)
                result.figures[f"{job} {mb:g}"] = found
    return result


def _checks(what: str, found: dict[str, list[dict[str, Any]]]) -> list[Check]:
    """Ours beside `local`: the same bytes, and how much slower past start-up."""
    ours = {name: [r for r in runs if "failed" not in r] for name, runs in found.items() if name in ENGINES}
    lost = sum(len(found[name]) - len(runs) for name, runs in ours.items())
    ours = {name: runs for name, runs in ours.items() if runs}
    if "local" not in ours or len(ours) == 1:
        return [Check(f"{what}: failed runs of our engines", lost, 0)]
    work = {name: statistics.median(r["work_s"] for r in runs) for name, runs in ours.items()}
    digests = {r["made"] for runs in ours.values() for r in runs}
    checks = [Check(f"{what}: failed runs of our engines", lost, 0)]
    checks += [Check(f"{what}: different outputs of our engines", len(digests), 1)]
    return checks + [
        Check(f"{what}: work of `{name}` over that of `local`", s / work["local"], GOAL)
        for name, s in work.items()
        if name != "local"
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=float, nargs="+", default=[200], help="million bytes of text (default 200)")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="take text from here; may be repeated")
    parser.add_argument("--shard-mb", type=float, default=25, help="million bytes of text a shard (default 25)")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, help="default: both")
    parser.add_argument(
        "--only", nargs="+", default=[*ENGINES, *PEERS], choices=[*ENGINES, *PEERS], help="default: all"
    )
    parser.add_argument("--workers", type=int, default=2, help="of each contender (default 2)")
    parser.add_argument("--memory-gb", type=float, default=4, help="of each engine of ours (default 4)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3], help="of each size; the last holds for the rest")
    parser.add_argument("--peer-rounds", type=int, default=1, help="runs of the peers (default 1)")


if __name__ == "__main__":
    alone(__doc__, options, measure)
