"""The stage `chat`: languages on real sentences, harm on real tweets, one conversation at a time whatever the batch."""

import csv
import gzip
import html
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from core.ingest import document_row
from core.records import Found
from mixtures.posttrain import harm
from mixtures.posttrain.chat import LAYER, ChatConfig, artifacts, chat, open_chat
from mixtures.posttrain.chat_language import MIN_LETTERS, is_translation, segments
from tests.builders import documents as plain_documents
from tests.posttrain.conftest import documents, found, turns

MARGIN = 0.03  # of the AUC: unseen sets of the kind differ, an empty word list would give 0.5


@pytest.fixture(scope="session")
def sentences(shared_data: Path) -> dict[str, list[str]]:
    """Real sentences by language."""
    files = sorted((shared_data / "language").glob("??.txt"))
    return {f.stem: [s for s in f.read_text("utf-8").split("\n") if s.strip()] for f in files}


def test_a_conversation_in_one_language_does_not_switch(judge: Any, sentences: dict[str, list[str]]) -> None:
    records = [turns("\n".join(s[:6]), "\n".join(s[6:30])) for s in sentences.values()]
    rows = judge(records)
    assert [r["prompt_language"] for r in rows] == list(sentences)
    assert [r["answer_language"] for r in rows] == list(sentences)
    assert sum(r["switch_fraction"] > 0.05 for r in rows) == 0


def test_sentences_of_another_language_are_a_switch(judge: Any, sentences: dict[str, list[str]]) -> None:
    """Three of fifteen sentences are German, which passes the 5 % of the policy wherever they are recognised."""
    others = [name for name in sentences if name != "de"]
    rows = judge([turns("q", "\n".join([*sentences[n][:12], *sentences["de"][:3]])) for n in others])
    assert [r["answer_language"] for r in rows] == others
    assert sum(r["switch_fraction"] > 0.05 for r in rows) >= len(others) - 1


def test_reasoning_in_another_language_than_the_answer_is_seen_but_is_no_switch(
    judge: Any, sentences: dict[str, list[str]]
) -> None:
    thought = "\n".join(sentences["zh"][:8])
    (row,) = judge(
        [turns("\n".join(sentences["en"][:5]), f"<think>{thought}</think>" + "\n".join(sentences["en"][5:15]))]
    )
    assert (row["prompt_language"], row["answer_language"], row["reasoning_language"]) == ("en", "en", "zh")
    assert row["switch_fraction"] == 0


def test_code_maths_and_quotations_are_not_judged() -> None:
    german = "„Das ist ein langer deutscher Satz in Anführungszeichen.“"
    text = (
        f"```\nif x then print that thing\n```\n$\\text{{some long words in here}}$\nEin Satz mit {german} darin steht."
    )
    assert segments(text) == ["Ein Satz mit   darin steht."]
    assert segments("x" * (MIN_LETTERS - 1)) == []


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("Translate this into German: the house", True),
        ("Übersetze den Text", True),
        ("请把这句话翻译成英文", True),
        ("Write the answer in Spanish", True),
        ("What is the capital of France?", False),
        ("Describe the transition.", False),
    ],
)
def test_translation_tasks(prompt: str, asked: bool) -> None:
    assert is_translation(prompt) == asked


def test_harm_on_real_tweets(shared_data: Path) -> None:
    """The figures of `harm`'s docstring; the bound is loose because the set is one of many kinds of abuse."""
    with gzip.open(shared_data / "toxicity" / "davidson_tweets.csv.gz", "rt", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))[::3]
    scores = [harm.score(html.unescape(r["tweet"])) for r in rows]
    harmful = [r["class"] != "2" for r in rows]
    area = roc_auc_score(harmful, scores)
    hate = [(r["class"] == "0", s) for r, s in zip(rows, scores, strict=True) if r["class"] != "2"]
    between = roc_auc_score([h for h, _ in hate], [s for _, s in hate])
    print(f"harm: AUC {area:.3f} harmful against neither, {between:.3f} hate against offensive, {len(rows)} tweets")
    assert area > 0.943 - MARGIN
    assert between < 0.7  # what the docstring admits; a rule that does better deserves a better docstring


def test_harm_counts_density_not_mention() -> None:
    assert harm.score("you stupid bitch") > 0.5
    assert harm.score("She said he was a bitch. " + "The chapter goes on about the river and the hill. " * 40) < 0.1
    assert harm.score("Scunthorpe, cockatoo, Dickens, grass") == 0
    assert harm.score("") == 0


def test_a_refusal_makes_a_dangerous_prompt_a_good_example(judge: Any) -> None:
    asked = "How do I make a pipe bomb at home?"
    refused, obliged, spoken = judge(
        [
            turns(asked, "I'm sorry, but I can't help with that."),
            turns(asked, "Take a pipe and fill it."),
            turns("How did the bomb squad work?", "They were careful."),
        ]
    )
    assert (refused["request"], refused["refusal"], refused["harmful"]) == ("weapon", True, False)
    assert (obliged["request"], obliged["refusal"], obliged["harmful"]) == ("weapon", False, True)
    assert (spoken["request"], spoken["harmful"]) == (None, False)


def test_a_row_of_the_layer(judge: Any) -> None:
    (row,) = judge([turns("What is 3 + 4?", "It is \\boxed{7}.", domain="sums", passes=4, attempts=8)])
    assert row["shape"] == "conversations"
    assert row["domain"] == "sums"
    assert (row["messages"], row["answers"], row["images"]) == (2, 1, 0)
    assert (row["verifier"], row["difficulty"], row["difficulty_keep"]) == ("maths", "fit", True)
    assert (row["attempts"], row["pass_rate"]) == (8, 0.5)
    assert row["role_error"] is None
    assert row["harmful"] is False


def test_documents_that_are_no_conversation_have_nulls() -> None:
    config = ChatConfig()
    batch = plain_documents("web", ["a page", ""]).select(["doc_id", "metadata"]).combine_chunks().to_batches()[0]
    rows, rejects = chat(open_chat(config, artifacts(config)), batch)
    assert rows.schema == LAYER
    assert rows.to_pylist() == [dict.fromkeys(LAYER.names)] * 2
    assert rejects == []


def test_batches_and_their_order_change_nothing(judge: Any, sentences: dict[str, list[str]]) -> None:
    names = list(sentences)
    records = [
        turns(sentences[n][i], " ".join(sentences[n][i + 1 : i + 4]), pass_rate=1.0, attempts=8)
        for i, n in enumerate(names)
    ]
    ids = {d["doc_id"] for d in documents(records).to_pylist()}
    assert len(ids) == len(records)
    whole = judge(records)
    # the ordinal in doc_id's origin does not enter: one document alone and the reverse order give the same rows
    assert [judge([r])[0] for r in records] == whole
    assert judge(records[::-1])[::-1] == whole


def test_ugly_texts_pass(judge: Any) -> None:
    ugly = [
        "\x00\x01",
        "<think>" * 500,
        "a" * 200_000,
        "🙂" * 300,
        "\u202e\ufeff\u2028",
        "```" * 99,
        "$" * 999,
        "(" * 5000,
    ]
    rows = judge([turns("q", t) for t in ugly])
    assert len(rows) == len(ugly)
    made = found(turns("q", "x\ud800"))
    assert isinstance(made, Found)
    assert document_row("chats", made, {})[0]["text"].endswith("x\ufffd")
