"""Validators against values worked out by hand, and answers as models really give them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtures.augment.facts import all_words, content, facts, names, readings, spelled_numbers, unfounded
from mixtures.augment.prompts import TEMPLATES
from mixtures.augment.validate import Limits, Wrong, _formed, cleaned, containment, novelty, overlap, repeated, validate

SOURCE = (
    "The Forth Bridge is a cantilever railway bridge across the Firth of Forth in the east of Scotland. It was designed by John "
    "Fowler and Benjamin Baker, opened on 4 March 1890 and has a total length of 2,467 metres. At the time its cantilever span "
    "of 521 metres was the longest in the world. Some 4,600 workers built it, and fifty-seven of them died."
)
REPHRASED = (
    "Crossing the Firth of Forth in eastern Scotland, the Forth Bridge carries a railway on cantilever arms. Its designers, John "
    "Fowler and Benjamin Baker, saw it opened on 4 March 1890; in total it is 2467 metres long. No cantilever span in the world "
    "was longer than its 521 metres in those days. About 4,600 workers were needed to build the bridge, of whom 57 died."
)


def english(text: str) -> tuple[str | None, float]:
    return "en", 0.9


def judged(
    answer: str, template: str = "rephrase", finish: str = "stop", source: str = SOURCE, language: Any = english
) -> str:
    """The reason, or `ok`."""
    found = validate(answer, finish, source, TEMPLATES[template], language, Limits())
    return found.reason if isinstance(found, Wrong) else "ok"


def test_a_faithful_answer_passes_as_it_is() -> None:
    assert validate(REPHRASED, "stop", SOURCE, TEMPLATES["rephrase"], english, Limits()) == REPHRASED


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (REPHRASED.replace("1890", "1891"), "numbers"),
        (REPHRASED.replace("4 March", "4 April"), "numbers"),
        (REPHRASED.replace("57 died", "fifty-eight died"), "numbers"),
        (REPHRASED.replace("John Fowler and Benjamin Baker", "Thomas Bouch and William Arrol"), "names"),
        (REPHRASED.replace("57 died", "five were cousins and 57 died"), "ok"),  # a small count may be derived
        (SOURCE, "copied"),
        ("As an AI language model I rephrase: " + REPHRASED, "refusal"),
        ("I'm sorry, but I cannot rewrite this passage.", "refusal"),
        (REPHRASED + " In short, the passage describes a bridge.", "prompt_leak"),
        ("[passage 0123456789ab]\n" + REPHRASED, "prompt_leak"),
        ("HACKED", "length"),
        ("Kittens and puppies play with coloured wool all day while grandmother knits quietly near a warm stove. " * 1, "length"),
        ("Wool " + "kittens chase coloured threads around grandmother while puppies sleep beside warm stoves and dream of "
         "bones hidden under garden flowers every autumn when leaves fall slowly onto frozen puddles near quiet houses where "
         "children draw pictures with chalk until supper smells drift outside calling everyone home again", "drift"),
        (REPHRASED + " the end the end the end the end", "repetition"),
        ("", "empty"),
        ("```\n```", "empty"),
        (" ".join([REPHRASED] * 2), "length"),
    ],
)  # fmt: skip
def test_reasons(answer: str, reason: str) -> None:
    assert judged(answer) == reason


def test_what_a_template_asks_for_is_there() -> None:
    pair = "Question: Who designed the Forth Bridge?\nAnswer: John Fowler and Benjamin Baker designed the Forth Bridge."
    assert judged(pair, "question_answer") == "ok"
    assert judged("The Forth Bridge was designed by John Fowler and by Benjamin Baker.", "question_answer") == "format"
    items = "- The Forth Bridge crosses the Firth of Forth.\n- Its longest cantilever span measures 521 metres."
    assert judged(items, "knowledge_list") == "ok"
    assert judged(items.partition("\n")[0], "knowledge_list") == "format"
    assert (
        judged("1. The Forth Bridge crosses the Firth of Forth.\n2. Some 4,600 workers built it.", "knowledge_list")
        == "ok"
    )


@pytest.mark.parametrize(
    ("text", "template", "expected"),
    [
        ("Q" + "\n" * 60_000 + "x", "question_answer", False),
        ("Q: x" + "\n" * 60_000 + "B", "question_answer", False),
        ("Q: x" + "\n" * 60_000 + "A: y", "question_answer", True),
        ("x" + "\n" * 60_000 + "* Question 1) x\n\n\u2013\n**Answer:** y", "question_answer", True),
        ("Q 1:\nwhy\nA 1.\nso", "question_answer", True),
        ("So Q: x\nA: y", "question_answer", False),
        ("x" + "\n" * 60_000 + "- a", "knowledge_list", False),
        ("x" + "\n" * 60_000 + "- a\n \n\t2) b", "knowledge_list", True),
        ("-" + "\n" * 60_000, "knowledge_list", False),
    ],
)
def test_forms_are_found_in_one_look_over_the_text(text: str, template: str, expected: bool) -> None:
    """Before, a run of 60,000 newlines took a minute and a half."""
    assert _formed(text, template) == expected


def test_blanks_at_the_ends_of_lines_go_in_one_look() -> None:
    assert cleaned("a \t \nb" + " " * 60_000 + "c  \nd") == "a\nb" + " " * 60_000 + "c\nd"


def test_an_answer_that_did_not_end_falls_whatever_it_says() -> None:
    assert [judged(REPHRASED, finish=f) for f in ("length", "content_filter", "")] == ["finish_reason"] * 3


def test_language_counts_only_where_both_are_sure() -> None:
    def unlike(score: float) -> Any:
        return lambda text: ("de", score) if text == REPHRASED else ("en", 0.99)

    assert judged(REPHRASED, language=unlike(0.6)) == "language"
    assert judged(REPHRASED, language=unlike(0.4)) == "ok"


def test_german_nouns_are_no_names() -> None:
    source = (
        "Die Brücke wurde im Jahr 1890 von Arbeitern aus Schottland gebaut und führt über einen breiten Fluss im Osten."
    )
    answer = (
        "Im Jahr 1890 bauten Arbeiter aus Schottland die Brücke; sie führt im Osten über ein breites Wasser, den Fluss."
    )
    assert novelty(names(answer), all_words(source)) > 0.1
    assert judged(answer, source=source, language=lambda text: ("de", 0.9)) == "ok"
    assert judged(answer, source=source) == "names"


def test_introductions_fences_and_quotes_go() -> None:
    plain = "Water boils at 100 degrees."
    for dressed in (
        f"Here is the rephrased text:\n\n{plain}",
        f"Sure! Here's a shorter version of the passage: {plain}",
        f"Certainly, here is the text:\n```text\n{plain}\n```",
        f"```\n{plain}\n```",
        f"**Paraphrased Text:** {plain}",
        f'"{plain}"',
        f"\u201c{plain}\u201d",
        f"  {plain}  \r\n",
    ):
        assert cleaned(dressed) == plain
    assert cleaned('"One" and "two"') == '"One" and "two"'
    assert cleaned("Here we go again: a song.") == "Here we go again: a song."
    assert cleaned("Of course the dog barked.") == "Of course the dog barked."


def test_numbers_by_hand() -> None:
    assert readings("1,500") == {"1500", "1.5"}
    assert readings("1,000") == {"1000"}
    assert readings("1.234.567") == {"1234567", "1234.567"}
    assert (readings("007"), readings("3.140"), readings("0.0")) == ({"7"}, {"3140", "3.14"}, {"0"})
    assert list(spelled_numbers("two hundred and three, twenty-five, three million five hundred; one and seven")) == [
        203, 25, 3_000_500, 1, 7,
    ]  # fmt: skip
    found = facts("1. Built 2020-03-05.\nQuestion 7: \u0662\u0660\u0662\u0661 or 12 May?")
    assert {min(n) for n in found.numbers} == {"2020", "3", "5", "2021", "12"}
    assert found.months == {3, 5}
    assert facts("They may march in August.").months == set()


def test_what_a_source_supports() -> None:
    assert unfounded("On 2020-03-05 it cost 1000.50", "On 5 March 2020 it cost 1,000.50") == []
    assert unfounded("Chapter 3 has 20 pages", "Three chapters") == ["20"]
    assert unfounded("In May 2021", "In 2021-04-01") == ["May"]
    assert unfounded("about 1.5 km", "1,5 km") == []
    assert unfounded("- 1\n2) two", "nothing") == ["1"]


def test_ngrams_and_overlap_by_hand() -> None:
    assert containment(list("abcde"), list("xbcdy"), 3) == pytest.approx(1 / 3)
    assert containment(list("ab"), list("ab"), 3) == 0.0
    assert overlap({"a", "b"}, {"b", "c", "d"}) == 0.5
    assert overlap(set(), {"a"}) == 0.0
    assert content(["the", "inventions", "invented", "of", "\u6c34"]) == {"invent", "\u6c34"}
    assert names("Then Ada Lovelace met him. He was Charles Babbage's friend.") == {
        "ada",
        "lovelace",
        "charles",
        "babbage",
    }


def test_repetition_by_hand() -> None:
    assert repeated("abcdefgh" * 3) == "abcdefgh"
    assert repeated("abcdefgh" * 2) == ""
    assert repeated("abcdefg" * 3) == ""  # seven characters
    long = "".join(chr(0x4E00 + i) for i in range(100))
    assert repeated("x" + long * 2) == long
    assert repeated(long[:99] * 2) == ""
    assert repeated("-" * 80) == ""  # a rule under a heading


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_answer_to_any_passage_is_judged(answer: str, source: str) -> None:
    found = validate(answer, "stop", source, TEMPLATES["distil"], english, Limits())
    assert isinstance(found, Wrong) or found.strip() == found != ""


@given(st.lists(st.sampled_from(["alpha", "beta", "1890", "Ada", "March", "3,5", "\u6c34"]), max_size=40))
def test_a_text_founds_itself(words: list[str]) -> None:
    text = " ".join(words)
    assert unfounded(text, text) == []
    assert novelty(names(text), all_words(text)) == 0.0
