"""The functions that ingest calls, the same for all kinds of source.

`units` cuts a source into work, `records` reads a unit and survives broken input, `parse` makes one record a document
and may raise, `input_digest` hashes a unit's input for the identity of the run. A vanished file or a refused access
is no bad record: such an OSError is raised by all of them.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, BinaryIO

import xxhash

from core.engines.contract import Unit
from core.hashing import CHUNK_BYTES
from core.records import Dropped, Failed, Found, Origin, Raw
from crawl.extract import extract
from crawl.sources.chat import is_array, parse_chat, read_chat
from crawl.sources.config import (
    ChatSource,
    DatatroveSource,
    FilesSource,
    JsonlSource,
    ParquetSource,
    Stored,
    WarcSource,
)
from crawl.sources.jsonl import parse_row, read_jsonl
from crawl.sources.listing import RANGE_BYTES, Folder, Input, Piece, grouped, ranges, unit_name, whole
from crawl.sources.members import packing
from crawl.sources.tables import check_columns, datatrove_files, read_datatrove, read_parquet, row_group_ranges
from crawl.sources.warc import read_warc

SUFFIX_TYPES = {
    "html": "text/html",
    "htm": "text/html",
    "xhtml": "application/xhtml+xml",
    "pdf": "application/pdf",
    "epub": "application/epub+zip",
    "txt": "text/plain",
    "md": "text/markdown",
    "eml": "message/rfc822",
}


def units(source: Stored) -> list[Unit]:
    """The work of a source, sorted by path; ConfigError where it has none. Same files, same units, in any listing
    order."""
    if isinstance(source, DatatroveSource):
        files = [Input(path, size) for path, size in datatrove_files(source)]
        return [whole(f) for f in files] or [Unit(unit_name(source.reader), Piece(()))]
    folder = Folder(source.path)
    files = folder.inputs(source.files)
    if isinstance(source, FilesSource):
        return grouped(files)
    if isinstance(source, JsonlSource | ChatSource):
        return [unit for f in files for unit in _jsonl_units(folder, f, source)]
    if isinstance(source, ParquetSource):
        return _parquet_units(folder, files, source)
    return [whole(f) for f in files]


def records(source: Stored, unit: Unit) -> Iterator[Raw | Dropped | Failed]:
    """The records of a unit in file order. Broken input gives Failed, never an exception."""
    piece: Piece = unit.payload
    if isinstance(source, DatatroveSource):
        yield from read_datatrove(piece, source)
        return
    folder = Folder(source.path)
    if isinstance(source, FilesSource):
        for path in piece.paths:
            yield _file(folder, path, source)
        return
    with folder.open(piece.paths[0]) as f:
        if isinstance(source, ChatSource):
            yield from read_chat(f, piece, source)
        elif isinstance(source, JsonlSource):
            yield from read_jsonl(f, piece, source)
        elif isinstance(source, ParquetSource):
            yield from read_parquet(f, piece, source)
        else:
            yield from read_warc(f, piece.paths[0], source.types, source.limits.record_bytes)


def parse(source: Stored, raw: Raw) -> Found | Dropped:
    """The document in a record. May raise InputError or what a parser raises: that costs this record only."""
    if isinstance(source, WarcSource | FilesSource):
        return extract(raw, source.limits, source.document_kind, source.license)
    if isinstance(source, ChatSource):
        return parse_chat(raw, source)
    if isinstance(source, DatatroveSource):
        row: dict[str, Any] = {**raw.payload["metadata"], "source_id": raw.payload["id"], "text": raw.payload["text"]}
        found = parse_row(row, raw, "text", "url", None, None)
    else:
        found = parse_row(raw.payload, raw, source.text, source.url, source.id, source.metadata)
    if isinstance(found, Dropped):
        return found
    return replace(found, kind=source.document_kind or found.kind, license=source.license, fetched_at=raw.fetched_at)


def input_digest(source: Stored, unit: Unit) -> str:
    """xxh3_128 of the bytes that the unit reads: its files with their relative paths, or its range of one file."""
    piece: Piece = unit.payload
    h = xxhash.xxh3_128()
    if isinstance(source, DatatroveSource) and not piece.paths:
        for record in read_datatrove(piece, source):  # a reader without files has no other bytes
            h.update(repr(record).encode("utf-8", "surrogatepass"))
        return h.hexdigest()
    folder = Folder(source.path)
    for path in piece.paths:
        h.update(path.encode("utf-8", "surrogatepass") + b"\0")
        with folder.open(path) as f:
            if isinstance(source, ParquetSource):
                _feed(h, f, 0, None)
                h.update(f"{piece.start}:{piece.end}".encode())
            else:
                _feed(h, f, piece.start, piece.end)
    return h.hexdigest()


def _feed(h: Any, f: BinaryIO, start: int, end: int | None) -> None:
    f.seek(start)
    left = None if end is None else end - start
    while left is None or left > 0:
        chunk = f.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not chunk:
            return
        h.update(chunk)
        if left is not None:
            left -= len(chunk)


def _file(folder: Folder, path: str, source: FilesSource) -> Raw | Dropped:
    size = folder.size(path)
    if size > source.limits.record_bytes:
        return Dropped(Origin(path), "too_large", f"{size} bytes, limit {source.limits.record_bytes}")
    with folder.open(path) as f:
        data = f.read()
    return Raw(Origin(path), data, content_type=SUFFIX_TYPES.get(path.rpartition(".")[2].lower()))


def _jsonl_units(folder: Folder, file: Input, source: JsonlSource | ChatSource) -> list[Unit]:
    """Byte ranges of a plain file; a compressed one or an array of conversations cannot be entered in the middle."""
    if file.bytes <= RANGE_BYTES:
        return [whole(file)]
    with folder.open(file.path) as f:
        solid = packing(f.read(8)) is not None
        f.seek(0)
        solid = solid or (isinstance(source, ChatSource) and is_array(f))
    return [whole(file)] if solid else ranges(file)


def _parquet_units(folder: Folder, files: list[Input], source: ParquetSource) -> list[Unit]:
    """Runs of row groups of large files. Footers of small files are left to `records`, but for the first one's
    columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with folder.open(files[0].path) as f, suppress(pa.ArrowInvalid):  # not Parquet: `records` counts it
        check_columns(pq.read_schema(f), source, files[0].path)
    done = []
    for file in files:
        runs = []
        if file.bytes > RANGE_BYTES:
            with folder.open(file.path) as f:
                runs = row_group_ranges(f, RANGE_BYTES)
        if len(runs) < 2:
            done.append(whole(file))
        else:
            done += [
                Unit(unit_name(file.path, n), Piece((file.path,), a, b), size) for n, (a, b, size) in enumerate(runs)
            ]
    return done
