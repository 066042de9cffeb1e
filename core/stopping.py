"""Asked to stop, by SIGTERM or Ctrl-C: what runs is let go of in order, and the same command goes on later.

In: signals of this process while a command is in `listening`. Out: `Stopped`, raised in the main thread: at once, or, inside
`patiently`, where the code there asks for it (a pool lets the units that run come to their end first). Work is safe against
kill -9 at any moment, so it does not matter where the exception strikes; it is there to release locks and temporary files.

A second signal ends the process on the spot. Workers end with it, and the next run takes its locks over.

In a process that does not listen (a script, a notebook) Ctrl-C is a KeyboardInterrupt as ever, but not inside `patiently`: Python
raises it between any two instructions, and swallows it where that is a destructor or a weakref's callback. There it is a flag,
for `interrupt` to look at, and no later than at the block's end it is raised.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

GRACE_S = 8.0  # for running units to end: `docker stop` kills after 10 s, Kubernetes after 30, Airflow after 60
SAME_S = 1.0  # a signal sent to the process and to its group arrives twice; `timeout` and terminals do that
NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did; the message says how far it was. A KeyboardInterrupt, for that is what event loops,
    Ray and every `except Exception` let pass."""


class _Request:
    """What this process was asked: module state, because a signal belongs to a process."""

    listening = False
    number = 0
    at = 0.0
    patience = 0
    interrupted = False  # Ctrl-C came while it was held back


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop while the block runs; SIGUSR1 prints the stack of every thread to stderr."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    _Request.number, _Request.listening = 0, True
    reclaim()
    faulthandler.register(signal.SIGUSR1)
    try:
        yield
    finally:
        _Request.number, _Request.listening = 0, False  # what was asked of one command is not asked of the next
        faulthandler.unregister(signal.SIGUSR1)
        for number, handler in before.items():
            signal.signal(number, handler)


def reclaim() -> None:
    """Set the signals' handlers again, where this process listens: Ray and Spark set their own when they start."""
    if _Request.listening:
        for number in NUMBERS:
            signal.signal(number, _heard)


def asked() -> int:
    """The number of the signal that asked to stop while this process listens, or 0."""
    return _Request.number


def check() -> None:
    """Stopped if a stop was asked for: an exception that a destructor or a callback swallowed is not lost."""
    if _Request.number:
        raise Stopped


def interrupt() -> None:
    """KeyboardInterrupt if Ctrl-C was held back: for what waits inside `patiently`."""
    if _Request.interrupted:
        _Request.interrupted = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """No `Stopped` and no KeyboardInterrupt strikes inside the block, which may look at `asked` and `interrupt` by itself; at
    its end comes what was asked inside."""
    before = _Request.number
    with _holding_ctrl_c():
        _Request.patience += 1
        try:
            yield
        finally:
            _Request.patience -= 1
    if _Request.number != before:
        raise Stopped


@contextlib.contextmanager
def _holding_ctrl_c() -> Iterator[None]:
    """For Python's own reaction to Ctrl-C; who has set another, or ignores it, keeps that."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _Request.interrupted = False
    signal.signal(signal.SIGINT, _held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt()


def _held(number: int, frame: Any) -> None:
    _Request.interrupted = True


def request(number: int) -> bool:
    """Note that a stop was asked for; False if one was before, or nobody listens. For code with handlers of its own."""
    if _Request.number or not _Request.listening:
        return False
    _Request.number, _Request.at = number, time.monotonic()
    return True


def _heard(number: int, frame: Any) -> None:
    if request(number):
        if not _Request.patience:
            raise Stopped
    elif time.monotonic() - _Request.at > SAME_S:
        os._exit(128 + _Request.number)  # not by the default action, which process 1 of a container ignores
