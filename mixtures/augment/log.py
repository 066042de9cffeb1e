"""The log of paid answers: one JSON object a line, appended and safe before an answer counts as received.

In: entries with a `key`. Out, in a folder of a root: on a local disk `answers.jsonl`; in an object store `answers.jsonl` and then
`answers-00001.jsonl` and so on, closed at PART_BYTES, of which each append writes the last one whole. A paid answer is never
lost: it counts once the disk has synced it, or the store has its part; whoever dies, driver or machine, takes with it only what
had not come home. What a power cut tore off at the end is cut away when the log is opened, and its request is sent again. A
broken line anywhere else is damage, and an error. One process at a time holds a log: on a disk a file lock says so, in a store
the run's lock alone. Keys are kept in memory: 100 bytes each. Traffic to a store: at most PART_BYTES an append; answers that
come while it is under way share the next.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Self

from core.errors import StageError
from core.storage import Root

NAME = "answers.jsonl"
PART_BYTES = 1 << 20  # some 400 answers; an append to a store sends half of it on average: chosen, untested
READS = 16  # parts of a log in a store that are read at once


class AnswerLog:
    """An open log, as a context. `entries` maps a key to its entry; of several the smallest answer counts, in any order."""

    def __init__(self, root: Root, folder: str) -> None:
        self._lines: _File | _Parts = _File(root.local_path(folder)) if root.is_local else _Parts(root, folder)
        try:
            self.entries: dict[str, dict[str, Any]] = {}
            for place, line in self._lines.read():
                _put(self.entries, _entry(place, line))
        except BaseException:
            self._lines.close()
            raise
        self.torn_bytes = self._lines.torn_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write entries and return when they are safe. StageError where they are not."""
        made = list(entries)
        data = b"".join(json.dumps(e, ensure_ascii=True, sort_keys=True).encode() + b"\n" for e in made)
        try:
            self._lines.append(data)
        except OSError as e:
            raise StageError(f"answers: cannot write {self._lines.name}: {e}; make room, then run again") from e
        for entry in made:
            _put(self.entries, entry)


class _File:
    """Lines of a local file. `torn_bytes` is known once `read` has ended."""

    def __init__(self, folder: Path) -> None:
        self.name = folder / NAME
        self.torn_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.name, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise StageError(f"answers: {self.name} is in use by another run; wait for it, or stop it") from e

    def read(self) -> Iterator[tuple[str, bytes]]:
        """(place, line) of all whole lines; what is torn off at the end is cut away."""
        good = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            yield f"line {number} of {self.name}", line
            good += len(line)
        self.torn_bytes = os.fstat(self._file.fileno()).st_size - good
        if self.torn_bytes:
            self._file.truncate(good)
            os.fsync(self._file.fileno())

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Parts:
    """Lines of numbered objects. Only the last may be written again, so the first number that is missing ends the log."""

    def __init__(self, root: Root, folder: str) -> None:
        self._root, self._folder = root, folder
        self.torn_bytes = self._number = 0
        self._tail = b""  # the part that is being filled

    @property
    def name(self) -> str:
        """Of the part that is being filled."""
        return f"{self._folder}/{_part_name(self._number)}"

    def read(self) -> Iterator[tuple[str, bytes]]:
        """(place, line) of all whole lines. What is torn off at the end of the last part, as of a local log that was copied here,
        is cut away; of a part that others follow it is a StageError."""
        for number, data in _parts(self._root, self._folder):
            if self.torn_bytes:
                raise StageError(
                    f"answers: {self.name} is damaged, got {self.torn_bytes} bytes after its last whole line, expected none as "
                    "another part follows; restore the file, or remove these bytes to have that answer paid again"
                )
            self._number = number
            self._tail = data[: data.rfind(b"\n") + 1]
            self.torn_bytes = len(data) - len(self._tail)
            for i, line in enumerate(self._tail.split(b"\n")[:-1], start=1):
                yield f"line {i} of {self.name}", line
        if self.torn_bytes:
            self._root.write_bytes(self.name, self._tail)
        self._close_part()

    def append(self, data: bytes) -> None:
        self._root.write_bytes(self.name, self._tail + data)
        self._tail += data
        self._close_part()

    def close(self) -> None:
        """Nothing is open."""

    def _close_part(self) -> None:
        if len(self._tail) >= PART_BYTES:
            self._number, self._tail = self._number + 1, b""


def known_keys(root: Root, folder: str) -> set[str]:
    """The keys in a log that may be open elsewhere, for an estimate."""
    lines = (line for _, data in _parts(root, folder) for line in data.split(b"\n")[:-1])
    entries = [_parsed(line) for line in lines]
    return {e["key"] for e in entries if e is not None}


def _parts(root: Root, folder: str) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the files of a log, in order."""

    def read(number: int) -> bytes | None:
        try:
            return root.read_bytes(f"{folder}/{_part_name(number)}")
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(READS) as pool:
        for first in count(0, READS):
            numbers = range(first, first + READS)
            for number, data in zip(numbers, pool.map(read, numbers), strict=True):
                if data is None:
                    return
                yield number, data


def _part_name(number: int) -> str:
    return NAME if number == 0 else f"answers-{number:05d}.jsonl"


def _put(entries: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    before = entries.get(entry["key"])
    if before is None or _rank(entry) < _rank(before):
        entries[entry["key"]] = entry


def _rank(entry: dict[str, Any]) -> tuple[bool, str]:
    """An answer before a refusal, which may have been asked for once more."""
    return "refused" in entry, json.dumps(entry, sort_keys=True)


def _entry(place: str, line: bytes) -> dict[str, Any]:
    entry = _parsed(line)
    if entry is None:
        raise StageError(
            f"answers: {place} is damaged, expected a JSON object with a key; restore the file, or remove the line to have that "
            "answer paid again"
        )
    return entry


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None
