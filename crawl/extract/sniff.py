"""What a record is, and its bytes as text.

`media_type` trusts the first bytes before any header: servers send PDFs as text/html and pages as text/plain. `decode`
tries byte-order mark, HTTP charset, `<meta>`, detector, in that order; what cannot be decoded becomes U+FFFD and is
counted.
"""

import codecs
import re
from dataclasses import dataclass

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

HEAD_BYTES = 4096  # the WHATWG sniffing standard reads 1,445 bytes; pages with long comments first need more
DETECT_BYTES = 1 << 17
# a declared encoding that loses more than this share of its characters is not believed; chosen, untested
BAD_SHARE = 0.01

MAGIC = (
    (b"\x89PNG\r\n", "image/png"),
    (b"GIF8", "image/gif"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"%!PS", "application/postscript"),
    (b"{\\rtf", "application/rtf"),
    (b"\xd0\xcf\x11\xe0", "application/x-ole-storage"),
    (b"\x1f\x8b\x08", "application/gzip"),
    (b"\x28\xb5\x2f\xfd", "application/zstd"),
    (b"BZh", "application/x-bzip2"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"),
    (b"Rar!", "application/vnd.rar"),
    (b"ID3", "audio/mpeg"),
    (b"OggS", "application/ogg"),
    (b"\x00asm", "application/wasm"),
    (b"wOF", "font/woff"),
)
BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# WHATWG names whose Python codec has another name or is narrower than what browsers decode.
PYTHON_CODEC = {
    "latin-1": "cp1252",  # not a WHATWG label, but common in mail
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "big5": "big5hkscs",
    "windows-874": "cp874",
    "iso-8859-8-i": "iso-8859-8",
    "macintosh": "mac_roman",
    "x-mac-cyrillic": "mac_cyrillic",
}
HTML_START = re.compile(
    rb"(?:<!--.{0,2048}?-->|<\?xml[^>]{0,200}>|\s)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S
)
HTML_TAG = re.compile(rb"<(?:title|meta|body|div|p|table|br|a\s|span|h[1-6]|script|style|ul|font|center)\b[^<]*>", re.I)
META_CHARSET = re.compile(rb"<meta\b[^>]{0,512}?charset\s*=\s*[\"']?\s*([\w:.-]{2,40})", re.I)
XML_ENCODING = re.compile(rb"<\?xml[^>]{0,100}?encoding\s*=\s*[\"']([\w:.-]{2,40})", re.I)
HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w:.-]{2,40})", re.I)
CONTROLS = bytes(set(range(32)) - {9, 10, 11, 12, 13, 27})


@dataclass(frozen=True)
class Decoded:
    """Text, the Python codec that gave it, where that codec was found, and how many U+FFFD decoding added."""

    text: str
    encoding: str
    source: str  # 'bom', 'http', 'meta', 'detected' or 'default'
    replaced: int


def media_type(data: bytes, declared: str | None = None) -> str:
    """The lower-case media type of `data`; 'application/octet-stream' where bytes are no text and no magic matches."""
    head = data[:HEAD_BYTES]
    if b"%PDF-" in head[:1024]:
        return "application/pdf"
    if head.startswith(b"PK\x03\x04"):
        return "application/epub+zip" if b"mimetypeapplication/epub+zip" in head[:128] else "application/zip"
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        return "video/mp4"
    if head[:4] == b"RIFF":
        return "image/webp" if head[8:12] == b"WEBP" else "application/x-riff"
    has_bom = any(head.startswith(mark) for mark, _ in BOMS)
    if HTML_START.match(head.removeprefix(codecs.BOM_UTF8)):
        return "text/html"
    name = (declared or "").split(";")[0].strip().lower()
    if (
        name
        and "/" in name
        and name not in ("application/octet-stream", "application/force-download", "unknown/unknown")
    ):
        return name
    if not has_bom and len(head.translate(None, CONTROLS)) < 0.95 * len(head):
        return "application/octet-stream"
    return "text/html" if HTML_TAG.search(head) else "text/plain"


def decode(data: bytes, content_type: str | None = None, markup: bool = True) -> Decoded:
    """`data` as text that is valid UTF-8. `markup` looks for a charset in `<meta>` or the XML declaration."""
    for mark, codec in BOMS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], codec, "bom")
    for label, source in _declared(data, content_type, markup):
        declared = python_codec(label)
        if declared is None:
            continue
        result = _decoded(data, declared, source)
        if result.replaced <= BAD_SHARE * len(result.text):
            return result
    try:
        return Decoded(data.decode("utf-8"), "utf-8", "default", 0)
    except UnicodeDecodeError:
        detected = python_codec(detect_encoding(data, max_len=DETECT_BYTES) or "")
        result = _decoded(data, detected or "utf-8", "detected")
        # Few bytes make the detector say UTF-8 of what is none: then the web's default, as in the HTML standard.
        return result if result.replaced <= BAD_SHARE * len(result.text) else _decoded(data, "cp1252", "default")


def python_codec(label: str) -> str | None:
    """The Python codec for a WHATWG encoding label, or None: labels such as 'hex' or 'utf-7' are never looked up."""
    label = label.strip().lower()
    name = label if label in PYTHON_CODEC else map_encoding_to_html5(label, fallback_utf8=False)
    if not name or name in ("replacement", "x-user-defined"):
        return None
    codec = PYTHON_CODEC.get(name, name)
    try:
        return codecs.lookup(codec).name
    except LookupError:
        return None


def _declared(data: bytes, content_type: str | None, markup: bool) -> list[tuple[str, str]]:
    """(label, where it was found) of each declared encoding, most trusted first."""
    found = []
    if content_type and (m := HEADER_CHARSET.search(content_type)):
        found.append((m[1], "http"))
    if markup:
        head = data[:HEAD_BYTES]
        if tag := META_CHARSET.search(head) or XML_ENCODING.search(head):
            label = tag[1].decode("ascii", "replace")
            # A <meta> that could be read as ASCII cannot stand in a UTF-16 file: HTML standard, section 13.2.3.2.
            found.append(("utf-8" if label.lower().startswith("utf-16") else label, "meta"))
    return found


def _decoded(data: bytes, codec: str, source: str) -> Decoded:
    text = data.decode(codec, "replace")
    replaced = text.count("\ufffd")
    if replaced and codec == "utf-8":
        replaced -= data.count(b"\xef\xbf\xbd")  # the page's own replacement characters are not our loss
    return Decoded(text, codec, source, max(0, replaced))
