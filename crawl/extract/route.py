"""One raw record to a document: sniff the type, call its reader, name the drop.

Out: `Found` whose metadata holds title, date, language, canonical, links, media_type, encoding, replaced_chars,
extractor and extractor_reason as far as they are known, or `Dropped` with one of 'empty', 'too_short', 'too_large',
'unsupported', 'encrypted', 'scanned', 'damaged'.
"""

import re
from collections.abc import Callable
from typing import Any

from core.records import Dropped, Found, Raw
from crawl.extract.epub import NoBook, read_epub
from crawl.extract.facts import Facts
from crawl.extract.html import Page, read_page, solid
from crawl.extract.limits import Limits
from crawl.extract.pdf import NoText, read_pdf
from crawl.extract.plain import read_mail, read_plain
from crawl.extract.sniff import Decoded, decode, media_type

HTML_TYPES = frozenset(("text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"))
MARKDOWN_TYPES = frozenset(("text/markdown", "text/x-markdown"))
PLAIN_TYPES = frozenset(
    ("text/plain", "text/x-rst", "text/prs.fallenstein.rst", "text/troff", "text/x-tex", "application/x-tex")
)
# A PDF is called a paper only when it names both parts that papers have; else it is 'other'.
PAPER = re.compile(r"^\W*abstract\b.*^\W*(?:\d+\.?\s+)?(?:references|bibliography)\b", re.I | re.M | re.S)

Result = Found | Dropped
Reader = Callable[[Raw, bytes, str, Limits], Result]


def extract(raw: Raw, limits: Limits | None = None, kind: str | None = None, license: str | None = None) -> Result:
    """The document in `raw.payload` (bytes). `kind` overrides what the type suggests."""
    limits = limits or Limits()
    data = raw.payload
    if len(data) > limits.record_bytes:
        return _drop(raw, "too_large", f"{len(data)} bytes, limit {limits.record_bytes}")
    if not data.strip(b"\x00 \t\r\n"):
        return _drop(raw, "empty", "no bytes")
    name = media_type(data, raw.content_type)
    reader = _reader(name)
    if reader is None:
        return _drop(raw, "unsupported", name)
    result = reader(raw, data, name, limits)
    if isinstance(result, Dropped):
        return result
    chars = solid(result.text)
    if chars < limits.min_chars:
        return _drop(raw, "too_short" if chars else "empty", f"{chars} characters, {name}")
    metadata = {k: v for k, v in result.metadata.items() if v not in (None, [], "")}
    return Found(
        origin=raw.origin,
        text=result.text,
        url=raw.url,
        kind=kind or result.kind,
        license=license,
        fetched_at=raw.fetched_at,
        metadata={"media_type": name, **metadata},
    )


def _reader(name: str) -> Reader | None:
    if name in HTML_TYPES:
        return _html
    if name in MARKDOWN_TYPES or name in PLAIN_TYPES:
        return _plain
    return {
        "application/pdf": _pdf,
        "application/epub+zip": _epub,
        "application/zip": _zip,
        "message/rfc822": _mail,
    }.get(name)


def _html(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    if len(data) > limits.html_bytes:
        return _drop(raw, "too_large", f"{len(data)} bytes of HTML, limit {limits.html_bytes}")
    decoded = decode(data, raw.content_type)
    return _page(raw, read_page(decoded.text, raw.url), _decoding(decoded), "web")


def _page(raw: Raw, page: Page, more: dict[str, Any], kind: str) -> Found:
    metadata = {**_facts(page.facts), "extractor": page.extractor, "extractor_reason": page.reason, **more}
    return _found(raw, page.text, kind, metadata)


def _plain(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    plain = read_plain(data, raw.content_type, markdown=name in MARKDOWN_TYPES)
    metadata = {"title": plain.title, "extractor": "plain"}
    if plain.decoded is not None:
        metadata |= _decoding(plain.decoded)
    return _found(raw, plain.text, "web" if raw.url else "other", metadata)


def _mail(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    mail = read_mail(data)
    if not mail.html:
        return _found(raw, mail.text, "mail", {"title": mail.title, "date": mail.date, "extractor": "mail"})
    if len(mail.text) > limits.html_bytes:
        return _drop(raw, "too_large", f"{len(mail.text)} characters of HTML in a mail, limit {limits.html_bytes}")
    return _page(raw, read_page(mail.text), {"title": mail.title, "date": mail.date}, "mail")


def _pdf(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    pdf = read_pdf(data, limits.pdf_pages)
    if isinstance(pdf, NoText):
        return _drop(raw, pdf.reason, pdf.detail)
    kind = "paper" if PAPER.search(pdf.text) else "other"
    return _found(
        raw, pdf.text, kind, {"title": pdf.title, "date": pdf.date, "pages": pdf.pages, "extractor": "pypdfium2"}
    )


def _epub(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    book = read_epub(data, limits)
    if isinstance(book, NoBook):
        return _drop(raw, book.reason, book.detail)
    metadata = {
        "title": book.title,
        "date": book.date,
        "language": book.language,
        "chapters": book.chapters,
        "replaced_chars": book.replaced or None,
        "extractor": "epub",
    }
    return _found(raw, book.text, "book", metadata)


def _zip(raw: Raw, data: bytes, name: str, limits: Limits) -> Result:
    """An ePub whose first entry is not `mimetype`, against the rules but common; any other zip is unsupported."""
    result = _epub(raw, data, name, limits)
    return _drop(raw, "unsupported", name) if isinstance(result, Dropped) and result.reason == "damaged" else result


def _facts(facts: Facts) -> dict[str, Any]:
    return {
        "title": facts.title,
        "date": facts.date,
        "language": facts.language,
        "canonical": facts.canonical,
        "links": list(facts.links),
    }


def _decoding(decoded: Decoded) -> dict[str, Any]:
    return {"encoding": decoded.encoding, "replaced_chars": decoded.replaced or None}


def _found(raw: Raw, text: str, kind: str, metadata: dict[str, Any]) -> Found:
    return Found(raw.origin, text, raw.url, kind, metadata=metadata)


def _drop(raw: Raw, reason: str, detail: str | None = None) -> Dropped:
    return Dropped(raw.origin, reason, detail, raw.url)
