"""Shapes of conversations, their rendering, and spans of it taken back to the messages."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from core.records import Dropped, Failed, Found, Raw
from core.text import Span, apply_spans
from crawl import sources
from crawl.sources.conversations import ROLES, ChatShapeError, read_conversation, render, with_spans
from tests.posttrain.conftest import found, turns

TEXTS = st.text(max_size=12)
SEGMENTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image"]), "value": TEXTS}, optional={"loss_mask": st.integers(0, 1)}
    ),
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": TEXTS | SEGMENTS},
    optional={
        "name": TEXTS | st.none(),
        "loss_mask": st.integers(0, 1) | st.none(),
        "tool_schemas": st.lists(st.dictionaries(TEXTS, st.integers(), max_size=2), max_size=2),
    },
)
ANCHOR = {"role": "user", "content": "x"}  # a conversation without any text is dropped
CONVERSATIONS = st.lists(MESSAGES, max_size=5).map(lambda m: {"conversations": [*m, ANCHOR], "images": ["a.png"]})


def test_openai_messages_become_the_published_schema() -> None:
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "u"}}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": {"b": 1, "a": 2}}}],
                "unknown": 3,
            },
        ]
    }
    conversation, replaced = read_conversation(record)
    assert (conversation.shape, replaced) == ("messages", 0)
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "value": "See"}, {"type": "image", "value": "u"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"a": 2, "b": 1}'}}],
        },
    ]
    text, pieces = render(conversation.messages)
    assert text == 'system:\nBe brief.\n\nuser:\nSee\n\nassistant:\n\nlook({"a": 2, "b": 1})'
    assert [p.path for p in pieces][-1] == ("tool_calls", 0, "function", "arguments")


def test_sharegpt_becomes_the_published_schema() -> None:
    conversation, _ = read_conversation(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    )
    assert conversation.shape == "sharegpt"
    assert conversation.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_reasoning_is_rendered_between_tags_and_names_beside_roles() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "name": "calc"}
    assert render([message])[0] == "assistant calc:\n<think>\n2 + 2\n</think>\n4"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "no chat"}, "no_conversation"),
        ({"conversations": "hello"}, "no_conversation"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "empty"),
        ({"messages": ["hello"]}, "bad_message"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "bad_role"),
        ({"messages": [{"role": None, "content": "x"}]}, "bad_role"),
        ({"messages": [{"role": "user", "content": 7}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"value": "x"}]}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "bad_content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": "x"}], "images": "a.png"}, "bad_images"),
    ],
)
def test_a_malformed_record_is_dropped_for_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ChatShapeError) as e:
        read_conversation(record)
    assert e.value.reason == reason
    dropped = found(record)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.detail


@given(CONVERSATIONS)
def test_each_piece_of_the_rendering_is_its_text(record: dict[str, Any]) -> None:
    messages = read_conversation(record)[0].messages
    text, pieces = render(messages)
    for piece in pieces:
        value: Any = messages[piece.message]
        for step in piece.path:
            value = value[step]
        assert text.encode()[piece.start : piece.end].decode() == value
    assert [p.start for p in pieces] == sorted(p.start for p in pieces)


@given(CONVERSATIONS)
def test_the_schema_is_read_as_it_is_written(record: dict[str, Any]) -> None:
    assert read_conversation(record)[0].canonical == record


def test_lone_surrogates_are_replaced_before_offsets_are_counted() -> None:
    made = found(
        json.loads('{"messages": [{"role": "user", "content": "a\\ud800b"}, {"role": "assistant", "content": "c"}]}')
    )
    assert isinstance(made, Found)
    assert made.text == "user:\na\ufffdb\n\nassistant:\nc"
    assert made.metadata["surrogates_replaced"] == 1


def test_spans_change_the_texts_they_lie_in_and_nothing_else() -> None:
    messages = turns(
        "ünd a@b.org", [{"type": "text", "value": "see 1.2", "loss_mask": 1}, {"type": "text", "value": ".3.4 end"}]
    )
    text, _ = render(messages["conversations"])
    data = text.encode()
    mail, address = data.index(b"a@b.org"), data.index(b"1.2.3.4")
    head = Span(0, 5, "!")  # the role
    spans = [head, Span(mail, mail + 7, "M"), Span(address, address + 7, "IP")]
    changed = with_spans(messages["conversations"], [spans])
    assert changed[0]["content"] == "ünd M"
    assert changed[1]["content"] == [
        {"type": "text", "value": "see IP", "loss_mask": 1},
        {"type": "text", "value": " end"},
    ]
    assert messages["conversations"][0]["content"] == "ünd a@b.org"  # the input is not touched


@given(CONVERSATIONS, st.data())
def test_a_span_within_a_text_reads_in_the_rendering_as_in_the_message(
    record: dict[str, Any], data: st.DataObject
) -> None:
    messages = read_conversation(record)[0].messages
    text, pieces = render(messages)
    piece = data.draw(st.sampled_from(pieces))
    inside = text.encode()[piece.start : piece.end].decode()
    cut = data.draw(st.integers(0, len(inside)))
    span = Span(piece.start, piece.start + len(inside[:cut].encode()), "#")
    assert render(with_spans(messages, [[span]]))[0] == apply_spans(text.encode(), [[span]])


def read_all(source: Any) -> list[Any]:
    return [r for unit in sources.units(source) for r in sources.records(source, unit)]


def test_lines_arrays_and_compressed_files_give_the_same_documents(tmp_path: Path) -> None:
    records = [turns(f"quéstion {i}", "answer" * i, id=i) for i in range(1, 40)]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    array = json.dumps(records, ensure_ascii=False, indent=2).encode()
    forms = {
        "a.jsonl": lines,
        "b.json": b"\xef\xbb\xbf\n " + array,
        "c.jsonl.gz": gzip.compress(lines),
        "d.json.zst": zstandard.compress(array),
    }
    read = {}
    for name, data in forms.items():
        path = tmp_path / name
        path.write_bytes(data)
        source = sources.ChatSource(path=str(path))
        raws = read_all(source)
        assert all(isinstance(r, Raw) for r in raws)
        read[name] = [(f.text, f.metadata) for f in (sources.parse(source, r) for r in raws) if isinstance(f, Found)]
    assert len(read["a.jsonl"]) == len(records)
    assert all(r == read["a.jsonl"] for r in read.values())


def test_offsets_of_array_elements_are_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([turns("ä", "ö"), turns("ü", "ß")], ensure_ascii=False, indent=1), "utf-8")
    for raw in read_all(sources.ChatSource(path=str(path))):
        start, length = raw.origin.offset, raw.origin.length
        assert json.loads(path.read_bytes()[start : start + length]) == raw.payload


@pytest.mark.parametrize(
    ("data", "good", "reasons"),
    [
        (b'[{"messages": []}, {"mess', 1, ["torn_record"]),
        (b'[{"messages": []}, ', 1, ["torn_record"]),
        (b"[1, {}]", 1, ["InputError"]),
        (b"[]", 0, []),
        (b'[{"a": "\xff"}]', 1, []),
        (b'{"a": 1}\n{broken\n[]\n{"b": 2}\n', 2, ["JSONDecodeError", "InputError"]),
        (b"", 0, []),
    ],
)
def test_broken_files_lose_what_is_broken_and_say_so(
    tmp_path: Path, data: bytes, good: int, reasons: list[str]
) -> None:
    (tmp_path / "a.json").write_bytes(data)
    read = read_all(sources.ChatSource(path=str(tmp_path)))
    assert sum(isinstance(r, Raw) for r in read) == good
    assert [r.reason for r in read if isinstance(r, Failed)] == reasons
