"""Language models of the sample, one a language and half, and the figures of their card.

In: the sample. Out: a pair of `ngrams.Model` for each language with enough text: the first for documents of half 0, trained on
half 1, and the other way round, so that no document is scored by a model that has read it. Curated kinds are read first, other
documents by hash until `lm_bytes` are reached: what is fluent is first of all what somebody edited (CCNet, Wenzek et al. 2020,
arXiv 1911.00359, takes Wikipedia).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.raters import corrupt
from classifiers.raters.labels import half_of, site
from classifiers.raters.ngrams import FIXED, Model, Scorer, train
from core.hashing import seeded
from core.schema import TEXT

ORDER_SEED = 6104
CARD_DOCS = 150  # documents of a language that the card compares to their scrambled selves, in three folds
CARD_BYTES = 300_000  # that a model of the card is trained on: three a language are thrown away
CARD_FOLDS = 3


def models(
    sample: pa.Table, curated: Sequence[str], order: int, least: int, most: int
) -> dict[str, tuple[Model, Model]]:
    """Language -> models. A language whose smaller half has less than `least` bytes has none."""
    out = {}
    half = half_of(sample.column("doc_id").combine_chunks())
    for language, rows in by_language(sample, curated).items():
        parts = [_upto(sample, rows[half[rows] != h], most) for h in (0, 1)]
        if min(pc.sum(pc.binary_length(p)).as_py() or 0 for p in parts) >= least:
            out[language] = (train(parts[0], order), train(parts[1], order))
    return out


def by_language(sample: pa.Table, curated: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of each language, curated kinds first, then by hash."""
    about = zip(*(sample.column(c).to_pylist() for c in ("language", "kind", "doc_id")), strict=True)
    keys = [(language, kind not in curated, seeded(ORDER_SEED, doc_id), doc_id) for language, kind, doc_id in about]
    found: dict[str, list[int]] = {}
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        found.setdefault(keys[i][0], []).append(i)
    return {language: np.array(rows, dtype=np.int64) for language, rows in found.items()}


def _upto(sample: pa.Table, rows: np.ndarray, most: int) -> pa.Array:
    """The texts of `rows` until they are `most` bytes long."""
    texts = sample.column("text").take(pa.array(rows)).cast(TEXT)
    size = np.cumsum(np.asarray(pc.binary_length(texts)).astype(np.int64))
    texts = texts.slice(0, int(np.searchsorted(size, most)) + 1)
    return pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], TEXT)


def scores(scorer: Scorer, texts: pa.Array) -> np.ndarray:
    """float64 [n]: the geometric mean of the characters' probabilities, 1 / perplexity; NaN for a text without characters."""
    bits, count = scorer.bits(texts)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.exp2(-bits / FIXED / np.maximum(count, 1)), np.nan)


class Compared(NamedTuple):
    """Texts and themselves without their order: `label` 1 and 0, `stratum` the language and the fold, `way` what was done."""

    score: np.ndarray
    label: np.ndarray
    stratum: list[str]
    way: list[str]
    texts: list[str]


def compared(sample: pa.Table, languages: Sequence[str], curated: Sequence[str], order: int) -> Compared:
    """Scores of texts and of their scrambled selves by models that saw no page of their site; of some for each language."""
    out = Compared(np.zeros(0), np.zeros(0, np.int8), [], [], [])
    rows_of = by_language(sample, curated)
    for language in languages:
        rows = rows_of[language]
        urls, datasets, ids, texts = (
            sample.column(c).take(pa.array(rows)).to_pylist() for c in ("url", "dataset", "doc_id", "text")
        )
        sites = [site(url) or dataset for url, dataset in zip(urls, datasets, strict=True)]
        names = sorted(set(sites), key=lambda s: (-sites.count(s), s))
        fold = np.array([names.index(s) % CARD_FOLDS for s in sites])
        for f in range(min(CARD_FOLDS, len(names)) if len(names) > 1 else 0):
            at = np.flatnonzero(fold == f)[: CARD_DOCS // CARD_FOLDS]
            scorer = Scorer(train(_upto(sample, rows[fold != f], CARD_BYTES), order))
            spoilt = [corrupt.scramble(texts[i], ids[i]) for i in at]
            both = [*(texts[i] for i in at), *(text for text, _ in spoilt)]
            out = Compared(
                np.concatenate([out.score, scores(scorer, pa.array(both, TEXT))]),
                np.concatenate([out.label, np.repeat(np.array([1, 0], np.int8), len(at))]),
                out.stratum + [f"{language} {f}"] * len(both),
                out.way + [way for _, way in spoilt] * 2,
                out.texts + both,
            )
    return out
