"""The export stage `train_raters`: six small raters from the pipeline's own documents and optional labelled files.

In: text, URL, kind and language of a hash sample of the documents for which `where` holds. Out: `models/<instance>/` (see
`store`): weights, language models, and `cards.json`. Every model comes twice, each fitted on the documents of one half (by hash
of doc_id) to score those of the other: no document is rated by a model that has read it, which matters where, as in the demo,
the sample is the corpus.

Five raters are linear over hashed n-grams (`linear`), `fluency` is a character language model (`ngrams`). Trained twice, the
files are equal byte for byte: one thread, fixed order, fixed seeds; sums of float64 may differ between CPU types in the last bit,
which rounding the weights nearly always hides. Cost: 24 to 57 s for the demo's 1.9 k documents (6 MB read) on two busy cores,
half of it for the cards; 0.5 GB. Memory grows with `sample_bytes`.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from classifiers.raters import cards, fluency, linear, store
from classifiers.raters.labels import CURATED, LINEAR, RATERS, RULES, Task, half_of, read_labelled, tasks
from classifiers.raters.sample import COLUMNS, draw, windows
from core.errors import ConfigError, StageError
from core.hashing import digest, document_id
from core.job import Job, Outcome
from core.predicate import Predicate
from core.schema import TEXT
from core.stage import Artifacts, ConfigPath, Kind, Resources, Stage, StageConfig, execution

NEXT = "add a labelled file for it (`labelled`), take in documents of the other label, or leave it out of `raters`"


class TrainRatersConfig(StageConfig):
    """What the raters learn from."""

    raters: tuple[str, ...] = Field(default=RATERS, description="which of the six to train")
    curated: tuple[str, ...] = Field(
        default=CURATED, description="kinds of documents that somebody edited: the good ones of `reference`"
    )
    labelled: dict[str, ConfigPath] = execution(
        {},
        "rater: JSONL file of {text, label 0 or 1, language, source} to learn from besides; its content enters the identity",
    )
    sample_bytes: int = Field(default=64 << 20, gt=0, description="text to learn from, about; as much of each dataset")
    max_bytes: int = Field(
        default=8192,
        ge=256,
        description="UTF-8 bytes read of a document, in four windows, to learn from it and to rate it",
    )
    seed: int = Field(default=0, description="draws another sample")
    bits: int = Field(default=18, ge=10, le=24, description="2^bits weights a rater; n-grams share them by hash")
    c: float = Field(default=1.0, gt=0, description="liblinear's C; held-out AUC hardly depends on it, the time does")
    order: int = Field(default=5, ge=1, le=8, description="longest n-gram of the language models, in characters")
    lm_least_bytes: int = Field(
        default=50_000, ge=1, description="text in each half below which a language has no language model; chosen"
    )
    lm_most_bytes: int = Field(default=2 << 20, ge=1, description="text that a language model is trained on at most")

    @field_validator("raters")
    @classmethod
    def _known(cls, raters: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [r for r in raters if r not in RATERS]
        if unknown or not raters:
            raise ConfigError(f"train_raters: unknown raters {unknown}, expected some of {', '.join(RATERS)}")
        return tuple(r for r in RATERS if r in raters)

    @field_validator("labelled")
    @classmethod
    def _linear(cls, labelled: dict[str, ConfigPath]) -> dict[str, ConfigPath]:
        if unknown := sorted(set(labelled) - set(LINEAR)):
            raise ConfigError(f"train_raters: no labels are taken for {unknown}, expected some of {', '.join(LINEAR)}")
        return labelled


def reads(config: TrainRatersConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*COLUMNS, *(Predicate(config.where).columns if config.where else ())]))


def artifacts(config: TrainRatersConfig) -> Artifacts:
    return {f"labelled {rater}": path for rater, path in sorted(config.labelled.items())}


def train_raters(job: Job) -> Outcome:
    """Draw the sample, train, write files and cards."""
    config: TrainRatersConfig = job.config
    sample = draw(job)
    if sample.num_rows == 0:
        raise StageError(f"{job.instance}: no documents to learn from where {config.where!r} holds; widen `where`")
    found = {name: task for name, task in tasks(sample, config.curated).items() if name in config.raters}
    found = {name: _with_labelled(name, task, config) for name, task in found.items()}
    _check(job.instance, found)
    trained: dict[str, store.Linear] = {}
    written: list[dict[str, Any]] = []
    for name, task in found.items():
        trained[name], card = _linear(job.instance, name, task, config)
        written.append(card)
    speaks: dict[str, Any] = {}
    if "fluency" in config.raters:
        speaks = fluency.models(sample, config.curated, config.order, config.lm_least_bytes, config.lm_most_bytes)
        compared = fluency.compared(sample, sorted(speaks), config.curated, config.order)
        written.append(cards.fluency_card(config.order, sorted(speaks), compared))
    names = store.save(
        job.root, job.instance, store.Trained(config.bits, config.max_bytes, config.order, trained, speaks)
    )
    written.sort(key=lambda card: RATERS.index(card["rater"]))
    job.root.write_json(f"{store.folder(job.instance)}/cards.json", written)
    outputs = {
        name: {"content": digest(job.root.read_bytes(f"{store.folder(job.instance)}/{name}").hex()), "rows": 1}
        for name in [*names, "cards.json"]
    }
    counted = {"raters": len(written), "sample_docs": sample.num_rows, "languages": len(speaks)}
    size = sum(len(t.encode()) for t in sample.column("text").to_pylist())
    return Outcome(outputs, accounts=counted, observed={"docs": sample.num_rows, "bytes": size})


def _linear(instance: str, name: str, task: Task, config: TrainRatersConfig) -> tuple[store.Linear, dict[str, Any]]:
    """The weights for both halves, and the card."""
    X = linear.matrix(task.texts, config.bits)
    weight = linear.cell_weights(task.label, task.language)
    languages = tuple(sorted({language for language, w in zip(task.language, weight, strict=True) if w > 0}))
    halves = []
    for half in (0, 1):
        mine = np.where(task.half == half, 0.0, weight)
        if min(mine[task.label == 1].sum(), mine[task.label == 0].sum()) == 0:
            raise StageError(
                f"{instance}: too few documents for {name}, got {int((task.label == 1).sum())} good and "
                f"{int((task.label == 0).sum())} bad ones, expected {linear.CELL_DOCS} of each in one language; {NEXT}"
            )
        halves.append(linear.fit(X, task.label, mine, config.c))
    held_out, fold = linear.out_of_group(X, task, config.c)
    fitted = linear.logits(X, linear.fit(X, task.label, weight, config.c))
    made = store.Linear(languages, np.stack([h.weight for h in halves]), (halves[0].bias, halves[1].bias))
    return made, cards.linear_card(name, task, languages, fitted, held_out, fold)


def _check(instance: str, found: dict[str, Task]) -> None:
    """Every rater has documents of both labels; else one error names all that lack some."""
    problems = []
    for name, task in found.items():
        missing = [kind for kind, label in (("good", 1), ("bad", 0)) if not (task.label == label).any()]
        if missing:
            problems.append(
                f"{instance}: no {' and no '.join(missing)} documents for {name}, got {len(task.label)} of one label; "
                f"its labels are {RULES[name]!r}; {NEXT}"
            )
    if problems:
        raise StageError("\n".join(problems))


def _with_labelled(name: str, task: Task, config: TrainRatersConfig) -> Task:
    """The task with the rows of a labelled file behind it."""
    if name not in config.labelled:
        return task
    rows = read_labelled(config.labelled[name], "train_raters")
    ids = pa.array([str(r.get("id") or document_id("labelled", "", str(r["text"]))) for r in rows], TEXT)
    return Task(
        pa.concat_arrays([task.texts, windows(pa.array([str(r["text"]) for r in rows], TEXT), config.max_bytes)]),
        np.concatenate([task.label, np.array([r["label"] for r in rows], dtype=np.int8)]),
        task.group + [str(r.get("source") or "labelled file") for r in rows],
        task.language + [str(r.get("language") or "en") for r in rows],
        np.concatenate([task.half, half_of(ids)]),
    )


STAGE = Stage(
    name="train_raters",
    kind=Kind.EXPORT,
    config=TrainRatersConfig,
    fn=train_raters,
    version=1,
    reads=reads,
    artifacts=artifacts,
    libraries=("scikit-learn", "scipy", "numpy"),
    resources=Resources(memory_gb=4.0),
)
