"""A crawl's folder made safe in an object store while the crawl goes on.

In: the mirror of the folder (`core.workspace`). A commit holds the WARC files and a snapshot of the frontier that claims just
what is in them. It is due when a WARC file was closed, and otherwise COMMIT_S after the last, or later where commits are slow:
they never take more than about a tenth of the time. The open WARC file and the frontier cross the network whole each time;
closed WARC files once, and then leave this machine.

What the loss of the machine costs: the pages since the last commit, which are fetched again.
"""

import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from core.workspace import Mirror, Workspace

from .warc import file_number, warc_files

COMMIT_S = 300.0  # chosen, untested
REST = 10.0  # times as long as the last commit took, until the next
FRONTIER, SNAPSHOT = "frontier.sqlite", "frontier.snapshot"


class Saver:
    """Commits one crawl's folder. While it does, nobody writes WARC records; the frontier may be used."""

    def __init__(self, mirror: Workspace, commit_s: float = COMMIT_S) -> None:
        self._mirror, self._wait_s = mirror, commit_s
        self._commit_s, self._file, self._saved_at = commit_s, 0, time.monotonic()

    def due(self, file: int) -> bool:
        """Whether it is time; `file` is the number of the open WARC file."""
        return file > self._file or time.monotonic() - self._saved_at >= self._wait_s

    def save(self, file: int) -> None:
        """Commit what is there now."""
        began = time.monotonic()
        folder = self._mirror.path
        snapshot = folder / SNAPSHOT
        copy_database(folder / FRONTIER, snapshot)
        self._commit(snapshot)
        snapshot.unlink()
        self._file, self._saved_at = file, time.monotonic()
        self._wait_s = max(self._commit_s, REST * (self._saved_at - began))

    def finish(self) -> None:
        """Commit the folder of a crawl that has ended; its frontier is closed."""
        self._commit(self._mirror.path / FRONTIER)

    def _commit(self, frontier: Path) -> None:
        folder = self._mirror.path
        self._mirror.commit({FRONTIER: frontier, **{path.name: path for path, _ in warc_files(folder, folder.name)}})


@contextmanager
def saved(workspace: Workspace) -> Iterator[Saver | None]:
    """A saver for a mirror, which also commits what is there when the block ends or is told to stop; None for a local folder."""
    if not isinstance(workspace, Mirror):
        yield None
        return
    saver = Saver(workspace)
    try:
        yield saver
    except (KeyboardInterrupt, SystemExit):
        saver.finish()  # this machine may be about to go
        raise
    saver.finish()


def needed(crawl: str, names: Collection[str]) -> list[str]:
    """Of the files of `crawl` those without which it cannot go on: all but closed WARC files."""
    numbers = {name: number for name in names if (number := file_number(name, crawl)) is not None}
    last = max(numbers.values(), default=0)
    return [name for name in names if numbers.get(name, last) == last]


def copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a database that may be written to meanwhile."""
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # the copy is one file
