"""Rows of which three in ten have one key, and the engine jobs over them that `test_skew` measures in a process of its own.

`python -m tests.conformance.heavy_keys FOLDER UNITS MEMORY_GB CASE` prints JSON: bytes of rows, rows out, rows cut, largest keys,
peak memory of the workers.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import Frame, Unit
from core.engines.local import LocalEngine

HOT, HOT_FRACTION = 7, 0.3
BATCHES, ROWS, WIDTH = 8, 4000, 1000
SCHEMA = pa.schema([("k", pa.int64()), ("n", pa.int64()), ("filler", pa.large_binary())])
COUNTS = pa.schema([("k", pa.int64()), ("n", pa.int64())])
NAMES = pa.schema([("k", pa.int64()), ("name", pa.int64())])


def heavy(unit: Unit) -> Iterator[pa.RecordBatch]:
    """`unit.payload` = seed: a kilobyte a row."""
    rng = np.random.default_rng(unit.payload)
    for b in range(BATCHES):
        keys = np.where(rng.random(ROWS) < HOT_FRACTION, HOT, rng.integers(1000, 1 << 40, ROWS))
        filler = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(WIDTH), ROWS, [None, pa.py_buffer(rng.bytes(ROWS * WIDTH))]
        )
        numbers = (unit.payload * BATCHES + b) * ROWS + np.arange(ROWS)
        yield pa.record_batch([pa.array(keys), pa.array(numbers), filler.cast(pa.large_binary())], schema=SCHEMA)


def counted(table: pa.Table) -> pa.Table:
    """Rows by key."""
    starts = np.append(np.flatnonzero(key_starts(table, ["k"])), table.num_rows)
    return pa.table([table.column("k").take(pa.array(starts[:-1])), pa.array(np.diff(starts))], schema=COUNTS)


def lowest(table: pa.Table) -> pa.Table:
    """The first row of each key and the sum of `n`: associative, so it may run before the exchange."""
    starts = np.flatnonzero(key_starts(table, ["k"]))
    if not len(starts):
        return table
    total = np.add.reduceat(table.column("n").to_numpy(), starts)
    return table.take(pa.array(starts)).set_column(1, "n", pa.array(total))


def summed(table: pa.Table) -> pa.Table:
    return lowest(table).select(COUNTS.names)


def dropped_filler(table: pa.Table) -> pa.Table:
    return table.select(["k", "name"])


def out_of(engine: LocalEngine, rows: Frame, case: str) -> Frame:
    """The frame that a case makes."""
    if case == "capped":
        return engine.shuffle(rows, ["k"], counted, COUNTS, ["n"], max_rows_per_key=100, label="heavy")
    if case == "combined":
        return engine.shuffle(rows, ["k"], summed, COUNTS, ["n"], combine=lowest, label="heavy")
    if case == "joined":
        names = engine.table(pa.table([[HOT, 1], [70, 10]], schema=NAMES))
        return engine.map(engine.join(rows, names, ["k"], "inner", "heavy"), dropped_filler, NAMES)
    return engine.shuffle(rows, ["k"], counted, COUNTS, ["n"], label="heavy")


def main(folder: str, units: str, memory_gb: str, case: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    engine = LocalEngine(folder, 2, float(memory_gb))
    try:
        rows = engine.scan(heavy, [Unit(str(i), i) for i in range(int(units))], SCHEMA, "rows")
        table = engine.collect(out_of(engine, rows, case))
        hot = table.filter(pc.equal(table.column("k"), HOT))
        found = {
            "bytes": rows.bytes,
            "rows": table.num_rows,
            "hot": pc.sum(hot.column(1)).as_py(),
            "hot_rows": hot.num_rows,
            "cut": engine.dropped_rows(),
            "skew": {label: asdict(key) for label, key in engine.skewed().items()},
            "peak": engine.peak_memory_bytes,
        }
        print(json.dumps(found))
    finally:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
