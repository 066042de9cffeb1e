"""The maths verifier: extraction, exact values by hand, real GSM8K answers, symbols through math-verify."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, InputError, StageError
from mixtures.posttrain import verify_maths
from mixtures.posttrain.maths_values import Choice, Group, Number, equal, read_value
from mixtures.posttrain.verify_maths import answer_of, compare, is_verifiable, last_boxed, maths_reward


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x^{2^{3}}} rest }", "x^{2^{3}}"),
        (r"\boxed{1} and \boxed{2", "1"),  # the last does not close
        (r"\boxed 7", "7"),
        ("no box", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_that_closes(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("work\n#### 1,234\n", "1,234"),
        ("The answer is **42**.", "42"),
        ("The answer is 3.5 because of that", "3.5"),
        ("Answer: 7", "7"),
        ("First the answer is 1. No, the answer is 2.", "2"),
        ("I count 5 apples", None),
        ("", None),
    ],
)
def test_marked_answers(response: str, answer: str | None) -> None:
    assert answer_of(response) == answer


def number(value: str, **more: object) -> Number:
    return Number(Fraction(value), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", number("12", significant=2)),
        ("-3", number("-3", significant=1)),
        ("−3", number("-3", significant=1)),
        ("1,234,567", number("1234567", significant=7)),
        ("1{,}000", number("1000", significant=4)),
        ("0.50", number("1/2", digits=2, significant=2)),
        (r"\frac{3}{4}", number("3/4")),
        (r"-\dfrac12", number("-1/2")),
        ("2 1/3", number("7/3")),
        (r"2\frac{1}{3}", number("7/3")),
        (r"\$18", number("18", significant=2)),
        ("18 dollars", number("18", significant=2)),
        (r"5 \text{ cm}^2", number("5", significant=1)),
        (r"90^\circ", number("90", significant=2)),
        (r"50\%", number("50", significant=2, percent=True)),
        ("1.2e3", number("1200", significant=2)),
        (r"3 \times 10^{-2}", number("3/100", significant=1)),
        ("x = 5", number("5", significant=1)),
        ("B", Choice("b")),
        (r"\text{True}", Choice("true")),
        ("1/0", None),
        ("5x", None),
        ("2 pi", None),
        (r"\sqrt{2}", None),
        ("3 or 4", None),
        ("1e99999", None),
        ("9" * 3000, None),
        ("", None),
    ],
)
def test_values_are_read_exactly(text: str, value: object) -> None:
    assert read_value(text) == value


def test_groups() -> None:
    one, two = number("1", significant=1), number("2", significant=1)
    assert read_value("(1, 2)") == Group("tuple", (one, two))
    assert read_value(r"\left[ 1, 2 \right)") == Group("interval", (one, two), "[)")
    assert read_value(r"\{2, 1\}") == Group("set", (two, one))
    assert read_value("1, 2") == Group("set", (one, two))
    assert read_value("((1,2),1)") == Group("tuple", (Group("tuple", (one, two)), one))


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("1/2", "0.5", True),
        ("1/3", "0.3333", True),
        ("2/3", "0.6667", True),
        ("1/3", "0.33", False),  # too few digits to be the value
        ("0.1235", "0.12345", False),  # 0.1235 is exact: only equality will do
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50", "50%", True),
        ("50%", "5", False),
        ("{1, 2}", "{2, 1}", True),
        ("{1, 1, 2}", "{1, 2, 2}", False),
        ("(1, 2)", "(2, 1)", False),
        ("[0, 1)", "[0, 1]", False),
        ("3", "{3}", True),
        ("3", "4", False),
        ("A", "B", False),
        ("A", "1", False),
    ],
)
def test_equality(gold: str, answer: str, same: bool) -> None:
    left, right = read_value(gold), read_value(answer)
    assert left is not None
    assert right is not None
    assert equal(left, right) == same


@given(st.fractions(max_denominator=10**6), st.booleans())
def test_a_fraction_equals_itself_however_written(value: Fraction, latex: bool) -> None:
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    read = read_value(rf"{sign}\frac{{{top}}}{{{bottom}}}" if latex else f"{sign}{top}/{bottom}")
    assert isinstance(read, Number)
    assert read.value == value
    assert not equal(read, Number(value + 1))


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    read_value(text)
    answer_of(text)
    is_verifiable(text)


def test_real_gold_answers_and_their_variants(shared_data: Path) -> None:
    """Every GSM8K test answer as its solution, boxed, with unit, with thousands separators; and off by one."""
    with gzip.open(shared_data / "benchmarks" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as f:
        golds = [json.loads(line)["answer"] for line in f]
    for gold in golds:
        value = int(gold.rpartition("####")[2].strip().replace(",", ""))
        right = [
            gold,
            f"\\boxed{{{value}}}",
            f"So the answer is ${value:,}.",
            f"\\boxed{{{value}.00 \\text{{ dollars}}}}",
        ]
        assert [maths_reward(r, gold)[0] for r in right] == [1.0] * len(right), gold
        assert maths_reward(f"\\boxed{{{value + 1}}}", gold)[0] == 0.0
    assert len(golds) == 1319


def test_symbols_are_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    pairs = [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x^2+2x+1", "(x+2)^2"),
        (r"2\sqrt{2}", "2"),
    ]
    assert compare(pairs) == [True, True, True, False, False]
    assert maths_reward(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == (1.0, "equal")
    assert compare([(r"2\sqrt{2}", r"\frac{1}{")]) == [False]


def test_a_gold_answer_that_cannot_be_read_is_an_error_and_no_wrong_answer() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(InputError, match=r"the gold answer '.*frac\{1\}\{' cannot be read"):
        maths_reward(r"\boxed{\sqrt{8}}", r"\frac{1}{")
    assert not is_verifiable(r"\frac{1}{")
    assert is_verifiable(r"\left\{ \frac{1}{2} \right\}")


def test_a_comparison_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is a real one; what it runs is replaced by a program that is sent two pairs, answers one and hangs."""
    child = "import sys, time\nprint('ready', flush=True)\nsys.stdin.read()\nprint('true', flush=True)\ntime.sleep(600)"
    monkeypatch.setattr(verify_maths, "CHILD", child)
    monkeypatch.setattr(verify_maths, "COMPARE_S", 1.5)
    assert compare([("1", "1"), ("2", "2")]) == [True, None]
    monkeypatch.setattr(verify_maths, "CHILD", child.replace("print('true', flush=True)", ""))
    assert maths_reward(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == (0.0, r"timeout: answered '\\sqrt{8}'")


def test_the_clock_begins_when_the_child_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes four times as long as a comparison may."""
    child = "import sys, time\ntime.sleep(2)\nprint('ready', flush=True)\nsys.stdin.read()\nprint('true', flush=True)"
    monkeypatch.setattr(verify_maths, "CHILD", child)
    monkeypatch.setattr(verify_maths, "COMPARE_S", 0.5)
    assert compare([("1", "1")]) == [True]


def test_a_child_that_cannot_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_maths, "CHILD", f"import sys; sys.exit({verify_maths.MISSING})")
    with pytest.raises(ConfigError, match="needs the package math-verify"):
        compare([("1", "1")])
    monkeypatch.setattr(verify_maths, "CHILD", "import time; time.sleep(600)")
    monkeypatch.setattr(verify_maths, "LOAD_S", 0.5)
    with pytest.raises(StageError, match=r"was not loaded within .* ended with -9"):
        compare([("1", "1")])


def test_what_can_be_verified() -> None:
    assert is_verifiable("72")
    assert is_verifiable(r"\frac{\sqrt{3}}{2}")
    assert is_verifiable("#### 5")
    assert not is_verifiable("A")
    assert not is_verifiable("true")
    assert not is_verifiable("It depends on the weather.")
    assert not is_verifiable("")
