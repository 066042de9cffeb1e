"""Word problems: what is read from a text, prompts, and a model that answers."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from core.errors import ConfigError, InputError
from moe.solve import Problem, Solved, number, prompt, read_problems, share, solve
from tests.moe.texts import tokenizer_of, uniform

APPLES = Problem("How many apples?", "2 + 2 = 4", Decimal(4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 2 + 3 = 5\n#### 5", 5),
        (" so it is $1,234.50 in all", "1234.50"),
        (" first 3, then -7", -7),
        (" #### 12 and then 99", 12),
        (" 5 apples #### none", None),
        (" no idea", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text: str, expected: object) -> None:
    assert number(text) == (None if expected is None else Decimal(str(expected)))


def test_numbers_are_equal_by_value() -> None:
    assert number("#### 1,000") == number("it costs 1000.00")


def test_a_prompt_shows_examples_like_answers() -> None:
    pears = Problem("How many pears?", "3", Decimal(3))
    assert prompt(pears, [APPLES]) == (
        "Question: How many apples?\nAnswer: 2 + 2 = 4\n#### 4\n\nQuestion: How many pears?\nAnswer:"
    )


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": " How many? ", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}) + "\n")
    assert read_problems(path) == [Problem("How many?", "2+2=4", Decimal(1004))]
    path.write_text(json.dumps({"question": "How many?", "answer": "four"}) + "\n")
    with pytest.raises(InputError, match="record 0 has no number behind ####"):
        read_problems(path)


def test_every_real_problem_has_a_number(shared_data: Path) -> None:
    found = read_problems(shared_data / "benchmarks" / "gsm8k_test.jsonl.gz")
    assert len(found) == 1319
    # GSM8K's own rule: what stands behind #### is the answer, so a perfect model scores all of them.
    solved = [
        Solved("", number(f"{p.solution}\n#### {p.result}"), number(f"#### {p.result}") == p.result) for p in found
    ]
    assert share(solved).right == 1319


def test_a_model_answers_within_its_limits() -> None:
    tokenizer = tokenizer_of(["Question: How many apples?\nAnswer: 2 + 2 = 4\n#### 4"])
    model = uniform(tokenizer)
    (found,) = solve(model, tokenizer, [APPLES], [], max_tokens=5)
    assert (found.right, found.number) == (False, None), "equal logits: greedy takes EOS, the first token"
    with pytest.raises(ConfigError, match="give fewer examples"):
        solve(model, tokenizer, [APPLES], [APPLES] * 40, max_tokens=5)


def test_a_share_counts() -> None:
    told = share([Solved("", Decimal(1), True), Solved("", None, False), Solved("", Decimal(2), False)])
    assert (told.questions, told.right, told.without_number) == (3, 1, 1)
    assert 0 < told.low < 1 / 3 < told.high < 1
