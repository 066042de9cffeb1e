"""Batches of text for the kernels of this folder's tests."""

import pyarrow as pa


def texts_batch(texts: list[str | None]) -> pa.RecordBatch:
    """What a stage that reads `text` is handed."""
    return pa.record_batch({"text": pa.array(texts, pa.large_string())})
