"""One request to an OpenAI-compatible endpoint, tried until it is answered, refused, or has failed too often.

In: a JSON body. Out: the answer's text, finish_reason, model and usage, or `Refused` for a status that says this very request
will never work (400, 413, 422). Tried again, after waits that double with jitter or as long as Retry-After says:
429, 408, 409, 425, 5xx, time-outs, broken connections, and 200s that are no chat completion (nothing in them can be used).
Any other status is a mistake of the config and stops the stage.

The key is sent in the Authorization header and nowhere else: it is in no log, no message and no identity. Redirects are not
followed and proxies of the environment are not used, so it goes to the configured address only.
"""

import asyncio
import email.utils
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from core.errors import RetryableError, StageError
from core.hashing import seeded
from core.records import well_formed
from mixtures.augment.pace import Pace

ANSWER_BYTES = 4 << 20  # a longer body is no answer to a request of a few thousand tokens
REFUSED = frozenset({400, 413, 422})
AGAIN = frozenset({408, 409, 425, 429})
LONGEST_WAIT_S = 60.0
RETRY_AFTER_S = 600.0  # the longest wait a server may ask for


@dataclass(frozen=True)
class Refused:
    """The endpoint will never answer this request."""

    status: int
    detail: str


@dataclass
class Tally:
    """What happened on the wire."""

    sent: int = 0
    retries: dict[str, int] = field(default_factory=dict)  # by cause
    failures_in_a_row: int = 0  # tries without an answer since the last answer
    stopped: bool = False  # nothing more is sent; what is in flight is waited for, since it is paid

    def failed(self, cause: str) -> None:
        self.retries[cause] = self.retries.get(cause, 0) + 1
        self.failures_in_a_row += 1


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and how patiently."""

    client: httpx.AsyncClient
    url: str
    key: str | None
    pace: Pace
    tally: Tally
    tries: int
    breaker: int  # tries in a row without an answer after which the endpoint counts as down
    first_wait_s: float

    async def ask(self, key: str, body: dict[str, Any], tokens: int) -> dict[str, Any] | Refused:
        """The answer. RetryableError after `tries` tries; StageError where going on is useless."""
        cause = ""
        for attempt in range(self.tries):
            await self.pace.turn(tokens)
            self._check_breaker(cause)
            if self.tally.stopped:
                raise RetryableError("stopped")
            self.tally.sent += 1
            try:
                status, headers, data = await self._post(key, body)
            except (httpx.TransportError, httpx.DecodingError) as e:
                cause, asked_s = type(e).__name__, None
            else:
                done = self._judged(status, data)
                if done is not None:
                    self.tally.failures_in_a_row = 0
                    return done
                cause, asked_s = "malformed" if status == 200 else str(status), retry_after(headers)
            self.tally.failed(cause)
            if asked_s is not None:
                self.pace.pause(min(asked_s, RETRY_AFTER_S))
            if attempt + 1 < self.tries and not self.tally.stopped:
                await asyncio.sleep(backoff(attempt, key, self.first_wait_s))
        self._check_breaker(cause)
        raise RetryableError(cause)

    async def _post(self, key: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        content = json.dumps(body, ensure_ascii=False).encode()
        data = bytearray()
        async with self.client.stream("POST", self.url, content=content, headers=headers) as response:
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > ANSWER_BYTES:
                    return response.status_code, response.headers, b""
        return response.status_code, response.headers, bytes(data)

    def _judged(self, status: int, data: bytes) -> dict[str, Any] | Refused | None:
        """An answer, a refusal, or None: try again. StageError for what the config must mend."""
        if status == 200:
            return parsed(data)
        if status in REFUSED:
            return Refused(status, self._shown(data))
        if status in AGAIN or status >= 500:
            return None
        raise StageError(
            f"answers: {self.url} says {status}: {self._shown(data)}; expected 200; check `endpoint`, `model` and the key "
            "in `key_env`, then run again: answers so far are kept"
        )

    def _shown(self, data: bytes) -> str:
        """The beginning of a body for a message, without the key, should the server repeat it."""
        text = data[:2000].decode("utf-8", "replace")
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:300]

    def _check_breaker(self, cause: str) -> None:
        if self.tally.failures_in_a_row >= self.breaker:
            raise StageError(
                f"answers: {self.url} gave no answer in {self.tally.failures_in_a_row} tries in a row "
                f"({cause or 'of other requests'}); see that it is up, then run again: answers so far are kept"
            )


def parsed(data: bytes) -> dict[str, Any] | None:
    """What the log keeps of a chat completion; None where it is none."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        content, reason = choice["message"]["content"], choice["finish_reason"]
        usage = answer.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not (isinstance(content, str | None) and isinstance(reason, str | None)):
        return None
    counted = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in tokens)
    return {
        "text": well_formed(content or "")[0],
        "finish_reason": well_formed(reason or "")[0],
        "model": well_formed(str(answer.get("model") or ""))[0],
        "usage": dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True)) if counted else None,
    }


def backoff(attempt: int, key: str, first_s: float) -> float:
    """Seconds before the next try: doubling, with a jitter that depends on the request, so that no two wake together."""
    return min(LONGEST_WAIT_S, first_s * 2.0**attempt) * (0.5 + 0.5 * seeded(attempt, key))


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks for: a number, or a date (RFC 9110, 10.2.3). None where it says nothing readable."""
    value = headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, when.timestamp() - time.time())
