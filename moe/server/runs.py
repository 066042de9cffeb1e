"""The choices of one request on their way: opened together, gathered into whole answers or written out as they grow."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from moe.events import DivergedError, Event
from moe.server.answers import DONE, Choice, Writer, data
from moe.server.protocol import Ask, RefusedError, refusal
from moe.server.service import Scored, Service, Stream


class Run:
    """One choice: its request to the model and the answer so far. The i-th choice of a prompt has the seed plus i."""

    def __init__(self, service: Service, ask: Ask, prompt: list[int], choice: Choice, i: int) -> None:
        self.service, self.ask, self.prompt, self.choice = service, ask, prompt, choice
        self.i = i
        self.sampling = replace(ask.sampling, seed=ask.sampling.seed + i)
        self._stream: Stream | None = None

    async def open(self, scored: Scored | None) -> None:
        """Takes an echoed prompt with its score, and hands the request to the model unless it asks for no new token."""
        if self.ask.echo:
            self.choice.text.append(self.service.batcher.tokenizer.decode(self.prompt, skip_special_tokens=False))
        if scored is not None:
            self.choice.logprobs += zip(self.prompt, scored.chosen, scored.top, strict=True)
        if not self.ask.writes:
            self.choice.finish = "length"
        else:
            self._stream = await self.service.open(self.prompt, self.sampling)

    async def events(self) -> AsyncIterator[Event]:
        """What the model says, already taken into `choice`."""
        if self._stream is None:
            return
        async for event in self._stream:
            if event.error is not None:
                raise DivergedError(event.error)
            self.choice.tokens += event.tokens
            named = event.tokens if event.end is None else (*event.tokens, event.end)
            for token, found in zip(named, event.logprobs or (), strict=event.logprobs is not None):
                self.choice.logprobs.append((token, found.logprob, dict(found.top[: self.ask.sampling.logprobs])))
            if event.text:
                self.choice.text.append(event.text)
            self.choice.finish = event.finished
            yield event

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


async def opened(runs: Sequence[Run]) -> None:
    """Opens all choices, prompt after prompt; those of an echoed prompt share one score."""
    scored = None
    for run in runs:
        top = run.ask.sampling.logprobs
        if run.i == 0 and run.ask.echo and top is not None:
            scored = await run.service.score(run.prompt, top)
        await run.open(scored)


async def finished(runs: Sequence[Run]) -> None:
    """Waits for all choices; the first error ends the others."""

    async def drain(run: Run) -> None:
        async for _ in run.events():
            pass

    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(drain(run))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def streamed(runs: Sequence[Run], writer: Writer) -> AsyncIterator[str]:
    """Server-sent events of all choices as they grow. An error in the middle is an event of its own, and the last."""
    ready: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def pump(run: Run) -> None:
        try:
            async for part in _parts(run, writer):
                ready.put_nowait(part)
            ready.put_nowait(None)
        except Exception as e:  # told to the client below
            if refusal(e) is None:
                logging.getLogger(__name__).exception("serve: a stream failed")
            ready.put_nowait(e)

    tasks = [asyncio.create_task(pump(run)) for run in runs]
    try:
        open_runs = len(runs)
        while open_runs:
            part = await ready.get()
            if isinstance(part, Exception):
                unforeseen = RefusedError("the server failed on this request", code="internal_error", status=500)
                yield data((refusal(part) or unforeseen).body())
                return
            if part is None:
                open_runs -= 1
            else:
                yield part
        if writer.ask.usage:
            yield writer.last([run.choice for run in runs])
        yield DONE
    finally:
        for task in tasks:
            task.cancel()
        for run in runs:
            run.close()


async def _parts(run: Run, writer: Writer) -> AsyncIterator[str]:
    """Chunks of one choice."""
    choice = run.choice
    if writer.ask.chat:
        yield writer.opening(choice.index)
    if choice.text or choice.finish is not None:  # an echoed prompt, or a choice without new tokens
        yield writer.chunk(choice, "".join(choice.text), 0)
    written = len(choice.logprobs)
    async for event in run.events():
        if event.text or event.finished is not None:
            yield writer.chunk(choice, event.text, written)
            written = len(choice.logprobs)
