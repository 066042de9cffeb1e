"""JSONL to raw records: one object a line, plain (by byte ranges) or compressed.

A line belongs to the range in which its first byte lies. The payload is the object; the origin's offset and length
are those of the line, in the decompressed stream where the file is compressed.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from core.errors import InputError
from core.records import Dropped, Failed, Found, Origin, Raw
from crawl.extract.html import solid
from crawl.sources.config import ChatSource, JsonlSource
from crawl.sources.listing import Piece
from crawl.sources.members import MemberStream, TornMemberError


def read_jsonl(file: BinaryIO, piece: Piece, source: JsonlSource | ChatSource) -> Iterator[Raw | Dropped | Failed]:
    """The records of the lines that begin in the piece's range. A line that cannot be used costs one Failed."""
    path = piece.paths[0]
    stream = MemberStream(file, at=max(0, piece.start - 1))
    try:
        if piece.start:
            _skip_line(stream)
        number = 0
        while piece.end is None or stream.tell() < piece.end:
            start = stream.tell()
            line = stream.readline(source.line_bytes)
            if not line:
                return
            number += 1
            where = f"line {number}" if piece.start == 0 else f"line {number} behind byte {piece.start}"
            if len(line) == source.line_bytes and not line.endswith(b"\n"):
                length = len(line) + _skip_line(stream)
                detail = f"{where}: {length} bytes, limit {source.line_bytes}"
                yield Dropped(Origin(path, start, length), "too_large", detail)
            elif line.strip():
                yield _record(line, Origin(path, start, len(line)), where, source)
    except TornMemberError as e:
        yield Failed(Origin(path, e.offset), "torn_record", str(e))


def parse_row(
    row: dict[str, Any], raw: Raw, text: str, url: str | None, source_id: str | None, kept: Any
) -> Found | Dropped:
    """A document from named values: shared by all sources whose records are text with columns."""
    value = row.get(text)
    if value is None or not solid(value):
        return Dropped(raw.origin, "empty", f"{text} is {'missing' if value is None else 'blank'}", _url(row, url))
    used = {text, url, source_id}
    names = [k for k in row if k not in used] if kept is None else [k for k in kept if k in row]
    metadata = {k: row[k] for k in names if row[k] is not None}
    if source_id is not None and row.get(source_id) is not None:
        metadata["source_id"] = str(row[source_id])
    return Found(raw.origin, value, _url(row, url), "other", metadata=metadata)


def _record(line: bytes, origin: Origin, where: str, source: JsonlSource | ChatSource) -> Raw | Failed:
    torn = not line.endswith(b"\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        reason = "torn_record" if torn else type(e).__name__
        return Failed(origin, reason, f"{where}: {e}")
    if not isinstance(value, dict):
        return Failed(origin, InputError.__name__, f"{where}: got {type(value).__name__}, expected an object")
    text = value.get(source.text) if isinstance(source, JsonlSource) else None
    if isinstance(source, JsonlSource) and text is not None and not isinstance(text, str):
        detail = f"{where}: {source.text!r} is {type(text).__name__}, expected a string"
        return Failed(origin, InputError.__name__, detail)
    return Raw(origin, value, _url(value, source.url))


def _url(row: dict[str, Any], name: str | None) -> str | None:
    value = row.get(name) if name is not None else None
    return value if isinstance(value, str) and value else None


def _skip_line(stream: MemberStream) -> int:
    """Pass over the rest of the line; returns its bytes."""
    passed = 0
    while part := stream.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed
