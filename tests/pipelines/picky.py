"""Annotate stages for tests of what surrounds a stage: one fails on some texts, one reads a model of another stage."""

import pyarrow as pa

from core.stage import ROOT, Kind, Reject, Stage, StageConfig
from core.storage import Root


def chars(config, batch):
    """How many characters; ValueError for a batch with 'raise' in it, a reject for a text with 'reject'."""
    texts = batch.column("text").to_pylist()
    if any("raise" in t for t in texts):
        raise ValueError("cannot count \ud800 this")
    rejects = [Reject(i, "refused", "said so") for i, t in enumerate(texts) if "reject" in t]
    return pa.RecordBatch.from_arrays([pa.array([len(t) for t in texts], pa.int64())], names=["chars"]), rejects


STAGE = Stage("picky", Kind.ANNOTATE, StageConfig, chars, reads=("text",), layer=pa.schema([("chars", pa.int64())]))


def known_words(config, artifacts):
    return set(Root(artifacts[ROOT]).read_json("models/words.json"))


def count_known(words, batch):
    """How many words of each text are in the model."""
    counts = [sum(word in words for word in text.split()) for text in batch.column("text").to_pylist()]
    return pa.RecordBatch.from_arrays([pa.array(counts, pa.int64())], names=["known"]), []


KNOWING = Stage(
    "knowing",
    Kind.ANNOTATE,
    StageConfig,
    count_known,
    reads=("text", "@words"),
    layer=pa.schema([("known", pa.int64())]),
    open=known_words,
)
