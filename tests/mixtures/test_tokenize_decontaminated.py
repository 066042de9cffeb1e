"""The last look before text leaves the house: what spans put together, or the policy let pass, is left out and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core.errors import StageError
from core.schema import SPANS
from dedup import decontaminate
from mixtures import tokenizer
from mixtures.tokenize import STAGE
from tests.mixtures.conftest import House, documents, sentence

ITEM = "The old lighthouse keeper counted ships before breakfast for 14 days and wrote each name into a blue book yesterday"
# markup breaks every run of 13 words: 9 and 11
HALVES = ITEM.replace(" for 14 days", " </p><p class=advert> for 14 days")
# The quotation, the same torn in two by markup, and clean text.
TEXTS = [f"Quoted: {ITEM}.", f"Torn: {HALVES}.", *(sentence(i, 30) for i in range(6))]


def filled(house: House, tmp_path: Path, **config: Any) -> House:
    house.add(
        "web", {"s1": documents("web", TEXTS[:4]), "s2": documents("web", TEXTS[4:], [f"u{i}" for i in range(4)])}
    )
    house.judge("web")
    house.run(tokenizer.STAGE, vocab_size=400)
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"question": ITEM}))
    house.run(decontaminate.STAGE, benchmarks={"b": {"path": str(path), "answer": None}}, **config)
    return house


def markup(house: House) -> None:
    """Spans that cut the markup out of the second document."""

    def spans(document: dict[str, Any]) -> dict[str, Any]:
        start = document["text"].find("</p>")
        end = document["text"].find("> for") + 2
        cut = {"start": start, "end": end, "replacement": None, "label": "x"}
        return {"spans": [cut] if start >= 0 else None}

    house.layer("web", "markup", pa.schema([pa.field("spans", SPANS)]), spans)


def written(house: House) -> int:
    return sum(house.root.read_table(f"tokens/tokenizer/web/{s}.docs.parquet").num_rows for s in ("s1", "s2"))


def test_text_that_spans_put_together_is_left_out(house: House, tmp_path: Path) -> None:
    filled(house, tmp_path, coverage=0.9)
    hits = house.root.read_table("datasets/web/layers/decontaminate/s1.parquet").column("hit").to_pylist()
    assert hits == [True, False, False, False]
    markup(house)
    outcome = house.run(STAGE, spans=["markup.spans"], decontaminate="decontaminate")
    assert outcome.accounts["contaminated_docs"] == 2
    assert outcome.accounts["docs"] == written(house) == len(TEXTS) - 2
    assert [outcome.outputs[f"web/{s}"]["contaminated"] for s in ("s1", "s2")] == [2, 0]
    assert house.run(STAGE, spans=["markup.spans"]).accounts["docs"] == len(TEXTS)


def test_text_whose_spans_were_cut_stays(house: House, tmp_path: Path) -> None:
    filled(house, tmp_path, coverage=0.9)
    outcome = house.run(STAGE, spans=["decontaminate.spans"], decontaminate="decontaminate")
    assert outcome.accounts["contaminated_docs"] == 0
    docs = house.root.read_table("tokens/tokenizer/web/s1.docs.parquet")
    assert docs.column("bytes").to_pylist()[0] == len("Quoted: .")


def test_held_out_documents_are_written_and_their_copies_are_not(house: House, tmp_path: Path) -> None:
    original = " ".join(f"word{i}" for i in range(200))
    house.add("books", {"s": documents("books", [original])})
    house.judge("books", held_out=["word1"])
    filled(house, tmp_path, held_out="split.split == 'held_out'")
    house.add(
        "web",
        {"s1": documents("web", [f"{original} and a little more", "other"]), "s2": documents("web", ["x"], ["u"])},
    )
    house.judge("web")
    house.run(decontaminate.STAGE, held_out="split.split == 'held_out'")
    assert house.run(STAGE, decontaminate="decontaminate").accounts["contaminated_docs"] == 1
    assert house.root.read_table("tokens/tokenizer/books/s.docs.parquet").num_rows == 1
    assert written(house) == 2


def test_another_index_makes_the_shards_again(house: House, tmp_path: Path) -> None:
    filled(house, tmp_path)
    house.run(STAGE, decontaminate="decontaminate")
    assert house.run(STAGE, decontaminate="decontaminate").observed["resumed_units"] == 2
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"question": TEXTS[2]}))
    house.run(decontaminate.STAGE, benchmarks={"other": {"path": str(path), "answer": None}})
    outcome = house.run(STAGE, decontaminate="decontaminate")
    assert outcome.observed["resumed_units"] == 0
    assert outcome.accounts["contaminated_docs"] >= 1


def test_workers_change_nothing(house: House, tmp_path: Path) -> None:
    filled(house, tmp_path)
    assert (
        house.run(STAGE, decontaminate="decontaminate").outputs
        == house.run(STAGE, 2, decontaminate="decontaminate").outputs
    )


def test_a_missing_or_changed_index_is_said(house: House, tmp_path: Path) -> None:
    filled(house, tmp_path)
    with pytest.raises(StageError, match=r"no index of 'decontaminate@late' .* run stage decontaminate@late first"):
        house.run(STAGE, decontaminate="decontaminate@late")
    about = house.root.read_json("indexes/decontaminate/index.json")
    house.root.write_json("indexes/decontaminate/index.json", {**about, "fingerprint": "other"})
    with pytest.raises(StageError, match="is not the one its manifest names"):
        house.run(STAGE, decontaminate="decontaminate")
