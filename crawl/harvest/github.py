"""GitHub's REST and GraphQL interfaces, asked slowly and never twice for the same thing.

Every good answer is stored below `captures/<source>/answers/` under the hash of its question. A stored answer with an ETag is
confirmed (304 costs nothing of the rate limit); one that cannot change (an object by its SHA, a GraphQL answer of this harvest)
is used as it is. So a harvest that was killed, ran out of requests or met a rate limit goes on where it was.

Rate limits: `Retry-After` and `X-RateLimit-Reset` are waited for up to `max_wait_s`, beyond which the run ends and says when to
return. 5xx and network faults are tried again. The token goes to `base_url` only: links to other hosts are refused.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from core.errors import ConfigError, InputError, StageError
from core.hashing import digest
from core.storage import Root
from crawl.harvest.config import Api

AGENT = "stepwell harvest"
GONE = (404, 410, 451)  # 451: withdrawn for legal reasons
ANSWER_BYTES = 64 << 20
DAY_S = 86_400.0  # no limit of the forge lasts longer, whatever a header says
REDIRECTS = 5  # of one question; a renamed repository takes one
_NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')
_PASSING = (500, 502, 503, 504)


class GoneError(InputError):
    """What was asked for is not there, or not for us."""


class GitHub:
    """One interface with its stored answers. `close` it, or use it as a context."""

    def __init__(self, api: Api, root: Root, folder: str) -> None:
        token = os.environ.get(api.token_variable, "")
        headers = {"User-Agent": AGENT, "Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._api, self._root, self._folder = api, root, folder
        self._client = httpx.Client(headers=headers, timeout=api.timeout_s, follow_redirects=False)
        self._has_token = bool(token)
        self.requests = self.confirmed = self.stored = 0  # requests sent; answered 304; answered from the store

    def __enter__(self) -> "GitHub":
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def get(self, path: str, fixed: bool = False, **parameters: str | int) -> Any:
        """The JSON at `path`. `fixed`: it can never change. GoneError where there is nothing."""
        return self._get(self._url(path, parameters), fixed)[0]

    def pages(self, path: str, most: int, **parameters: str | int) -> Iterator[Any]:
        """The items of a list over all its pages, at most `most`."""
        url: str | None = self._url(path, parameters)
        left = most
        while url is not None and left > 0:
            items, link = self._get(url, False)
            if not isinstance(items, list):
                raise InputError(f"harvest: {path} is {type(items).__name__}, expected a list")
            yield from items[:left]
            left -= len(items)
            found = _NEXT.search(link)
            url = self._own(found[1]) if found else None

    def query(self, text: str, **variables: Any) -> dict[str, Any]:
        """The data of a GraphQL answer. GoneError where it says NOT_FOUND; other errors are tried again, then raised."""
        question = {"query": text, "variables": variables}
        name = self._name(["graphql", self._api.base_url, question])
        if (known := self._read(name)) is not None:
            self.stored += 1
            return dict(known["body"])
        if not self._has_token:
            raise ConfigError(
                f"harvest: GraphQL needs a token, got none in {self._api.token_variable}; set it, or leave `api` out"
            )
        for attempt in range(self._api.retries + 1):
            answer = self._send("POST", f"{self._api.base_url}/graphql", json.dumps(question, sort_keys=True).encode())
            value = _json(answer)
            errors = value.get("errors") if isinstance(value, dict) else [{"message": "no object"}]
            if not errors and value.get("data"):
                self._root.write_json(name, {"body": value["data"], "question": question})
                return dict(value["data"])
            kinds = {str(e.get("type")) for e in errors or ()}
            if "NOT_FOUND" in kinds or "FORBIDDEN" in kinds:
                raise GoneError(f"harvest: {sorted(kinds)} for {variables}")
            if "RATE_LIMITED" in kinds:
                self._wait_for_reset(answer)
            else:
                self._pause(attempt)
        raise InputError(f"harvest: GraphQL gave errors only, the last {str(errors)[:200]}")

    def _get(self, url: str, fixed: bool, moves: int = REDIRECTS) -> tuple[Any, str]:
        """(JSON, Link header), from the store where that still holds. At most `moves` redirects are followed."""
        name = self._name(["get", url])
        known = self._read(name)
        if known is not None and fixed:
            self.stored += 1
            return known["body"], known["link"]
        tag = {"If-None-Match": known["etag"]} if known is not None and known["etag"] else {}
        answer = self._send("GET", url, headers=tag)
        if answer.status_code == 304 and known is not None:
            self.confirmed += 1
            return known["body"], known["link"]
        if answer.status_code in (301, 302, 307, 308):
            if not moves:
                raise InputError(f"harvest: {urlsplit(url).path} leads round in circles, got {REDIRECTS} redirects")
            return self._get(self._own(answer.headers.get("location", "")), fixed, moves - 1)
        body, link = _json(answer), answer.headers.get("link", "")
        self._root.write_json(name, {"url": url, "etag": answer.headers.get("etag"), "link": link, "body": body})
        return body, link

    def _send(
        self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """One good answer: 2xx, 3xx. Waits and tries again as the server asks."""
        last = ""
        for attempt in range(self._api.retries + 1):
            if self.requests >= self._api.max_requests:
                raise StageError(
                    f"harvest: {self.requests:,} requests sent, the limit of a run; run again to go on from the stored answers"
                )
            self.requests += 1
            try:
                answer = self._client.request(method, url, content=body, headers=dict(headers or {}))
            except httpx.HTTPError as e:
                last = repr(e)
                self._pause(attempt)
                continue
            if answer.status_code < 400:
                return answer
            last = f"status {answer.status_code}"
            self._refused(answer, url, attempt)
        raise StageError(
            f"harvest: {urlsplit(url).path} failed {self._api.retries + 1} times, the last with {last}; run again"
        )

    def _refused(self, answer: httpx.Response, url: str, attempt: int) -> None:
        """Wait where waiting helps, else raise."""
        status = answer.status_code
        limited = "retry-after" in answer.headers or answer.headers.get("x-ratelimit-remaining") == "0"
        if status == 429 or (status == 403 and limited):
            self._wait_for_reset(answer)
        elif status == 401:
            raise ConfigError(f"harvest: the token in {self._api.token_variable} is refused (401); give a valid one")
        elif status in GONE or status == 403:
            raise GoneError(f"harvest: {urlsplit(url).path} answers {status}")
        elif status in _PASSING:
            self._pause(attempt)
        else:
            raise InputError(f"harvest: {urlsplit(url).path} answers {status}: {answer.text[:120]!r}")

    def _wait_for_reset(self, answer: httpx.Response) -> None:
        """Sleep as long as the answer asks for; a minute where it does not say."""
        now = time.time()
        after, reset = answer.headers.get("retry-after", ""), answer.headers.get("x-ratelimit-reset", "")
        wait_s = float(after) if after.isdecimal() else max(0.0, float(reset) - now) if reset.isdecimal() else 60.0
        if wait_s > self._api.max_wait_s:
            when = time.strftime("%H:%M:%S UTC", time.gmtime(now + min(wait_s, DAY_S)))
            raise StageError(f"harvest: the rate limit asks for a wait of {wait_s:.0f} s; run again after {when}")
        time.sleep(wait_s)

    def _pause(self, attempt: int) -> None:
        time.sleep(min(self._api.max_wait_s, self._api.retry_s * 2**attempt))

    def _url(self, path: str, parameters: Mapping[str, str | int]) -> str:
        url = httpx.URL(f"{self._api.base_url}/{path}")
        return (
            str(url.copy_merge_params({k: str(v) for k, v in sorted(parameters.items())})) if parameters else str(url)
        )

    def _own(self, url: str) -> str:
        """A link of an answer, if it stays where the token may go."""
        ours, theirs = urlsplit(self._api.base_url), urlsplit(url)
        if (ours.scheme, ours.netloc) != (theirs.scheme, theirs.netloc):
            raise InputError(f"harvest: an answer links to {theirs.netloc!r}, expected {ours.netloc}")
        return url

    def _name(self, question: Any) -> str:
        name = digest(question)
        return f"{self._folder}/{name[:2]}/{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            stored = self._root.read_json(name)
        except (FileNotFoundError, ValueError):
            return None
        return stored if isinstance(stored, dict) and "body" in stored else None


def _json(answer: httpx.Response) -> Any:
    if len(answer.content) > ANSWER_BYTES:
        raise InputError(f"harvest: an answer of {len(answer.content):,} bytes, limit {ANSWER_BYTES:,}")
    try:
        return answer.json()
    except ValueError as e:
        raise InputError(f"harvest: an answer is no JSON: {e}") from e
