"""WARC and ARC files to raw records, surviving what real archives hold.

Out, in file order: `Raw` for each document-like record (payload: body bytes, HTTP coding undone), `Dropped` for
content that is rightly no document ('http_status', 'record_type', 'too_large'), `Failed` for what cannot be read.
Requests, warcinfo and metadata records are not content and are passed over. Garbage or damage costs one
`Failed('torn_record')` at its offset, then reading goes on at the next record or member.

The origin's offset and length are those of the compressed member that holds the record; in a file that is one big
member (or plain), they are positions in the decompressed stream.

Framing is our own. fastwarc 2.0.1 reads faster (zlib-bound either way, and extraction is forty times slower), but it
stops for good at the first bad byte, ends silently where a member is torn within its header, takes a record without
Content-Length for an empty one, gives all records of a single-member file one position, and does not know ARC.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from core.errors import InputError
from core.records import Dropped, Failed, Origin, Raw
from crawl.sources.http import HEADER_BYTES, parse_headers, parse_message
from crawl.sources.members import MemberStream, TornMemberError

VERSION = re.compile(rb"WARC/\d+\.\d+\s*$")
ARC_LINE = re.compile(rb"(\S.*?) (\S+) (\d{8,17}) (\S+) (\d+)\s*$")  # URL may hold spaces, IP, date, type, length
ARC_LINE_V2 = re.compile(rb"(\S.*?) (\S+) (\d{8,17}) (\S+) \d+ \S+ \S+ \d+ \S+ (\d+)\s*$")
CONTENT_TYPES = frozenset(("response", "resource", "conversion", "revisit", "continuation"))
LINE_BYTES = 32 << 10


@dataclass(frozen=True)
class Head:
    """A record's own header: its type, length in bytes and named fields, whichever format it came from."""

    type: str
    length: int
    headers: dict[str, str]


class _BadHeadError(Exception):
    """What stands where a record must begin is none."""


def read_warc(file: BinaryIO, path: str, types: tuple[str, ...], limit: int) -> Iterator[Raw | Dropped | Failed]:
    """The records of one file. Errors of the store itself (OSError with an errno) are raised."""
    stream = MemberStream(file)
    start: int | None = 0
    lost = False  # the next record's beginning must be searched for
    while True:
        try:
            if lost and not _resync(stream):
                return
            lost = False
            start = _next_start(stream)
            if start is None:
                return
            yield from _record(stream, path, start, types, limit)
        except TornMemberError as e:
            yield Failed(Origin(path, e.offset), "torn_record", str(e))
            if not stream.resume():
                return
        except _BadHeadError as e:
            yield Failed(Origin(path, stream.stored_offset(start or 0)), "torn_record", str(e))
            lost = True


def _next_start(stream: MemberStream) -> int | None:
    """Position of the next record, behind any empty lines; None at the end."""
    while head := stream.peek(512):
        blank = len(head) - len(head.lstrip(b"\r\n"))
        stream.skip(blank)
        if blank < len(head):
            return stream.tell()
    return None


def _record(
    stream: MemberStream, path: str, start: int, types: tuple[str, ...], limit: int
) -> Iterator[Raw | Dropped | Failed]:
    head = _head(stream)
    keep = head.type in types and head.length <= limit
    block = stream.read(head.length) if keep else b""
    got = len(block) if keep else stream.skip(head.length)
    origin = _origin(stream, path, start)
    if got < head.length:
        yield Failed(origin, "torn_record", f"the file ends after {got} of {head.length} bytes of a {head.type} record")
        return
    if head.type not in CONTENT_TYPES:
        return
    url = head.headers.get("warc-target-uri", "").strip("<>") or None
    if head.type not in types:
        yield Dropped(origin, "record_type", head.type, url)
    elif not keep:
        yield Dropped(origin, "too_large", f"{head.length} bytes, limit {limit}", url)
    else:
        yield _content(head, origin, url, block, limit)


def _content(head: Head, origin: Origin, url: str | None, block: bytes, limit: int) -> Raw | Dropped | Failed:
    """One response, resource or conversion record."""
    fetched_at = _date(head.headers.get("warc-date", ""))
    own = {k: v for k, v in head.headers.items() if k.startswith("warc-")}
    declared = head.headers.get("content-type", "")
    if head.type != "response":
        content_type = "text/plain; charset=utf-8" if head.type == "conversion" else declared
        return Raw(origin, block, url, content_type or None, fetched_at, own)
    if not block.startswith(b"HTTP/") and not declared.lower().startswith("application/http"):
        return Dropped(origin, "record_type", declared or "response without HTTP", url)  # e.g. text/dns
    try:
        message = parse_message(block, limit)
    except InputError as e:
        return Failed(origin, "InputError", str(e))
    if message.status != 200:
        return Dropped(origin, "http_status", str(message.status), url)
    if len(message.body) > limit:
        return Dropped(origin, "too_large", f"body unpacks to more than {limit} bytes", url)
    return Raw(origin, message.body, url, message.headers.get("content-type"), fetched_at, {**message.headers, **own})


def _head(stream: MemberStream) -> Head:
    """The header of the record that begins here."""
    line = stream.readline(LINE_BYTES)
    if not VERSION.match(line):
        return _arc_head(stream, line)
    lines, size = [], 0
    while (field := stream.readline(LINE_BYTES)).strip():
        lines.append(field)
        size += len(field)
        if size > HEADER_BYTES:
            raise _BadHeadError(f"the header is longer than {HEADER_BYTES} bytes")
    if not field:
        raise _BadHeadError("the file ends within a header")
    headers = parse_headers(b"".join(lines))
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise _BadHeadError(f"Content-Length is {length!r}")
    return Head(headers.get("warc-type", "").lower(), int(length), headers)


def _arc_head(stream: MemberStream, line: bytes) -> Head:
    """An ARC record's one line, as the WARC header it would have. `filedesc:` is the file's own description."""
    m = ARC_LINE_V2.match(line) or ARC_LINE.match(line)
    if m is None:
        stream.back(len(line))  # the next record may begin within this very line
        raise _BadHeadError(f"no WARC or ARC record begins with {line[:40]!r}")
    url, stamp, declared = m[1].decode("utf-8", "replace"), m[3].decode(), m[4].decode("latin-1")
    if url.startswith("filedesc:"):
        return Head("warcinfo", int(m[5]), {})
    http = stream.peek(5) == b"HTTP/"
    date = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}T{stamp[8:10] or '00'}:{stamp[10:12] or '00'}:{stamp[12:14] or '00'}Z"
    headers = {"warc-target-uri": url, "warc-date": date, "content-type": "application/http" if http else declared}
    return Head("response" if http else "resource", int(m[5]), headers)


def _resync(stream: MemberStream) -> bool:
    """Skip to the next line that begins a record; False at the end."""
    while line := stream.readline(LINE_BYTES):
        if line.startswith((b"http://", b"https://")) and ARC_LINE.match(line):
            stream.back(len(line))
            return True
        i = line.find(b"WARC/")
        if i >= 0 and VERSION.match(line[i:]):
            stream.back(len(line) - i)
            return True
    return False


def _origin(stream: MemberStream, path: str, start: int) -> Origin:
    """Stored offset and length: of the member where the record is one, else of the record in the decompressed
    stream."""
    end = stream.tell()
    if stream.begins_member(start):
        tail = _peek_tail(stream)
        stream.skip(len(tail) - len(tail.lstrip(b"\r\n")))
        if (after := stream.member_end()) is not None:
            at = stream.stored_offset(start)
            return Origin(path, at, after - at)
    return Origin(path, start, end - start)


def _peek_tail(stream: MemberStream) -> bytes:
    """The few bytes behind a record. Damage there is the next record's, which meets it again."""
    try:
        return stream.peek(4)
    except TornMemberError:
        return b""


def _date(value: str) -> datetime | None:
    try:
        stamp = datetime.fromisoformat(value.strip())
    except ValueError:
        return None
    return stamp.astimezone(UTC) if stamp.tzinfo else stamp.replace(tzinfo=UTC)
