"""One run at a time for each (root, dataset, stage): a lock file with a lease and a heartbeat.

A second run refuses and names the first. The same run id re-enters (a retry of the same task). A lock is taken over when its
process is gone from this machine, or when its heartbeat is older than the lease. Taking over, renewing and releasing each name
the version of the file that they mean to change, so of two runs that find the same dead owner one wins, and a run that lost its
lock while its machine slept neither renews nor removes what is another's. That holds on local disks and on stores with
conditional put; elsewhere (see `Root.probe`) two runs that start in the same instant may both go on.

Machines compare clocks here: one that is LEASE_S ahead takes living runs for dead.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
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
    beat = _Beat(root, path, run_id, _acquire(root, path, run_id))
    beat.start()
    try:
        yield
    finally:
        beat.stop()
        try:
            root.remove_version(path, beat.version)
        except Exception as e:  # noqa: BLE001 - said, not raised: what the block raised matters more
            log.warning("%s: not released (%s: %s); it ends with its lease", path, type(e).__name__, e)


def _acquire(root: Root, path: str, run_id: str) -> str:
    """The version of the lock file that is ours."""
    for _ in range(3):
        mine = _entry(run_id)
        if root.create_exclusively(path, mine):
            found = _found(root, path)
            if found is not None and found[0] == mine:
                return found[1]
            continue  # only on a store without exclusive creation: another run wrote at the same moment
        found = _found(root, path)
        if found is None:
            continue  # it was released in between
        owner = _owner(path, found[0])
        if owner["run_id"] != run_id and not _gone(owner):
            raise StageError(
                f"{path}: held by run {owner['run_id']} (process {owner['pid']} on {owner['host']}, last sign "
                f"{time.time() - owner['beat']:.0f} s ago); wait for it, or stop it and try again"
            )
        version = root.replace(path, mine, found[1], LEASE_S)
        if version is not None:
            return version
    raise StageError(f"{path}: could not be taken in 3 tries; another run is starting, try again")


class _Beat:
    """A thread that renews the lock until it is stopped or finds the lock to be another's."""

    def __init__(self, root: Root, path: str, run_id: str, version: str) -> None:
        self.version = version  # as of the last renewal
        self._root, self._path, self._run_id = root, path, run_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _renew(self) -> None:
        entry = None
        while not self._stop.wait(HEARTBEAT_S):
            # The same bytes until they are known to be there: a renewal whose answer was lost is then found to be ours.
            entry = entry or _entry(self._run_id)
            try:
                version = self._root.replace(self._path, entry, self.version, HEARTBEAT_S)
            except Exception as e:  # noqa: BLE001 - a missed beat shortens the lease; the work itself will meet the fault
                log.warning("%s: not renewed (%s: %s)", self._path, type(e).__name__, e)
                continue
            if version is None:
                log.warning("%s: taken over by another run; two runs may now do the same work", self._path)
                return
            self.version, entry = version, None


def _gone(owner: dict[str, Any]) -> bool:
    if owner["host"] == socket.gethostname() and owner.get("kernel", _kernel()) == _kernel():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _started(owner["pid"]) != owner["started"]
    return bool(time.time() - owner["beat"] > LEASE_S)


def _found(root: Root, path: str) -> tuple[bytes, str] | None:
    try:
        return root.versioned(path)
    except FileNotFoundError:
        return None


def _owner(path: str, stored: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(stored)
    except ValueError:
        owner = None
    if not isinstance(owner, dict) or not {"run_id", "pid", "host", "started", "beat"} <= owner.keys():
        raise StageError(f"{path}: not a lock of ours; remove the file if no run is using this root")
    return owner


def _entry(run_id: str) -> bytes:
    """What this process writes: no two entries are equal, so that each can be told from every other."""
    pid = os.getpid()
    entry = {"run_id": run_id, "pid": pid, "host": socket.gethostname(), "kernel": _kernel(), "started": _started(pid)}
    return json.dumps({**entry, "beat": time.time(), "entry": uuid.uuid4().hex}).encode()


def _kernel() -> str:
    """Where process numbers mean what they mean here: containers on two machines may have one host name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The process's start time in kernel ticks, so that a reused process number is not taken for the owner."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
