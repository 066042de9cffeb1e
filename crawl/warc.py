"""WARC/1.1 files (IIPC, warc-1.1): one gzip member per record, and a length that is known to be good.

In: captures with their metadata. Out: `<name>-<nnnnn>.warc.gz`, each opened by a `warcinfo` record, rolled at
`roll_bytes`; for each capture a `response`, its `request` and a `metadata` record. Record ids and dates are all that
differs between two writings of the same captures.

The frontier remembers (file number, length) in the very transaction that marks pages done, after the bytes were
synced. What lies beyond that point at the next start - a torn gzip member, or whole records of pages that were never
marked - is cut off, and those pages are fetched again. So each page is in the files exactly once, and the files are
valid after any kill.

Digests are SHA-1 in base 32, as in CDX indexes. WARC-Payload-Digest covers the body as it lies in the block, chunk
framing included: warcio 1.8 and fastwarc 2.0 both verify it so (read and tried), although the standard can be read
otherwise.
"""

import base64
import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from core.errors import StageError

from .fetch import Capture

ROLL_BYTES = 1_000_000_000  # Heritrix and Common Crawl roll at 1e9
LEVEL = 6
Headers = list[tuple[str, str]]


class Position(NamedTuple):
    """Everything before it is good: number of the current file and its length."""

    file: int
    length: int


class Location(NamedTuple):
    """Where a response record lies."""

    file: int
    offset: int
    length: int


@dataclass
class Entry:
    """One capture to write, with the facts for its metadata record."""

    capture: Capture
    metadata: Mapping[str, Any]


class WarcWriter:
    """Appends to the files of one crawl. Not for concurrent use."""

    def __init__(
        self, folder: Path, name: str, good: Position, info: Mapping[str, str], roll_bytes: int = ROLL_BYTES
    ) -> None:
        """Cut everything after `good`, which is (0, 0) for a crawl that wrote nothing yet."""
        self.folder, self.name, self.info, self.roll_bytes = folder, name, info, roll_bytes
        self._number = good.file
        self._cut(good)
        self._file: BinaryIO = open(self._path(good.file), "ab")  # noqa: SIM115 - lives as long as the writer
        _sync_folder(folder)

    def append(self, entries: Sequence[Entry]) -> tuple[list[Location], Position]:
        """Write and sync; the locations of the response records, and the new good position."""
        places = []
        for entry in entries:
            if self._file.tell() >= self.roll_bytes:
                self._roll()
            if self._file.tell() == 0:
                self._write([("WARC-Type", "warcinfo"), *self._info_headers()], self._info_block())
            places.append(self._write_entry(entry))
        self._sync()
        return places, Position(self._number, self._file.tell())

    def close(self) -> None:
        """Leaves no file behind where nothing was ever written."""
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self._path(self._number).unlink()

    def total_bytes(self) -> int:
        """Bytes of all files of this crawl."""
        return sum(path.stat().st_size for path, _ in warc_files(self.folder, self.name))

    def _write_entry(self, entry: Entry) -> Location:
        capture = entry.capture
        about = [("WARC-Target-URI", capture.url), ("WARC-Date", _date(capture.started_at))]
        response_id, offset = _record_id(), self._file.tell()
        head = [("WARC-Type", "response"), ("WARC-Record-ID", response_id), *about, ("WARC-IP-Address", capture.ip)]
        head.append(("Content-Type", "application/http;msgtype=response"))
        head.append(("WARC-Payload-Digest", _digest(memoryview(capture.raw)[capture.header_bytes :])))
        if capture.truncated:
            head.append(("WARC-Truncated", capture.truncated))
        self._write(head, capture.raw)
        place = Location(self._number, offset, self._file.tell() - offset)
        head = [("WARC-Type", "request"), ("WARC-Record-ID", _record_id()), *about, ("WARC-Concurrent-To", response_id)]
        self._write([*head, ("Content-Type", "application/http;msgtype=request")], capture.request)
        head = [("WARC-Type", "metadata"), ("WARC-Record-ID", _record_id()), *about, ("WARC-Refers-To", response_id)]
        block = json.dumps(dict(entry.metadata), sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        self._write([*head, ("Content-Type", "application/json")], block)
        return place

    def _write(self, headers: Headers, block: bytes | bytearray) -> None:
        headers = [*headers, ("WARC-Block-Digest", _digest(block)), ("Content-Length", str(len(block)))]
        text = "".join(f"{name}: {value}\r\n" for name, value in headers)
        gzip = zlib.compressobj(LEVEL, wbits=31)  # no file name and no time in the gzip header
        self._file.write(gzip.compress(f"WARC/1.1\r\n{text}\r\n".encode()))
        self._file.write(gzip.compress(block))
        self._file.write(gzip.compress(b"\r\n\r\n") + gzip.flush())

    def _info_headers(self) -> Headers:
        now = _date(datetime.now(UTC).timestamp())
        name = self._path(self._number).name
        return [
            ("WARC-Record-ID", _record_id()), ("WARC-Date", now), ("WARC-Filename", name),
            ("Content-Type", "application/warc-fields"),
        ]  # fmt: skip

    def _info_block(self) -> bytes:
        return "".join(f"{key}: {value}\r\n" for key, value in self.info.items()).encode()

    def _roll(self) -> None:
        self._sync()
        self._file.close()
        self._number += 1
        self._file = open(self._path(self._number), "ab")  # noqa: SIM115
        _sync_folder(self.folder)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.warc.gz"

    def _cut(self, good: Position) -> None:
        """Remove files after the good one and its tail."""
        for path, number in warc_files(self.folder, self.name):
            if number > good.file:
                path.unlink()
        path = self._path(good.file)
        length = path.stat().st_size if path.exists() else 0
        if length < good.length:
            raise StageError(
                f"crawl: {path.name} lost bytes, got {length}, expected {good.length}; restore it or use a new folder"
            )
        if length > good.length:
            os.truncate(path, good.length)


def warc_files(folder: Path, name: str) -> list[tuple[Path, int]]:
    """(path, number) of the files of crawl `name`, in order."""
    numbered = ((path, file_number(path.name, name)) for path in folder.iterdir())
    return sorted(((path, number) for path, number in numbered if number is not None), key=lambda file: file[1])


def file_number(file: str, name: str) -> int | None:
    """The number of a file of crawl `name`; None where it is no WARC file of it."""
    match = re.fullmatch(re.escape(name) + r"-(\d{5,})\.warc\.gz", file)
    return int(match[1]) if match else None


def _digest(data: bytes | bytearray | memoryview) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data).digest()).decode()


def _record_id() -> str:
    return f"<urn:uuid:{uuid.uuid4()}>"


def _date(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
