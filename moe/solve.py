"""Word problems answered by generation, GSM8K's way: examples, a question, greedy text, the last number counts.

In: questions and worked solutions (`question`, `answer` with the result behind "####"), others as examples. Out: one `Solved` a
question and the share that is right. A number is compared by value: 1,000 equals 1000.0. The first `shots` examples of the file
stand before every question, so that two models read the same text; the answer ends where the model begins another question.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError, InputError
from core.statistics import wilson
from moe.choices import CALCULATION, Paired, paired, records
from moe.generate import generate_batch, token_ids
from moe.model import Decoder
from moe.sampling import Sampling

RESULT = "####"
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
STOP = "\nQuestion:"


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str
    result: Decimal


@dataclass(frozen=True)
class Solved:
    """What the model wrote, the number read from it (None: none in it), and whether it is the right one."""

    text: str
    number: Decimal | None
    right: bool


@dataclass(frozen=True)
class Share:
    questions: int
    right: int
    low: float  # of the share at 95%
    high: float
    without_number: int


def read_problems(path: Path) -> list[Problem]:
    """Problems of a JSONL file, gzipped or not."""
    return [_problem(record, f"{path.name}, record {i}") for i, record in enumerate(records(path))]


def prompt(problem: Problem, examples: Sequence[Problem]) -> str:
    """Examples with their solutions, then the question."""
    shown = "".join(f"Question: {e.question}\nAnswer: {e.solution}\n{RESULT} {e.result}\n\n" for e in examples)
    return f"{shown}Question: {problem.question}\nAnswer:"


def solve(
    model: Decoder, tokenizer: Any, problems: Sequence[Problem], examples: Sequence[Problem], max_tokens: int = 256
) -> list[Solved]:
    """Greedy answers to all problems. A prompt that leaves no room in the context is a `ConfigError`."""
    sampling = Sampling(temperature=0.0, stop=(STOP,), max_tokens=max_tokens)
    prompts = [token_ids(tokenizer, prompt(p, examples)) for p in problems]
    longest = len(model.prefix) + max((len(p) for p in prompts), default=0)
    if longest + max_tokens - 1 > model.config.context:  # the last new token is not read
        raise ConfigError(
            f"evaluate: {len(examples)} examples and a question take {longest} tokens and an answer {max_tokens}, "
            f"expected at most the context, {model.config.context}; give fewer examples or a shorter answer"
        )
    written = generate_batch(model, prompts, sampling, tokenizer=tokenizer)
    found = [(a.text, number(a.text)) for a in written]
    return [Solved(text, n, n == p.result) for (text, n), p in zip(found, problems, strict=True)]


def share(solved: Sequence[Solved]) -> Share:
    right = sum(s.right for s in solved)
    low, high = wilson(right, len(solved))
    return Share(len(solved), right, low, high, sum(s.number is None for s in solved))


def difference(a: Sequence[Solved], b: Sequence[Solved]) -> Paired:
    """Share that B solves less share that A solves, paired by problem. Fewer than two problems are a `ConfigError`."""
    if len(a) != len(b) or len(a) < 2:
        raise ConfigError(
            f"evaluate: the models did not answer the same problems, got {len(a)} and {len(b)}, expected two or more in common"
        )
    gained = np.array([float(y.right) - float(x.right) for x, y in zip(a, b, strict=True)])
    return paired(gained, np.ones(len(gained)))


def number(text: str) -> Decimal | None:
    """The number behind the first "####", else the last one in the text."""
    _, mark, after = text.partition(RESULT)
    found = NUMBER.findall(after if mark else text)
    return _value(found[0] if mark else found[-1]) if found else None


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def _problem(record: Any, where: str) -> Problem:
    try:
        solution, mark, result = record["answer"].partition(RESULT)
        value = _value(result.strip())
        question = record["question"].strip()
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"evaluate: {where} has no question and answer ({type(e).__name__}: {e}); mend the file"
        ) from e
    if not mark or value is None:
        raise InputError(f"evaluate: {where} has no number behind {RESULT}, got {result[:40]!r}; mend the file")
    return Problem(question, CALCULATION.sub("", solution).strip(), value)
