"""Files of trained raters: arrays as npz (never pickled), facts as JSON.

    models/<instance>/model.json     bits, bytes read, order, languages and biases of each rater
    models/<instance>/linear.npz     <rater>: int32 [2, 2^bits], the weights for documents of half 0 and of half 1
    models/<instance>/fluency-<language>.npz    <half>.<order>.<key, share, passes>, <half>.base, <half>.alphabet
    models/<instance>/cards.json     one card a rater

Equal content gives equal bytes: npz members bear no time.
"""

import io
from typing import Any, NamedTuple

import numpy as np

from classifiers.raters.ngrams import Level, Model
from core.errors import StageError
from core.storage import Root


class Linear(NamedTuple):
    """A linear rater as stored: what it may judge and its weights for each half."""

    languages: tuple[str, ...]
    weight: np.ndarray  # int32 [2, 2^bits]
    bias: tuple[int, int]


class Trained(NamedTuple):
    """Everything that `train_raters` made, but for the cards."""

    bits: int
    max_bytes: int  # of a document that the linear raters read
    order: int
    linear: dict[str, Linear]
    fluency: dict[str, tuple[Model, Model]]  # language -> the models for documents of half 0 and of half 1


def folder(instance: str) -> str:
    return f"models/{instance}"


def save(root: Root, instance: str, trained: Trained) -> list[str]:
    """Write the files and return their names."""
    facts = {
        "bits": trained.bits,
        "max_bytes": trained.max_bytes,
        "order": trained.order,
        "linear": {
            n: {"languages": list(r.languages), "bias": list(r.bias)} for n, r in sorted(trained.linear.items())
        },
        "fluency": sorted(trained.fluency),
    }
    base = folder(instance)
    root.write_json(f"{base}/model.json", facts)
    root.write_bytes(f"{base}/linear.npz", _npz({n: r.weight for n, r in sorted(trained.linear.items())}))
    for language, halves in sorted(trained.fluency.items()):
        root.write_bytes(f"{base}/fluency-{language}.npz", _npz(_arrays(halves)))
    return ["model.json", "linear.npz", *(f"fluency-{language}.npz" for language in sorted(trained.fluency))]


def load(root: Root, instance: str) -> Trained:
    """What `save` wrote."""
    base = folder(instance)
    if not root.exists(f"{base}/model.json"):
        raise StageError(f"raters: no model at {base} in {root.url}; run stage {instance} first")
    facts = root.read_json(f"{base}/model.json")
    weights = _read(root, f"{base}/linear.npz")
    linear = {
        name: Linear(tuple(r["languages"]), weights[name], (r["bias"][0], r["bias"][1]))
        for name, r in facts["linear"].items()
    }
    fluency = {}
    for language in facts["fluency"]:
        arrays = _read(root, f"{base}/fluency-{language}.npz")
        fluency[language] = (_model(arrays, 0, facts["order"]), _model(arrays, 1, facts["order"]))
    return Trained(facts["bits"], facts["max_bytes"], facts["order"], linear, fluency)


def _arrays(halves: tuple[Model, Model]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for half, model in enumerate(halves):
        for k, level in enumerate(model.levels, start=1):
            out |= {f"{half}.{k}.{name}": array for name, array in level._asdict().items()}
        out[f"{half}.base"], out[f"{half}.alphabet"] = np.array(model.base), np.array(model.alphabet)
    return out


def _model(arrays: dict[str, np.ndarray], half: int, order: int) -> Model:
    levels = (Level(*(arrays[f"{half}.{k}.{name}"] for name in Level._fields)) for k in range(1, order + 1))
    return Model(tuple(levels), float(arrays[f"{half}.base"]), int(arrays[f"{half}.alphabet"]))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(out, allow_pickle=False, **named)
    return out.getvalue()


def _read(root: Root, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(root.read_bytes(name)), allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}
