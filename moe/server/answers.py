"""The bodies of OpenAI's answers: completions and chats, whole and in chunks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.server.protocol import Ask


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt_tokens: int
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float, Mapping[int, float]]] = field(default_factory=list)  # id, its own, the top
    finish: str | None = None


@dataclass(frozen=True)
class Writer:
    """Writes answers to one request. `created` is in seconds since 1970, `tokenizer` a `tokenizers.Tokenizer`."""

    number: str
    created: int
    model: str
    ask: Ask
    tokenizer: Any

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        kind = "chat.completion" if self.ask.chat else "text_completion"
        return self._head(kind) | {
            "choices": [self._choice(c) for c in choices],
            "usage": usage(choices, self.ask.choices),
        }

    def opening(self, index: int) -> str:
        """The first chunk of a chat's choice, which names who speaks."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, choice: Choice, text: str, since: int) -> str:
        """New text of a choice, with the log-probabilities from entry `since` on."""
        logprobs = self._logprobs(choice.logprobs[since:], sum(map(len, choice.text)) - len(text))
        entry: dict[str, Any] = {"index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish}
        return self._chunk(entry | ({"delta": {"content": text} if text else {}} if self.ask.chat else {"text": text}))

    def last(self, choices: Sequence[Choice]) -> str:
        """The chunk that bears the counts and no choice."""
        return data(self._head(self._chunk_kind) | {"choices": [], "usage": usage(choices, self.ask.choices)})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.ask.chat else "text_completion"

    def _chunk(self, choice: dict[str, Any]) -> str:
        counts = {"usage": None} if self.ask.usage else {}
        return data(self._head(self._chunk_kind) | {"choices": [choice]} | counts)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        ends = {"index": choice.index, "logprobs": self._logprobs(choice.logprobs, 0), "finish_reason": choice.finish}
        if self.ask.chat:
            return ends | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return ends | {"text": text}

    def _logprobs(self, rows: Sequence[tuple[int, float, Mapping[int, float]]], offset: int) -> dict[str, Any] | None:
        if self.ask.sampling.logprobs is None:
            return None
        if self.ask.chat:
            return {"content": [self._chat_row(*row) for row in rows], "refusal": None}
        texts = [self._text(t) for t, _, _ in rows]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [{self._text(i): p for i, p in best.items()} for _, _, best in rows]
        return {"tokens": texts, "token_logprobs": [p for _, p, _ in rows], "top_logprobs": top, "text_offset": offsets}

    def _chat_row(self, token: int, own: float, best: Mapping[int, float]) -> dict[str, Any]:
        return self._named(token, own) | {"top_logprobs": [self._named(i, p) for i, p in best.items()]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # A token that is part of a character has no text of its own, and its bytes cannot be had from the tokenizer.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


def usage(choices: Sequence[Choice], per_prompt: int) -> dict[str, int]:
    """Tokens read and written; a prompt counts once however many choices it has."""
    read = sum(c.prompt_tokens for c in choices if c.index % per_prompt == 0)
    written = sum(len(c.tokens) for c in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def data(body: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
