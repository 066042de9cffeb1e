"""A compressed file as one stream that knows where its members lie.

gz, zst, bz2 and xz files are chains of independently compressed members. `MemberStream` gives the decompressed bytes,
the stored offset of the member at any position, and after a damaged member goes on at the next one. gzip.GzipFile
hides the offsets, stops at the first damage; fastwarc ends silently when a member is torn within its header.
"""

import bz2
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

# Input bytes fed at once, so that a bomb unpacks to tens of megabytes before the reader's own limits see it: deflate
# packs 1:1,032, the others far tighter.
FEED = {"gz": 16 << 10, "zst": 1 << 10, "bz2": 2 << 10, "xz": 2 << 10}
MAGIC = {
    "gz": b"\x1f\x8b\x08",
    "zst": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "lz4": b"\x04\x22\x4d\x18",
}
OPEN: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
CHUNK = 1 << 18


class TornMemberError(Exception):
    """The member at stored `offset` is damaged or ends early; what came before it was delivered."""

    def __init__(self, offset: int, detail: str) -> None:
        self.offset = offset
        super().__init__(detail)


def packing(head: bytes) -> str | None:
    """Name of the compression whose magic bytes `head` begins with, or None."""
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)


class MemberStream:
    """Sequential reading with line and peek; positions are in decompressed bytes."""

    def __init__(self, file: BinaryIO, at: int = 0) -> None:
        """`at` is where an uncompressed file is entered; positions still count from its beginning."""
        self._file: Any = file
        self.packing = packing(self._file.read(8)) if at == 0 else None
        self._file.seek(at)
        if self.packing == "lz4":
            from fastwarc.stream_io import Lz4Reader

            self._file = Lz4Reader(file)  # its members are not told apart: offsets are decompressed ones
            self.packing = None
        self._buffer = b""
        self._at = 0  # next byte within the buffer
        self._base = at  # decompressed position of the buffer's first byte
        self._raw = b""  # stored bytes not yet fed
        self._raw_end = 0  # stored position behind `_raw`
        self._decompressor: Any = None
        self._starts: list[int] = []  # decompressed position of each member,
        self._stored: list[int] = []  # and its stored offset
        self._torn: TornMemberError | None = None

    def tell(self) -> int:
        return self._base + self._at

    def stored_offset(self, position: int) -> int:
        """Where a record that begins at `position` is found: its member's offset if it begins one, else `position`."""
        i = bisect_right(self._starts, position) - 1
        return self._stored[i] if i >= 0 and self._starts[i] == position else position

    def begins_member(self, position: int) -> bool:
        i = bisect_right(self._starts, position) - 1
        return i >= 0 and self._starts[i] == position

    def readline(self, limit: int) -> bytes:
        """The next line with its end, or the first `limit` bytes of it; empty at the end."""
        while True:
            end = self._buffer.find(b"\n", self._at, self._at + limit)
            if end >= 0:
                return self._take(end + 1 - self._at)
            if len(self._buffer) - self._at >= limit or not self._more(2 * (len(self._buffer) - self._at) + CHUNK):
                return self._take(min(limit, len(self._buffer) - self._at))

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        while len(self._buffer) - self._at < size and self._more(size):
            pass
        return self._take(min(size, len(self._buffer) - self._at))

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them."""
        while len(self._buffer) - self._at < size and self._more(size):
            pass
        return self._buffer[self._at : self._at + size]

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        passed = 0
        while passed < size and (chunk := self.read(min(CHUNK, size - passed))):
            passed += len(chunk)
        return passed

    def back(self, size: int) -> None:
        """Give back the last `size` bytes of the line just read."""
        self._at -= size

    def member_end(self) -> int | None:
        """Stored offset of the end of the member that ends at the present position; None where none ends here."""
        try:
            if self.packing is not None and not self.peek(1):
                return self._raw_end - len(self._raw)
        except TornMemberError:  # kept, and raised again by the next read
            pass
        return self.stored_offset(self.tell()) if self.begins_member(self.tell()) else None

    def resume(self) -> bool:
        """After TornMemberError: go on at the next member behind the torn one. False where there is none."""
        torn, self._torn = self._torn, None
        if torn is None or self.packing is None:
            return False
        position = torn.offset + 1
        magic = MAGIC[self.packing]
        while (found := self._find_magic(magic, position)) is not None:
            if self._opens(found):
                self._base = self.tell() + 1  # a gap, so that no record can span it
                self._buffer, self._at = b"", 0
                self._file.seek(found)
                self._raw, self._raw_end, self._decompressor = b"", found, None
                return True
            position = found + 1
        return False

    def _take(self, size: int) -> bytes:
        data = self._buffer[self._at : self._at + size]
        self._at += size
        return data

    def _more(self, wanted: int) -> bool:
        """Append decompressed bytes to the buffer, up to about `wanted` unread ones; False at the end."""
        if self._torn is not None:
            raise self._torn
        parts = [self._buffer[self._at :]]
        size = len(parts[0])
        self._base, self._at = self.tell(), 0
        try:
            while size < wanted or len(parts) == 1:
                chunk = self._next(size)
                if not chunk:
                    break
                parts.append(chunk)
                size += len(chunk)
        except TornMemberError as e:
            self._torn = e
            if len(parts) == 1:
                self._buffer = parts[0]
                raise
        self._buffer = b"".join(parts)
        return len(parts) > 1

    def _next(self, ahead: int) -> bytes:
        """The next decompressed chunk, which lies `ahead` bytes behind the buffer's start; empty at the end."""
        if self.packing is None:
            return self._file.read(CHUNK)
        while True:
            if not self._raw:
                self._raw = self._file.read(CHUNK)
                self._raw_end += len(self._raw)
                if not self._raw:
                    if self._decompressor is not None:
                        raise TornMemberError(self._stored[-1], f"the file ends within a {self.packing} member")
                    return b""
            if self._decompressor is None and not self._begin(ahead):
                continue
            feed = FEED[self.packing]
            piece, self._raw = self._raw[:feed], self._raw[feed:]
            try:
                out = self._decompressor.decompress(piece)
            except (zlib.error, zstandard.ZstdError, OSError, lzma.LZMAError, EOFError) as e:
                raise TornMemberError(self._stored[-1], f"{type(e).__name__}: {e}") from None
            if self._decompressor.eof:
                self._raw = self._decompressor.unused_data + self._raw
                self._decompressor = None
            if out:
                return out

    def _begin(self, ahead: int) -> bool:
        """Open the next member. Zero padding between members is passed over, as gzip does."""
        self._raw = self._raw.lstrip(b"\x00")
        if not self._raw:
            return False
        offset = self._raw_end - len(self._raw)
        if len(self._raw) < 8:
            self._raw += (more := self._file.read(CHUNK))
            self._raw_end += len(more)
        if not self._raw.startswith(MAGIC[self.packing or ""]):
            self._starts.append(self._base + ahead)
            self._stored.append(offset)
            raise TornMemberError(offset, f"no {self.packing} member here")
        self._starts.append(self._base + ahead)
        self._stored.append(offset)
        self._decompressor = OPEN[self.packing or ""]()
        return True

    def _find_magic(self, magic: bytes, position: int) -> int | None:
        """Stored offset of the next `magic` at or behind `position`."""
        self._file.seek(position)
        tail = b""
        while chunk := self._file.read(CHUNK):
            data = tail + chunk
            if (i := data.find(magic)) >= 0:
                return position - len(tail) + i
            position += len(chunk)
            tail = data[-(len(magic) - 1) :]
        return None

    def _opens(self, offset: int) -> bool:
        """Whether a member really begins at `offset`: magic bytes also occur by chance within compressed data."""
        self._file.seek(offset)
        trial = OPEN[self.packing or ""]()
        try:
            return bool(trial.decompress(self._file.read(FEED[self.packing or ""])))
        except (zlib.error, zstandard.ZstdError, OSError, lzma.LZMAError, EOFError):
            return False
