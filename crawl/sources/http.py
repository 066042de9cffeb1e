"""A stored HTTP message to status, headers and decoded body. Lenient: archives hold what servers really sent.

Bodies that a writer had already unchunked or unpacked while it kept the headers are recognised and left alone.
Unpacking stops at a limit, so a compression bomb costs no more than that.
"""

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from core.errors import InputError

STATUS = re.compile(rb"HTTP/\d(?:\.\d)?\s+(\d{3})")
CHUNK_SIZE = re.compile(rb"\s*([0-9a-fA-F]{1,15})\s*(?:;[^\r\n]*)?\r?\n")
HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Message:
    """`headers` have lower-case names; of repeated ones the values are joined by ', '."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse_message(block: bytes, limit: int) -> Message:
    """The message in a response block; its body decoded to at most `limit` bytes (+ 1 where there is more).

    InputError where there is no status line or the body's coding is broken from the first byte."""
    status = STATUS.match(block)
    if status is None:
        raise InputError(f"warc: not an HTTP response, got {block[:40]!r}, expected a status line")
    head, body = split_head(block)
    headers = parse_headers(head.split(b"\n", 1)[1] if b"\n" in head else b"")
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = unchunk(body)
    for coding in reversed([c.strip().lower() for c in headers.get("content-encoding", "").split(",")]):
        body = unpack(body, coding, limit)
    return Message(int(status[1]), headers, body)


def split_head(block: bytes) -> tuple[bytes, bytes]:
    """Header part and body around the first empty line, whose line ends may be CRLF or LF."""
    ends = [(i, len(gap)) for gap in (b"\r\n\r\n", b"\n\n", b"\n\r\n") if (i := block.find(gap, 0, HEADER_BYTES)) >= 0]
    if not ends:
        return block, b""
    start, gap = min(ends)
    return block[:start], block[start + gap :]


def parse_headers(head: bytes) -> dict[str, str]:
    """Header lines to lower-case names; folded lines are joined, lines without a colon ignored."""
    headers: dict[str, str] = {}
    last = None
    for line in head.splitlines():
        text = _text(line)
        if line[:1] in (b" ", b"\t") and last:
            headers[last] += " " + text.strip()
            continue
        name, colon, value = text.partition(":")
        if not colon:
            continue
        last = name.strip().lower()
        headers[last] = f"{headers[last]}, {value.strip()}" if last in headers else value.strip()
    return headers


def unchunk(body: bytes) -> bytes:
    """The body without chunk framing. Not chunked after all: unchanged. Framing that breaks off: what came before."""
    parts: list[bytes] = []
    position = 0
    while m := CHUNK_SIZE.match(body, position):
        size = int(m[1], 16)
        if size == 0:
            return b"".join(parts)
        data = body[m.end() : m.end() + size]
        parts.append(data)
        position = m.end() + size
        if len(data) < size:
            break
        if body.startswith(b"\r\n", position):
            position += 2
        elif body.startswith(b"\n", position):
            position += 1
        elif position < len(body):
            return body if len(parts) == 1 else b"".join(parts)
    return b"".join(parts) if parts else body


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    """One content coding undone; a torn end keeps what came before, an unknown coding is an InputError."""
    if coding in ("", "identity", "none", "utf-8") or not body:
        return body
    if coding in ("gzip", "x-gzip"):
        return _inflate(body, 31, limit) if body.startswith(b"\x1f\x8b") else body
    if coding == "deflate":
        if body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0:  # a zlib header, RFC 1950
            return _inflate(body, 15, limit)
        return _inflate(body, -15, limit)
    if coding == "zstd":
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body, read_across_frames=True)
        return body if not body.startswith(b"\x28\xb5\x2f\xfd") else _read_to_limit(reader.read, limit, coding)
    if coding == "br":
        from fastwarc.stream_io import BrotliReader

        return _read_to_limit(BrotliReader(io.BytesIO(body)).read, limit, coding)
    raise InputError(f"warc: cannot undo content coding, got {coding!r}, expected gzip, deflate, br or zstd")


def _inflate(body: bytes, wbits: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=wbits)
    parts: list[bytes] = []
    size, data = 0, body
    while data and size <= limit and not decompressor.eof:
        try:
            out = decompressor.decompress(data[: 64 << 10], limit + 1 - size)
        except zlib.error as e:
            if not parts:
                raise InputError(f"warc: broken compressed body: {e}") from None
            break
        parts.append(out)
        size += len(out)
        data = decompressor.unconsumed_tail + data[64 << 10 :]
    return b"".join(parts)


def _read_to_limit(read: Callable[[int], bytes], limit: int, coding: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size <= limit:
        try:
            chunk = read(min(1 << 16, limit + 1 - size))
        except (OSError, zstandard.ZstdError) as e:
            if not parts:
                raise InputError(f"warc: broken {coding} body: {e}") from None
            break
        if not chunk:
            break
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts)


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        return line.decode("latin-1").rstrip("\r\n")
