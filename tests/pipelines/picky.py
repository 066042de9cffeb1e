"""An annotate stage that raises on some texts and rejects others, for tests of what surrounds a stage."""

import pyarrow as pa

from core.stage import Kind, Reject, Stage, StageConfig


def chars(config, batch):
    """How many characters; ValueError for a batch with 'raise' in it, a reject for a text with 'reject'."""
    texts = batch.column("text").to_pylist()
    if any("raise" in t for t in texts):
        raise ValueError("cannot count \ud800 this")
    rejects = [Reject(i, "refused", "said so") for i, t in enumerate(texts) if "reject" in t]
    return pa.RecordBatch.from_arrays([pa.array([len(t) for t in texts], pa.int64())], names=["chars"]), rejects


STAGE = Stage("picky", Kind.ANNOTATE, StageConfig, chars, reads=("text",), layer=pa.schema([("chars", pa.int64())]))
