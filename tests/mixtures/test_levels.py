"""Which tokens a phase learns: levels by hand, through spans, and from documents to the reader's masks."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import StageError
from core.schema import DOCUMENTS, SPANS
from core.text import Span, apply_spans
from crawl.harvest.templates import Segment, joined, masked_for_annealing, masked_for_chat
from crawl.sources.conversations import render
from mixtures import mix, tokenize, tokenizer
from mixtures.encoder import PIECE_CHARS, open_encoder, read_info
from mixtures.levels import LevelsError, byte_levels, character_levels, text_levels, token_levels
from mixtures.reader import MixtureSource
from mixtures.token_files import ANSWER, PROMPT, SCAFFOLD
from tests.mixtures.conftest import House, documents, sentence
from tests.mixtures.small_mix import component, phase

SEGMENTS = [
    Segment("user", "scaffold", "Häufig: löse\n<p>\n"),
    Segment("user", "content", "mail ada@example.org, 日本"),
    Segment("user", "scaffold", "\n</p>\n\n"),
    Segment("assistant", "answer", "die Antwort ist ✓\n"),
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "name": "ada", "content": "two?\n\n"},
    {"role": "assistant", "content": "no", "loss_mask": 0},
    {"role": "user", "content": [{"type": "text", "value": "a"}, {"type": "text", "value": "b", "loss_mask": 1}]},
    {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": [{"type": "text", "value": "yes", "loss_mask": 0}, {"type": "text", "value": "!"}],
    },
]


def _dialogue() -> tuple[str, str]:
    text, spans = joined(SEGMENTS)
    return text, json.dumps({"template": "repair", "segments": [list(s) for s in spans]})


def _levels(text: str, metadata: str) -> np.ndarray:
    levels = byte_levels(text.encode(), metadata)
    assert levels is not None
    return levels


def _at(text: str, levels: np.ndarray, most: int) -> str:
    """The characters of at most that level; | where some are left out."""
    kept = "".join(c if level <= most else "\0" for c, level in zip(text, levels, strict=True))
    return "|".join(part for part in kept.split("\0") if part)


def test_a_dialogue_has_the_masks_of_its_templates() -> None:
    text, metadata = _dialogue()
    levels = _levels(text, metadata)
    _, spans = joined(SEGMENTS)
    for masked, level in ((masked_for_annealing(spans), SCAFFOLD), (masked_for_chat(spans), PROMPT)):
        said = np.zeros(len(levels), bool)
        for start, end in masked:
            said[start:end] = True
        assert ((levels >= level) == said).all()
    characters = character_levels(levels, text.encode())
    assert _at(text, characters, PROMPT) == "mail ada@example.org, 日本|die Antwort ist ✓\n"
    assert _at(text, characters, ANSWER) == "die Antwort ist ✓\n"


def test_a_conversation_has_the_masks_of_its_messages() -> None:
    text, _ = render(CHAT)
    levels = _levels(text, json.dumps({"chat": {"conversations": CHAT, "images": []}}))
    assert _at(text, levels, ANSWER) == "b|<think>\nhm\n</think>\n|!"
    assert set(levels.tolist()) == {ANSWER, PROMPT}
    plain = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four\n\n"}] * 2
    text, _ = render(plain)
    levels = _levels(text, json.dumps({"chat": {"conversations": plain, "images": []}}))
    assert _at(text, levels, ANSWER) == "four\n\n\n\n|four\n\n", "the end of a turn is learned"


def test_metadata_of_another_text_is_no_guess() -> None:
    text, metadata = _dialogue()
    with pytest.raises(LevelsError, match="segments end at"):
        byte_levels(text.encode() + b"x", metadata)
    with pytest.raises(LevelsError, match="not the rendering"):
        byte_levels(b"user:\nx", json.dumps({"chat": {"conversations": CHAT, "images": []}}))
    for other in ("{}", '{"title": "\\"segments\\" and \\"chat\\""}', '{"segments": []}', '{"chat": "room"}'):
        assert byte_levels(b"text", other) is None


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6), st.sampled_from(["", "·x"])), max_size=4))
def test_levels_follow_the_characters_through_spans(found: list[tuple[int, int, str]]) -> None:
    text = "aabbbbccdddd"
    segments = [
        (0, 2, "user", "scaffold"),
        (2, 6, "user", "content"),
        (6, 8, "user", "scaffold"),
        (8, 12, "assistant", "answer"),
    ]
    spans = [Span(start, min(12, start + size), put) for start, size, put in found]
    left = apply_spans(text.encode(), [spans])
    levels = text_levels(text, left, json.dumps({"segments": segments}), [spans])
    assert levels is not None
    assert len(levels) == len(left)
    known = {"a": SCAFFOLD, "b": PROMPT, "c": SCAFFOLD, "d": ANSWER}
    assert all(known[c] == level for c, level in zip(left, levels, strict=True) if c in known)


def test_a_token_over_a_border_is_learned() -> None:
    levels = np.array([2, 2, 1, 0, 0], np.uint8)
    assert token_levels(levels, [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (2, 2), (5, 5)]).tolist() == [
        2,
        2,
        1,
        0,
        0,
        1,
        0,
    ]
    assert token_levels(np.zeros(0, np.uint8), [(0, 0)]).tolist() == [0]


def _with_metadata(source: str, texts: list[str], metadata: list[str]) -> pa.Table:
    table = documents(source, texts)
    at = DOCUMENTS.get_field_index("metadata")
    return table.set_column(at, DOCUMENTS.field(at), pa.array(metadata, DOCUMENTS.field(at).type))


@pytest.fixture
def spoken(house: House) -> House:
    """Pages, one shard of dialogues and one of conversations; a span hides the dialogue's address."""
    text, metadata = _dialogue()
    chat, _ = render(CHAT)
    chats = json.dumps({"chat": {"conversations": CHAT, "images": []}})
    house.add("web", {"s0": documents("web", [sentence(i, 40) for i in range(12)])})
    house.add(
        "talk",
        {
            "s0": _with_metadata("talk", [text, sentence(50, 30)], [metadata, "{}"]),
            "s1": _with_metadata("talk", [chat, chat + "?"], [chats, chats]),
        },
    )
    for name in ("web", "talk"):
        house.judge(name)
        house.layer(name, "pii", pa.schema([pa.field("spans", SPANS)]), _address)
    house.run(tokenizer.STAGE, vocab_size=500)
    return house


def _address(document: dict[str, Any]) -> dict[str, Any]:
    start = document["text"].encode().find(b"ada@example.org")
    return {"spans": [{"start": start, "end": start + 15, "replacement": "<mail>"}] if start >= 0 else []}


def _learned(house: House, name: str) -> dict[str, tuple[str, str]]:
    """Text of each document of `talk` -> its learned and its other tokens' text."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_str(house.root.read_bytes("models/tokenizer/tokenizer.json").decode()).decode
    source = MixtureSource(house.root.url, name)
    out = {}
    for i in range(len(source)):
        tokens, mask = source.tokens(i), source.mask(i)
        if source.domains[source.domain(i)] == "talk":
            assert mask is None or (mask.dtype, len(mask)) == (np.bool_, len(tokens))
            kept = np.ones(len(tokens), bool) if mask is None else mask
            out[decode(tokens[:-1].tolist())] = (decode(tokens[kept][:-1].tolist()), decode(tokens[~kept].tolist()))
            assert kept[-1], "all of these end in what is learned"
        else:
            assert mask is None
    return out


def _mixed(house: House, **learn: str) -> None:
    parts = (component("talk", 0.5, max_epochs=1.0), component("web", 0.5))
    house.run(mix.STAGE, phases={name: {**phase(*parts), "learn": what} for name, what in learn.items()})


def test_from_documents_to_masks(spoken: House) -> None:
    outcome = spoken.run(tokenize.STAGE, spans=("pii.spans",), levels=True)
    assert outcome.accounts["unmatched_docs"] == 1
    assert [outcome.outputs[name]["levels"] for name in ("talk/s0", "talk/s1", "web/s0")] == [True, True, False]
    assert not spoken.root.exists("tokens/tokenizer/web/s0.levels")
    _mixed(spoken, pretrain="all", anneal="content", midtrain="answers")
    dialogue = _dialogue()[0].replace("ada@example.org", "<mail>")
    chat = render(CHAT)[0]
    assert all(other == "" for _, other in _learned(spoken, "pretrain").values())
    anneal, midtrain = _learned(spoken, "anneal"), _learned(spoken, "midtrain")
    assert anneal[dialogue] == ("mail <mail>, 日本die Antwort ist ✓\n", "Häufig: löse\n<p>\n\n</p>\n\n")
    assert midtrain[dialogue] == ("die Antwort ist ✓\n", dialogue.removesuffix("die Antwort ist ✓\n"))
    assert anneal[chat] == (chat, "")
    assert midtrain[chat][0].removeprefix("a") == "b<think>\nhm\n</think>\n!", "ab may be one token, then learned"
    assert midtrain[chat + "?"] == (chat + "?", ""), "what is not known is learned, and counted"


def test_levels_change_no_token_and_are_content(spoken: House) -> None:
    def files() -> dict[str, bytes]:
        folder = spoken.root.local_path("tokens")
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    plain = spoken.run(tokenize.STAGE, spans=("pii.spans",))
    before = files()
    levelled = spoken.run(tokenize.STAGE, spans=("pii.spans",), levels=True)
    after = files()
    assert {n: b for n, b in after.items() if n.endswith((".bin", ".idx"))} == {
        n: b for n, b in before.items() if n.endswith((".bin", ".idx"))
    }
    assert set(after) - set(before) == {"tokenizer/talk/s0.levels", "tokenizer/talk/s1.levels"}
    contents = [{name: out["content"] for name, out in o.outputs.items()} for o in (plain, levelled)]
    assert contents[0]["web/s0"] == contents[1]["web/s0"]
    assert contents[0]["talk/s0"] != contents[1]["talk/s0"]
    spoken.run(tokenize.STAGE, spans=("pii.spans",))
    assert set(files()) == set(before), "levels that nobody asked for go"


def test_levels_that_are_cut_or_missing_are_named_and_made_again(spoken: House) -> None:
    spoken.run(tokenize.STAGE, levels=True)
    _mixed(spoken, midtrain="answers")
    path = spoken.root.local_path("tokens/tokenizer/talk/s1.levels")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StageError, match=r"s1\.levels is cut short or overwritten, got \d+ bytes, expected \d+"):
        MixtureSource(spoken.root.url, "midtrain").check()
    path.unlink()
    with pytest.raises(StageError, match=r"s1\.levels is missing"):
        MixtureSource(spoken.root.url, "midtrain").check()
    assert spoken.run(tokenize.STAGE, levels=True).observed["resumed_units"] == 2
    assert path.read_bytes() == whole


def test_levels_of_a_text_that_is_encoded_in_pieces(spoken: House) -> None:
    encoder = open_encoder(spoken.root.url, read_info(spoken.root, "tokenizer"))
    lines = PIECE_CHARS // 12 + 1000
    text, levels = "water stone\n" * lines, np.repeat(np.arange(lines) % 2, 12).astype(np.uint8)
    tokens, lengths, found = encoder.encode_levels(["plain", text], [None, levels])
    alone, _ = encoder.encode([text])
    assert tokens[lengths[0] :].tolist() == alone.tolist()
    assert (found[: lengths[0]] == 0).all()
    by_line = found[lengths[0] : -1].reshape(lines, -1)
    assert (by_line == (np.arange(lines) % 2)[:, None]).all()
    assert found[-1] == levels[-1]


def test_a_phase_that_learns_a_part_needs_levels(spoken: House) -> None:
    spoken.run(tokenize.STAGE)
    with pytest.raises(StageError, match="phase 'midtrain' learns answers only, got no token shard with levels"):
        _mixed(spoken, midtrain="answers")
