"""Calibration of tiers to labelled documents: logistic stacking of the buckets, and isotonic probabilities.

In: a JSONL file of {text, label, language}, the models of `train_raters`, the percentiles that `tiers` found. Out: the judge with
a fitted stack (`method: stacked`), and the ensemble as a probability. The documents are rated as any other and looked up in the
percentiles of their language; they are not counted in them. scikit-learn fits both; coefficients are rounded to six digits.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.ensemble import NOTHING, UNIT, Stack, stack_inputs
from classifiers.raters.labels import RATERS, read_labelled
from classifiers.raters.score import RatersConfig, rate, state_of
from classifiers.raters.store import load
from core.errors import ConfigError
from core.hashing import document_id
from core.job import Job
from core.schema import TEXT

if TYPE_CHECKING:
    from classifiers.tiers import Judge

LEAST_DOCS = 20  # of each label; chosen


def calibrated(job: Job, judge: "Judge") -> "tuple[Judge, tuple[np.ndarray, np.ndarray]]":
    """(the judge, with a stack where the config asks for one; ensembles ascending and their probabilities)."""
    from sklearn.isotonic import IsotonicRegression

    scored, label = rated(job)
    if job.config.method == "stacked":
        judge = judge._replace(stack=fit_stack(judge.of(scored)[1], label))
    found = judge.of(scored)[2]
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(found, label)
    return judge, (fitted.X_thresholds_.astype(np.float64), fitted.y_thresholds_.round(6))


def rated(job: Job) -> tuple[pa.Table, np.ndarray]:
    """The labelled documents as `tiers` reads documents, and their labels."""
    from classifiers.tiers import SCORED

    rows = read_labelled(job.config.labelled, job.instance)
    label = np.array([int(r["label"]) for r in rows])
    if min((label == 1).sum(), (label == 0).sum()) < LEAST_DOCS:
        raise ConfigError(
            f"{job.instance}: too few labelled documents in {job.config.labelled}, got {int((label == 1).sum())} of label 1 "
            f"and {int((label == 0).sum())} of label 0, expected {LEAST_DOCS} of each; label more"
        )
    texts = [str(r["text"]) for r in rows]
    language = pa.array([str(r.get("language") or "en") for r in rows], TEXT)
    ids = pa.array([document_id("labelled", "", t) for t in texts], TEXT)
    batch = pa.RecordBatch.from_arrays(
        [ids, pa.array(texts, TEXT), language], names=["doc_id", "text", "language.language"]
    )
    scores, _ = rate(state_of(RatersConfig(), load(job.root, job.config.model)), batch)
    whole = [pc.round(pc.multiply(scores.column(r).cast(pa.float64()), float(UNIT))).cast(pa.int32()) for r in RATERS]
    arrays = [
        pa.array(np.arange(len(rows))),
        language,
        scores.column("bytes"),
        *(pc.fill_null(w, NOTHING) for w in whole),
    ]
    return pa.Table.from_arrays(arrays, schema=SCORED), label


def fit_stack(bucket: np.ndarray, label: np.ndarray) -> Stack:
    """A logistic regression of the labels on the buckets."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(solver="liblinear", dual=True, random_state=0, tol=1e-6, max_iter=10_000)
    model.fit(stack_inputs(bucket), label)
    return Stack(model.coef_[0].round(6), round(float(model.intercept_[0]), 6))
