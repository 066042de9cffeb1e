"""The driver's side of one worker process: how it is started, spoken to and ended, so that nothing here waits without a bound.

What a wait depends on may be frozen, stuck in native code, deaf to SIGTERM, or gone without a word. So every message has a time
limit, every end of a process is a request, then SIGKILL, then a bounded wait; and `multiprocessing`, which joins its children
without a bound when the interpreter ends, finds none left then. All of this runs inside `stopping.patiently`: a KeyboardInterrupt
between a fork and its bookkeeping would lose the process, one in a weakref's callback would itself be lost.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from core import stopping
from core.engines.environment import environment
from core.engines.worker import work

LEAVE_S = 3.0  # for a worker to remove its half-written file before it is killed: chosen, untested
KILLED_S = 5.0  # for the kernel to end a killed process, which it cannot while a dead disk is read: chosen, untested
MESSAGE_S = 60  # without a byte in the middle of a message, of which the other end does nothing else: chosen, untested
# Arrow's allocator keeps the large blocks that are freed for 0.1 s: sorting one of 83 MB peaked at 416 to 485 MB, by the moment.
# So they go at once, to a peak of 350 MB and no more CPU. Small ones it keeps.
ALLOCATOR = {"MIMALLOC_ARENA_PURGE_MULT": "0"}

log = logging.getLogger("stepwell")


@dataclass
class Worker:
    """A process, its pipe, and what it does; `task` is the pool's."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False  # it has started and reads: what is sent before may block for as long as it takes to start
    knows: int = -1  # number of the last function sent to it
    task: Any = None
    row: int | None = None
    began: bool = False  # it has said something of its task
    last_sign: float = field(default_factory=time.monotonic)


def start(workers: list[Worker]) -> Worker:
    """A new process, which is in `workers` before any exception can strike."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    _limit(ours)
    process = context.Process(target=work, args=(theirs, os.getpid()), daemon=True)
    with _signals_later(), environment(**ALLOCATOR):
        process.start()
        worker = Worker(process, ours)
        workers.append(worker)
    theirs.close()
    return worker


def end_all(workers: list[Worker]) -> None:
    """End every process and empty the list; takes LEAVE_S and, for what cannot be killed, KILLED_S each."""
    with stopping.patiently():
        for worker in workers:
            if not worker.ready:
                kill(worker)  # it has begun nothing
            elif worker.task is not None:
                worker.process.terminate()
            else:
                _send_end(worker)
        last = time.monotonic() + LEAVE_S
        while workers:
            end(workers[-1], last - time.monotonic())
            workers.pop()


def end(worker: Worker, wait_s: float = LEAVE_S) -> None:
    """Wait for a process that should end by itself, and kill it and what its unit started where it does not."""
    worker.process.join(timeout=max(0.0, wait_s))
    if worker.process.is_alive():
        kill(worker)
        worker.process.join(timeout=KILLED_S)
        if worker.process.is_alive():
            log.warning("worker process %s does not end although it was killed; is a disk gone?", worker.process.pid)
    worker.pipe.close()


def kill(worker: Worker) -> None:
    """SIGKILL to the process and to its group, for an orphan would hold on to our terminal and our pipes."""
    pid = worker.process.pid
    if pid is not None and worker.process.is_alive():  # not reaped, so the number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has made no group yet
            os.killpg(pid, signal.SIGKILL)
        worker.process.kill()


def exit_reason(worker: Worker) -> str:
    """How a process came to its end, which may take it a moment."""
    worker.process.join(timeout=LEAVE_S)
    code = worker.process.exitcode
    if code is None:
        return "fell silent in a message or in its end"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exited with {code}"


def _send_end(worker: Worker) -> None:
    with contextlib.suppress(OSError):  # it is dead
        worker.pipe.send(None)


def _limit(pipe: Connection) -> None:
    """Let `send` and `recv` fail with BlockingIOError once the other end has not moved for MESSAGE_S."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end_of_pair:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end_of_pair.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", MESSAGE_S, 0))


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """A process that starts in the block has Ctrl-C and SIGTERM blocked until `work` unblocks them, so that those sent to our
    group do not end it with a traceback in the middle of an import."""
    resource_tracker.ensure_running()  # to start it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
