"""Rows as addresses: layout by hand, packing loses nothing, the rows of one dataset."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from core.rows import ROW_BITS, SHARD_BITS, dataset_of, local_of, of_dataset, pack, shard_of

PLACES = st.tuples(st.integers(0, 2**15 - 1), st.integers(0, 2**SHARD_BITS - 1), st.integers(0, 2**ROW_BITS - 1))


def test_layout_by_hand():
    assert pack(1, 2, np.array([3])).tolist() == [(1 << 48) | (2 << 24) | 3]
    assert pack(0, 1, 3).tolist() == [1 << 24, (1 << 24) + 1, (1 << 24) + 2]
    assert pack(5, 5, 0).tolist() == []


@given(st.lists(PLACES, min_size=1, max_size=20))
def test_packing_loses_nothing_and_keeps_order(places):
    rows = np.concatenate([pack(d, s, np.array([r])) for d, s, r in places])
    assert rows.dtype == np.int64
    assert (rows >= 0).all()
    assert list(zip(dataset_of(rows), shard_of(rows), local_of(rows), strict=True)) == places
    assert [places[i] for i in np.argsort(rows, kind="stable")] == sorted(places)


def test_the_rows_of_one_dataset():
    rows = np.concatenate([pack(0, 7, 2), pack(1, 0, 1), pack(2, 7, 1), pack(1, 7, 1)])
    found = of_dataset(1, pa.table({"row": rows, "n": range(5)}))
    assert found.column("n").to_pylist() == [2, 4]
