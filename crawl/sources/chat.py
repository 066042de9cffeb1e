"""Chat files to raw records: one JSON object a line, or one array of objects in a file, plain or compressed.

A file whose first character is `[` is an array; it is read element by element, so it may be larger than memory. The payload
is the object; offset and length are its bytes in the decompressed stream. Broken JSON costs one record in a JSONL file. In an
array nothing behind it can be found again, so the rest of the file is one reject that says where it begins.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from core.errors import InputError
from core.records import Dropped, Failed, Found, Origin, Raw
from crawl.sources.config import ChatSource
from crawl.sources.conversations import ChatShapeError, read_conversation, render
from crawl.sources.jsonl import read_jsonl
from crawl.sources.listing import Piece
from crawl.sources.members import MemberStream, TornMemberError

TURNS = ("conversations", "messages", "conversation", "images")
BETWEEN = re.compile(r"[\s,]*")
READ = 1 << 20


def is_array(file: BinaryIO) -> bool:
    """Whether the first character of a file that is not white space is `[`. Leaves the file at its beginning."""
    stream = MemberStream(file)
    try:
        head = stream.peek(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    except TornMemberError:
        head = b""
    file.seek(0)
    return head.startswith(b"[")


def read_chat(file: BinaryIO, piece: Piece, source: ChatSource) -> Iterator[Raw | Dropped | Failed]:
    """The records of a chat file or of a range of its lines."""
    if piece.start == 0 and is_array(file):
        yield from _elements(file, piece.paths[0], source.line_bytes)
    else:
        yield from read_jsonl(file, piece, source)


def parse_chat(raw: Raw, source: ChatSource) -> Found | Dropped:
    """The conversation of a record as a document: `text` is its rendering, `metadata["chat"]` the whole of it."""
    record: dict[str, Any] = raw.payload
    try:
        conversation, replaced = read_conversation(record)
    except ChatShapeError as e:
        return Dropped(raw.origin, e.reason, e.detail, raw.url)
    used = {*TURNS, source.url, source.id, "chat", "shape"}
    metadata = {k: v for k, v in record.items() if k not in used and v is not None}
    if source.id is not None and record.get(source.id) is not None:
        metadata["source_id"] = str(record[source.id])
    if replaced:
        metadata["surrogates_replaced"] = replaced
    metadata.update(chat=conversation.canonical, shape=conversation.shape)
    text, _ = render(conversation.messages)
    return Found(
        raw.origin,
        text,
        raw.url,
        source.document_kind or "other",
        source.license or _license(record),
        metadata=metadata,
    )


def _license(record: dict[str, Any]) -> str | None:
    value = record.get("license")
    return value if isinstance(value, str) else None


def _elements(file: BinaryIO, path: str, most: int) -> Iterator[Raw | Failed]:
    """The objects of one array. Bytes that are no UTF-8 become lone surrogates, which a document replaces and counts."""
    stream = _Text(file)
    try:
        stream.skip(re.compile(r"\ufeff?\s*\[\s*"))
        number = 0
        while not stream.at_end() and stream.peek() != "]":
            number += 1
            start = stream.offset
            try:
                value = stream.value(most)
            except (ValueError, RecursionError) as e:
                yield Failed(
                    Origin(path, start), "torn_record", f"element {number}: {e}; the rest of the array is lost"
                )
                return
            origin = Origin(path, start, stream.offset - start)
            if isinstance(value, dict):
                yield Raw(origin, value)
            else:
                detail = f"element {number}: got {type(value).__name__}, expected an object"
                yield Failed(origin, InputError.__name__, detail)
            stream.skip(BETWEEN)
        if stream.at_end():
            yield Failed(
                Origin(path, stream.offset), "torn_record", f"the array ends after element {number} without `]`"
            )
    except TornMemberError as e:
        yield Failed(Origin(path, e.offset), "torn_record", str(e))


class _Text:
    """A byte stream as text from which one JSON value after the other is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._stream = MemberStream(file)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False
        self.offset = 0  # bytes taken

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        data = self._stream.read(size)
        self._ended = len(data) < size
        self._text = self._text[self._at :] + self._decoder.decode(data, self._ended)
        self._at = 0
        return True

    def at_end(self) -> bool:
        while self._at == len(self._text):
            if not self._more(READ):
                return True
        return False

    def peek(self) -> str:
        return self._text[self._at]

    def _take(self, end: int) -> None:
        self.offset += len(self._text[self._at : end].encode("utf-8", "surrogateescape"))
        self._at = end

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Pass over what `pattern` matches, also where it goes on behind what was read."""
        while not self.at_end():
            match = pattern.match(self._text, self._at)
            if match is None:
                return
            end = match.end()
            self._take(end)
            if end < len(self._text):
                return

    def value(self, most: int) -> Any:
        """The JSON value that begins here; ValueError where there is none or it is longer than `most` characters."""
        size = READ
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if len(self._text) - self._at > most or not self._more(size):
                    raise
                size *= 2  # twice as much each time: a value of n bytes is tried log(n) times
                continue
            self._take(end)
            return value
