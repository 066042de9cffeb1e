"""URLs: one parser for the whole crawl, the key under which a page is seen once, and the shapes that never end.

In: strings as found in pages, headers and seed lists. Out: absolute http(s) URLs as a browser would send them, and
their canonical form. A page is fetched under the URL as found and remembered under the canonical one: sorting a query
or dropping a parameter is safe for telling pages apart, but a server may answer the edited URL with something else.

`can_ada` (the WHATWG parser of Node.js) costs 3 us an absolute URL, 19 us a relative one (`urljoin`), 8 us a key. It
also turns `http://0x7f.1/` into `http://127.0.0.1/`, so addresses are judged after it and never before. Trap rules
are those of Heritrix 3 (PathologicalPathDecideRule, TooManyPathSegmentsDecideRule) plus a calendar rule.
"""

import re
from urllib.parse import urljoin

import can_ada
import xxhash

MAX_URL_CHARS = 2048  # what the common servers accept; longer ones are machine-made
MAX_SEGMENTS = 20  # Heritrix 3, TooManyPathSegmentsDecideRule
CALENDAR_YEARS = 2  # chosen, untested: endless calendars link every month of every year

# Parameters that say where a click came from, not what page is meant.
TRACKERS = re.compile(
    r"utm_\w*|gclid|gclsrc|dclid|gbraid|wbraid|fbclid|msclkid|yclid|twclid|ttclid|igshid|mc_cid|mc_eid|_hsenc|_hsmi"
    r"|mkt_tok|oly_anon_id|oly_enc_id|vero_id|_openstat"
)
SESSIONS = re.compile(r"phpsessid|jsessionid|sid|sessionid|session_id|aspsessionid\w*|cfid|cftoken")
PATH_SESSION = re.compile(r";jsessionid=[^/?;]*", re.IGNORECASE)
ABSOLUTE = re.compile(r"https?://", re.IGNORECASE)  # spares urljoin, which costs three times as much as the parser
ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
REPEATED = re.compile(r"/(.+?/)\1{2,}")  # the same run of segments three times in a row
CALENDAR = re.compile(r"calend|events?\b|month|agenda", re.IGNORECASE)
YEAR = re.compile(r"(?<!\d)((?:1[6-9]|2\d)\d\d)(?!\d)")


def clean(url: str, base: str | None = None) -> str | None:
    """The absolute http(s) URL without fragment and user information, or None where there is none to fetch."""
    text = url.strip(" \t\r\n\f").encode("utf-8", "replace").decode("utf-8")
    try:
        parsed = can_ada.parse(text if base is None or ABSOLUTE.match(text) else urljoin(base, text))
    except ValueError:
        return None
    if parsed.protocol not in ("http:", "https:") or not parsed.hostname:
        return None
    parsed.hash = parsed.username = parsed.password = ""
    return str(parsed.href)


def canonical(url: str) -> str:
    """The key of a cleaned URL: no trackers or sessions, sorted query, escapes only where needed and in upper case.

    Empty values stay (`?a=` is not `?`), and so does the order among equal names.
    """
    parsed = can_ada.parse(url)
    path = PATH_SESSION.sub("", _escapes(parsed.pathname))
    hostname = parsed.hostname.rstrip(".")
    port = f":{parsed.port}" if parsed.port else ""
    kept = [p for p in _escapes(parsed.search).removeprefix("?").split("&") if p and not _is_noise(p)]
    kept.sort(key=lambda p: p.partition("=")[0])
    query = "?" + "&".join(kept) if kept else ""
    return f"{parsed.protocol}//{hostname}{port}{path}{query}"


def key_of(url: str) -> bytes:
    """16 bytes that name a page: xxh3_128 of the canonical URL."""
    return xxhash.xxh3_128_digest(canonical(url).encode())


def exact_key_of(url: str) -> bytes:
    """16 bytes that name a page by its URL as it is, where the canonical one would hide a difference that matters."""
    return xxhash.xxh3_128_digest(url.encode())


def path_key(url: str) -> bytes:
    """16 bytes that name a page without its query."""
    return xxhash.xxh3_128_digest(url.partition("?")[0].encode())


def host_of(url: str) -> str:
    """The hostname, in lower case and without a final dot: the unit of politeness. IPv6 in brackets."""
    return str(can_ada.parse(url).hostname).rstrip(".")


def origin_of(url: str) -> str:
    """`scheme://host[:port]`: what one robots.txt speaks for."""
    return str(can_ada.parse(url).origin)


def port_of(url: str) -> int:
    parsed = can_ada.parse(url)
    return int(parsed.port) if parsed.port else (443 if parsed.protocol == "https:" else 80)


def path_of(url: str) -> str:
    """Path and query: the request target."""
    parsed = can_ada.parse(url)
    return f"{parsed.pathname}{parsed.search}"


def trap(url: str, year: int) -> str | None:
    """Which trap rule this cleaned URL breaks: length, segments, repeated, calendar; None for none.

    `year` is the year in which the crawl began, so that a resumed crawl judges as the first run did.
    """
    if len(url) > MAX_URL_CHARS:
        return "length"
    path = path_of(url)
    segments, _, _ = path.partition("?")
    if segments.count("/") > MAX_SEGMENTS:
        return "segments"
    if REPEATED.search(segments + "/"):
        return "repeated"
    if CALENDAR.search(path) and any(abs(int(y) - year) > CALENDAR_YEARS for y in YEAR.findall(path)):
        return "calendar"
    return None


def _is_noise(parameter: str) -> bool:
    name = parameter.partition("=")[0].lower()
    return bool(TRACKERS.fullmatch(name) or SESSIONS.fullmatch(name))


def _escapes(text: str) -> str:
    return ESCAPE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    char = chr(int(match[1], 16))
    return char if char in UNRESERVED else match[0].upper()
