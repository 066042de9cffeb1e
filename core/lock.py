"""One run at a time for each (root, dataset, stage): a lock file with a lease and a heartbeat.

A second run refuses and names the first. The same run id re-enters (a retry of the same task). A lock is taken over when its
process is gone from this machine, or when its heartbeat is older than the lease.
"""

import contextlib
import json
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
        root.remove(path)


def _acquire(root: Root, path: str, run_id: str) -> None:
    for _ in range(3):
        if root.create_exclusively(path, _entry(run_id)):
            return
        owner = _owner(root, path)
        if owner is None:
            continue  # it was released in between
        if owner["run_id"] != run_id and not _gone(owner):
            raise StageError(
                f"{path}: held by run {owner['run_id']} (process {owner['pid']} on {owner['host']}, last sign "
                f"{time.time() - owner['beat']:.0f} s ago); wait for it, or stop it and try again"
            )
        root.remove(path)
    raise StageError(f"{path}: could not be taken in 3 tries; another run is starting, try again")


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
        return owner
    except (FileNotFoundError, ValueError):
        return None


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
        with contextlib.suppress(OSError):  # a missed beat shortens the lease; the work itself will meet the same fault
            root.write_bytes(path, _entry(run_id))
