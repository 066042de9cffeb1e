"""One run at a time for each (root, dataset, stage): a lock file with a lease and a heartbeat.

A second run refuses and names the first. The same run id re-enters (a retry of the same task). A lock is taken over when its
process is gone from this machine, or when its heartbeat is older than the lease. On a local root a take-over happens under a
file lock, so of two runs that find the same dead owner one wins.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from core.errors import StageError
from core.storage import Root

LEASE_S = 90.0
HEARTBEAT_S = 20.0

log = logging.getLogger("stepwell")


@contextlib.contextmanager
def held(root: Root, name: str, run_id: str) -> Iterator[None]:
    """Hold `locks/<name>.json` for the block."""
    path = f"locks/{name}.json"
    _acquire(root, path, run_id)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(root, path, run_id, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if _is_ours(_owner(root, path)):
            root.remove(path)


def _acquire(root: Root, path: str, run_id: str) -> None:
    for _ in range(3):
        if root.create_exclusively(path, _entry(run_id)):
            return
        with _alone(root, path):
            owner = _owner(root, path)
            if owner is None:
                continue  # it was released in between
            if owner["run_id"] != run_id and not _gone(owner):
                raise StageError(
                    f"{path}: held by run {owner['run_id']} (process {owner['pid']} on {owner['host']}, last sign "
                    f"{time.time() - owner['beat']:.0f} s ago); wait for it, or stop it and try again"
                )
            root.remove(path)
            if root.create_exclusively(path, _entry(run_id)):
                return
    raise StageError(f"{path}: could not be taken in 3 tries; another run is starting, try again")


@contextlib.contextmanager
def _alone(root: Root, path: str) -> Iterator[None]:
    """One process at a time on a local root; elsewhere nothing (there the store's conditional put is all there is)."""
    if not root.is_local:
        yield
        return
    with open(root.path(path + ".guard"), "wb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel drops it when this process ends, however that happens
        yield


def _gone(owner: dict[str, Any]) -> bool:
    if owner["host"] == socket.gethostname():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _started(owner["pid"]) != owner["started"]
    return bool(time.time() - owner["beat"] > LEASE_S)


def _owner(root: Root, path: str) -> dict[str, Any] | None:
    try:
        owner: dict[str, Any] = root.read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        owner = {}
    if not {"run_id", "pid", "host", "started", "beat"} <= owner.keys():
        raise StageError(f"{path}: not a lock of ours; remove the file if no run is using this root")
    return owner


def _is_ours(owner: dict[str, Any] | None) -> bool:
    """Whether the lock still is this process's: it may have been taken over while the machine slept."""
    if owner is None:
        return False
    pid = os.getpid()
    return (owner["host"], owner["pid"], owner["started"]) == (socket.gethostname(), pid, _started(pid))


def _entry(run_id: str) -> bytes:
    pid = os.getpid()
    entry = {"run_id": run_id, "pid": pid, "host": socket.gethostname(), "started": _started(pid), "beat": time.time()}
    return json.dumps(entry).encode()


def _started(pid: int) -> str:
    """The process's start time in kernel ticks, so that a reused process number is not taken for the owner."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _beat(root: Root, path: str, run_id: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError, StageError):  # a missed beat shortens the lease; the work will meet the fault
            if not _is_ours(_owner(root, path)):
                log.warning("%s: taken over by another run; two runs may now do the same work", path)
                return
            root.write_bytes(path, _entry(run_id))
