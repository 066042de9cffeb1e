"""What of a document a phase may leave out of its loss, byte by byte and token by token.

In: a document's text and metadata. Out: uint8 levels: `ANSWER` 0, `PROMPT` 1, `SCAFFOLD` 2, or None where the document is no
dialogue. A phase learns every token up to a level (`mixtures.token_files.LEARN`); after Step 3.5 Flash (arXiv 2602.10604,
appendix C) annealing leaves out a template's own words, `content`, and mid-training what the user says, `answers`.

- A dialogue of a change (`crawl.harvest.templates`) has its segments in its metadata: the user's scaffold is SCAFFOLD, the
  rest of what the user says PROMPT.
- In a conversation (`crawl.sources.conversations`) a segment's `loss_mask` says whether it is learned, without one its message's,
  without that whether the assistant speaks. What is learned of a message includes the rendering's frames around its texts and
  the empty line that ends it, so the end of a turn is learned as well; the line that names the speaker never is.

All other text is ANSWER. A token with bytes of several levels counts as the lowest of its first and last character.
Cost: a text with levels is encoded with offsets, 1.6 times as long as without; the others as before. One byte a token is stored.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.text import Span, unite_spans
from crawl.sources.conversations import render
from mixtures.token_files import ANSWER, PROMPT, SCAFFOLD

CONTINUES = 0x80  # of a UTF-8 byte's two highest bits, within a character
KEYS = ('"segments"', '"chat"')


class LevelsError(ValueError):
    """The metadata speaks of another text than the document's."""


def text_levels(original: str, text: str, metadata: str, stages: Sequence[Sequence[Span]]) -> np.ndarray | None:
    """uint8, one a character of `text`, which is `original` with the spans of all stages applied; None as `byte_levels`."""
    levels = byte_levels(original.encode(), metadata)
    return None if levels is None else character_levels(after_spans(levels, stages), text.encode())


def byte_levels(text: bytes, metadata: str) -> np.ndarray | None:
    """uint8 [len(text)], or None for a document without speakers.

    LevelsError where its metadata does not fit its text.
    """
    if not any(key in metadata for key in KEYS):
        return None
    fields = json.loads(metadata)
    segments, chat = fields.get("segments"), fields.get("chat")
    if isinstance(segments, list) and segments:
        if segments[-1][1] != len(text):
            raise LevelsError(f"segments end at {segments[-1][1]} of {len(text)} bytes")
        return _painted(len(text), [(start, end, _segment_level(role, kind)) for start, end, role, kind in segments])
    if isinstance(chat, dict) and "conversations" in chat:
        messages = chat["conversations"]
        if render(messages)[0].encode() != text:
            raise LevelsError("the text is not the rendering of the conversation")
        return _painted(len(text), _message_ranges(messages))
    return None


def after_spans(levels: np.ndarray, stages: Sequence[Sequence[Span]]) -> np.ndarray:
    """The levels of the text that `core.text.apply_spans` leaves; a replacement has the level of what it begins in."""
    out, at = [], 0
    for start, end, replacement in unite_spans(stages):
        out += [levels[at:start], np.full(len((replacement or "").encode()), levels[start], dtype=np.uint8)]
        at = end
    return np.concatenate([*out, levels[at:]])


def character_levels(levels: np.ndarray, text: bytes) -> np.ndarray:
    """uint8, one a character of `text`, from one a byte."""
    return levels[(np.frombuffer(text, dtype=np.uint8) & 0xC0) != CONTINUES]


def token_levels(levels: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint8 [tokens] from one a character and each token's range of characters."""
    if not len(levels):
        return np.zeros(len(offsets), dtype=np.uint8)
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    first = np.minimum(start, len(levels) - 1)
    return np.minimum(levels[first], levels[np.maximum(end - 1, first)])


def _painted(size: int, ranges: Sequence[tuple[int, int, int]]) -> np.ndarray:
    out = np.zeros(size, dtype=np.uint8)
    for start, end, level in ranges:
        out[start:end] = level
    return out


def _segment_level(role: str, kind: str) -> int:
    if role != "user":
        return ANSWER
    return SCAFFOLD if kind == "scaffold" else PROMPT


def _message_ranges(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """(first byte, one behind the last, level) over the rendering; a later range overrules an earlier one."""
    out: list[tuple[int, int, int]] = []
    at = 0
    for message in messages:
        text, pieces = render([message])
        speaker = " ".join([message["role"], *([message["name"]] if message.get("name") else [])])
        head, end = at + len(f"{speaker}:\n".encode()), at + len(text.encode()) + 2  # the empty line behind it
        level = _level(message.get("loss_mask"), ANSWER if message["role"] == "assistant" else PROMPT)
        out += [(at, head, PROMPT), (head, end, level)]
        for piece in pieces:
            if piece.path[0] == "content" and len(piece.path) > 1:
                own = _level(message["content"][piece.path[1]].get("loss_mask"), level)
                out.append((at + piece.start, at + piece.end, own))
        at = end
    return out


def _level(loss_mask: Any, default: int) -> int:
    return default if loss_mask is None else ANSWER if loss_mask else PROMPT
