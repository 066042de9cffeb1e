"""Conversations in one form, and the plain text that stands for one.

In: a JSON object of one of three shapes. *conversations*: `conversations` of `{role, content, name, loss_mask, tool_schemas}`
and `images`, content being text or a list of `{type, value, loss_mask}` (the SFT schema published with Step 3.5 Flash).
*messages*: OpenAI's `messages`. *sharegpt*: `conversations` of `{from, value}`. Out: `Conversation.canonical`, always the
first shape: roles in lower case, known keys only, everything else as it was given. A message may keep two keys that the
published schema lacks, `reasoning_content` (text) and `tool_calls` (OpenAI's).

The rendering is what all text stages judge: for each message its role and name, a colon and a newline, then its reasoning
between `<think>` tags, its text segments end to end, its tool calls as `name(arguments)` a line, and an empty line. Images,
tool schemas and masks are not rendered. Each text of the conversation is one `Piece` of the rendering, so that byte spans
found there can be taken back to where they belong.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from core.errors import InputError
from core.records import well_formed
from core.text import Span, apply_spans, unite_spans

PUBLISHED = ("role", "content", "name", "loss_mask", "tool_schemas")
MESSAGE_KEYS = (*PUBLISHED, "reasoning_content", "tool_calls", "tool_call_id")
ROLES = ("system", "user", "assistant", "tool")
# Names that data sets in the wild give to the four roles.
SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "function": "tool",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
Path = tuple[str | int, ...]


class ChatShapeError(InputError):
    """A record that holds no usable conversation. `reason` is the reason of its drop."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"chat: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Piece:
    """One text of a conversation: where it stands (`path` from a message on) and its UTF-8 bytes in the rendering."""

    message: int
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Conversation:
    """A conversation in the published schema, and the shape it had."""

    canonical: dict[str, Any]  # conversations, images
    shape: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.canonical["conversations"]
        return found


def read_conversation(record: Mapping[str, Any]) -> tuple[Conversation, int]:
    """The conversation of a record and the lone surrogates replaced in it. ChatShapeError says why there is none."""
    turns, shape = _turns(record)
    messages = [_message(turn, i, shape) for i, turn in enumerate(turns)]
    images = record.get("images")
    if images is None:
        images = []
    if not isinstance(images, list):
        raise ChatShapeError("bad_images", f"images is {type(images).__name__}, expected a list")
    if not any(text.strip() for m in messages for _, text in texts(m)):
        raise ChatShapeError("empty", "no message has any text")
    counted = [0]
    canonical = _clean({"conversations": messages, "images": images}, counted)
    return Conversation(canonical, shape), counted[0]


def _turns(record: Mapping[str, Any]) -> tuple[list[Any], str]:
    for key in ("conversations", "messages", "conversation"):
        turns = record.get(key)
        if turns is None:
            continue
        if not isinstance(turns, list):
            raise ChatShapeError("no_conversation", f"{key} is {type(turns).__name__}, expected a list of messages")
        if not turns:
            raise ChatShapeError("empty", f"{key} is an empty list")
        if isinstance(turns[0], dict) and "from" in turns[0]:
            return turns, "sharegpt"
        return turns, "messages" if key == "messages" else "conversations"
    raise ChatShapeError("no_conversation", f"neither conversations nor messages, got {sorted(map(str, record))[:8]}")


def _message(turn: Any, i: int, shape: str) -> dict[str, Any]:
    """One message in the published schema. Unknown keys are left out."""
    if not isinstance(turn, dict):
        raise ChatShapeError("bad_message", f"message {i} is {type(turn).__name__}, expected an object")
    role, content = (
        (turn.get("from"), turn.get("value")) if shape == "sharegpt" else (turn.get("role"), turn.get("content"))
    )
    if not isinstance(role, str) or _role(role) not in ROLES:
        raise ChatShapeError(
            "bad_role", f"message {i} has the role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}"
        )
    made = {k: turn[k] for k in MESSAGE_KEYS if k in turn and (turn[k] is not None or k in PUBLISHED)}
    for key in ("name", "reasoning_content"):
        if not isinstance(made.get(key, ""), str | None):
            raise ChatShapeError("bad_content", f"message {i}: {key} is {type(made[key]).__name__}, expected text")
    if "tool_calls" in made:
        made["tool_calls"] = [_tool_call(call, i) for call in _listed(made["tool_calls"], i)]
    return {**made, "role": _role(role), "content": _content(content, i, shape)}


def _role(role: str) -> str:
    lower = role.strip().lower()
    return SYNONYMS.get(lower, lower)


def _content(content: Any, i: int, shape: str) -> str | list[dict[str, Any]]:
    """Text as it is; segments with OpenAI's keys renamed (`text`, `image_url` to `value`); null is an empty text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatShapeError(
            "bad_content", f"message {i}: content is {type(content).__name__}, expected text or segments"
        )
    return [_segment(part, i, shape) for part in content]


def _segment(part: Any, i: int, shape: str) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ChatShapeError("bad_content", f"message {i}: a segment is no object with a type")
    if "value" in part or shape != "messages":
        made = {k: part[k] for k in ("type", "value", "loss_mask") if k in part}
    else:
        made = {"type": part["type"], "value": part.get(part["type"])}
        if part["type"] == "image_url":
            address = made["value"]
            made = {"type": "image", "value": address.get("url") if isinstance(address, dict) else address}
    if not isinstance(made.get("value"), str):
        raise ChatShapeError("bad_content", f"message {i}: a segment's value is no text")
    return made


def _listed(value: Any, i: int) -> list[Any]:
    if not isinstance(value, list):
        raise ChatShapeError("bad_tool_call", f"message {i}: tool_calls is {type(value).__name__}, expected a list")
    return value


def _tool_call(call: Any, i: int) -> dict[str, Any]:
    """A tool call whose arguments are text: those given as an object become their JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatShapeError("bad_tool_call", f"message {i}: a tool call names no function")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, sort_keys=True)
    return {**call, "function": {**function, "arguments": arguments}}


def _clean(value: Any, counted: list[int]) -> Any:
    """`value` with lone surrogates as U+FFFD: before the rendering, so that its offsets hold for the texts themselves."""
    if isinstance(value, str):
        text, replaced = well_formed(value)
        counted[0] += replaced
        return text
    if isinstance(value, list):
        return [_clean(v, counted) for v in value]
    if isinstance(value, dict):
        return {_clean(k, counted): _clean(v, counted) for k, v in value.items()}
    return value


def texts(message: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """(path, text) of every text of a message, in the order of the rendering."""
    if "reasoning_content" in message:
        yield ("reasoning_content",), message["reasoning_content"]
    content = message["content"]
    if isinstance(content, str):
        yield ("content",), content
    else:
        for i, part in enumerate(content):
            if part["type"] == "text":
                yield ("content", i, "value"), part["value"]
    for i, call in enumerate(message.get("tool_calls", ())):
        yield ("tool_calls", i, "function", "arguments"), call["function"]["arguments"]


def render(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Piece]]:
    """The plain text of a conversation, and the bytes in it that each of its texts takes."""
    out: list[str] = []
    pieces: list[Piece] = []
    at = 0

    def put(text: str) -> None:
        nonlocal at
        out.append(text)
        at += len(text.encode())

    for i, message in enumerate(messages):
        put(" ".join([message["role"], *([message["name"]] if message.get("name") else [])]) + ":\n")
        for path, text in texts(message):
            before, after = _frame(message, path)
            put(before)
            start = at
            put(text)
            pieces.append(Piece(i, path, start, at))
            put(after)
        put("\n\n")
    return "".join(out).removesuffix("\n\n"), pieces


def _frame(message: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """What stands around a text in the rendering."""
    if path[0] == "reasoning_content":
        return "<think>\n", "\n</think>\n"
    if path[0] == "tool_calls":
        call = message["tool_calls"][path[1]]
        return f"\n{call['function']['name']}(", ")"
    return "", ""


def with_spans(messages: Sequence[dict[str, Any]], stages: Sequence[Sequence[Span]]) -> list[dict[str, Any]]:
    """The messages with spans of their rendering applied to the texts they lie in.

    A span that reaches beyond a text is cut to it; its replacement stands in the first text that it touches. What stands
    between texts (roles, names) is never changed."""
    _, pieces = render(messages)
    made = deepcopy(list(messages))
    used: set[Span] = set()
    spans = unite_spans(stages)
    for piece in pieces:
        mine = [s for s in spans if s.start < piece.end and s.end > piece.start]
        if not mine:
            continue
        cuts = []
        for s in mine:
            start, end = max(s.start, piece.start), min(s.end, piece.end)
            cuts.append(Span(start - piece.start, end - piece.start, None if s in used else s.replacement))
            used.add(s)
        _put(made[piece.message], piece.path, cuts)
    return made


def _put(message: dict[str, Any], path: Path, cuts: list[Span]) -> None:
    """Apply spans to the text at `path` of a message, in place."""
    *way, last = path
    holder: Any = message
    for step in way:
        holder = holder[step]
    holder[last] = apply_spans(holder[last].encode(), [cuts])
