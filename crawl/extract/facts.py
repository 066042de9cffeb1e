"""What a page says about itself: title, date, language, canonical URL, links. All cheap look-ups in a parsed tree.

Dates are ISO 8601 as far as the page gives them ('2024-05-01' or with time); a date that does not parse is None. htmldate
finds more dates, at 5 to 30 ms a page; this costs well under one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from resiliparse.parse.html import HTMLTree

MAX_LINKS = 256
MAX_TITLE_CHARS = 1_000
MAX_JSON_LD_CHARS = 200_000  # chosen, untested; product feeds embed megabytes

DATE_META = (  # most specific first
    "article:published_time",
    "og:published_time",
    "datepublished",
    "citation_publication_date",
    "citation_date",
    "dc.date.issued",
    "dcterms.issued",
    "dc.date",
    "dc.date.created",
    "pubdate",
    "publishdate",
    "publish-date",
    "parsely-pub-date",
    "sailthru.date",
    "date",
)
LEADING_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")


@dataclass(frozen=True)
class Facts:
    """None and empty mean that the page does not say."""

    title: str | None = None
    date: str | None = None
    language: str | None = None
    canonical: str | None = None
    links: tuple[str, ...] = ()


def read_facts(tree: HTMLTree, url: str | None = None) -> Facts:
    """Facts of one page; relative links are resolved against `<base>` or `url`, and left out where both are missing."""
    document = tree.document
    if document is None:
        return Facts()
    metas = _metas(document)
    root = document.query_selector("html")
    base_tag = document.query_selector("base[href]")
    base = _join(url, base_tag.getattr("href")) or url if base_tag is not None else url
    canonical = document.query_selector('link[rel="canonical"]')
    title = tree.title or metas.get("og:title") or _first_heading(document)
    return Facts(
        title=" ".join(title.split())[:MAX_TITLE_CHARS] or None if title else None,
        date=_date(document, metas),
        language=(root.getattr("lang") or root.getattr("xml:lang") or None) if root is not None else None,
        canonical=_join(base, canonical.getattr("href")) if canonical is not None else None,
        links=_links(document, base),
    )


def iso_date(value: object) -> str | None:
    """`value` as an ISO date or date-time, or None. Accepts ISO 8601 and any text that begins with y-m-d, y/m/d or y.m.d."""
    if not isinstance(value, str):
        return None
    value = value.strip()
    try:
        stamp = datetime.fromisoformat(value)
    except ValueError:
        m = LEADING_DATE.match(value)
        if m is None:
            return None
        try:
            return date(int(m[1]), int(m[2]), int(m[3])).isoformat()
        except ValueError:
            return None
    bare = stamp.tzinfo is None and (stamp.hour, stamp.minute, stamp.second) == (0, 0, 0)
    return stamp.date().isoformat() if bare else stamp.replace(microsecond=0).isoformat()


def _metas(document: Any) -> dict[str, str]:
    """Lower-case name or property of each `<meta>` to its content; the first wins."""
    metas: dict[str, str] = {}
    for tag in document.query_selector_all("meta[content]"):
        name = tag.getattr("property") or tag.getattr("name") or tag.getattr("itemprop")
        if name:
            metas.setdefault(name.lower(), tag.getattr("content") or "")
    return metas


def _first_heading(document: Any) -> str | None:
    heading = document.query_selector("h1")
    return heading.text if heading is not None else None


def _date(document: Any, metas: dict[str, str]) -> str | None:
    for name in DATE_META:
        if found := iso_date(metas.get(name)):
            return found
    for script in document.query_selector_all('script[type="application/ld+json"]'):
        for value in _published(script.text or ""):
            if found := iso_date(value):
                return found
    for tag in document.query_selector_all("time[datetime]"):
        if found := iso_date(tag.getattr("datetime")):
            return found
    return None


def _published(text: str) -> Iterator[object]:
    """Values of `datePublished` (or, after those, `dateCreated`) anywhere in a JSON-LD block, in document order."""
    if len(text) > MAX_JSON_LD_CHARS or ("datePublished" not in text and "dateCreated" not in text):
        return
    try:
        todo: list[Any] = [json.loads(text, strict=False)]
    except (ValueError, RecursionError):
        return
    created = []
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(reversed(node))
        elif isinstance(node, dict):
            if "datePublished" in node:
                yield node["datePublished"]
            created.append(node.get("dateCreated"))
            todo.extend(reversed([v for v in node.values() if isinstance(v, dict | list)]))
    yield from created


def _links(document: Any, base: str | None) -> tuple[str, ...]:
    """The first MAX_LINKS distinct http(s) links, absolute, without fragments, in document order."""
    found: dict[str, None] = {}
    for tag in document.query_selector_all("a[href]"):
        link = _join(base, tag.getattr("href"))
        if link:
            found.setdefault(link.partition("#")[0])
            if len(found) == MAX_LINKS:
                break
    return tuple(found)


def _join(base: str | None, href: str | None) -> str | None:
    """An absolute http(s) URL, or None."""
    if not href:
        return None
    try:
        joined = urljoin(base or "", href.strip())
        parts = urlsplit(joined)
    except ValueError:  # e.g. an unclosed IPv6 bracket
        return None
    return joined if parts.scheme in ("http", "https") and parts.netloc else None
