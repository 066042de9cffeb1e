"""What a body is: its kind by the first bytes and the header, and its content coding undone within bounds.

In: pieces of a body as received, and what the headers claim. Out: decoded bytes, never more than asked for, and one
of html, pdf, epub, txt. Only gzip and deflate are asked for and decoded; Python has no brotli decoder with an output
bound.
"""

import zlib

SNIFF_BYTES = 512
TYPES = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/x-pdf": "pdf",
    "application/epub+zip": "epub",
    "text/plain": "txt",
}
UNTOLD = frozenset({"", "application/octet-stream", "binary/octet-stream", "unknown/unknown", "application/download"})


class Decoder:
    """Content decoding with a bound on each output."""

    def __init__(self, coding: str) -> None:
        self.coding = coding.strip().lower()
        self.decoded_bytes = 0
        self.is_whole = self.coding in ("", "identity")  # nothing is missing so far
        self._zlib = zlib.decompressobj(wbits=47) if self.coding in ("gzip", "x-gzip", "deflate") else None
        self._broken = False

    def decode(self, data: bytes, room_bytes: int) -> bytes:
        """At most `room_bytes` of output; the rest of this input is dropped, for the caller stops at the cap anyway.

        An unknown coding gives nothing, a broken stream nothing more.
        """
        if self._zlib is None:
            out = data if self.is_whole else b""
        else:
            out = self._inflate(data, room_bytes)
        self.decoded_bytes += len(out)
        return out

    def _inflate(self, data: bytes, room_bytes: int) -> bytes:
        assert self._zlib is not None
        out = bytearray()
        while data and not self._broken and len(out) < room_bytes:
            try:
                out += self._zlib.decompress(data, room_bytes - len(out))
            except zlib.error:
                if self.coding == "deflate" and not self.decoded_bytes and not out:
                    self.coding = "raw deflate"  # many servers mean it by 'deflate'
                    self._zlib = zlib.decompressobj(wbits=-15)
                    continue
                self._broken = True  # after a whole member this is padding
                break
            data = b""
            if self._zlib.eof:
                self.is_whole, data = True, self._zlib.unused_data
                if data:  # several gzip members in one body
                    self._zlib = zlib.decompressobj(wbits=47)
        return bytes(out)


def sniff(content_type: str, head: bytes) -> str | None:
    """html, pdf, epub, txt or None from the first bytes, then the header: magic numbers beat what servers claim."""
    if head.lstrip(b"\0\t\r\n ").startswith(b"%PDF-"):
        return "pdf"
    if head.startswith(b"PK\x03\x04") and b"mimetypeapplication/epub+zip" in head[:100]:
        return "epub"
    named = content_type.partition(";")[0].strip().lower()
    start = head.lstrip(b"\xef\xbb\xbf\t\r\n ").lower()
    if named in UNTOLD:
        return "html" if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) else None
    if named == "text/plain" and start.startswith((b"<!doctype html", b"<html")):
        return "html"
    kind = TYPES.get(named)
    return None if kind in ("pdf", "epub") else kind  # named so, but the bytes say otherwise


def parameter(header: str, name: str) -> str:
    """A parameter of a Content-Type header, '' where it is absent or empty."""
    for part in header.split(";")[1:]:
        key, _, value = part.partition("=")
        if key.strip().lower() == name:
            return value.strip().strip("\"'")
    return ""
