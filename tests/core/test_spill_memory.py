"""A shuffle of far more rows than memory: the workers' peak stays below what the engine was given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
BASE_BYTES = 150e6  # a worker whose libraries are loaded and which holds no row: measured 128-150 MB

DRIVER = """
import json, sys
import pyarrow as pa
import pyarrow.compute as pc
from core.engines import spill
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.core import kernels

if __name__ == "__main__":
    folder, units, memory_gb, rows, each = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    engine = LocalEngine(folder, 2, memory_gb)
    schema = pa.schema([("k", pa.int64()), ("filler", pa.large_binary() if rows == "made_rows" else pa.int64())])
    frame = engine.scan(getattr(kernels, rows), [Unit(str(i), (i, 8, each)) for i in range(units)], schema, "rows")
    out = engine.shuffle(frame, ["k"], kernels.key_counts, pa.schema([("k", pa.int64()), ("n", pa.int64())]))
    rows = sum(pc.sum(b.column("n")).as_py() or 0 for p in out.parts for b in p.batches())
    distinct = sum(p.rows for p in out.parts)
    print(json.dumps({"bytes": frame.bytes, "rows": rows, "distinct": distinct, "peak": engine.peak_memory_bytes}))
    engine.close()
"""


def shuffle(tmp_path, units, memory_gb, rows="made_rows", each=4000):
    (tmp_path / "driver.py").write_text(DRIVER)
    out = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "driver.py"),
            str(tmp_path / "scratch"),
            str(units),
            str(memory_gb),
            rows,
            str(each),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=BOUND_S,
    )
    return json.loads(out.stdout)


def test_memory_stays_bounded(tmp_path):
    """512 MB of rows through two workers of 100 MB each."""
    seen = shuffle(tmp_path, 16, 0.2)
    assert seen["rows"] == 16 * 8 * 4000
    assert seen["distinct"] > 0.99 * seen["rows"]
    assert seen["bytes"] > 512e6
    assert seen["peak"] < BASE_BYTES + 100e6


def test_a_worker_with_narrow_rows_stays_within_its_part(tmp_path):
    """Two workers of 400 MB, themselves included, and more than a block for each."""
    seen = shuffle(tmp_path, 2, 0.8, "narrow_rows", 600_000)
    assert seen["rows"] == 2 * 8 * 600_000
    assert seen["bytes"] == 16 * seen["rows"]
    assert seen["peak"] < 400e6


@pytest.mark.soak
def test_memory_stays_bounded_for_ten_gigabytes(tmp_path):
    """Through two workers of 200 MB each."""
    if "STEPWELL_SOAK" not in os.environ:
        pytest.skip("set STEPWELL_SOAK to run it: it writes 20 GB of scratch")
    units = 320
    seen = shuffle(tmp_path, units, 0.4)
    assert seen["rows"] == units * 8 * 4000
    assert seen["bytes"] > 10e9
    assert seen["peak"] < BASE_BYTES + 200e6
