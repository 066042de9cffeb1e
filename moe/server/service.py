"""The model behind the server: one thread owns it, and requests meet it through a queue.

In: prompts as token ids with their sampling. Out: an asynchronous stream of `Event`s for each. The thread alone touches the
`Batcher` and the model, so nothing in them needs a lock; what it is asked to do goes through a queue of calls, what comes of it
goes back to the event loop. A client that leaves cancels its requests. When the batcher's own queue is full, or as many prompts
wait for their score, the answer is `Full` and the client is told to come back. A step that fails, as by too little memory, ends
the thread, since the rows' state is no longer known: the log says so, and every client hears it.
"""

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from core.errors import StepwellError
from moe.batching import Batcher, Full
from moe.events import DivergedError, Event, lost
from moe.memory import memory_named
from moe.sampling import Sampling

IDLE_S = 0.05  # how long the thread waits for a call when no request is running
SCORED = 512  # prompt positions whose logits exist at a time
Answer = TypeVar("Answer")


class StoppedError(RuntimeError):
    """The server is going down, or its model's thread has failed."""


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a prompt's tokens, the first one's given what begins every prompt."""

    chosen: list[float]
    top: list[dict[int, float]]


class Stream:
    """Events of one request until it finishes; `close` cancels what is left of it and may be called at any time."""

    def __init__(self, events: "asyncio.Queue[Event | StoppedError]", cancel: Callable[[], Any]) -> None:
        self._events, self._cancel, self._open = events, cancel, True

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, StoppedError):
            self._open = False
            raise event
        self._open = event.finished is None
        return event

    def close(self) -> None:
        if self._open:
            self._open = False
            self._cancel()


class Service:
    """Runs once, from `start` to `stop`; either may be called again and then changes nothing."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._streams: dict[int, Callable[[Event | StoppedError], None]] = {}
        self._taking = threading.Lock()  # no call may enter the queue after its last reader has emptied it
        self._ending = threading.Event()
        self._scores = 0  # prompts that wait for theirs
        self._thread = threading.Thread(target=self._work, name="moe-model", daemon=True)
        self.failure: BaseException | None = None
        self.tokens_out = 0

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, wait_s: float = 10.0) -> None:
        """No further step; open streams end with `StoppedError`."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def running(self) -> int:
        """Requests that have been taken and not ended."""
        return len(self._streams)

    async def open(self, prompt: Sequence[int], sampling: Sampling) -> "Stream":
        """Hands a request to the batcher. `Full` when its queue is, `ConfigError` when the request cannot be served."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | StoppedError]()

        def deliver(event: Event | StoppedError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        future = self._ask(lambda: self._submit(prompt, sampling, deliver))
        try:
            number = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._forget)
            raise
        return Stream(events, lambda: self._ask(lambda: self._cancel(number)))

    async def score(self, prompt: Sequence[int], top: int) -> Scored:
        """Log-probabilities of each prompt token given those before it, and of the `top` likeliest in its place.

        The prompt is one that the batcher's `check` lets through. `Full` when `queue` prompts wait already.
        """
        if self._scores >= self.batcher.queue:
            raise Full(f"score: the queue is full, got {self._scores} prompts waiting; try again later")
        self._scores += 1
        try:
            return await asyncio.wrap_future(self._ask(lambda: self._score(list(prompt), top)))
        finally:
            self._scores -= 1

    def _ask(self, call: Callable[[], Answer]) -> "Future[Answer]":
        future: Future[Answer] = Future()
        with self._taking:
            if self.failure is None and not self._ending.is_set():
                self._calls.put((call, future))
                return future
        future.set_exception(self._stopped())
        return future

    def _forget(self, taken: "Future[int]") -> None:
        """Cancels a request whose client left while it was being taken."""
        if not taken.cancelled() and taken.exception() is None:
            self._ask(lambda: self._cancel(taken.result()))

    # What follows runs on the model's thread.

    def _work(self) -> None:
        try:
            while not self._ending.is_set():
                self._answer_calls()
                if not self.batcher.idle:
                    with memory_named(*self._memory("a step")):
                        events = self.batcher.step()
                    for event in events:
                        self._deliver(event)
        except BaseException as e:
            self.failure = e
            known = isinstance(e, StepwellError)
            logging.getLogger(__name__).error("%s", self._stopped(), exc_info=None if known else e)
        finally:
            self._abandon()

    def _answer_calls(self) -> None:
        wait = self.batcher.idle
        while True:
            try:
                call, future = self._calls.get(timeout=IDLE_S) if wait else self._calls.get_nowait()
            except queue.Empty:
                return
            wait = False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as e:  # noqa: BLE001 - handed to the one who asked
                future.set_exception(e)

    def _submit(
        self, prompt: Sequence[int], sampling: Sampling, deliver: Callable[[Event | StoppedError], None]
    ) -> int:
        number = self.batcher.submit(list(prompt), sampling)
        self._streams[number] = deliver
        return number

    def _cancel(self, number: int) -> None:
        if number in self._streams:  # until the batcher says that it has ended, so that `running` tells the truth
            self.batcher.cancel(number)

    def _deliver(self, event: Event) -> None:
        deliver = self._streams.get(event.id)
        if deliver is None:
            return
        self.tokens_out += len(event.tokens)
        if event.finished is not None:
            del self._streams[event.id]
        deliver(event)

    def _abandon(self) -> None:
        with self._taking:
            self._ending.set()
            left = [self._calls.get_nowait() for _ in range(self._calls.qsize())]
        for deliver in self._streams.values():
            deliver(self._stopped())
        self._streams.clear()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._stopped())

    def _stopped(self) -> StoppedError:
        if self.failure is None:
            return StoppedError("the server is going down")
        told = self.failure if isinstance(self.failure, StepwellError) else repr(self.failure)
        return StoppedError(f"the model stopped: {told}")

    def _memory(self, what: str) -> tuple[str, str]:
        slots, context = self.batcher.slots, self.batcher.limit
        return (
            f"serve: out of memory in {what} with --slots {slots} x --context {context} tokens",
            "start again with less of either, or with --dtype bfloat16",
        )

    def _score(self, prompt: list[int], top: int) -> Scored:
        if not prompt:
            return Scored([], [])
        with memory_named(*self._memory(f"the score of {len(prompt)} tokens")), torch.inference_mode():
            return self._scored(prompt, top)

    def _scored(self, prompt: list[int], top: int) -> Scored:
        model = self.batcher.model
        device = model.lm_head.weight.device
        before = self.batcher.start or (model.config.eos,)
        tokens_T = torch.tensor([*before, *prompt], device=device)
        x_TD = model.hidden(tokens_T[None, :-1])[0, len(before) - 1 :]
        chosen: list[float] = []
        best: list[dict[int, float]] = []
        for first in range(0, len(prompt), SCORED):
            p_TV = model.lm_head(x_TD[first : first + SCORED]).float().log_softmax(-1)
            target_T = tokens_T[len(before) + first :][: len(p_TV)]
            chosen += p_TV.gather(1, target_T[:, None])[:, 0].tolist()
            likeliest = p_TV.topk(min(top, p_TV.shape[-1]), dim=-1) if top else None
            best += [
                dict(zip(likeliest.indices[t].tolist(), likeliest.values[t].tolist(), strict=True)) if likeliest else {}
                for t in range(len(p_TV))
            ]
        if not all(map(math.isfinite, chosen)):
            raise DivergedError(lost(len(prompt), 0))
        return Scored(chosen, best)
