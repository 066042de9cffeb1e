"""Rules over conversations, against values worked out by hand."""

from typing import Any

import pytest

from mixtures.posttrain import chat_rules as rules
from mixtures.posttrain.difficulty import difficulty, wilson
from mixtures.posttrain.parts import parts_of
from tests.posttrain.conftest import turns

CALL = [{"function": {"name": "f", "arguments": "{}"}}]


def roles(spoken: str) -> Any:
    """`s`, `u`, `a`, `t` as messages; `c` is an assistant that calls a tool."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "c": "assistant"}
    return parts_of([{"role": names[c], "content": "x", **({"tool_calls": CALL} if c == "c" else {})} for c in spoken])


def said(answer: str, prompt: str = "q") -> Any:
    return parts_of(turns(prompt, answer)["conversations"])


@pytest.mark.parametrize(
    ("spoken", "error"),
    [
        ("ua", None),
        ("suaua", None),
        ("ucta", None),
        ("ucttca", None),
        ("a", "no_user"),
        ("u", "no_assistant"),
        ("usa", "late_system"),
        ("aua", "begins_with_assistant"),
        ("uua", "repeated_user"),
        ("uaa", "repeated_assistant"),
        ("uta", "tool_without_call"),
        ("uau", "ends_with_user"),
        ("uct", "ends_with_tool"),
    ],
)
def test_order_of_roles(spoken: str, error: str | None) -> None:
    assert rules.role_error(roles(spoken)) == error


def test_an_answer_of_reasoning_only_is_empty_and_a_call_is_not() -> None:
    assert rules.empty_answers(said("<think>hm</think>\n ")) == 1
    assert rules.empty_answers(said("4")) == 0
    call = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": CALL}]
    assert rules.empty_answers(parts_of(call)) == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("<think>a</think>b", None),
        ("a < b and <b>bold</b>", None),
        ("<think>a", "unclosed_think"),
        ("a</think>b", "unclosed_think"),
        ("<think>a<think>b</think>", "unclosed_think"),
        ("<think>a</reasoning>", "unclosed_think"),
        ("fine<|im_end|>", "leftover"),
        ("[INST] hi", "leftover"),
        ("### Response:\nhi", "leftover"),
        ("Hello {{user}}", "leftover"),
        ("vector<|x|> [INSTALL] </span>", None),
    ],
)
def test_template_errors(answer: str, error: str | None) -> None:
    assert rules.template_error(said(answer)) == error


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ("I am ChatGPT, a model trained by OpenAI.", True),
        ("I'm an AI assistant called Claude.", True),
        ("Ich bin DeepSeek-V3.", True),
        ("作为一个人工智能语言模型，我不能", True),
        ("As an AI language model, I cannot.", True),
        ("OpenAI published a paper; Claude Shannon founded the theory.", False),
        ("I am a gardener. The house was built by Google Street.", True),  # the price of a phrase rule
        ("I am happy to help.", False),
    ],
)
def test_identity_phrases(answer: str, seen: bool) -> None:
    assert (rules.identity(said(answer)) is not None) == seen


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ("My knowledge cutoff is 2023.", True),
        ("As of my last update, it stands.", True),
        ("my training data only goes up to 2021", True),
        ("我的知识截至2023年", True),
        ("The cutoff frequency is 3 kHz.", False),
    ],
)
def test_cutoff_phrases(answer: str, seen: bool) -> None:
    assert (rules.cutoff(said(answer)) is not None) == seen


def test_repetition_is_counted_by_kind() -> None:
    paragraph = "This paragraph says the same."
    assert rules.repetition(said("\n\n".join([paragraph] * 6)))[0] == 6
    two_lines = f"{paragraph}\nand more of it here"
    assert rules.repetition(said("\n\n".join([two_lines] * 8)))[0] == 2  # several lines: 4 are allowed for each
    fenced = "```python\n" + "\n\n".join(["value = compute()"] * 8) + "\n```"
    assert rules.repetition(said(fenced))[0] == 4  # code: 2 are allowed for each
    assert rules.repetition(said("I will stop now. " * 50))[1:] == (50, 50)
    assert rules.repetition(said("x = x + 1 again.\n" * 10))[2] == 5  # maths: 2
    assert rules.repetition(said("- the same item\n" * 9))[2] == 3  # lists: 3
    assert rules.repetition(said("}\n" * 100))[1] == 0  # too short to mean anything
    assert rules.repetition(said("One thing here. Another thing there."))[1:] == (1, 1)


def test_repetition_in_the_prompt_is_not_the_answers_fault() -> None:
    assert rules.repetition(said("Fine by me, done.", prompt="please please me. " * 90))[1] == 1


def test_wilson_interval_is_the_textbooks() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson 1927, z = 1.96
    assert wilson(0, 8)[0] == 0
    assert round(wilson(0, 8)[1], 4) == 0.3244


@pytest.mark.parametrize(
    ("record", "verdict", "keep"),
    [
        ({"passes": 4, "attempts": 8}, "fit", True),
        ({"pass_rate": 0.5, "attempts": 16}, "fit", True),
        ({"passes": 1, "attempts": 10}, "hard", False),
        ({"passes": 9, "attempts": 10}, "easy", False),
        ({"passes": 0, "attempts": 8}, "unsolved", False),
        ({"passes": 3, "attempts": 7}, "few", None),
        ({"pass_rate": 0.5}, "few", None),
        ({"passes": 9, "attempts": 8}, None, None),
        ({"pass_rate": 1.5, "attempts": 8}, None, None),
        ({"pass_rate": "half", "attempts": 8}, None, None),
        ({"passes": True, "attempts": 8}, None, None),
        ({}, None, None),
    ],
)
def test_difficulty(record: dict[str, Any], verdict: str | None, keep: bool | None) -> None:
    made = difficulty(record, "a" * 32, (0.1, 0.9), 8, 0.1)
    assert (made.verdict, made.keep) == (verdict, keep)


def test_a_tenth_of_always_solved_tasks_is_kept_by_hash() -> None:
    kept = [difficulty({"passes": 8, "attempts": 8}, f"{i:032x}", (0.1, 0.9), 8, 0.1).keep for i in range(4000)]
    assert 0.08 < sum(map(bool, kept)) / len(kept) < 0.12
    assert kept == [difficulty({"passes": 8, "attempts": 8}, f"{i:032x}", (0.1, 0.9), 8, 0.1).keep for i in range(4000)]
