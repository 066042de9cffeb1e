"""The log of paid answers: one JSON object a line, appended and flushed to disk before an answer counts as received.

In: entries with a `key`. Out: `answers.jsonl` in a local folder. A paid answer is never lost: a line is written whole and
fsynced; what a power cut tore off at the end is cut away when the log is opened, and its request is sent again. A broken line
anywhere else is damage, and an error. One process at a time holds a log. Keys are kept in memory: 100 bytes each.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from core.errors import StageError

NAME = "answers.jsonl"


class AnswerLog:
    """An open log, as a context. `entries` maps a key to its entry; of several the smallest answer counts, in any order."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            good, self.entries = self._read()
        except BaseException:
            self._file.close()
            raise
        self.torn_bytes = os.fstat(self._file.fileno()).st_size - good
        if self.torn_bytes:
            self._file.truncate(good)
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write entries and return when the disk has them. StageError where it cannot."""
        made = list(entries)
        data = b"".join(json.dumps(e, ensure_ascii=True, sort_keys=True).encode() + b"\n" for e in made)
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise StageError(f"answers: cannot write {self.path}: {e}; make room, then run again") from e
        for entry in made:
            _put(self.entries, entry)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise StageError(f"answers: {self.path} is in use by another run; wait for it, or stop it") from e

    def _read(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """(length of the whole lines, entries)."""
        found: dict[str, dict[str, Any]] = {}
        good = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            entry = _parsed(line)
            if entry is None:
                raise StageError(
                    f"answers: line {number} of {self.path} is damaged, expected a JSON object with a key; restore the file, or "
                    "remove the line to have that answer paid again"
                )
            _put(found, entry)
            good += len(line)
        return good, found


def known_keys(folder: Path) -> set[str]:
    """The keys in a log that may be open elsewhere, for an estimate."""
    path = folder / NAME
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = [_parsed(line) for line in lines if line.endswith(b"\n")]
    return {e["key"] for e in entries if e is not None}


def _put(entries: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    before = entries.get(entry["key"])
    if before is None or _rank(entry) < _rank(before):
        entries[entry["key"]] = entry


def _rank(entry: dict[str, Any]) -> tuple[bool, str]:
    """An answer before a refusal, which may have been asked for once more."""
    return "refused" in entry, json.dumps(entry, sort_keys=True)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None
