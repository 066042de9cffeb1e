"""Conversations of the demo, made from small sources that look like those of packages."""

import json
from pathlib import Path
from typing import Any

from core.records import Found
from mixtures.posttrain.verify_code import code_reward
from pipelines.demo.chats import FAULTS, faq_records, function_records, session_records, write_chats
from pipelines.demo.sites import Package
from tests.posttrain.conftest import found

MODULE = '''
import re
from nowhere import helper

def words(text):
    """Count the words of a text.

    >>> words("a bc  d")
    3
    >>> words("")
    0
    """
    return len(re.findall(r"\\w+", text))

def wrong(x):
    """
    >>> wrong(1)
    5
    """
    return x

def foreign(x):
    """
    >>> foreign(1)
    1
    """
    return helper(x)
'''
PAGE = """
Numbers
=======

Some text.

    >>> total = 1
    >>> for i in range(3):
    ...     total += i
    >>> total
    4

More text.

    >>> print("no number here, but a sentence of some length")
    no number here, but a sentence of some length

Why is it so?
-------------

It is so because the documentation says that it is so, at some length.

.. _target: https://example.org/

Next
----
"""


def test_only_functions_that_pass_their_own_examples_become_tasks() -> None:
    (record,) = function_records(MODULE)
    prompt, answer = (m["content"] for m in record["conversations"])
    assert "def words(text):" in prompt
    assert "return" not in prompt
    assert answer.startswith("```python\nimport re\n")
    assert '"""' not in answer
    assert record["tests"] == ['assert (words("a bc  d")) == 3', 'assert (words("")) == 0']
    assert code_reward(answer, record["tests"])[0] == 1.0
    assert code_reward(answer.replace("len(", "1 + len("), record["tests"])[0] == 0.0


def test_sessions_ask_for_their_last_output() -> None:
    first, second = session_records(PAGE)
    assert first["answer"] == "4"
    asked = first["conversations"][0]["content"]
    assert asked.endswith(">>> total = 1\n>>> for i in range(3):\n...     total += i\n>>> total\n```")
    assert first["conversations"][1]["content"] == "It prints:\n\n```\n4\n```\n\nThe answer is 4."
    assert "answer" not in second


def test_headings_that_ask_become_questions() -> None:
    (record,) = faq_records(PAGE)
    assert [m["content"] for m in record["messages"]] == [
        "Why is it so?",
        "It is so because the documentation says that it is so, at some length.",
    ]


def test_files_are_the_same_each_time_and_every_planted_fault_is_found(tmp_path: Path, judge: Any) -> None:
    package = Package("pip", "small", "1.0", 1)
    place = tmp_path / "unpacked" / package.key
    place.mkdir(parents=True)
    (place / "PKG-INFO").write_text("License-Expression: MIT\n\n")
    (place / "small.py").write_text(MODULE)
    questions = "\n".join(
        f"What about number {i}?\n====================\n\n{'This is a plain answer to a plain question. ' * 3}\n"
        for i in range(9)
    )
    (place / "faq.rst").write_text(PAGE + questions)
    counts = write_chats(tmp_path / "unpacked", tmp_path / "chats", [package])
    assert counts == {"doctests": 2, "functions": 1, "faq": 10, "planted": len(FAULTS)}
    first = {p.name: p.read_bytes() for p in (tmp_path / "chats").iterdir()}
    write_chats(tmp_path / "unpacked", tmp_path / "chats", [package])
    assert {p.name: p.read_bytes() for p in (tmp_path / "chats").iterdir()} == first
    records = [json.loads(line) for line in first["planted.jsonl"].splitlines()]
    assert all(isinstance(made := found(r), Found) and made.license == "MIT" for r in records)
    rows = {r["planted"]: row for r, row in zip(records, judge(records), strict=True)}
    assert rows["role_order"]["role_error"] == "begins_with_assistant"
    assert rows["empty_answer"]["empty_answers"] == 1
    assert rows["unclosed_think"]["template_error"] == "unclosed_think"
    assert rows["leftover"]["template_error"] == "leftover"
    assert rows["endless_repetition"]["sentence_repeats"] >= 40
    assert rows["identity"]["identity"]
    assert rows["knowledge_cutoff"]["cutoff"]
    assert rows["language_switch"]["switch_fraction"] > 0.05
