"""A supervised process pool. It notices a worker that dies or goes silent, names what it was doing, and tries again alone.

`multiprocessing.Pool` waits for ever when a worker is killed (the usual fate under an out-of-memory killer), and one raising task
there ends its siblings. Here the driver waits on pipes and process sentinels together, so no death goes unseen. A Ctrl-C is a
flag that the driver looks at while it waits (see `core.stopping`), never an exception in the middle of what it does.
"""

import logging
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

from core import stopping
from core.engines.contract import NO_ROW, Note, Report, Unit, UnitFn
from core.engines.measure import measured
from core.engines.processes import Worker, end, end_all, exit_reason, kill, start
from core.errors import ConfigError, RetryableError, StageError

POISON_LIMIT = 20  # rows that may kill a worker in one unit before the stage stops: the reject budget's floor
RETRIES = 3  # RetryableError from a unit
FIRST_WAIT_S = 0.5  # before the second try, doubled each time: chosen, untested
BLIND_DEATHS = 2  # deaths of a unit that never said which row it was at
START_S = 60.0  # for a worker to start and import what a unit needs, where `stall_s` is less: chosen, untested
LOOK_S = 0.2  # for which a request to stop may go unseen: chosen, untested
AT_EXIT = 15  # of what `multiprocessing` does before it joins its children, as its own pools have it

log = logging.getLogger("stepwell")

Progress = Callable[[int, int, int], None]  # (docs, bytes, units) since the last call


@dataclass
class _Task:
    unit: Unit
    index: int
    tries: int = 0
    blind_deaths: int = 0
    not_before: float = 0.0


class Pool:
    """`workers` processes that live until `close`. Started on first use."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._all: list[Worker] = []
        self._runs = 0
        self._at_exit: Finalize[None] | None = None

    def run(self, fn: UnitFn, units: Sequence[Unit], label: str, stall_s: float, progress: Progress) -> list[Report]:
        """`fn` on every unit; reports in order. Stops at the first failure, after running units have ended; where the process
        is asked to stop (see `core.stopping`), after they have ended or GRACE_S is over; at Ctrl-C where nobody listens for it,
        at once."""
        run = _Run(self, pickle.dumps(fn), units, label, stall_s, progress)
        with stopping.patiently():
            self._runs += 1
            try:
                return run.finish()
            except BaseException:
                self.close()  # a worker may still be busy with a unit nobody waits for
                raise

    def close(self) -> None:
        """End all workers, within seconds. The next run starts new ones."""
        end_all(self._all)
        if self._at_exit is not None:
            self._at_exit.cancel()
            self._at_exit = None

    def start_worker(self) -> Worker:
        if self._at_exit is None:  # for those who forget `close`
            self._at_exit = Finalize(self, end_all, args=(self._all,), exitpriority=AT_EXIT)
        return start(self._all)

    def discard(self, worker: Worker) -> None:
        end(worker)
        self._all.remove(worker)

    def idle(self) -> list[Worker]:
        for worker in [w for w in self._all if w.task is None and not w.process.is_alive()]:
            self.discard(worker)  # killed between two units: nobody's fault
        return [w for w in self._all if w.task is None]

    def busy(self) -> list[Worker]:
        return [w for w in self._all if w.task is not None]


class _Run:
    """One call of `Pool.run`."""

    def __init__(
        self, pool: Pool, fn: bytes, units: Sequence[Unit], label: str, stall_s: float, progress: Progress
    ) -> None:
        self.pool, self.fn, self.label, self.stall_s, self.progress = pool, fn, label, stall_s, progress
        self.waiting = deque(_Task(unit, i) for i, unit in enumerate(units))
        self.reports: list[Report | None] = [None] * len(units)
        self.failure: Exception | None = None
        self.patience_ends = float("inf")

    def finish(self) -> list[Report]:
        while self.waiting or self.pool.busy():
            stopping.interrupt()
            if stopping.asked():
                self._be_patient()
            if self.failure is not None:
                self.waiting.clear()
            self._assign()
            busy = self.pool.busy()
            if busy:
                ready = set(wait([x for w in busy for x in (w.pipe, w.process.sentinel)], timeout=LOOK_S))
                for worker in busy:
                    if worker.pipe in ready or worker.process.sentinel in ready:
                        self._listen(worker)
                self._kill_silent()
            elif self.waiting:
                time.sleep(0.05)  # only units that wait for their next try are left
        if stopping.asked():
            raise self._stopped()
        if self.failure is not None:
            raise self.failure
        return [r for r in self.reports if r is not None]

    def _be_patient(self) -> None:
        """Begin no unit any more, and wait for those that run until the grace time is over: then Stopped is raised."""
        self.waiting.clear()
        now, busy = time.monotonic(), len(self.pool.busy())
        if self.patience_ends == float("inf"):
            self.patience_ends = now + stopping.GRACE_S
            if busy:
                log.warning("stopping: running units (%d) may end within %.0f s", busy, stopping.GRACE_S)
        if busy and now > self.patience_ends:
            raise self._stopped()

    def _stopped(self) -> stopping.Stopped:
        done = sum(r is not None for r in self.reports)
        return stopping.Stopped(f"{self.label}: {done} of {len(self.reports)} units are committed")

    def _assign(self) -> None:
        now = time.monotonic()
        while self.waiting and self.failure is None:
            task = self.waiting[0]
            busy = self.pool.busy()
            alone = task.unit.cautious or any(w.task is not None and w.task.unit.cautious for w in busy)
            if len(busy) >= self.pool.workers or (alone and busy) or task.not_before > now:
                return
            self.waiting.popleft()
            idle = self.pool.idle()
            worker = idle[0] if idle else self.pool.start_worker()
            worker.task, worker.row, worker.began, worker.last_sign = task, None, False, now
            if worker.ready:
                self._send(worker)

    def _send(self, worker: Worker) -> None:
        """Tell a worker that reads what its task is."""
        number = self.pool._runs
        fn = self.fn if worker.knows != number else None
        worker.knows = number
        try:
            worker.pipe.send((number, fn, worker.task.unit))
        except OSError:  # BlockingIOError: it is frozen
            self._died(worker, "died before it began")

    def _ready(self, worker: Worker) -> None:
        worker.ready = True
        if stopping.asked():
            worker.task = None  # no unit begins any more
        else:
            self._send(worker)

    def _listen(self, worker: Worker) -> None:
        """Take every message that is there; a closed pipe is a death."""
        try:
            while worker.pipe.poll():
                kind, payload = worker.pipe.recv()
                worker.last_sign = time.monotonic()
                if kind == "ready":
                    self._ready(worker)
                    return
                worker.began = True
                if kind == "note":
                    docs, size, row = payload
                    if row is not None:
                        worker.row = None if row == NO_ROW else row
                    self.progress(docs, size, 0)
                else:
                    self._ended(worker, kind, payload)
                    return
        except (EOFError, OSError):  # OSError: it died, or was frozen, in the middle of a message
            self._died(worker, exit_reason(worker))
            return
        if not worker.process.is_alive() and not worker.pipe.poll():
            self._died(worker, exit_reason(worker))

    def _ended(self, worker: Worker, kind: str, payload: Any) -> None:
        task, worker.task = worker.task, None
        assert task is not None
        if kind == "done":
            self.reports[task.index] = payload
            self.progress(0, 0, 1)
            return
        error, trace = payload
        if isinstance(error, RetryableError) and task.tries < RETRIES:
            task.tries += 1
            task.not_before = time.monotonic() + FIRST_WAIT_S * 2**task.tries
            self.waiting.append(task)
        elif isinstance(error, ConfigError | StageError):
            self.failure = self.failure or error
        else:
            self.failure = self.failure or failed_unit(self.label, task.unit.name, error, trace)

    def _died(self, worker: Worker, how: str) -> None:
        task = worker.task
        self.pool.discard(worker)
        if task is None:
            return
        unit = task.unit
        if unit.cautious and worker.row is not None:
            task.unit = replace(unit, poison=(*unit.poison, worker.row))
        else:
            task.blind_deaths += 1
            task.unit = replace(unit, cautious=True)
        if task.blind_deaths > BLIND_DEATHS or len(task.unit.poison) > POISON_LIMIT:
            where = f"at row {worker.row}" if worker.row is not None else "before it named a row"
            deaths = task.blind_deaths + len(task.unit.poison)
            self.failure = self.failure or StageError(
                f"{self.label}: worker {how} {where} of unit {unit.name}, {deaths} deaths in this unit; look at the documents "
                "named above, or, where memory is the cause, give the engine more memory_gb per worker or fewer workers"
            )
            return
        log.warning("%s: worker %s in unit %s; trying it again alone", self.label, how, unit.name)
        self.waiting.appendleft(task)

    def _kill_silent(self) -> None:
        now = time.monotonic()
        for worker in self.pool.busy():
            patience_s = self.stall_s if worker.began else max(self.stall_s, START_S)
            if now - worker.last_sign > patience_s:
                kill(worker)
                self._died(worker, f"gave no sign for {patience_s:.0f} s")


def failed_unit(label: str, unit: str, error: Exception, trace: str) -> StageError:
    """What a unit's exception becomes: one line, with the worker's traceback as a note for `--debug`."""
    failure = StageError(f"{label}: unit {unit} failed: {type(error).__name__}: {error}")
    failure.add_note(trace)
    return failure


def run_here(fn: UnitFn, units: Sequence[Unit], label: str, progress: Progress) -> list[Report]:
    """`fn` on every unit in this process, for debugging and for roots that live in memory; errors and retries as in a pool."""
    reports = []
    for unit in units:
        note: Note = lambda docs=0, bytes=0, row=None: progress(docs, bytes, 0)  # noqa: E731 - has no name to give
        reports.append(attempted(partial(measured, fn, unit, note), label, unit.name))
        progress(0, 0, 1)
    return reports


def attempted(work: Callable[[], Any], label: str, unit: str) -> Any:
    """`work()`, tried again after a RetryableError; what it raises takes the form that the contract gives to errors."""
    tries = 0
    while True:
        try:
            return work()
        except (ConfigError, StageError):
            raise
        except Exception as e:
            if not isinstance(e, RetryableError) or tries == RETRIES:
                raise failed_unit(label, unit, e, traceback.format_exc()) from e
        time.sleep(FIRST_WAIT_S * 2**tries)
        tries += 1


def quiet_note(docs: int = 0, bytes: int = 0, row: int | None = None) -> None:
    """The `note` of engines that know by themselves whether a worker lives."""
