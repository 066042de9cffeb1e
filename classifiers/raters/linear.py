"""A linear model over hashed n-grams: fitting, scoring and the figures of its card.

A document is the sum of its features over the square root of their number: about unit length where few repeat, and no n-gram
need be counted to score it. One weight for each n-gram is also what fastText's classifier of two classes comes to once trained.
Here the weights themselves are fitted, by L2 logistic regression in the dual (liblinear: one thread, one order, its own
generator with a fixed seed), and stored as int32 in units of 1 / FIXED. Scores are sums of int64, so neither batch nor machine
moves them; only the last steps, root and logistic function, are float.

Within a language both labels weigh the same, and a language without enough documents of both is left out: otherwise the
language would be what is learned.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from classifiers.raters.features import Features, features
from classifiers.raters.labels import Task

FIXED = 1 << 16
CELL_DOCS = 20  # documents of each label below which a language is left out; chosen, untested
FOLDS = 10  # models fitted for one card
TOLERANCE = 0.1  # liblinear's own default for its dual solvers
CHUNK_BYTES = 4 << 20


class Weights(NamedTuple):
    """One linear rater."""

    weight: np.ndarray  # int32 [2^bits]
    bias: int  # both in units of 1 / FIXED


def chunks(column: pa.Array, size: int = CHUNK_BYTES) -> Iterator[pa.Array]:
    """Slices of whole texts with about `size` bytes each, so that memory does not grow with a batch."""
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    at = 0
    while at < len(column):
        cut = max(at + 1, int(np.searchsorted(offsets, offsets[at] + size, side="right")) - 1)
        yield column.slice(at, cut - at)
        at = cut


def matrix(column: pa.Array, bits: int) -> Any:
    """scipy CSR float64 [D, 2^bits]: the features of each text over the root of their number."""
    from scipy.sparse import csr_matrix, vstack

    parts = []
    for part in chunks(column):
        families = features(part, bits)
        count = sum(np.diff(f.first) for f in families)
        doc = np.concatenate([np.repeat(np.arange(len(part)), np.diff(f.first)) for f in families])
        ids = np.concatenate([f.ids for f in families])
        key, times = np.unique(doc.astype(np.int64) << bits | ids, return_counts=True)
        value = times / np.sqrt(np.maximum(count, 1))[key >> bits]
        parts.append(csr_matrix((value, (key >> bits, key & ((1 << bits) - 1))), shape=(len(part), 1 << bits)))
    return vstack(parts, format="csr") if parts else csr_matrix((0, 1 << bits))


def cell_weights(label: np.ndarray, language: Sequence[str]) -> np.ndarray:
    """float64 [n]: labels of a language weigh the same together; 0 for a language with fewer than CELL_DOCS of either."""
    names, code = np.unique(np.array(language, dtype=object).astype(str), return_inverse=True)
    cell = np.bincount(code * 2 + label, minlength=2 * len(names)).reshape(-1, 2)
    enough = cell.min(axis=1) >= CELL_DOCS
    weight = cell.sum(axis=1, keepdims=True) / np.maximum(2 * cell, 1) * enough[:, None]
    out: np.ndarray = weight[code, label]
    return out


def fit(X: Any, label: np.ndarray, weight: np.ndarray, c: float) -> Weights:
    """Fitted weights; documents of weight 0 take no part."""
    from sklearn.linear_model import LogisticRegression

    at = np.flatnonzero(weight > 0)
    model = LogisticRegression(C=c, solver="liblinear", dual=True, random_state=0, tol=TOLERANCE, max_iter=1000)
    model.fit(X[at], label[at], sample_weight=weight[at])
    fixed = np.rint(model.coef_[0] * FIXED).astype(np.int32)
    return Weights(fixed, int(np.rint(model.intercept_[0] * FIXED)))


def sums(families: Sequence[Features], weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [D, k] sums of the weights [2^bits, k] of each document's features, int64 [D] number of features)."""
    total = np.zeros((len(families[0].first) - 1, weight.shape[1]), dtype=np.int64)
    count = np.zeros(len(total), dtype=np.int64)
    for f in families:
        count += np.diff(f.first)
        for k in range(weight.shape[1]):
            gathered = np.cumsum(weight[f.ids, k], dtype=np.int64)
            total[:, k] += np.diff(np.concatenate([[0], gathered])[f.first])
    return total, count


def logits(X: Any, weights: Weights) -> np.ndarray:
    """float64 [n] of rows of `matrix`."""
    out: np.ndarray = (X @ weights.weight.astype(np.float64) + weights.bias) / FIXED
    return out


def out_of_group(X: Any, task: Task, c: float) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n]: each document's logit by a model that saw no document of its group, int64 [n]: which model). NaN where
    without the group too little is left to learn from in the document's language."""
    fold = folds(task.group, task.label)
    out = np.full(len(task.label), np.nan)
    for f in np.unique(fold):
        at, rest = np.flatnonzero(fold == f), np.flatnonzero(fold != f)
        spoken = [task.language[i] for i in rest]
        weight = cell_weights(task.label[rest], spoken)
        known = {name for name, w in zip(spoken, weight, strict=True) if w > 0}
        at = at[[task.language[i] in known for i in at]]
        if known and len(at):
            out[at] = logits(X[at], fit(X[rest], task.label[rest], weight, c))
    return out, fold


def folds(group: Sequence[str], label: np.ndarray) -> np.ndarray:
    """int64 [n]: groups that are held out together. Each fold holds groups of good and of bad documents, so that a model is
    judged on both; a group counts by what most of it is. At most FOLDS, and no more than there are groups of either."""
    names, code = np.unique(np.array(group, dtype=object).astype(str), return_inverse=True)
    count = np.bincount(code, minlength=len(names))
    good = np.bincount(code, weights=label, minlength=len(names)) * 2 >= count
    most = max(1, min(FOLDS, int(good.sum()), int((~good).sum())))
    number = np.zeros(len(names), dtype=np.int64)
    for side in (good, ~good):
        order = sorted(np.flatnonzero(side).tolist(), key=lambda i: (-count[i], names[i]))
        number[order] = np.arange(len(order)) % most
    out: np.ndarray = number[code]
    return out


def auc(score: np.ndarray, label: np.ndarray, stratum: Sequence[str]) -> float | None:
    """The chance that of two documents of one stratum, one of each label, the good one scores higher; ties count half.
    Documents with a NaN are left out; None where no such two are left."""
    from scipy.stats import rankdata

    known = np.isfinite(score)
    strata = np.array(stratum, dtype=object).astype(str)
    won = pairs = 0.0
    for name in np.unique(strata[known]):
        at = np.flatnonzero(known & (strata == name))
        good = label[at] == 1
        n = int(good.sum()) * int((~good).sum())
        if n:
            rank = rankdata(score[at])[good].sum()
            won, pairs = won + rank - good.sum() * (good.sum() + 1) / 2, pairs + n
    return round(won / pairs, 4) if pairs else None
