"""Texts as vectors, for the search of the inventory in the passages: a protocol, a default that needs no model, a trained one.

`embed(texts)` gives float32 [n, d]; rows mean directions, zero for a text without a known word. The default hashes words into d
signed buckets, weighted by length, so that `the` says little and `photosynthesis` much; it finds shared words, not shared
meaning. `ModelVectors` are those of the stage `embed`, from a model of `embedder`: of a distilled one they find meaning.

Similarities are compared as whole numbers: `quantised` turns a row into integers within +-127, held in float32, and a product
of two such rows of d <= 1024 is a whole number below 2^24, which float32 holds exactly. So the order in which a matrix product
adds, which depends on batch size, threads and library, cannot move a hit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.schema import TEXT
from core.stage import ROOT
from core.text import Hashes, code_points, raw_words, words
from mixtures.embed import EmbedConfig, EmbedState, embed, open_model
from mixtures.kmeans import unpack

LEVELS = 127
MOST_DIMENSIONS = 1024  # 1024 * 127 * 127 < 2^24
FULL_WEIGHT_CHARS = 8  # words of this length and more count whole, shorter ones in proportion: chosen, untested


class Embedder(Protocol):
    """Anything that turns texts into vectors. Must be picklable, and give the same vector for the same text always."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


class HashedWords:
    """Signed feature hashing of lower-case words; sums are of integers, so equal texts have equal vectors anywhere."""

    def __init__(self, dimensions: int = 512) -> None:
        self.dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dimensions], rows of length one; zero for a text without a word."""
        text = code_points(pc.utf8_lower(pa.array(texts, TEXT)))
        found = words(text, raw_words(text))
        hashes = Hashes(text.points).of(found.start, found.end)
        weight = np.minimum(found.end - found.start, FULL_WEIGHT_CHARS)
        document = np.repeat(np.arange(len(texts)), np.diff(found.first))
        bucket = (hashes % np.uint64(self.dimensions)).astype(np.int64)
        sign = 1 - 2 * (hashes >> np.uint64(63)).astype(np.int64)
        sums = np.zeros(len(texts) * self.dimensions, np.int64)
        np.add.at(sums, document * self.dimensions + bucket, sign * weight)
        rows = sums.reshape(len(texts), self.dimensions).astype(np.float64)
        length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        return (rows / np.maximum(length, 1.0)).astype(np.float32)


@dataclass(frozen=True)
class ModelVectors:
    """Vectors from an instance of `embedder`, loaded once per worker and `identity`, that of the stage which reads it."""

    url: str
    instance: str
    identity: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dims]."""
        state = _opened(self)
        made, _ = embed(state, pa.RecordBatch.from_arrays([pa.array(texts, TEXT)], names=["text"]))
        found, there = unpack(made.column("vector"), "passages", state.dims)
        vectors = np.zeros((len(texts), state.dims), np.float32)
        vectors[there] = found
        return vectors


@lru_cache(maxsize=1)
def _opened(model: ModelVectors) -> EmbedState:
    return open_model(EmbedConfig(embedder=model.instance), {ROOT: model.url})


def quantised(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] of whole numbers within +-LEVELS: each row scaled by its largest entry."""
    if vectors.shape[1] > MOST_DIMENSIONS:
        raise ValueError(f"passages: vectors have {vectors.shape[1]} dimensions, expected at most {MOST_DIMENSIONS}")
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)
    return np.rint(vectors / np.where(largest > 0, largest, 1.0) * LEVELS).astype(np.float32)


def nearest(passages: np.ndarray, entities: np.ndarray, least: float, most: int) -> list[list[int]]:
    """For each quantised passage row the entity rows of cosine >= `least`, nearest first, at most `most`."""
    if not len(entities):
        return [[] for _ in range(len(passages))]
    products = (passages @ entities.T).astype(np.int64)
    squares = [(v.astype(np.int64) ** 2).sum(axis=1) for v in (passages, entities)]
    lengths = np.sqrt(np.outer(squares[0], squares[1]).astype(np.float64))
    cosine = products / np.where(lengths > 0, lengths, 1.0)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :most]
    return [[int(j) for j in row if cosine[i, j] >= least] for i, row in enumerate(order)]
