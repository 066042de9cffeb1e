"""The bodies of OpenAI's answers: completions and chats, whole and in chunks."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
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
    offset: int = 0  # characters of the tokens whose log-probabilities are written


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
        logprobs = self._logprobs(choice, since)
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
        ends = {"index": choice.index, "logprobs": self._logprobs(choice, 0), "finish_reason": choice.finish}
        if self.ask.chat:
            return ends | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return ends | {"text": text}

    def _logprobs(self, choice: Choice, since: int) -> dict[str, Any] | None:
        """Of the entries from `since` on. Offsets count the tokens' own texts, so that streams and whole answers agree."""
        if self.ask.sampling.logprobs is None:
            return None
        rows = choice.logprobs[since:]
        if self.ask.chat:
            return {"content": [self._chat_row(*row) for row in rows], "refusal": None}
        *offsets, choice.offset = accumulate((len(self._text(t)) for t, _, _ in rows), initial=choice.offset)
        top: list[dict[str, float]] = [{} for _ in rows]
        for names, (_, _, best) in zip(top, rows, strict=True):
            for i, p in best.items():
                names.setdefault(self._name(i), p)  # of tokens with one name the likelier, which comes first
        return {
            "tokens": [self._name(t) for t, _, _ in rows],
            "token_logprobs": [p for _, p, _ in rows],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _chat_row(self, token: int, own: float, best: Mapping[int, float]) -> dict[str, Any]:
        return self._named(token, own) | {"top_logprobs": [self._named(i, p) for i, p in best.items()]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        raw = self._bytes(token) if "\ufffd" in text else text.encode()
        return {"token": self._name(token), "logprob": logprob, "bytes": None if raw is None else list(raw)}

    def _name(self, token: int) -> str:
        """The token's text, or, as OpenAI writes it, the bytes of one that is a part of a character."""
        text = self._text(token)
        raw = self._bytes(token) if "\ufffd" in text else None
        return text if raw is None else "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def _bytes(self, token: int) -> bytes | None:
        """Those that the tokenizer's entry stands for; None for one that is written in no known way."""
        entry = str(self.tokenizer.id_to_token(token))
        if found := re.fullmatch("<0x([0-9A-F]{2})>", entry):  # byte fallback, of sentencepiece
            return bytes.fromhex(found[1])
        table = _byte_of()
        return bytes(table[c] for c in entry) if all(c in table for c in entry) else None

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


@cache
def _byte_of() -> dict[str, int]:
    """What characters stand for in byte-level vocabularies (GPT-2): visible Latin-1 for itself, U+0100 and on for the rest."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(others)}


def usage(choices: Sequence[Choice], per_prompt: int) -> dict[str, int]:
    """Tokens read and written; a prompt counts once however many choices it has."""
    read = sum(c.prompt_tokens for c in choices if c.index % per_prompt == 0)
    written = sum(len(c.tokens) for c in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def data(body: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


DONE = "data: [DONE]\n\n"
