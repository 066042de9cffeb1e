"""What a client may ask, and how it is told what is wrong: the request bodies of OpenAI's completions and chat completions.

In: the JSON of a request. Out: an `Ask` with every value checked, or a `RefusedError`, which is the error body that OpenAI's
clients turn into their exceptions. Fields that this server cannot honour are refused rather than ignored, as an ignored
field gives an answer to another question; fields that only label a request are let through. Two fields are not OpenAI's:
`top_k` and `repetition_penalty`, under the names that other servers use. Without a seed each request draws its own.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError, StageError
from moe.batching import Full
from moe.events import DivergedError
from moe.sampling import COLDEST, LEAST_PENALTY, Sampling
from moe.server.chat import TemplateError
from moe.server.service import StoppedError

LABELS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# chosen; OpenAI: 4 stops, 128 choices. Choices are of all prompts together
MAX_STOPS, MAX_CHOICES, MAX_PROMPTS = 16, 128, 128
MAX_STOP_CHARS = 256  # chosen
COMPLETION_TOKENS = 16  # OpenAI's max_tokens of a completion that says none
MAX_LOGPROBS = {False: 20, True: 20}  # OpenAI: 5 of completions, 20 of chats


class RefusedError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        param = None if self.param is None else _clean(self.param)
        return {"error": {"message": _clean(str(self)), "type": kind, "param": param, "code": self.code}}


def refusal(error: Exception) -> RefusedError | None:
    """How a client is told of an error of ours; None for one that nobody foresaw."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, Full):
        return RefusedError(f"{error}; try again", code="queue_full", status=429)
    if isinstance(error, StoppedError):
        return RefusedError(str(error), code="stopped", status=503)
    if isinstance(error, DivergedError):  # others may get their answers
        return RefusedError(str(error), code="model_failed", status=500)
    if isinstance(error, StageError):  # what is wrong with the server, in words for who runs it
        return RefusedError(str(error), code="out_of_resources", status=503)
    if isinstance(error, TemplateError | ConfigError):
        return RefusedError(str(error))
    return None


@dataclass(frozen=True)
class Ask:
    """One request. `prompt` is a list of texts or token ids, or the messages of a chat."""

    model: str
    chat: bool
    prompt: list[Any]
    choices: int
    sampling: Sampling
    writes: bool  # False where max_tokens is 0: a prompt is only echoed, or scored
    stream: bool
    usage: bool  # a last chunk with token counts
    echo: bool


@dataclass(frozen=True)
class _Field:
    """A value's check, what is said when it fails, and what stands for an absent or null one."""

    fits: Callable[[Any], bool]
    expected: str
    default: Any = None


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        return False
    return all(isinstance(t, str) and 0 < len(t) <= MAX_STOP_CHARS for t in texts)


def _only(*values: Any) -> _Field:
    return _Field(lambda v: v in values, f"{values[0]!r}: nothing else is supported", values[0])


LARGE = 2**31 - 1
SHARED = {
    "model": _Field(lambda v: isinstance(v, str), "a text", ""),
    "n": _Field(_whole(1, MAX_CHOICES), f"1 to {MAX_CHOICES}", 1),
    "temperature": _Field(
        lambda v: _number(0, 2)(v) and (v == 0 or v >= COLDEST),
        f"a number from 0 to 2, and 0 or at least {COLDEST}",
        1.0,
    ),
    "top_p": _Field(lambda v: _number(0, 1)(v) and v > 0, "a number above 0, at most 1", 1.0),
    "top_k": _Field(_whole(1, LARGE), "a whole number from 1"),
    "repetition_penalty": _Field(_number(LEAST_PENALTY, 10), f"a number from {LEAST_PENALTY} to 10", 1.0),
    "stop": _Field(_stops, f"a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters", []),
    "seed": _Field(_whole(-(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "max_tokens": _Field(_whole(0, LARGE), "a whole number from 0"),
    "stream": _Field(_flag, "true or false", False),
    "stream_options": _Field(
        lambda v: (
            isinstance(v, dict) and set(v) <= {"include_usage", "include_obfuscation"} and all(map(_flag, v.values()))
        ),
        "an object with include_usage",
        {},
    ),
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
}
COMPLETION = {
    "prompt": _Field(lambda v: isinstance(v, str | list), "a text, token ids, or a list of either"),
    "echo": _Field(_flag, "true or false", False),
    "best_of": _Field(_whole(1, MAX_CHOICES), f"1 to {MAX_CHOICES}"),
    "logprobs": _Field(_whole(0, MAX_LOGPROBS[False]), f"0 to {MAX_LOGPROBS[False]}"),
    "suffix": _only("", None),
}
CHAT = {
    "messages": _Field(lambda v: isinstance(v, list) and bool(v), "a list of messages"),
    "max_completion_tokens": _Field(_whole(0, LARGE), "a whole number from 0"),
    "logprobs": _Field(_flag, "true or false", False),
    "top_logprobs": _Field(_whole(0, MAX_LOGPROBS[True]), f"0 to {MAX_LOGPROBS[True]}"),
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "parallel_tool_calls": _Field(_flag, "true or false", True),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
}


def read(body: Any, chat: bool) -> Ask:
    """The request, or a `RefusedError` that names its first wrong field."""
    if not isinstance(body, dict):
        raise RefusedError("the body is not a JSON object", code="invalid_json")
    fields = SHARED | (CHAT if chat else COMPLETION)
    unknown = sorted(body.keys() - fields.keys() - set(LABELS))
    if unknown:
        raise RefusedError(f"unknown field {unknown[0]!r}; known: {', '.join(fields)}", unknown[0], "unknown_parameter")
    got = {name: _checked(name, field, body.get(name)) for name, field in fields.items()}
    if chat:
        prompt, longest, logprobs = _messages(got["messages"]), got["max_completion_tokens"], _chat_logprobs(got)
    else:
        prompt, logprobs = _prompts(got["prompt"]), got["logprobs"]
        longest = COMPLETION_TOKENS if got["max_tokens"] is None else got["max_tokens"]
        if got["best_of"] not in (None, got["n"]):
            raise RefusedError(
                f"best_of: got {got['best_of']}, expected n, {got['n']}: no choices are ranked", "best_of"
            )
        if got["n"] * len(prompt) > MAX_CHOICES:
            raise RefusedError(
                f"n: got {got['n']} choices of {len(prompt)} prompts, expected at most {MAX_CHOICES} in all", "n"
            )
    if got["stream_options"] and not got["stream"]:
        raise RefusedError("stream_options: set without stream, expected stream true as well", "stream_options")
    most = got["max_tokens"] if longest is None else longest
    return Ask(
        model=got["model"],
        chat=chat,
        prompt=prompt,
        choices=got["n"],
        sampling=_sampling(got, most or None, logprobs),
        writes=most != 0,
        stream=got["stream"],
        usage=bool(got["stream_options"].get("include_usage")),
        echo=bool(got.get("echo")),
    )


def _checked(name: str, field: _Field, value: Any) -> Any:
    if value is None:
        return field.default
    if not field.fits(value):
        raise RefusedError(f"{name}: got {_short(value)}, expected {field.expected}", name, "invalid_value")
    return value


def _sampling(got: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> Sampling:
    stop = got["stop"]
    return Sampling(
        temperature=float(got["temperature"]),
        top_k=got["top_k"],
        top_p=float(got["top_p"]),
        repetition_penalty=float(got["repetition_penalty"]),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if got["seed"] is None else got["seed"],
        logprobs=logprobs,
    )


def _chat_logprobs(got: Mapping[str, Any]) -> int | None:
    if got["top_logprobs"] is not None and not got["logprobs"]:
        raise RefusedError("top_logprobs: set without logprobs, expected logprobs true as well", "top_logprobs")
    return (got["top_logprobs"] or 0) if got["logprobs"] else None


def _prompts(value: Any) -> list[Any]:
    """One text or list of token ids for each prompt; the four shapes that OpenAI takes."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(_whole(0, LARGE)(v) for v in value)):
        return [value]
    good = isinstance(value, list) and all(
        isinstance(v, str) or (isinstance(v, list) and all(_whole(0, LARGE)(t) for t in v)) for v in value
    )
    if not good or not value or len(value) > MAX_PROMPTS:
        raise RefusedError(
            f"prompt: got {_short(value)}, expected a text, token ids, or a list of 1 to {MAX_PROMPTS} of either",
            "prompt",
            "invalid_value",
        )
    return list(value)


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages with a role and a text; parts of type text are joined."""
    if value is None:
        raise RefusedError("messages: missing, expected a list of messages", "messages", "missing_required_parameter")
    out = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError(
                f"{where}: got {_short(message)}, expected an object with a role", where, "invalid_value"
            )
        if message.get("tool_calls"):
            raise RefusedError(f"{where}.tool_calls: nothing here calls tools; leave it out", where, "invalid_value")
        out.append({"role": message["role"], "content": _content(message.get("content"), f"{where}.content")})
    return out


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        texts = [p.get("text") for p in value]
        if all(isinstance(t, str) for t in texts):
            return "".join(t for t in texts if isinstance(t, str))
    raise RefusedError(f"{where}: got {_short(value)}, expected a text or parts of type text", where, "invalid_value")


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON may bring and no answer can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
