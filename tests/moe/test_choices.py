"""Questions with given answers: figures by hand on a uniform model, files of every layout, paired differences."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from core.errors import ConfigError, InputError
from core.statistics import wilson
from moe.choices import Answered, Question, answer, difference, pair, read_questions, summary
from tests.moe.texts import tokenizer_of, uniform

WORDS = ["Question: What is red?\nAnswer: an apple", "Question: What is green?\nAnswer: grass and leaves"]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_uniform_model_prefers_the_shortest(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(WORDS)
    questions = [Question("Question: What is red?\nAnswer:", (" an apple", " grass and leaves of green"), 0)]
    (found,) = answer(uniform(tokenizer), tokenizer, questions)
    sizes = [len(pair(tokenizer, questions[0].context, t)[1]) for t in questions[0].answers]
    per_token = math.log2(tokenizer.get_vocab_size())
    assert found.bits == pytest.approx([n * per_token for n in sizes], rel=1e-6)
    assert found.bytes == (9, 26)
    assert found.likeliest == 0
    told = summary([found])
    assert told.gold_bpb == pytest.approx(sizes[0] * per_token / 9, rel=1e-6)
    assert (told.accuracy, told.chance, told.questions) == (1.0, 0.5, 1)


def test_an_answer_longer_than_the_context_is_scored_whole() -> None:
    tokenizer = tokenizer_of(WORDS)
    model = uniform(tokenizer, context=8)
    long = " leaves" * 20
    (found,) = answer(model, tokenizer, [Question("Q:", (long, " short"), 0)])
    size = len(pair(tokenizer, "Q:", long)[1])
    assert size > 16
    assert found.bits[0] == pytest.approx(size * math.log2(tokenizer.get_vocab_size()), rel=1e-6)
    assert found.bytes == (140, 6)


def test_spaces_that_end_a_context_count_as_bits_and_bytes() -> None:
    tokenizer = tokenizer_of(WORDS)
    model = uniform(tokenizer)
    moved, plain = answer(model, tokenizer, [Question("Q: \n", ("apple",), 0), Question("Q:", (" \napple",), 0)])
    assert moved.bytes == plain.bytes == (7,)
    assert moved.bits == plain.bits


def test_what_is_no_text_reads_as_a_question_mark() -> None:
    """JSON may bring half of a surrogate pair, on which a tokenizer fails."""
    tokenizer = tokenizer_of(WORDS)
    broken, clean = (Question(f"What {mark}", (f" is {mark}", " red"), 0) for mark in ("\ud800", "?"))
    assert answer(uniform(tokenizer), tokenizer, [broken]) == answer(uniform(tokenizer), tokenizer, [clean])


def test_pairs_join_to_the_whole() -> None:
    tokenizer = tokenizer_of(WORDS)
    for context, text in [("What is red?", " an apple"), ("What is red? ", "an apple"), ("", "apple"), ("gra", "ss")]:
        before, added = pair(tokenizer, context, text)
        assert tokenizer.decode(before + added) == context + text
        assert added


def test_accuracies_and_intervals_by_hand() -> None:
    rows = [
        Answered((8.0, 9.0), (4, 9), 0, True),  # right by bits, wrong by bits per byte
        Answered((8.0, 4.0), (4, 4), 0, False),
        Answered((2.0, 4.0, 6.0, 8.0), (2, 2, 2, 2), 3, False),
    ]
    told = summary(rows)
    assert (told.accuracy, told.accuracy_per_byte, told.greedy_fraction) == (1 / 3, 0.0, 1 / 3)
    assert told.chance == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert told.gold_bpb == pytest.approx(24 / 10)
    low, high = wilson(1, 3)
    assert (told.accuracy_low, told.accuracy_high) == (low, high)
    assert (low, high) == pytest.approx(stats.binomtest(1, 3).proportion_ci(method="wilson"), rel=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    own = rng.gamma(2, 50, 400)  # a question's difficulty, which both models share
    a = [Answered((b,), (10,), 0, False) for b in own + rng.normal(0, 1, 400)]
    b = [Answered((b,), (10,), 0, False) for b in own - 5 + rng.normal(0, 1, 400)]
    found = difference(a, b)
    assert found.accuracy is None, "one answer each: there was nothing to choose"
    bits = found.gold_bpb
    assert bits.low < -0.5 < bits.high < 0
    assert bits.high - bits.low < 0.1 < bits.effect * -1
    delta = np.array([y.bits[0] - x.bits[0] for x, y in zip(a, b, strict=True)]) / 10
    expected = stats.ttest_1samp(delta, 0).confidence_interval()
    assert (bits.low, bits.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert bits.least_effect > (bits.high - bits.low) / 2
    with pytest.raises(ConfigError, match="same questions"):
        difference(a, b[:-1])


def test_a_difference_in_accuracy_is_paired_too() -> None:
    """Questions that neither model or both get right add nothing to the effect."""
    right, wrong = Answered((1.0, 2.0), (4, 4), 0, False), Answered((2.0, 1.0), (4, 4), 0, False)
    single = Answered((9.0,), (4,), 0, False)
    a = [right] * 30 + [wrong] * 70 + [single]
    b = [right] * 30 + [right] * 10 + [wrong] * 60 + [single]
    found = difference(a, b).accuracy
    assert found is not None
    expected = stats.ttest_1samp([0.0] * 90 + [1.0] * 10, 0).confidence_interval()
    assert (found.effect, found.low, found.high) == pytest.approx((0.1, expected.low, expected.high), rel=1e-6)
    assert found.least_effect > found.high - found.effect


def test_files_of_each_layout(tmp_path: Path) -> None:
    arc = write(tmp_path / "arc.jsonl", [{"query": "Question: Why? ", "choices": ["So", " No "], "gold": 1}])
    assert read_questions(arc) == [Question("Question: Why?\nAnswer:", (" So", " No"), 1)]
    lambada = write(tmp_path / "l.jsonl", [{"context": "He said", "continuation": "signs"}])
    assert read_questions(lambada) == [Question("He said", (" signs",), 0)]
    gsm = write(tmp_path / "g.jsonl", [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}])
    assert read_questions(gsm) == [Question("Question: 2+2?\nAnswer:", (" 2+2=4\n#### 4",), 0)]
    packed = tmp_path / "arc.jsonl.gz"
    packed.write_bytes(gzip.compress(arc.read_bytes()))
    assert read_questions(packed) == read_questions(arc)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "Why?", "choices": ["So"], "gold": 1}, "gold 1 of 1 answers"),
        ({"query": "Why?", "choices": ["So", " "], "gold": 0}, "gold 0 of 2 answers"),
        ({"query": "Why?", "choices": 3, "gold": 0}, "record 0 is not of layout 'choices'"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(write(tmp_path / "q.jsonl", [record]))


def test_bad_files_are_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"query": "x"}\n' * 100)[:-9])
    for path in (torn, tmp_path / "absent.jsonl"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_questions(path)
    with pytest.raises(ConfigError, match="no record"):
        read_questions(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match="none of the known layouts"):
        read_questions(write(tmp_path / "odd.jsonl", [{"a": 1}]))


@pytest.mark.parametrize(("name", "count"), [("arc_easy", 2376), ("arc_challenge", 1172), ("lambada_openai", 5153)])
def test_real_files_are_read_whole(shared_data: Path, name: str, count: int) -> None:
    found = read_questions(shared_data / "benchmarks" / f"{name}.jsonl.gz")
    assert len(found) == count
