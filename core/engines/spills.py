"""A folder for what Java or Ray spills for one process: gone when its engine is closed, after kill -9 when the next one starts.

A file in it is locked as long as the process lives: the kernel lets go of it however that ends, and no number of a process is
mistaken for another's. Where a file system knows no locks nothing is taken for abandoned.
"""

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from core.errors import ConfigError

HELD = "held"


class Spills:
    """A new folder below `scratch`. Those of this kind that nobody holds any more are removed first. ConfigError where the disk
    refuses it."""

    def __init__(self, scratch: Path, kind: str) -> None:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            for held in scratch.glob(f"{kind}-*/{HELD}"):
                _remove_abandoned(held)
            self.path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=scratch))
            held = self.path / HELD
            lock = os.open(f"{held}.new", os.O_CREAT | os.O_RDWR)
            _locks(lock)
            os.rename(f"{held}.new", held)  # nobody sees it before it is locked
        except OSError as e:
            raise ConfigError(f"{kind}: cannot write {scratch}: {e}; name another folder in `engine.scratch`") from e
        self.remove = weakref.finalize(self, _remove, self.path, lock)  # also for those who forget it


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(held: Path) -> None:
    try:
        file = os.open(held, os.O_RDWR)
    except OSError:
        return  # removed in between, or another user's
    try:
        if _locks(file):
            shutil.rmtree(held.parent, ignore_errors=True)
    finally:
        os.close(file)


def _locks(file: int) -> bool:
    """Whether the file is locked by us now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
