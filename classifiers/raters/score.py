"""The stage `raters`: what each trained rater says of each document, 0 to 1, high is good.

In: `text`, `language.language`, the models of `train_raters`. Out, a row a document: float32 `educational`, `knowledge`,
`reference`, `fluency`, `commercial`, `integrity`, rounded to SCORE_DIGITS, and `bytes` (int64, UTF-8 length). Null where a rater
does not apply: it was not trained in the document's language (unknown or too few labels), or the text has no token. Never NaN.
Models trained anew score every shard anew.

`fluency` is the geometric mean of the characters' probabilities, 1 / perplexity; the others are logistic. Scores are to be
compared within a language; `tiers` does that. A document is read in windows, as many bytes of it as the raters were trained
on and `fluency_bytes` for fluency, so it costs no more however long it is.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from classifiers.raters.features import features
from classifiers.raters.fluency import scores
from classifiers.raters.labels import RATERS, half_of
from classifiers.raters.linear import FIXED, chunks, sums
from classifiers.raters.ngrams import Scorer
from classifiers.raters.sample import windows
from classifiers.raters.store import Trained, load
from core.schema import TEXT
from core.stage import ROOT, Artifacts, Kind, Reject, Resources, Stage, StageConfig
from core.storage import Root

SCORE_DIGITS = 4  # 10,001 values: a histogram of them is exact, and far coarser than what CPUs disagree on
LAYER = pa.schema([*(pa.field(name, pa.float32()) for name in RATERS), pa.field("bytes", pa.int64())])


class RatersConfig(StageConfig):
    """Which models rate."""

    model: str = Field(default="train_raters", description="instance of `train_raters` whose models are used")
    fluency_bytes: int = Field(default=2048, ge=64, description="UTF-8 bytes of a document that fluency reads")


class State(NamedTuple):
    """What a worker holds."""

    config: RatersConfig
    trained: Trained
    weight: np.ndarray  # int32 [2 * 2^bits, linear raters]: both halves, one after the other
    scorers: dict[str, tuple[Scorer, Scorer]]


def open_raters(config: RatersConfig, artifacts: Artifacts) -> State:
    """Load the models once per worker."""
    return state_of(config, load(Root(artifacts[ROOT]), config.model))


def state_of(config: RatersConfig, trained: Trained) -> State:
    """Models made ready to be looked up."""
    weight = [trained.linear[name].weight.reshape(-1) for name in trained.linear]
    size = 2 << trained.bits
    stacked = np.stack(weight, axis=1) if weight else np.zeros((size, 0), np.int32)
    scorers = {name: (Scorer(pair[0]), Scorer(pair[1])) for name, pair in trained.fluency.items()}
    return State(config, trained, stacked, scorers)


def rate(state: State, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """Scores of every document, same order."""
    column = pc.fill_null(batch.column("text"), "").cast(TEXT)
    language = batch.column("language.language").to_pylist()
    half = half_of(batch.column("doc_id"))
    found = dict.fromkeys(RATERS, np.full(len(column), np.nan))
    found |= _linear(state, windows(column, state.trained.max_bytes), language, half)
    found["fluency"] = _fluency(state, column, language, half)
    arrays = []
    for name in RATERS:
        score = np.round(found[name], SCORE_DIGITS).astype(np.float32)
        arrays.append(pa.array(score, mask=np.isnan(score)))
    size = pc.binary_length(column).cast(pa.int64())
    return pa.RecordBatch.from_arrays([*arrays, size], schema=LAYER), []


def _linear(state: State, column: pa.Array, language: list[str | None], half: np.ndarray) -> dict[str, np.ndarray]:
    """float64 [n] for each linear rater; NaN where it does not apply."""
    names = list(state.trained.linear)
    parts, start = [], 0
    for part in chunks(column):
        families = features(part, state.trained.bits)
        sides = half[start : start + len(part)].astype(np.int32)
        shifted = [f._replace(ids=f.ids + np.repeat(sides << state.trained.bits, np.diff(f.first))) for f in families]
        total_k, count = sums(shifted, state.weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(total_k / np.sqrt(np.where(count > 0, count, np.nan))[:, None])
        start += len(part)
    unit = np.concatenate(parts) if parts else np.zeros((0, len(names)))
    out = {}
    for k, name in enumerate(names):
        rater = state.trained.linear[name]
        applies = np.array([code in rater.languages for code in language], dtype=bool)
        logit = (unit[:, k] + np.array(rater.bias)[half]) / FIXED
        out[name] = np.where(applies, 1 / (1 + np.exp(-logit)), np.nan)
    return out


def _fluency(state: State, column: pa.Array, language: list[str | None], half: np.ndarray) -> np.ndarray:
    """float64 [n]; NaN where the language has no model or the text no character."""
    out = np.full(len(column), np.nan)
    read = windows(column, state.config.fluency_bytes)
    code = np.array([name or "" for name in language], dtype=object)
    for name, pair in state.scorers.items():
        for side in (0, 1):
            at = np.flatnonzero((code == name) & (half == side))
            if len(at):
                out[at] = scores(pair[side], read.take(pa.array(at)))
    return out


def reads(config: RatersConfig) -> tuple[str, ...]:
    return ("doc_id", "text", "language.language", f"@{config.model}")


STAGE = Stage(
    name="raters",
    kind=Kind.ANNOTATE,
    config=RatersConfig,
    fn=rate,
    version=1,
    reads=reads,
    layer=LAYER,
    open=open_raters,
    libraries=("numpy",),
    resources=Resources(memory_gb=2.0),
)
