"""ePub to text: container.xml, package (OPF), spine order, each XHTML file's whole body.

In: bytes. Out: `Book`, or the reason of a drop: 'encrypted' (DRM over the text), 'too_large' (entries or unpacked
bytes beyond the limits), 'damaged' (not a zip, no package, no spine). Navigation and cover pages are skipped. Names
are only looked up in the archive's own directory, nothing is unpacked to disk, so '..' and absolute names reach no
file; archives inside the archive are never opened. Own reader because EbookLib is AGPL.
"""

import posixpath
import re
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import unquote

from lxml import etree
from resiliparse.parse.html import HTMLTree
from selectolax.lexbor import LexborHTMLParser

from crawl.extract import guard
from crawl.extract.facts import iso_date
from crawl.extract.html import visible_text
from crawl.extract.limits import Limits
from crawl.extract.maths import has_maths, inline_maths
from crawl.extract.sniff import decode

CONTAINER = "META-INF/container.xml"
ENCRYPTION = "META-INF/encryption.xml"
# Font obfuscation is no DRM: the two algorithms of the EPUB OCF specification, section 4.4, and Adobe's.
FONT_ALGORITHMS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
XHTML_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
SKIPPED_ID = re.compile(r"^(?:cover|nav|toc|titlepage|cover[-_]?(?:page|image|xhtml|html))$", re.I)
PACKAGE_BYTES = 8 << 20  # container, package and encryption files are kilobytes


@dataclass(frozen=True)
class Book:
    """Text and facts of one ePub."""

    text: str
    title: str | None
    date: str | None
    language: str | None
    chapters: int
    replaced: int  # characters that could not be decoded


@dataclass(frozen=True)
class NoBook:
    """Why an ePub gives no text."""

    reason: str
    detail: str | None = None


class _DamagedError(Exception):
    """The archive does not hold what an ePub must."""


def read_epub(data: bytes, limits: Limits) -> Book | NoBook:
    """All chapters in spine order, apart by an empty line."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(e.file_size for e in entries)
            if len(entries) > limits.epub_entries or total > limits.epub_bytes:
                return NoBook("too_large", f"{len(entries)} entries, {total} bytes unpacked")
            return _read(archive, limits)
    except (zipfile.BadZipFile, zlib.error, etree.XMLSyntaxError, _DamagedError, EOFError, NotImplementedError) as e:
        return NoBook("damaged", f"{type(e).__name__}: {e}")
    except RuntimeError as e:  # zipfile's word for an entry with a password
        return NoBook("encrypted", str(e))


def _read(archive: zipfile.ZipFile, limits: Limits) -> Book | NoBook:
    package_path = _package_path(archive, limits)
    package = _xml(_entry(archive, package_path, PACKAGE_BYTES))
    folder = posixpath.dirname(package_path)
    chapters = [posixpath.normpath(posixpath.join(folder, href)) for href in _spine(package)]
    if not chapters:
        raise _DamagedError("the spine names no text")
    locked = _encrypted(archive).intersection(chapters)
    if locked:
        return NoBook("encrypted", f"{len(locked)} of {len(chapters)} chapters")
    texts, replaced = [], 0
    for path in chapters:
        decoded = decode(_entry(archive, path, limits.html_bytes))
        replaced += decoded.replaced
        texts.append(chapter_text(decoded.text))
    return Book(
        text="\n\n".join(t for t in texts if t),
        title=_dc(package, "title"),
        date=iso_date(_dc(package, "date")),
        language=_dc(package, "language"),
        chapters=len(chapters),
        replaced=replaced,
    )


def chapter_text(xhtml: str) -> str:
    """A chapter's whole body: in a book nothing is boilerplate."""
    xhtml = re.sub(r"^\s*<\?xml[^>]*\?>", "", guard.trim_attributes(guard.without_surrogates(xhtml)), count=1)
    # HTML parsers take `<title/>` and `<script .../>` for start tags and swallow the book.
    xhtml = re.sub(r"<(title|script|style|textarea|iframe|a|p|div|span|i|b|em)\b([^<>]*)/>", r"<\1\2></\1>", xhtml)
    if has_maths(xhtml) and not guard.too_deep(xhtml):
        page = LexborHTMLParser(xhtml)
        if inline_maths(page):
            xhtml = page.html or ""
    return visible_text(HTMLTree.parse(xhtml))


def _entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """One entry, never more than `limit` bytes whatever its directory claims. Names are looked up, never followed."""
    try:
        with archive.open(name) as f:
            data = f.read(limit + 1)
    except KeyError:
        raise _DamagedError(f"no entry {name!r}") from None
    if len(data) > limit:
        raise _DamagedError(f"entry {name!r} is larger than {limit} bytes")
    return data


def _package_path(archive: zipfile.ZipFile, limits: Limits) -> str:
    root = _xml(_entry(archive, CONTAINER, PACKAGE_BYTES))
    for rootfile in root.iter("{*}rootfile"):
        if path := rootfile.get("full-path"):
            return posixpath.normpath(unquote(path))
    raise _DamagedError("container.xml names no package")


def _spine(package: Any) -> list[str]:
    """Hrefs of the linear reading order, decoded, without navigation and cover."""
    items = {i.get("id"): i for i in package.iter("{*}item") if i.get("id")}
    skipped = {
        ref.get("href", "").partition("#")[0]
        for ref in package.iter("{*}reference")
        if ref.get("type") in ("cover", "toc")
    }
    hrefs: dict[str, None] = {}
    for ref in package.iter("{*}itemref"):
        item = items.get(ref.get("idref"))
        if item is None or item.get("media-type") not in XHTML_TYPES:
            continue
        href = (item.get("href") or "").partition("#")[0]
        navigation = "nav" in (item.get("properties") or "").split()
        if href and not navigation and href not in skipped and not SKIPPED_ID.match(item.get("id")):
            hrefs.setdefault(unquote(href))
    return list(hrefs)


def _encrypted(archive: zipfile.ZipFile) -> set[str]:
    """Names that META-INF/encryption.xml covers with anything but font obfuscation."""
    if ENCRYPTION not in archive.namelist():
        return set()
    root = _xml(_entry(archive, ENCRYPTION, PACKAGE_BYTES))
    covered: set[str] = set()
    for block in root.iter("{*}EncryptedData"):
        method = block.find("{*}EncryptionMethod")
        if method is not None and method.get("Algorithm") in FONT_ALGORITHMS:
            continue
        covered.update(posixpath.normpath(unquote(r.get("URI", ""))) for r in block.iter("{*}CipherReference"))
    return covered


def _dc(package: Any, name: str) -> str | None:
    for element in package.iter("{http://purl.org/dc/elements/1.1/}" + name):
        if text := " ".join("".join(element.itertext()).split()):
            return text
    return None


def _xml(data: bytes) -> Any:
    """The root element, without entities, DTDs or network."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=True)
    root = etree.fromstring(data, parser)
    if root is None:
        raise _DamagedError("empty XML")
    return root
