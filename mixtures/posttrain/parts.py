"""A conversation taken apart for judging: what was asked, what was answered, what was thought.

In: the messages of a conversation (`crawl.sources.conversations`). Out: `Parts`. Reasoning is `reasoning_content` and what
stands between `<think>` tags (also `<thinking>`, `<reasoning>`, `<thought>`) of assistant texts; the rest of them is the
answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crawl.sources.conversations import texts

TAGS = "think|thinking|reasoning|thought"
TAG = re.compile(rf"<(/?)({TAGS})>", re.IGNORECASE)
CLOSED = re.compile(rf"<({TAGS})>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """Texts by who speaks; each list in the order of the conversation."""

    prompts: tuple[str, ...]  # user
    answers: tuple[str, ...]  # assistant, without reasoning; one for each assistant message, possibly empty
    reasoning: tuple[str, ...]
    raw: tuple[str, ...]  # assistant, as it stands
    roles: tuple[str, ...]
    tool_calls: tuple[bool, ...]  # by assistant message

    @property
    def prompt(self) -> str:
        return "\n\n".join(self.prompts)

    @property
    def answer(self) -> str:
        return "\n\n".join(self.answers)


def conversation_of(metadata: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(the conversation, the record's other fields) of a document's metadata; None where it is no conversation."""
    fields = json.loads(metadata)
    chat = fields.get("chat")
    if not isinstance(chat, dict) or "conversations" not in chat:
        return None
    return chat, fields


def parts_of(messages: Sequence[Mapping[str, Any]]) -> Parts:
    """The parts of a conversation."""
    prompts, answers, reasoning, raw, calls = [], [], [], [], []
    for message in messages:
        found = [(path, text) for path, text in texts(message) if path[0] != "tool_calls"]
        whole = "".join(text for path, text in found if path[0] == "content")
        if message["role"] == "user":
            prompts.append(whole)
        elif message["role"] == "assistant":
            reasoning += [text for path, text in found if path[0] == "reasoning_content"]
            reasoning += [m[2] for m in CLOSED.finditer(whole)]
            answers.append(CLOSED.sub("", whole).strip())
            raw.append(whole)
            calls.append(bool(message.get("tool_calls")))
    roles = tuple(m["role"] for m in messages)
    return Parts(tuple(prompts), tuple(answers), tuple(reasoning), tuple(raw), roles, tuple(calls))
