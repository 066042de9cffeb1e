"""The life of one worker process of the pool: receive units until the pipe closes, say how far they are, answer with a report.

A worker has a process group of its own: Ctrl-C in a terminal, and a scheduler's SIGTERM to the group of its command, are the
driver's to handle, and reach neither a unit that may still end nor a child process that a unit waits for.
"""

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from core import stopping
from core.engines.measure import measured
from core.errors import StageError

NOTE_EVERY_S = 0.2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# Blocks up to here come from the heap, and twice as much stays free at its top; 8 MB cost 12 MB of peak.
KEPT_BYTES = 4 << 20


def work(pipe: Connection, parent: int) -> None:
    """A worker's life: say that it is ready, then receive units until the pipe closes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent in the moment before
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.NUMBERS)  # the driver starts us with these blocked
    faulthandler.register(signal.SIGUSR1)
    _die_with(parent)
    _keep_freed_memory()
    import pyarrow as pa

    pa.set_cpu_count(1)  # parallelism is the number of workers; more threads would only fight over the cores
    known, fn = -1, None
    pipe.send(("ready", None))
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message is None:
            return
        number, pickled, unit = message
        try:
            if number != known:
                known, fn = number, pickle.loads(pickled)
            assert fn is not None
            note = _noter(pipe)
            note()  # what was imported until here does not count as the unit's silence
            answer: tuple[str, Any] = ("done", measured(fn, unit, note))
            pickle.dumps(answer)  # so that a report that cannot travel is the unit's error, not this worker's end
        except Exception as e:  # noqa: BLE001 - the driver decides what an exception means
            answer = ("error", (_picklable(e), traceback.format_exc()))
        pipe.send(answer)


def _leave(number: int, frame: Any) -> None:
    """End now, but not without having removed what is half written."""
    sys.exit(128 + number)


def _noter(pipe: Connection) -> Callable[..., None]:
    held = [0, 0]
    last = [0.0]

    def note(docs: int = 0, bytes: int = 0, row: int | None = None) -> None:
        held[0] += docs
        held[1] += bytes
        now = time.monotonic()
        if row is not None or now - last[0] >= NOTE_EVERY_S:
            pipe.send(("note", (held[0], held[1], row)))
            held[:] = [0, 0]
            last[0] = now

    return note


def _keep_freed_memory() -> None:
    """Stop glibc from giving the same pages back and faulting them in again for every batch of numpy temporaries. Left alone it
    settles on thresholds by which blocks happen to be freed first. On 24 MB of text `signals` had 90,000 page faults and 0.15
    of 2.4 CPU seconds in the kernel; with these 2,000 to 5,000 and 0.03. The peak of a shuffle stays what it was."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens (Linux); an orphan would compete with the next run."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # noqa: BLE001 - any class may refuse to be pickled
        return StageError(f"{type(error).__name__}: {error}")
