"""Questions with given answers: bits per byte of the right one, and how often the model prefers it.

In: JSONL, also gzipped, in one of three layouts, named or seen from the first record's keys:

    choices        query, choices [text], gold int (ARC); the text before an answer is "query\\nAnswer:"
    continuation   context, continuation (LAMBADA): one answer, so no accuracy by preference
    solution       question, answer (GSM8K): the written-out solution, calculator annotations removed

Out: one `Answered` a question, and a `Summary` over them. The measure to compare models by is `gold_bpb`, bits per byte of the
right answer given the question: it moves smoothly where accuracy is still chance (Heineman et al. 2025, "Signal and Noise";
DataDecide, Magnusson et al. 2025). Accuracy is given by the answers' likelihood, and by likelihood a byte, which does not
favour short ones. Answers are tokenised together with the question, so that a word's border falls as in running text. Spaces
that end a context belong to the answer, its bits and its bytes. An answer longer than the model's context is scored whole, in
pieces (`moe.score.score_continuations`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.errors import ConfigError, InputError
from core.statistics import ALPHA, least_effect, paired_variance, wilson
from moe.files import read_json_lines
from moe.generate import token_ids
from moe.model import Decoder
from moe.score import score_continuations

Layout = Literal["choices", "continuation", "solution"]
KEYS: dict[Layout, tuple[str, ...]] = {
    "choices": ("query", "choices", "gold"),
    "continuation": ("context", "continuation"),
    "solution": ("question", "answer"),
}
CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Question:
    """A context and the texts that may follow it; `answers[gold]` is right."""

    context: str
    answers: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Answered:
    """Bits and UTF-8 bytes of each answer of one question."""

    bits: tuple[float, ...]
    bytes: tuple[int, ...]
    gold: int
    greedy: bool  # whether greedy decoding gives the right answer word for word

    @property
    def likeliest(self) -> int:
        return int(np.argmin(self.bits))

    @property
    def likeliest_per_byte(self) -> int:
        return int(np.argmin(np.divide(self.bits, self.bytes)))


@dataclass(frozen=True)
class Summary:
    """Over all questions. Intervals are at 95%; accuracies are None where a question has one answer only."""

    questions: int
    gold_bpb: float
    gold_bpb_error: float | None  # standard error over questions; None of a single one
    greedy_fraction: float
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    accuracy_per_byte: float | None
    chance: float | None  # expected accuracy of a blind choice


@dataclass(frozen=True)
class Paired:
    """A mean difference over pairs, and its interval at 95%."""

    effect: float
    low: float
    high: float
    least_effect: float  # a true difference of that size would be found four times in five


@dataclass(frozen=True)
class Difference:
    """Model B less model A on the same questions. Below zero in bits per byte: B is better; above zero in accuracy."""

    questions: int
    gold_bpb: Paired
    accuracy: Paired | None  # None where a question has one answer only


def read_questions(path: Path, layout: Layout | None = None) -> list[Question]:
    """The questions of a file in its order. A record that lacks a field is an `InputError` that names it."""
    found = records(path)
    chosen = layout or _layout_of(found[0], path)
    return [_question(record, chosen, f"{path.name}, record {i}") for i, record in enumerate(found)]


def records(path: Path) -> list[Any]:
    """The records of a JSONL file, gzipped or not. One that cannot be read or has none is a `ConfigError`."""
    try:
        found = read_json_lines(path)
    except (OSError, ValueError, EOFError) as e:
        raise ConfigError(f"evaluate: {path} cannot be read: {e}; expected JSONL, gzipped or not") from e
    if not found:
        raise ConfigError(f"evaluate: {path} has no record, expected one a line")
    return found


def answer(model: Decoder, tokenizer: Any, questions: Sequence[Question]) -> list[Answered]:
    """Scores every answer of every question. `tokenizer` is a `tokenizers.Tokenizer`."""
    asked = [(question.context, text) for question in questions for text in question.answers]
    sizes = [len(border(*texts)[1].encode("utf-8", "replace")) for texts in asked]
    found_scores = score_continuations(model, [pair(tokenizer, *texts) for texts in asked])
    scores = iter(zip(found_scores, sizes, strict=True))
    found = []
    for question in questions:
        rows = [next(scores) for _ in question.answers]
        bits = tuple(s.nats / math.log(2) for s, _ in rows)
        found.append(Answered(bits, tuple(n for _, n in rows), question.gold, rows[question.gold][0].greedy))
    return found


def summary(answered: Sequence[Answered]) -> Summary:
    """The figures of one model."""
    bits, text_bytes = _gold(answered)
    choosing = [a for a in answered if len(a.bits) > 1]
    right = sum(a.likeliest == a.gold for a in choosing)
    per_byte = sum(a.likeliest_per_byte == a.gold for a in choosing)
    low, high = wilson(right, len(choosing))
    n = len(choosing)
    return Summary(
        questions=len(answered),
        gold_bpb=float(bits.sum() / text_bytes.sum()),
        gold_bpb_error=math.sqrt(paired_variance(bits, text_bytes)) if len(bits) > 1 else None,
        greedy_fraction=sum(a.greedy for a in answered) / len(answered),
        accuracy=right / n if n else None,
        accuracy_low=low if n else None,
        accuracy_high=high if n else None,
        accuracy_per_byte=per_byte / n if n else None,
        chance=sum(1 / len(a.bits) for a in choosing) / n if n else None,
    )


def difference(a: Sequence[Answered], b: Sequence[Answered]) -> Difference:
    """B less A, paired by question: a question's own difficulty cancels. Other questions are a `ConfigError`."""
    (bits_a, bytes_a), (bits_b, bytes_b) = _gold(a), _gold(b)
    if not np.array_equal(bytes_a, bytes_b) or len(bits_a) < 2:
        raise ConfigError(
            f"evaluate: the models did not answer the same questions, got {len(a)} and {len(b)}, expected two or more in common"
        )
    choosing = [(x, y) for x, y in zip(a, b, strict=True) if len(x.bits) > 1]
    gained = np.array([float(y.likeliest == y.gold) - float(x.likeliest == x.gold) for x, y in choosing])
    accuracy = paired(gained, np.ones(len(gained))) if len(gained) > 1 else None
    return Difference(len(bits_a), paired(bits_b - bits_a, bytes_a), accuracy)


def paired(delta: np.ndarray, weight: np.ndarray) -> Paired:
    """Sum of the differences over sum of the weights (bytes, or ones), for two pairs or more."""
    from scipy.stats import t

    error, df = math.sqrt(paired_variance(delta, weight)), len(delta) - 1
    effect, half = float(delta.sum() / weight.sum()), float(t.ppf(1 - ALPHA / 2, df)) * error
    return Paired(effect, effect - half, effect + half, least_effect(error, df))


def border(context: str, text: str) -> tuple[str, str]:
    """The context without the spaces at its end, and the text behind them: what is scored, and whose bytes count."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + text


def pair(tokenizer: Any, context: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, and those that the text adds to it, divided at their `border`."""
    bare, text = border(context, text)
    before, whole = token_ids(tokenizer, bare), token_ids(tokenizer, bare + text)
    added = whole[len(before) :]
    if whole[: len(before)] == before and added:
        return before, added
    # The border fell inside a token: the text is tokenised by itself, as generation would have to write it.
    return before, token_ids(tokenizer, text)


def _gold(answered: Sequence[Answered]) -> tuple[np.ndarray, np.ndarray]:
    bits = np.array([a.bits[a.gold] for a in answered])
    return bits, np.array([a.bytes[a.gold] for a in answered], dtype=np.float64)


def _layout_of(record: Any, path: Path) -> Layout:
    for layout, keys in KEYS.items():
        if isinstance(record, dict) and all(k in record for k in keys):
            return layout
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
    raise ConfigError(f"evaluate: {path} has none of the known layouts, expected the fields of one ({known})")


def _question(record: Any, layout: Layout, where: str) -> Question:
    try:
        if layout == "choices":
            texts, gold = tuple(f" {c.strip()}" for c in record["choices"]), int(record["gold"])
            question = Question(f"{record['query'].rstrip()}\nAnswer:", texts, gold)
        elif layout == "continuation":
            question = Question(record["context"], (f" {record['continuation'].strip()}",), 0)
        else:
            solution = CALCULATION.sub("", record["answer"]).strip()
            question = Question(f"Question: {record['question'].strip()}\nAnswer:", (f" {solution}",), 0)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"evaluate: {where} is not of layout {layout!r} ({type(e).__name__}: {e}); mend the file"
        ) from e
    if not 0 <= question.gold < len(question.answers) or not all(t.strip() for t in question.answers):
        raise InputError(f"evaluate: {where}: gold {question.gold} of {len(question.answers)} answers; mend the file")
    return question
