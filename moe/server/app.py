"""The HTTP side: OpenAI's routes over a `Service`, as an ASGI application of Starlette.

    GET  /v1/models, /v1/models/NAME     what is served
    POST /v1/completions                 texts or token ids; echo with logprobs and max_tokens 0 scores a text
    POST /v1/chat/completions            messages through the model's template
    GET  /health                         200 while the model's thread lives
    GET  /metrics                        requests and tokens, in Prometheus' text format

Errors of these routes are OpenAI's error object: a full queue is 429 with Retry-After, a body beyond `max_body_bytes` 413, one
that takes longer than `body_s` 408, one that is not JSON by its content type 415, a stopped model 503, a failure of the server or
logits that are no numbers 500. What the HTTP layer refuses itself
(malformed requests, too many connections) is plain text. A client that goes away cancels its requests. With `api_key` set, /v1
wants it as a bearer token.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moe.generate import token_ids
from moe.server.answers import Choice, Writer
from moe.server.chat import ChatTemplate
from moe.server.protocol import Ask, RefusedError, read, refusal
from moe.server.runs import Run, finished, opened, streamed
from moe.server.service import Service

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # by status; Retry-After in seconds
TOKEN_BYTES = 64  # a text with more for each token of the context is not tokenised; chosen: few tokens are longer
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies would hold tokens back


@dataclass
class Serving:
    """What the routes need. `name` is the model's name for clients."""

    service: Service
    tokenizer: Any
    template: ChatTemplate
    name: str
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    body_s: float = 60.0  # that reading a body may take
    created: int = field(default_factory=lambda: int(time.time()))
    answered: Counter[int] = field(default_factory=Counter)  # requests by HTTP status

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.service.start()
            yield
            await asyncio.to_thread(self.service.stop)

        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chats, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        errors = {404: _not_found, 405: _not_found}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=errors)

    async def _models(self, request: Request) -> Response:
        return await self._guarded(request, self._list)

    async def _model(self, request: Request) -> Response:
        return await self._guarded(request, self._describe)

    async def _completions(self, request: Request) -> Response:
        return await self._guarded(request, lambda r: self._answer(r, chat=False))

    async def _chats(self, request: Request) -> Response:
        return await self._guarded(request, lambda r: self._answer(r, chat=True))

    async def _health(self, request: Request) -> Response:
        failure = self.service.failure
        return PlainTextResponse("ok\n") if failure is None else PlainTextResponse(f"{failure!r}\n", 503)

    async def _metrics(self, request: Request) -> Response:
        lines = [f'moe_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answered.items())]
        lines += [f"moe_running_requests {self.service.running}", f"moe_written_tokens_total {self.service.tokens_out}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _guarded(self, request: Request, answer: Any) -> Response:
        """The answer, or the error object of what went wrong."""
        try:
            self._check_key(request)
            response: Response = await answer(request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; counted as nginx counts it
        except Exception as e:  # whatever it is, clients expect their error object; the log has the rest
            known = refusal(e)
            if known is None:
                logging.getLogger(__name__).exception("serve: %s %s failed", request.method, request.url.path)
                known = RefusedError("the server failed on this request", code="internal_error", status=500)
            elif known.code == "out_of_resources":
                logging.getLogger(__name__).error("%s", e)
            response = _refused(known)
        self.answered[response.status_code] += 1
        return response

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RefusedError("wrong or missing API key", code="invalid_api_key", status=401)

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _describe(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "stepwell"}

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(f"no model {name!r} here, expected {self.name!r}", "model", "model_not_found", 404)

    async def _answer(self, request: Request, chat: bool) -> Response:
        ask = read(await self._json(request), chat)
        self._check_name(ask.model)
        if chat:
            stop, ends = (*ask.sampling.stop, *self.template.stops), self.template.ends(self.tokenizer)
            ask = replace(ask, sampling=replace(ask.sampling, stop=stop, stop_tokens=ends))
        self._check_room(ask)
        prompts = await asyncio.to_thread(self._token_ids, ask)
        writer = Writer(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), self.name, ask, self.tokenizer
        )
        runs = [
            Run(self.service, ask, prompt, Choice(p * ask.choices + i, len(prompt)), i)
            for p, prompt in enumerate(prompts)
            for i in range(ask.choices)
        ]
        try:
            await _unless_gone(request, opened(runs))
            if ask.stream:
                return Streamed(runs, writer)
            await _unless_gone(request, finished(runs))
        except BaseException:
            for run in runs:
                run.close()
            raise
        return JSONResponse(writer.whole([run.choice for run in runs]))

    async def _json(self, request: Request) -> Any:
        """The body; one that says it is something else is refused, as pages of other sites can send no JSON unasked."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise RefusedError(f"the body is {kind[:60]!r}, expected application/json", None, "wrong_content_type", 415)
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > self.max_body_bytes:
                        raise RefusedError(f"the body exceeds {self.max_body_bytes:,} bytes", None, "too_large", 413)
        except TimeoutError as e:
            raise RefusedError(f"the body took longer than {self.body_s:g} s", None, "timeout", 408) from e
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError) as e:
            raise RefusedError(f"the body is not JSON: {e}", code="invalid_json") from e

    def _check_room(self, ask: Ask) -> None:
        """Refuses what would find no place in an empty server either; 429 would have its client ask for ever."""
        batcher, wanted = self.service.batcher, ask.choices * (1 if ask.chat else len(ask.prompt))
        room = batcher.slots + batcher.queue
        if ask.writes and wanted > room:
            raise RefusedError(f"n: got {wanted} choices of all prompts, expected at most {room}; ask for fewer", "n")

    def _token_ids(self, ask: Ask) -> list[list[int]]:
        """The prompts' tokens, checked. Long texts take a while: not on the event loop."""
        texts = [self.template(ask.prompt)] if ask.chat else ask.prompt
        prompts = [self._encoded(p) if isinstance(p, str) else list(p) for p in texts]
        start = list(self.service.batcher.start)
        if (
            ask.chat and start and prompts[0][: len(start)] == start
        ):  # a template may write what every prompt gets anyway
            prompts = [prompts[0][len(start) :]]
        for prompt in prompts:
            self.service.batcher.check(prompt, ask.sampling, least=int(ask.writes))
        return prompts

    def _encoded(self, text: str) -> list[int]:
        most, size = TOKEN_BYTES * self.service.batcher.limit, len(text.encode("utf-8", "replace"))
        if size > most:
            raise RefusedError(
                f"prompt: got {size:,} bytes, expected at most {most:,}: it exceeds the context", "prompt"
            )
        return token_ids(self.tokenizer, text)


class Streamed(StreamingResponse):
    """Choices as server-sent events. What is left of them is cancelled even where the client went before the first."""

    def __init__(self, runs: Sequence[Run], writer: Writer) -> None:
        super().__init__(streamed(runs, writer), media_type="text/event-stream", headers=UNBUFFERED)
        self.runs = runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for run in self.runs:
                run.close()


async def _unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Awaits the work; a client that leaves before it is done is a `ClientDisconnect`, and the work is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(refused: RefusedError) -> JSONResponse:
    return JSONResponse(refused.body(), refused.status, HEADERS.get(refused.status))


async def _not_found(request: Request, error: Exception) -> Response:
    status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None) or {}
    response = _refused(
        RefusedError(f"no route for {request.method} {request.url.path}", code="not_found", status=status)
    )
    response.headers.update(headers)  # which methods are allowed
    return response
