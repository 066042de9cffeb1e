"""Sends requests until all are answered or something says stop, and logs each answer before anything else happens to it.

As many workers as may be in flight take requests in order. When the cap is reached, the endpoint is down or a signal comes,
nothing more is sent, and what is in flight is waited for and logged: it is paid. Answers that arrive while the disk flushes
share the next flush. Which requests a cap leaves unsent depends on what the others cost; what is logged is valid in any case. An
endpoint that refuses nearly everything is told before it has refused the rest.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from core import stopping
from core.errors import RetryableError, StageError
from mixtures.augment.budget import Budget, usage_of
from mixtures.augment.endpoint import Endpoint, Refused
from mixtures.augment.log import AnswerLog
from mixtures.augment.prompts import Request

REFUSALS_OF = 20  # fewer requests say nothing of an endpoint: chosen, untested


@dataclass
class Sent:
    """What became of the requests of one run."""

    answered: int = 0
    refused: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # key -> last cause
    stopped: str = ""  # max_cost or max_s, where one ended the run
    signalled: str = ""
    error: StageError | None = None


def refusals_error(refused: int, asked: int, most: float, first: str) -> StageError | None:
    """What to say of an endpoint that refuses more than the share `most` of at least REFUSALS_OF requests."""
    if asked < REFUSALS_OF or refused <= most * asked:
        return None
    return StageError(
        f"answers: {refused:,} of {asked:,} requests were refused, the first with {first}; expected at most {most:.0%}; mend the "
        "cause, or raise max_refused_fraction, and run again to ask them once more: answers so far are kept"
    )


class Sender:
    """One run over requests that the log does not hold."""

    def __init__(
        self,
        endpoint: Endpoint,
        log: AnswerLog,
        budget: Budget,
        max_refused: float,
        advance: Callable[[int, int, int], None],
    ) -> None:
        self.endpoint, self.log, self.budget, self.advance = endpoint, log, budget, advance
        self.max_refused = max_refused  # share of the answered and refused
        self.sent = Sent()
        self._first_refusal = ""
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def run(self, requests: Sequence[Request], in_flight: int, max_s: float | None) -> Sent:
        """Send what can be sent. Errors that end the run are in the result, after everything in flight was logged."""
        queue = iter(requests)
        timer = asyncio.get_running_loop().call_later(max_s, self._stop, "max_s") if max_s is not None else None
        with self._signals():
            workers = [self._work(queue) for _ in range(min(in_flight, len(requests)))]
            ended = await asyncio.gather(*workers, return_exceptions=True)
        if timer is not None:
            timer.cancel()
        for error in ended:
            if isinstance(error, BaseException):  # a fault of this code: told after the others' answers are safe
                raise error
        return self.sent

    def _stop(self, why: str) -> None:
        self.sent.stopped = self.sent.stopped or why
        self.endpoint.tally.stopped = True

    async def _work(self, queue: Iterator[Request]) -> None:
        for request in queue:
            if self.endpoint.tally.stopped:
                return
            if not await self.budget.admit(request):
                self._stop("max_cost")
                return
            paid = 0.0
            try:
                paid = await self._one(request)
            except RetryableError as e:
                if str(e) != "stopped":
                    self.sent.failed[request.key] = str(e)
            except StageError as e:
                self.sent.error = self.sent.error or e
                self.endpoint.tally.stopped = True
            except BaseException:
                self.endpoint.tally.stopped = True
                raise
            finally:
                await self.budget.settle(request, paid)
                self.advance(1, 0, 1)

    async def _one(self, request: Request) -> float:
        """Ask, log, and say what it cost."""
        entry: dict[str, Any] = {
            "key": request.key,
            "passage": request.passage,
            "template": request.template.label,
            "model": request.body["model"],
        }
        tokens = request.prompt_tokens + request.max_tokens
        answer = await self.endpoint.ask(request.key, request.body, tokens)
        if isinstance(answer, Refused):
            await self._write({**entry, "refused": answer.status, "detail": answer.detail})
            self.sent.refused += 1
            self._first_refusal = self._first_refusal or f"{answer.status}: {answer.detail}"
            asked = self.sent.answered + self.sent.refused
            if error := refusals_error(self.sent.refused, asked, self.max_refused, self._first_refusal):
                raise error
            return 0.0
        usage, estimated = usage_of(request, answer)
        more = {"usage": usage, "estimated": estimated, "served_model": answer["model"], "at_s": round(time.time(), 3)}
        await self._write({**entry, "text": answer["text"], "finish_reason": answer["finish_reason"], **more})
        self.sent.answered += 1
        return self.budget.prices.cost(usage)

    async def _write(self, entry: dict[str, Any]) -> None:
        """Return when the disk has the entry."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self.log.append, [entry for entry, _ in batch])
            except StageError as e:
                for _, done in batch:
                    done.set_exception(StageError(str(e)))
            else:
                for _, done in batch:
                    done.set_result(None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the sending and let what is in flight come home."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: signal.Signals) -> None:
            stopping.request(number)  # so that the command says and exits as after any stop
            self.sent.signalled = number.name
            self.endpoint.tally.stopped = True

        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])
