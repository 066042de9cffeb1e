"""The stage `embed`: one vector a document, from the model that the stage `embedder` made.

In: `text`, the model (`@embedder`), and with `language` the column that says which. Out, the layer `embed`:

- `vector`  large_binary  int8 [dims], the largest entry 127 in magnitude: a direction, no length; null: no known word
- `model`   large_string  `distilled` or `hashed`: whose vector it is; null where the vector is null

Only the first `max_chars` characters are read. Sums are integers, so a vector is the same in every batch and on every CPU.

The default encoder is English. Other languages come out by the word pieces and letters that they share with it, which says
something of spelling and little of meaning; Chinese and Japanese characters are mostly unknown. With `language:
language.language` documents in languages that the encoder does not know get hashed features of spelling instead
(`mixtures.hashed_vectors`). The two spaces are unrelated: at 256 dims the cosine of a distilled and a hashed vector was 0.05 in
magnitude in the mean and 0.32 at most, that of hashed ones of one language 0.23 in the mean (1,803 documents).

Cost: 1,800 pages of 8 kB a CPU second once a worker knows the common words, half of that on its first thousand pages; 350 MB
a worker. Hashing reads 2,000 such pages a CPU second.
"""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.errors import StageError
from core.schema import TEXT
from core.stage import ROOT, Artifacts, Kind, Reject, Resources, Stage, StageConfig
from core.storage import Root
from mixtures.hashed_vectors import hashed_vectors
from mixtures.static_vectors import StaticVectors, to_int8

LAYER = pa.schema([("vector", pa.large_binary()), ("model", TEXT)])
DISTILLED, HASHED = "distilled", "hashed"
SLICE_DOCS = 64  # documents hashed at once: their code points stay in memory that the allocator keeps


class EmbedConfig(StageConfig):
    """How documents are embedded."""

    embedder: str = Field(default="embedder", description="instance of the stage `embedder` whose model is used")
    max_chars: int = Field(default=10_000, gt=0, le=1 << 20, description="characters read from the start of a document")
    language: str | None = Field(
        default=None,
        description="column such as `language.language`; documents in languages unknown to the encoder are hashed",
    )


@dataclass(frozen=True)
class EmbedState:
    """What a worker holds. `static` is None where every document is hashed."""

    config: EmbedConfig
    dims: int
    languages: tuple[str, ...]
    static: StaticVectors | None


def open_model(config: EmbedConfig, artifacts: Artifacts) -> EmbedState:
    """Load what `embedder` wrote, once per worker."""
    from tokenizers import Tokenizer

    root, folder = Root(artifacts[ROOT]), f"models/{config.embedder}"
    if not root.exists(f"{folder}/embedder.json"):
        raise StageError(f"embed: no model {config.embedder!r} in {root.url}; run stage {config.embedder} first")
    about = root.read_json(f"{folder}/embedder.json")
    static = None
    if about["kind"] == DISTILLED:
        table = np.load(io.BytesIO(root.read_bytes(f"{folder}/table.npy")))
        static = StaticVectors(Tokenizer.from_str(root.read_bytes(f"{folder}/tokenizer.json").decode("utf-8")), table)
    return EmbedState(config, about["dims"], tuple(about["languages"]), static)


def embed(state: EmbedState, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Vectors of a batch, same order."""
    texts = pc.utf8_slice_codeunits(pc.fill_null(batch.column("text"), ""), 0, state.config.max_chars)
    hashed = np.full(len(texts), state.static is None)
    if state.static is not None and state.config.language:
        language = batch.column(state.config.language)
        known = pc.is_in(language, value_set=pa.array(state.languages, language.type))
        hashed = np.asarray(pc.and_(pc.is_valid(language), pc.invert(known)))
    sums = np.zeros((len(texts), state.dims), dtype=np.int64)
    at = np.flatnonzero(hashed)
    for start in range(0, len(at), SLICE_DOCS):
        part = at[start : start + SLICE_DOCS]
        sums[part] = hashed_vectors(texts.take(pa.array(part)), state.dims)
    if state.static is not None and not hashed.all():
        sums[~hashed] = state.static.sums(texts.filter(pa.array(~hashed)).to_pylist())
    models = pa.array(np.where(hashed, HASHED, DISTILLED), TEXT)
    some = pa.array(sums.any(axis=1))
    columns = [pc.if_else(some, vector_column(to_int8(sums)), None), pc.if_else(some, models, None)]
    return pa.RecordBatch.from_arrays(columns, schema=LAYER), []


def vector_column(vectors: np.ndarray) -> pa.Array:
    """int8 [n, dims] as large_binary [n]."""
    n, dims = vectors.shape
    offsets = pa.py_buffer(np.arange(n + 1, dtype=np.int64) * dims)
    return pa.Array.from_buffers(pa.large_binary(), n, [None, offsets, pa.py_buffer(np.ascontiguousarray(vectors))])


def reads(config: EmbedConfig) -> tuple[str, ...]:
    return ("text", *((config.language,) if config.language else ()), f"@{config.embedder}")


STAGE = Stage(
    name="embed",
    kind=Kind.ANNOTATE,
    config=EmbedConfig,
    fn=embed,
    reads=reads,
    layer=LAYER,
    open=open_model,
    libraries=("numpy", "tokenizers"),
    resources=Resources(memory_gb=1.0),
)
