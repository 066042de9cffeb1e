"""A shuffle far larger than memory: speed, and the peak memory of workers and driver.

    python -m benchmarks.spill [--gb 1] [--memory-gb 1] [--workers 2]

Random rows (`key`, int64, each about twice; `place`, int64; `payload`, 84 random bytes, which no codec shrinks) are made on the
workers, shuffled by key through LocalEngine and counted. The count of rows and a sum over all payloads must be the same after as
before, and every table that the reduce side sees must be sorted. Peaks are VmHWM, reset before each unit
(`core.engines.measure`), so spill files that a process maps count as well as what it allocates.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Sample, timed
from benchmarks.result import Check, Result, Table, alone
from core.engines.contract import Frame, Report, Unit, UnitFn
from core.engines.local import LocalEngine
from core.engines.measure import peak_memory, reset_peak_memory
from core.stage import Resources

PAYLOAD = 84
ROW_BYTES = 8 + 8 + PAYLOAD + 4  # with the offset of the payload
UNIT_BYTES = 64 << 20  # one unit of input
SCHEMA = pa.schema([("key", pa.int64()), ("place", pa.int64()), ("payload", pa.binary())])


class Watched(LocalEngine):
    """A local engine that keeps the peak memory of each verb's workers."""

    peaks: dict[str, int]

    def run_units(
        self, fn: UnitFn, units: Sequence[Unit], label: str, stall_s: float = 600.0, resources: Resources | None = None
    ) -> list[Report]:
        reports = super().run_units(fn, units, label, stall_s, resources)
        self.peaks = {**getattr(self, "peaks", {}), label: max((r.peak_memory_bytes for r in reports), default=0)}
        return reports


def random_rows(unit: Unit) -> Iterator[pa.RecordBatch]:
    """The rows of one unit; payload is (seed, rows, keys)."""
    seed, rows, keys = unit.payload
    rng = np.random.default_rng(seed)
    step = (4 << 20) // ROW_BYTES
    for start in range(0, rows, step):
        n = min(step, rows - start)
        offsets = pa.py_buffer(np.arange(n + 1, dtype=np.int32) * PAYLOAD)
        payload = pa.Array.from_buffers(pa.binary(), n, [None, offsets, pa.py_buffer(rng.bytes(n * PAYLOAD))])
        place = np.arange(start, start + n) + (seed << 32)
        yield pa.RecordBatch.from_arrays(
            [pa.array(rng.integers(0, keys, n)), pa.array(place), payload],
            schema=SCHEMA,
        )


Seen = tuple[int, int]  # rows, sum of all payload bytes


def seen(table: pa.Table) -> Seen:
    """What must be the same before and after."""
    total = 0
    for chunk in table.column("payload").chunks:
        data = np.frombuffer(chunk.buffers()[2], np.uint8)
        total += int(data[chunk.offset * PAYLOAD : (chunk.offset + len(chunk)) * PAYLOAD].sum(dtype=np.int64))
    return table.num_rows, total


def add(a: Seen, b: Seen) -> Seen:
    return a[0] + b[0], a[1] + b[1]


def sorted_by_key(table: pa.Table) -> pa.Table:
    """The rows as they are, if the shuffle kept its promise."""
    if np.any(np.diff(table.column("key").to_numpy()) < 0):
        raise ValueError("the shuffle handed over unsorted keys")
    return table


def units_of(gb: float) -> list[Unit]:
    rows = int(gb * 1e9) // ROW_BYTES
    per_unit = UNIT_BYTES // ROW_BYTES
    starts: Iterable[int] = range(0, rows, per_unit)
    return [Unit(f"{i:05d}", (i, min(per_unit, rows - start), rows // 2), UNIT_BYTES) for i, start in enumerate(starts)]


def measure(args: argparse.Namespace) -> Result:
    scratch = Path(args.scratch or tempfile.mkdtemp(prefix="stepwell-spill-"))
    engine = Watched(scratch / "engine", args.workers, args.memory_gb)
    units = units_of(args.gb)
    found: dict[str, Any] = {}

    def scan() -> None:
        found["rows"] = engine.scan(random_rows, units, SCHEMA, "make rows")

    def shuffle() -> None:
        rows: Frame = found["rows"]
        found["shuffled"] = engine.shuffle(rows, ["key"], sorted_by_key, SCHEMA, order=["place"], label="shuffle")

    reset_peak_memory()
    try:
        made = timed(scan)
        before = engine.fold(found["rows"], seen, add, "count before")
        took = timed(shuffle)
        driver = peak_memory()
        after = engine.fold(found["shuffled"], seen, add, "count after")
    finally:
        engine.close()
        shutil.rmtree(scratch)
    return _result(args, engine.peaks, driver, made, took, before[0], before == after)


def _result(
    args: argparse.Namespace, peaks: dict[str, int], driver: int, made: Sample, took: Sample, rows: int, same: bool
) -> Result:
    size = rows * ROW_BYTES
    speed = Table(
        "Shuffle",
        ("step", "wall s", "CPU s", "million rows/s", "MB/s"),
        [
            [name, f"{s.wall_s:.1f}", f"{s.cpu_s:.1f}", f"{rows / s.wall_s / 1e6:.2f}", f"{size / s.wall_s / 1e6:.0f}"]
            for name, s in (("make rows", made), ("shuffle", took))
        ],
    )
    memory: list[list[Any]] = [[label, f"{peak / 1e6:.0f}"] for label, peak in peaks.items()]
    memory.append(["driver", f"{driver / 1e6:.0f}"])
    top = max(peaks.values(), default=0)
    settings = {"rows": rows, "GB": round(size / 1e9, 2), "workers": args.workers, "memory_gb": args.memory_gb}
    checks = [
        Check("largest worker, share of its part of memory_gb", top / (args.memory_gb * 1e9 / args.workers), 1.0),
        Check("rows and payloads are the same after as before (1: yes)", float(same), 1.0, at_least=True),
    ]
    figures = {"peaks": peaks, "driver_peak": driver, "make": vars(made), "shuffle": vars(took)}
    tables = [speed, Table("Peak resident MB of the largest worker by step", ("step", "MB"), memory)]
    return Result("spill", settings, tables, checks, figures=figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=1, help="billion bytes of rows (default 1)")
    parser.add_argument("--memory-gb", type=float, default=1, help="memory shared by all workers (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument(
        "--scratch", default=None, help="folder to spill to, removed at the end (default: a temporary one)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    alone(__doc__, options, measure, argv)


if __name__ == "__main__":
    main()
