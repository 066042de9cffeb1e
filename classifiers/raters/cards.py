"""The card of a rater: how its labels were made and how far it can be believed, as JSON-like values.

`weak_label_auc` is on the documents it was fitted on: an upper bound. `held_out_auc` is by models that saw no document of the
same source (a site, or a way of spoiling a text), over pairs of one language that one model scored. None: it cannot be had from
this sample, and `note` says why. Beside it the AUC of length and of compression ratio alone, on the same pairs: a rater that is
no better than those has learned no more than those. All AUCs are agreement with weak labels, not with people.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from classifiers.raters.fluency import Compared
from classifiers.raters.labels import RULES, Task
from classifiers.raters.linear import auc

SOURCES_SHOWN = 20


def linear_card(
    rater: str, task: Task, languages: Sequence[str], fitted: np.ndarray, held_out: np.ndarray, fold: np.ndarray
) -> dict[str, Any]:
    """The card of a linear rater from its logits on its own documents and by models that had not seen their group."""
    used = np.array([language in languages for language in task.language], dtype=bool)
    stratum = [f"{language} {f}" for language, f in zip(task.language, fold, strict=True)]
    figures = _figures(held_out, task.label, stratum, task.texts.to_pylist())
    note = None if figures["held_out_auc"] is not None else _why(task, used)
    return {
        "rater": rater,
        "labels": RULES[rater],
        "languages": list(languages),
        "docs": int(used.sum()),
        "docs_left_out": int((~used).sum()),
        "base_rate": _rate(task.label[used]),
        "sources": len(set(task.group)),
        "weak_label_auc": auc(np.where(used, fitted, np.nan), task.label, task.language),
        **figures,
        "note": note,
        "held_out_sources": _by_source(task, held_out, stratum),
    }


def fluency_card(order: int, languages: Sequence[str], found: Compared) -> dict[str, Any]:
    """The card of the language models. Its weak-label figure would be that of models on their own text: not given."""
    figures = _figures(found.score, found.label, found.stratum, found.texts)
    by_way = {}
    for way in sorted(set(found.way)):
        at = np.array([w == way for w in found.way])
        strata = [s for s, mine in zip(found.stratum, at, strict=True) if mine]
        by_way[way] = {"docs": int(at.sum()), "auc": auc(found.score[at], found.label[at], strata)}
    return {
        "rater": "fluency",
        "labels": RULES["fluency"],
        "order": order,
        "languages": list(languages),
        "docs": len(found.label),
        "docs_left_out": 0,
        "base_rate": _rate(found.label),
        "sources": len(set(found.stratum)),
        "weak_label_auc": None,
        **figures,
        "note": None if figures["held_out_auc"] is not None else "no language has a model and pages of two sites",
        "held_out_sources": by_way,
    }


def _figures(score: np.ndarray, label: np.ndarray, stratum: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Held-out AUC of the score, of length and of compression ratio, on the documents that have a score."""
    known = np.isfinite(score)
    length = np.array([len(t) for t in texts], dtype=np.float64)
    return {
        "held_out_docs": int(known.sum()),
        "held_out_auc": auc(score, label, stratum),
        "length_auc": auc(np.where(known, length, np.nan), label, stratum),
        "compression_auc": auc(np.where(known, compression(texts), np.nan), label, stratum),
    }


def compression(texts: Sequence[str]) -> np.ndarray:
    """float64 [n]: bytes over compressed bytes, as the signal `zstd_ratio`."""
    compress = zstandard.ZstdCompressor(level=1, write_content_size=False).compress
    data = [t.encode() for t in texts]
    return np.array([len(d) / len(compress(d)) if d else 0.0 for d in data], dtype=np.float64)


def _by_source(task: Task, held_out: np.ndarray, stratum: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each source's documents beside those of the other label that the same model scored; the largest sources only."""
    group = np.array(task.group, dtype=object).astype(str)
    names, count = np.unique(group, return_counts=True)
    order = sorted(range(len(names)), key=lambda i: (-count[i], names[i]))[:SOURCES_SHOWN]
    out = {}
    for i in order:
        mine = group == names[i]
        for label in np.unique(task.label[mine]).tolist():
            score = np.where((mine & (task.label == label)) | (task.label != label), held_out, np.nan)
            kind = "good" if label else "bad"
            docs = int((mine & (task.label == label)).sum())
            out[f"{names[i]} ({kind})"] = {"docs": docs, "auc": auc(score, task.label, stratum)}
    return out


def _why(task: Task, used: np.ndarray) -> str:
    groups = [{g for g, y, u in zip(task.group, task.label, used, strict=True) if u and y == label} for label in (1, 0)]
    return (
        f"not to be had here: without one source, too few documents of one label are left in its languages "
        f"({len(groups[0])} sources of good documents, {len(groups[1])} of bad ones)"
    )


def _rate(label: np.ndarray) -> float | None:
    return round(float(label.mean()), 4) if len(label) else None
