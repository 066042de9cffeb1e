"""Which rows of a large frame a join will want: a filter that every worker carries, so that the others stay where they are.

A Bloom filter with one hash over `row` (Bloom 1970): it passes every row that was put in, and of the others one in BITS_PER_ROW.
Beyond MOST_BITS / BITS_PER_ROW rows it passes more, and where it would pass most there is none. Rows that pass for nothing fall
out in the join, so the filter decides what is moved, never what comes out.
"""

from functools import partial

import numpy as np
import pyarrow as pa

from core.engines.contract import Engine, Frame, rows_in

BITS_PER_ROW = 16
MOST_BITS = 1 << 25  # 4 MB, which goes to every worker and comes back from every part: chosen, untested
ODD = np.uint64(0x9E3779B97F4A7C15)


def row_filter(engine: Engine, frame: Frame, label: str) -> np.ndarray | None:
    """The filter of the column `row`, uint8 [bits / 8]; None where it would pass more than half of the others."""
    rows = rows_in(engine, frame, f"{label}: count")
    bits = min(MOST_BITS, 1 << max(3, (rows * BITS_PER_ROW - 1).bit_length()))
    if rows > bits // 2:
        return None
    found = engine.fold(frame, partial(marked, bits=bits), np.bitwise_or, label)
    return np.zeros(bits // 8, dtype=np.uint8) if found is None else found


def marked(piece: pa.Table, bits: int) -> np.ndarray:
    """The filter of one piece."""
    out = np.zeros(bits // 8, dtype=np.uint8)
    byte, bit = _places(piece.column("row").to_numpy(), bits)
    np.bitwise_or.at(out, byte, bit)
    return out


def passed(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [n]: false for rows that surely were not put in."""
    byte, bit = _places(rows, len(wanted) * 8)
    return (wanted[byte] & bit) != 0


def _places(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Byte and bit of each row; `bits` is a power of two."""
    at = (rows.view(np.uint64) * ODD) >> np.uint64(64 - bits.bit_length() + 1)
    return (at >> np.uint64(3)).astype(np.int64), np.uint8(1) << (at & np.uint64(7)).astype(np.uint8)
