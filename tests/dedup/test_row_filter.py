"""The filter of rows: nothing that was put in is held back, little else passes, and the stage comes out the same without it."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from memory_engine import OracleEngine
from planted import pair
from small_corpus import edges, layer, run

from dedup import row_filter as filters
from dedup.minhash import STAGE
from dedup.row_filter import passed, row_filter

ROWS = st.lists(st.integers(0, (1 << 63) - 1), max_size=60)


@given(ROWS, st.integers(0, 1000))
def test_every_row_put_in_passes(rows, seed):
    engine = OracleEngine(seed)
    found = row_filter(engine, engine.table(pa.table({"row": pa.array(rows, pa.int64())})), "test")
    assert passed(np.array(rows, dtype=np.int64), found).all()


def test_one_other_row_in_sixteen_passes():
    """4,096 rows in 65,536 bits set 1 - exp(-1/16) = 0.0606 of them; the standard error of 100,000 tries is 0.0008."""
    engine, rng = OracleEngine(), np.random.default_rng(0)
    rows, others = rng.choice(1 << 40, 4096), rng.choice(1 << 40, 100_000) + (1 << 41)
    found = row_filter(engine, engine.table(pa.table({"row": rows})), "test")
    assert len(found) == 8192
    assert 0.055 < passed(others, found).mean() < 0.066
    assert not passed(others, np.zeros_like(found)).any()


def test_too_many_rows_make_no_filter(monkeypatch):
    monkeypatch.setattr(filters, "MOST_BITS", 64)
    engine = OracleEngine()
    assert row_filter(engine, engine.table(pa.table({"row": np.arange(32)})), "test") is not None
    assert row_filter(engine, engine.table(pa.table({"row": np.arange(33)})), "test") is None


def test_documents_in_no_bucket_stay_where_they_are(corpus, monkeypatch):
    """Of 400 unlike documents and four pairs only the pairs' shingles are joined; without a filter all are, to the same end."""
    rng = np.random.default_rng(3)
    texts = [t for _ in range(4) for t in pair(rng, 0.95, 60)] + [pair(rng, 0.5, 60)[0] for _ in range(400)]
    found = []
    for bits in (filters.MOST_BITS, 8):
        monkeypatch.setattr(filters, "MOST_BITS", bits)
        engine, datasets = OracleEngine(), corpus({"web": texts})
        run(STAGE, engine, datasets, exact=None)
        found.append((edges(datasets), layer(datasets, "minhash")))
        brought = engine.moved["minhash: bring shingles"]
        assert brought < 60_000 if bits > 8 else brought > 150_000
    assert len(found[0][0]) == 4
    assert found[0] == found[1]
