"""Continuous batching: requests come and go, and every step serves all that are there.

In: prompts and settings, from any thread. Out: events with each request's new tokens. A request waits in a bounded
queue, takes the lowest free row, has its prompt read in chunks beside the others' decoding, and gives its row back when
it ends. One thread owns the model and calls `step`; `submit` and `cancel` may be called from any other.

A step reads at most `chunk` prompt tokens, padding included, so a long prompt delays the others' next token by no more
than that. On a GPU it reads the tokens of the step before the one it has just started: the device never waits for the
host, and a request that ends by what it wrote takes part in one step too many, which is discarded.

A request's tokens depend on its prompt, settings and seed alone, up to the last bits of its logits: which rows and
chunks stand beside it changes the shapes of matrix products, and with them the order of their sums. In fp64 that is
1e-15 and no test has seen a token change by it; in bfloat16 near ties may turn. With `speculate`, greedy answers are
those of plain decoding; sampled ones keep their distribution, but which draws they take also depends on when rounds and
plain steps alternate, and `Pace` decides that for all rows at once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, RetryableError
from moe.decode import Decode, Kind
from moe.events import Event, Finish, TokenLogprobs, lost
from moe.graphs import DIVERGED, Readback
from moe.model import Decoder
from moe.sampling import MODES, Mode, Sampling
from moe.speculative import Acceptance, Pace
from moe.streaming import TextStream

CHUNK = 256  # prompt tokens a step; chosen, untested


class Full(RetryableError):  # noqa: N818
    """The queue has no place; the same request may be accepted later."""


@dataclass(eq=False)
class Request:
    """One request's progress."""

    id: int
    prompt: list[int]  # with the token that begins every document
    sampling: Sampling
    limit: int  # tokens that it may make
    ends: frozenset[int]
    stream: TextStream | None
    acceptance: Acceptance
    row: int = -1
    fed: int = 0  # tokens of the prompt that are read
    made: int = 0
    promised: int = 0  # `made` when all steps under way are read, at the least
    finished: Finish | None = None

    @property
    def drafted(self) -> Acceptance | None:
        return self.acceptance if self.acceptance.rounds else None


@dataclass
class Launch:
    """A step under way: who took part, and where its tokens will be."""

    kind: Kind
    requests: list[tuple[int, Request]]  # index into the readback's rows
    readback: Readback


@dataclass
class Batcher:
    """`slots` requests at once over one model, `queue` more waiting.

    `context` None: the model's. `tokenizer` (a `tokenizers.Tokenizer`) is needed for texts and stop strings. `prefix`
    precedes every prompt: None is the model's, EOS unless its folder says otherwise. `speculate` is how many tokens a round
    may draft, one by each of the model's MTP heads, while that pays by `pace`; `lag`, steps that may be under way unread,
    is 1 on a GPU. `capture`, `compiled` and `fused` are those of `Decode`.
    """

    model: Decoder
    tokenizer: Any = None
    slots: int = field(kw_only=True)
    context: int | None = field(default=None, kw_only=True)
    speculate: int = field(default=0, kw_only=True)
    queue: int = field(default=64, kw_only=True)
    chunk: int = field(default=CHUNK, kw_only=True)
    prefix: tuple[int, ...] | None = field(default=None, kw_only=True)
    pace: Pace | None = field(default=None, kw_only=True)
    lag: int | None = field(default=None, kw_only=True)
    capture: bool = field(default=True, kw_only=True)
    compiled: bool = field(default=False, kw_only=True)
    fused: bool | None = field(default=None, kw_only=True)
    clock: Callable[[], float] = field(default=time.perf_counter, kw_only=True)

    def __post_init__(self) -> None:
        config = self.model.config
        self.limit = config.context if self.context is None else self.context
        sizes = self.slots, self.queue, self.chunk, self.limit
        if min(sizes) < 1:
            raise ConfigError(
                f"batcher: slots, queue, chunk and context must be positive, got {', '.join(map(str, sizes))}"
            )
        if self.speculate < 0:
            raise ConfigError(f"batcher: speculate must not be negative, got {self.speculate}; 0 drafts nothing")
        self.start = self.model.prefix if self.prefix is None else self.prefix
        self.drafts = min(self.speculate, config.mtp_heads)
        if self.drafts and self.pace is None:
            self.pace = Pace(self.drafts)
        self.acceptance = Acceptance.none(self.drafts)
        self.decode = Decode(
            self.model, rows=self.slots, context=self.limit, drafts=self.drafts, capture=self.capture,
            compiled=self.compiled, fused=self.fused,
        )  # fmt: skip
        self.steps_behind = (1 if self.decode.device.type == "cuda" else 0) if self.lag is None else self.lag
        self._lock = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._cancelled: set[int] = set()
        self._running: dict[int, Request] = {}  # by row
        self._launches: deque[Launch] = deque()
        self._stale = False  # plain steps went by that the heads have not read
        self._next_id = 0

    def submit(self, prompt: Sequence[int], sampling: Sampling | None = None) -> int:
        """Queues a request and returns its id. `Full` where there is no place, `ConfigError` where it cannot be served."""
        sampling = sampling or Sampling()
        limit = self.check(prompt, sampling)
        stream = None if self.tokenizer is None else TextStream(self.tokenizer.decode, sampling.stop)
        ends = frozenset((self.model.config.eos, *self.model.stop_tokens, *sampling.stop_tokens))
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise Full(f"batcher: the queue is full, got {self.queue} requests waiting; try again later")
            request = Request(
                self._next_id, [*self.start, *prompt], sampling, limit, ends, stream, Acceptance.none(self.drafts)
            )
            self._next_id += 1
            self._waiting.append(request)
            self._lock.notify()
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request with the next step; one that has ended stays as it is."""
        with self._lock:
            self._cancelled.add(request_id)
            self._lock.notify()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._lock:
            return not (self._waiting or self._cancelled or self._running or self._launches)

    def wait(self, timeout_s: float) -> bool:
        """Sleeps until a request or a cancellation arrives, where there is nothing to do; whether there is now."""
        with self._lock:
            return self._lock.wait_for(
                lambda: bool(self._waiting or self._cancelled or self._running or self._launches), timeout_s
            )

    def step(self) -> list[Event]:
        """Reads a chunk of prompts, starts a decode step, and returns the events of what has been read back."""
        events = self._drop_cancelled()
        self._admit()
        started = [launch for launch in (self._prefill(), self._launch()) if launch is not None]
        self._launches.extend(started)
        while len(self._launches) > (self.steps_behind * 2 if started else 0):  # a step is up to two launches
            events += self._read(self._launches.popleft())
        return events

    def check(self, prompt: Sequence[int], sampling: Sampling, least: int = 1) -> int:
        """The tokens that the request may make; `ConfigError` where it cannot be served. Any thread may ask.

        `least` 0: of a prompt that is only scored, whose last token is not read either.
        """
        vocab, length = self.model.config.vocab_size, len(self.start) + len(prompt)
        room = self.limit - length + 1  # the last new token is not read
        wanted = (room if sampling.max_tokens is None else sampling.max_tokens) if least else 0
        problems = []
        if not least <= wanted <= room:
            fits = (
                f"1 to {room} new ones within {self.limit}"
                if room > 0
                else f"{len(prompt) + room - least} in the prompt"
            )
            problems.append(
                f"generate: prompt and answer exceed the context, got {len(prompt)} + {max(wanted, least)} tokens, expected "
                f"{fits}; shorten the prompt or lower max_tokens"
            )
        if not length:
            problems.append("generate: nothing to continue, got an empty prompt without a prefix; pass a token")
        if any(not 0 <= t < vocab for t in (*prompt, *sampling.stop_tokens)):
            problems.append(f"generate: a token is outside the vocabulary, expected 0 to {vocab - 1}")
        if sampling.stop and self.tokenizer is None:
            problems.append("generate: stop strings need a tokenizer, got none; pass stop_tokens")
        if problems:
            raise ConfigError(*problems)
        return wanted

    def _drop_cancelled(self) -> list[Event]:
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            found = [r for r in (*self._running.values(), *self._waiting) if r.id in gone]
            self._waiting = deque(r for r in self._waiting if r.id not in gone)
        for request in found:
            self._finish(request, "cancelled")
        return [Event(r.id, (), finished="cancelled", acceptance=r.drafted) for r in found]

    def _admit(self) -> None:
        with self._lock:
            free = [row for row in range(self.slots) if row not in self._running]
            admitted = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            for row, request in zip(free, admitted, strict=False):
                request.row, self._running[row] = row, request
        for request in admitted:
            self.decode.admit(request.row, request.prompt[len(self.start) :], request.sampling)

    def _prefill(self) -> Launch | None:
        """Reads at most `chunk` tokens of prompts: the oldest request's, and others' of no more each."""
        reading = sorted((r for r in self._running.values() if r.fed < len(r.prompt)), key=lambda r: r.id)
        if not reading:
            return None
        most = min(self.chunk, len(reading[0].prompt) - reading[0].fed)
        reading = reading[: self.chunk // most]
        chunks = [r.prompt[r.fed : r.fed + most] for r in reading]
        for request, part in zip(reading, chunks, strict=True):
            request.fed += len(part)
        ahead = [r.prompt[r.fed] if r.fed < len(r.prompt) else None for r in reading]
        logits = self.decode.prefill(
            [r.row for r in reading], chunks, ahead, max(r.fed for r in reading), self._mode(reading)
        )
        ended = [r for r in reading if r.fed == len(r.prompt)]
        rows = self.decode.trunk.rows_B[[r.row for r in reading]]
        readback = Readback.start(
            self.decode.out_BT[rows, :1], self.decode.kept_B[rows], logits, self._wants_logprobs(ended)
        )
        for request in ended:
            request.promised += 1
        return Launch("plain", [(i, r) for i, r in enumerate(reading) if r.fed == len(r.prompt)], readback)

    def _launch(self) -> Launch | None:
        """Starts a decode step of all rows whose prompts are read and which may want another token."""
        active = []
        for request in self._running.values():
            if request.promised >= request.limit:
                self.decode.release(request.row)
            elif request.fed == len(request.prompt):
                active.append(request)
        if not active:
            return None
        rows, mode = bucket(max(r.row for r in active) + 1, self.slots), self._mode(active)
        kind = self._kind(rows, mode)
        logits = self.decode.step(kind, rows, mode)
        out_BT, kept_B = self.decode.out_BT[:rows, : logits.shape[1]], self.decode.kept_B[:rows]
        readback = Readback.start(out_BT, kept_B, logits, self._wants_logprobs(active))
        for request in active:
            request.promised += 1
        return Launch(kind, [(r.row, r) for r in active], readback)

    def _kind(self, rows: int, mode: Mode) -> Kind:
        if self.pace is None or not self.drafts:
            return "plain"
        if rows not in self.pace.costs:
            self.pace.cost(rows, *self.decode.measure(rows, mode, self.clock))
        if not self.pace.speculate(rows):
            self._stale = True
            return "plain"
        if self._stale:
            self.decode.restart_drafts(rows)
            self._stale = False
        return "round"

    @staticmethod
    def _mode(requests: Sequence[Request]) -> Mode:
        return max((r.sampling.mode for r in requests), key=MODES.index)

    @staticmethod
    def _wants_logprobs(requests: Sequence[Request]) -> bool:
        return any(r.sampling.logprobs is not None for r in requests)

    def _read(self, launch: Launch) -> list[Event]:
        rows, events = launch.readback.tokens(), []
        for index, request in launch.requests:
            if request.finished is None:
                if launch.kind == "round":
                    for acceptance in (request.acceptance, self.acceptance):
                        acceptance.add(len(rows[index]))
                    assert self.pace is not None
                    self.pace.saw(len(rows[index]))
                events.append(self._take(request, rows[index], launch.readback, index))
        return events

    def _take(self, request: Request, tokens: list[int], readback: Readback, index: int) -> Event:
        """Adds tokens up to where the request ends."""
        taken: list[int] = []
        text, end = "", None
        finished: Finish | None = None
        for token in tokens:
            if token == DIVERGED:
                return self._fail(request, taken, text)
            if token in request.ends:
                finished, end = "stop", token
                break
            taken.append(token)
            if request.stream is not None:
                text += request.stream.push(token)
                if request.stream.stopped:
                    finished = "stop"
                    break
            if request.made + len(taken) == request.limit:
                finished = "length"
                break
        request.made += len(taken)
        request.promised = max(request.promised, request.made)
        if finished and request.stream is not None and not request.stream.stopped:
            text += request.stream.end()
            finished = "stop" if request.stream.stopped else finished
        if finished:
            self._finish(request, finished)
        logprobs = self._logprobs(request, readback, index, len(taken) + (end is not None))
        return Event(request.id, tuple(taken), logprobs, finished, text, request.drafted if finished else None, end)

    def _fail(self, request: Request, taken: list[int], text: str) -> Event:
        """Ends a request whose next token no one can tell: its row's logits are no numbers. Other rows go on."""
        request.made += len(taken)
        self._finish(request, "failed")
        error = lost(len(request.prompt), request.made)
        return Event(request.id, tuple(taken), None, "failed", text, request.drafted, error=error)

    def _logprobs(self, request: Request, read: Readback, index: int, rows: int) -> tuple[TokenLogprobs, ...] | None:
        wanted = request.sampling.logprobs
        if wanted is None or read.logprobs is None:
            return None
        chosen, top, ids = (part[index, :rows].tolist() for part in read.logprobs)
        return tuple(
            TokenLogprobs(logprob, tuple(zip(i[:wanted], p[:wanted], strict=True)))
            for logprob, p, i in zip(chosen, top, ids, strict=True)
        )

    def _finish(self, request: Request, how: Finish) -> None:
        request.finished = how
        if request.row >= 0:
            self.decode.release(request.row)
            with self._lock:
                del self._running[request.row]


def bucket(rows: int, most: int) -> int:
    """The batch size that serves so many rows: a power of two, or `most`."""
    return min(1 << (rows - 1).bit_length(), most)
