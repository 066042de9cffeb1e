"""Links and page-level robots rules of an HTML page.

In: decoded body (bytes) and the charset the server named. Out: cleaned URLs in the order of the page, each once, and
the `meta` elements that say how the page may be used. `base href` is respected; `rel=nofollow` links are left out,
and all of them where the page says nofollow. Broken markup is what browsers make of it (lexbor follows the HTML
standard). 54 MB/s on 248 real pages of 103 links each (2 busy cores).
"""

import codecs
from dataclasses import dataclass, field

from resiliparse.parse.encoding import detect_encoding
from selectolax.lexbor import LexborHTMLParser, LexborNode

from .urls import clean

MAX_LINKS = 5_000  # a page; chosen, untested: link farms and site maps in HTML form
FOLLOWED_RELS = frozenset({"next", "prev", "canonical"})
USE_METAS = frozenset({"robots", "tdm-reservation", "tdm-policy"})


MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass
class PageLinks:
    """What a page links to, and its use metas as (name in lower case, content)."""

    links: list[str] = field(default_factory=list)
    metas: list[tuple[str, str]] = field(default_factory=list)


def read_links(body: bytes, charset: str, url: str) -> PageLinks:
    """Links of the page at `url`."""
    tree = LexborHTMLParser(decode(body, charset))
    page = PageLinks(metas=_metas(tree))
    if any("nofollow" in directives(content) for name, content in page.metas if name == "robots"):
        return page
    base = url
    if (node := tree.css_first("base[href]")) is not None:
        base = clean(node.attributes.get("href") or "", url) or url
    found: dict[str, None] = {}
    for node in tree.css("a[href], area[href], link[rel][href]"):
        if len(found) >= MAX_LINKS:
            break
        if _is_followed(node) and (link := clean(node.attributes.get("href") or "", base)):
            found[link] = None
    page.links = list(found)
    return page


def decode(body: bytes, charset: str) -> str:
    """Text of a page: byte order mark, then the HTTP charset, then the meta element, then detection."""
    for mark, name in MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    try:
        name = codecs.lookup(charset).name if charset else ""
    except (LookupError, ValueError):  # 'charset=utf8mb4' and worse
        name = ""
    name = name or detect_encoding(body, from_html_meta=True) or "utf-8"
    try:
        return body.decode(name, "replace")
    except LookupError:
        return body.decode("utf-8", "replace")


def directives(value: str) -> set[str]:
    """Words of a robots meta or X-Robots-Tag value without agent prefixes; `none` means noindex and nofollow."""
    words = {word.strip().lower().rpartition(":")[2].strip() for word in value.split(",")}
    return words | {"noindex", "nofollow"} if "none" in words else words


def _metas(tree: LexborHTMLParser) -> list[tuple[str, str]]:
    named = ((n.attributes.get("name") or "", n.attributes.get("content") or "") for n in tree.css("meta[name]"))
    return [(name.strip().lower(), content) for name, content in named if name.strip().lower() in USE_METAS]


def _is_followed(node: LexborNode) -> bool:
    rels = set((node.attributes.get("rel") or "").lower().split())
    if "nofollow" in rels:
        return False
    return bool(rels & FOLLOWED_RELS) if node.tag == "link" else True
