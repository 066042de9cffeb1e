"""Passages: where they are cut, how dense they are, which entities they hold, and that nothing but the documents decides."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engines.local import LocalEngine
from core.errors import ConfigError, StageError
from core.job import Job, Outcome
from core.schema import SPANS, TEXT
from core.storage import Root
from core.text import Span, code_points, raw_words
from mixtures.augment.coverage import choose
from mixtures.augment.density import MILLION, compressed, entity_starts, scores
from mixtures.augment.embedder import HashedWords, ModelVectors, nearest, quantised
from mixtures.augment.inventory import clean, defined, named_runs, read_file, titles
from mixtures.augment.passages import (
    STAGE,
    PassagesConfig,
    inventory_name,
    passage_id,
    passages_name,
    passages_of,
    reads,
    released_range,
)
from mixtures.augment.windows import byte_offsets, passages
from tests.builders import documents, make_dataset, make_layer
from tests.mixtures.encoders import VOCABULARY, tokenizer

FACTS = (
    "In 1843 the mathematician Ada Lovelace described how the Analytical Engine of Charles Babbage could compute Bernoulli "
    "numbers. Babbage is a pioneer of computing. The engine was never finished, but its plans of 1837 survive in London, and "
    "modern builders in the Science Museum made part of it from them between 1985 and 2002."
)
CHAT = (
    "We went for a walk and then we sat down for a while and talked about this and that, as one does when there is "
    "nothing else to do and the day is long and warm and nobody is waiting for us anywhere at all."
)


def column(*texts: str) -> pa.Array:
    return pa.array(texts, TEXT)


def pieces(text: str, least: int, most: int) -> list[str]:
    found, _, _ = passages(column(text), least, most)
    return [text.encode()[s:e].decode() for s, e in zip(found.start, found.end, strict=True)]


def test_cuts_by_hand() -> None:
    assert pieces("one two three", 4, 8) == []
    assert pieces("one two three four", 4, 8) == ["one two three four"]
    assert pieces("a b c. d e f g h i j k", 2, 5) == ["a b c.", "d e f g h", "i j k"]
    assert pieces("a b. c d\ne f g h", 2, 5) == ["a b. c d", "e f g h"]  # a line end before a sentence end
    assert pieces("a b c d e f", 2, 5) == ["a b c d e"]  # one word is left, too few
    assert pieces("\u00e9t\u00e9 \U0001f600! x y", 2, 2) == ["\u00e9t\u00e9 \U0001f600!", "x y"]
    assert pieces("x" * 500 + " y", 2, 4) == []  # a key, no text


@given(st.lists(st.text(max_size=60), max_size=4), st.integers(1, 5), st.integers(0, 6))
def test_passages_are_ranges_of_their_document(texts: list[str], least: int, more: int) -> None:
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    found, _, _ = passages(column(*texts), least, least + more)
    alone = [passages(column(t), least, least + more)[0] for t in texts]
    assert [a.start.tolist() for a in alone] == [found.start[found.document == d].tolist() for d in range(len(texts))]
    last = {}
    for d, s, e, n in zip(found.document, found.start, found.end, found.words, strict=True):
        piece = texts[d].encode()[s:e].decode()
        assert least <= n <= least + more
        assert len(raw_words(code_points(column(piece))).start) == n
        assert s >= last.get(d, 0)
        last[d] = e


def test_byte_offsets_by_hand() -> None:
    points = np.frombuffer("a\u00e9\u6c34\U0001f600".encode("utf-32-le"), np.uint32)
    assert byte_offsets(points).tolist() == [0, 1, 3, 6, 10]


def test_entities_by_hand() -> None:
    text = code_points(column("The cat met Ada Lovelace, Charles Babbage and the King. He left (Paris). London"))
    raw = raw_words(text)
    starts = entity_starts(text, raw)
    words = [bytes(text.points[s:e].astype("<u4")).decode("utf-32-le") for s, e in zip(raw.start, raw.end, strict=True)]
    assert [w for w, yes in zip(words, starts, strict=True) if yes] == ["Ada", "Charles", "King.", "(Paris)."]
    assert named_runs(column("We met Ada Lovelace, Charles Babbage's son and IBM.", "", "\u6c34\u6c34")) == [
        ["Ada Lovelace", "Charles Babbage", "IBM"], [], [],
    ]  # fmt: skip


def test_definitions_and_titles() -> None:
    text = "A Photon is a quantum of light. It is a particle. The Higgs boson is the quantum of a field! Is it a wave?"
    assert list(defined(text)) == [
        ("Photon", "A Photon is a quantum of light."),
        ("Higgs boson", "The Higgs boson is the quantum of a field!"),
    ]
    assert titles('{"title": "Forth Bridge"}') == ["Forth Bridge"]
    assert titles('{"title": "How to cross the bridge when you come to it"}') == []
    assert titles('{"title": 7}') == titles("{}") == []
    assert [clean(n) for n in ("  (Ada\n Lovelace) ", "AI", "The", "123", "x" * 90)] == [
        "Ada Lovelace",
        None,
        None,
        None,
        None,
    ]


def test_density_by_hand() -> None:
    """Ten words: one entity, one number, one definition, so 10 + 8 (its cap) + 4 x 4 (its cap) per hundred."""
    sentence = "so the Ada engine is a 7th part of it"
    config = PassagesConfig(min_words=16, max_words=384)
    found, text, raw = passages(column(sentence), 10, 10)
    made = scores(found, column(sentence), text, raw)
    assert compressed(column(sentence))[0] == 1.0
    assert made.tolist() == [(10 + 8 + 16) * MILLION]
    assert scores(*_scored("a b c d e f g h i j"))[0] == 0
    assert scores(*_scored("1 2 3 4 5 6 7 8 9 Ada"))[0] == 0  # a table
    assert scores(*_scored("so the Ada engine\nis a 7th\npart of it"))[0] == 0  # 3.3 words a line
    dense, chat = (passages_of(column(t + " " + t[::-1]), config)[3][0] for t in (FACTS, CHAT))
    assert dense > 4 * chat


def _scored(text: str) -> tuple[Any, pa.Array, Any, Any]:
    found, points, raw = passages(column(text), 10, 10)
    return found, column(text), points, raw


def test_coverage_by_hand() -> None:
    held = [["a", "b"], ["a"], ["b"], [], ["c", "a"], ["c"]]
    each = [str(i) for i in range(6)]
    assert choose(held, each, 10, 1, 1) == [0, 4]
    assert choose(held, each, 10, 2, 1) == [0, 1, 2, 4, 5]
    assert choose(held, each, 2, 2, 1) == [0, 1]
    assert choose(held, ["same"] * 6, 10, 2, 3) == [0, 1, 2]


def test_vectors_meet_where_words_do() -> None:
    embedder = HashedWords()
    vectors = quantised(
        embedder.embed(["photosynthesis chlorophyll", "Chlorophyll and photosynthesis.", "railway bridges", ""])
    )
    assert nearest(vectors[:1], vectors[1:], 0.5, 5) == [[0]]
    assert nearest(vectors[3:], vectors, 0.1, 5) == [[]]
    assert np.array_equal(vectors, np.rint(vectors))
    assert nearest(vectors, vectors[:0], 0.0, 5) == [[], [], [], []]
    with pytest.raises(ValueError, match="at most 1024"):
        quantised(np.zeros((1, 1025), np.float32))


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_a_vector_is_the_same_in_every_batch(texts: list[str]) -> None:
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    together = HashedWords(64).embed(texts)
    assert np.array_equal(together, np.concatenate([HashedWords(64).embed([t]) for t in texts]))


def test_spans_inside_across_and_outside_a_range() -> None:
    text = b"0123456789"
    cuts = [[Span(0, 1, "x"), Span(2, 4, "[A]"), Span(8, 10, "[B]")], [Span(3, 6, "[C]")]]
    assert released_range(text, cuts, 1, 9) == "1[A]67[B]"
    assert released_range(text, [], 2, 4) == "23"


def write_model(root: Root, **rows: list[int]) -> None:
    """A distilled model that knows some words of VOCABULARY, as `embedder` leaves it."""
    table = np.zeros((len(VOCABULARY), 2), np.int16)
    for word, row in rows.items():
        table[VOCABULARY.index(word)] = row
    data = io.BytesIO()
    np.save(data, table)
    root.write_bytes("models/embedder/table.npy", data.getvalue())
    root.write_bytes("models/embedder/tokenizer.json", tokenizer().to_str().encode())
    root.write_json("models/embedder/embedder.json", {"kind": "distilled", "dims": 2, "languages": ["en"]})


def test_vectors_of_a_model_meet_where_meaning_does(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    write_model(root, water=[5, 0], river=[9, 0], captain=[0, 7])
    model = ModelVectors(root.url, "embedder", "one")
    vectors = model.embed(["the water", "River", "a captain", "zebra", ""])
    assert vectors.tolist() == [[127, 0], [127, 0], [0, 127], [0, 0], [0, 0]]
    assert nearest(quantised(vectors[:1]), quantised(vectors[1:]), 0.5, 5) == [[0]]
    assert pickle.loads(pickle.dumps(model)) == model
    write_model(root, water=[0, 5])
    assert ModelVectors(root.url, "embedder", "two").embed(["water"]).tolist() == [[0, 127]]
    assert ModelVectors(root.url, "embedder", "two").embed([]).shape == (0, 2)


def run(root: Root, datasets: list[Any], workers: int = 0, **config: Any) -> Outcome:
    made = PassagesConfig(**{"where": None, "min_words": 16, "max_words": 40, "min_docs": 1, **config})
    engine = LocalEngine(Path(root.base) / f"exchange-{workers}", workers)
    job = Job(STAGE, "passages", made, root, engine, tuple(datasets), "identity")
    try:
        outcome: Outcome = STAGE.fn(job)
        return outcome
    finally:
        engine.clear()
        engine.close()


def corpus() -> list[str]:
    return [f"{CHAT} {i}. {FACTS} {CHAT}" if i % 3 else f"{FACTS}\n{CHAT} Number {i} lies in Paris." for i in range(12)]


def test_the_densest_passages_are_taken_and_lie_where_they_say(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    texts = corpus()
    dataset = make_dataset(root, "web", [texts[:5], texts[5:]])
    outcome = run(root, [dataset], passages=5, per_entity=3)
    rows = root.read_table(passages_name("passages")).to_pylist()
    assert outcome.accounts["passages"] == len(rows) <= 5
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
    by_id = {r["doc_id"]: t for r, t in zip(documents("web", texts).to_pylist(), texts, strict=True)}
    for r in rows:
        assert by_id[r["doc_id"]].encode()[r["start"] : r["end"]].decode() == r["text"]
        assert r["passage"] == passage_id(r["doc_id"], r["start"], r["end"])
        assert any(e in r["text"] for e in r["entities"])
        assert (r["source"], r["kind"], r["generation"], r["words"]) == ("web", "other", 0, len(r["text"].split()))
    assert "Analytical Engine" in root.read_table(inventory_name("passages")).column("entity").to_pylist()


def test_neither_shards_nor_workers_nor_order_move_a_passage(tmp_path: Path) -> None:
    texts, seen = corpus(), []
    for name, shards, workers in (("a", [texts], 0), ("b", [texts[:1], texts[1:7], texts[7:]], 2)):
        root = Root(str(tmp_path / name))
        run(root, [make_dataset(root, "web", shards)], workers, passages=6)
        table = root.read_table(passages_name("passages")).drop_columns(["row"])
        seen.append((table.to_pylist(), root.read_table(inventory_name("passages")).to_pylist()))
    assert seen[0] == seen[1]
    assert seen[0][0]


def test_spans_are_applied_before_text_leaves(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    dataset = make_dataset(root, "web", [[FACTS]])
    at = FACTS.encode().index(b"Ada Lovelace")
    span = {"start": at, "end": at + 12, "replacement": "[name]", "label": "name"}
    make_layer(dataset, "pii", {"spans": pa.array([[span]], SPANS)})
    run(root, [dataset], spans=["pii.spans"])
    text = root.read_table(passages_name("passages")).column("text").to_pylist()[0]
    assert "[name] described" in text
    assert "Lovelace" not in text


def test_a_given_inventory_comes_first(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "root"))
    path = tmp_path / "entities.txt"
    path.write_text("# mine\nAntikythera mechanism\n\nAda  Lovelace\n", "utf-8")
    run(root, [make_dataset(root, "web", [[FACTS]])], inventory=str(path))
    rows = root.read_table(inventory_name("passages")).to_pylist()
    assert [(r["entity"], r["docs"]) for r in rows[:2]] == [("Antikythera mechanism", 0), ("Ada Lovelace", 1)]
    assert len({r["entity"] for r in rows}) == len(rows)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="one entity a line"):
        read_file(str(path))


def test_a_model_finds_entities_that_are_not_named(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "root"))
    write_model(root, water=[5, 0], river=[9, 0], captain=[0, 7])
    path = tmp_path / "entities.txt"
    path.write_text("River\nCaptain\n", "utf-8")
    dataset = make_dataset(
        root, "web", [["so much water runs below seven old mills that one of them has not stood still ever"]]
    )
    held = []
    for model in ("embedder", None):
        run(root, [dataset], inventory=str(path), embedder=model)
        held.append(root.read_table(passages_name("passages")).column("entities").to_pylist())
    assert held == [[["River"]], []]
    assert "@embedder" in reads(PassagesConfig(embedder="embedder"))
    with pytest.raises(StageError, match=r"no model 'other' .*; run stage other first"):
        run(root, [dataset], embedder="other")


def test_ugly_documents_pass_through(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    ugly = [
        "",
        "\x00" * 100,
        "\U0001f600 " * 50,
        "a" * 200_000,
        "\ufffd",
        "\n" * 1000,
        "\u6c34" * 300,
        "A B " * 3000,
        f"\u202e{FACTS}\x00",
    ]
    outcome = run(root, [make_dataset(root, "web", [ugly, []])], passages=50)
    assert outcome.accounts["passages"] >= 1
    empty = Root(str(tmp_path / "empty"))
    assert run(empty, [make_dataset(empty, "web", [[""]])]).accounts["passages"] == 0


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_words is below min_words"):
        PassagesConfig(min_words=100, max_words=50)
