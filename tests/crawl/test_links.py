"""Links, metas and charsets of pages."""

import pytest

from crawl.content import Decoder, sniff
from crawl.links import MAX_LINKS, decode, directives, read_links

URL = "http://h/dir/page"


def links(html: str) -> list[str]:
    return read_links(html.encode(), "utf-8", URL).links


def test_links_in_page_order_each_once() -> None:
    html = """<link rel="canonical" href="/main"><link rel=stylesheet href=/s.css><link rel="next prefetch" href="?p=2">
    <a href=b>b</a><a href="b#x">b again</a><a name=x>no href</a><a href="">self</a><area href="/map">
    <a href="mailto:x@y">m</a><a rel="nofollow ugc" href=/spam>s</a><a rel=NoFollow href=/spam2>s</a><img src=/i>
    <a href="  //other/ \n">o</a><p><a href=unclosed"""
    assert links(html) == [
        "http://h/main", "http://h/dir/page?p=2", "http://h/dir/b", "http://h/dir/page", "http://h/map", "http://other/",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://cdn/x/", "http://cdn/x/a"),
        ("/y/", "http://h/y/a"),
        ("javascript:", "http://h/dir/a"),
        ("", "http://h/dir/a"),
    ],
)
def test_base_href(base: str, expected: str) -> None:
    assert links(f'<base href="{base}"><a href=a>a</a>') == [expected]


@pytest.mark.parametrize("content", ["nofollow", "NOINDEX, NoFollow", "none"])
def test_a_page_that_says_nofollow_has_no_links_but_keeps_its_metas(content: str) -> None:
    page = read_links(f'<meta name=ROBOTS content="{content}"><a href=/x>x</a>'.encode(), "", URL)
    assert page.links == []
    assert page.metas == [("robots", content)]


def test_a_page_has_a_bounded_number_of_links() -> None:
    assert len(links("".join(f"<a href=/{i}>" for i in range(MAX_LINKS + 5)))) == MAX_LINKS


@pytest.mark.parametrize("body", [b"", b"\x00\x01\x02", b"<a href=" * 50_000, b"<div>" * 20_000, b"\xff\xfe<\x00a\x00"])
def test_broken_pages_are_read_without_complaint(body: bytes) -> None:
    assert read_links(body, "", URL).links in ([], ["http://h/dir/%3Ca%20href=%3Ca"])


@pytest.mark.parametrize(
    ("body", "charset", "expected"),
    [
        ("é".encode(), "utf-8", "é"),
        ("é".encode("latin-1"), "ISO-8859-1", "é"),
        (b"\xef\xbb\xbf\xc3\xa9", "latin-1", "é"),  # a byte order mark beats the header
        ("é".encode("utf-16"), "", "é"),
        ('<meta charset="windows-1251">Привет'.encode("cp1251"), "", '<meta charset="windows-1251">Привет'),
        ('<meta charset="windows-1251">é'.encode(), "utf-8", '<meta charset="windows-1251">é'),  # header beats meta
        ("é".encode(), "utf8mb4", "é"),
        ("é".encode(), "a\x00b", "é"),
        (b"\xff", "utf-8", "\ufffd"),
        (b"plain", "base64", "plain"),
    ],
)
def test_charsets(body: bytes, charset: str, expected: str) -> None:
    assert decode(body, charset) == expected


def test_directives() -> None:
    assert directives("NoIndex , unavailable_after: 25 Jun") == {"noindex", "25 jun"}
    assert directives("stepbot: nofollow") == {"nofollow"}
    assert directives("none") >= {"noindex", "nofollow"}


@pytest.mark.parametrize(
    ("header", "head", "expected"),
    [
        ("text/html", b"%PDF-1.4", "pdf"),
        ("application/pdf", b"\n%PDF-1.4", "pdf"),
        ("application/pdf", b"<html>", None),
        ("application/zip", b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/epub+zip", "epub"),
        ("application/epub+zip", b"PK\x03\x04 something else", None),
        ("text/html; charset=x", b"", "html"),
        ("TEXT/HTML", b"words", "html"),
        ("text/plain", b"  <!DOCTYPE html>", "html"),
        ("text/plain", b"words", "txt"),
        ("", b"\xef\xbb\xbf\n<html", "html"),
        ("", b"words", None),
        ("image/png", b"words", None),
    ],
)
def test_sniff(header: str, head: bytes, expected: str | None) -> None:
    assert sniff(header, head) == expected


def test_decoder_never_passes_the_room_it_is_given() -> None:
    import gzip

    packed = gzip.compress(bytes(1 << 20))
    decoder = Decoder("gzip")
    assert len(decoder.decode(packed, 1000)) == decoder.decoded_bytes == 1000
    unknown = Decoder("br")
    assert (unknown.decode(b"abc", 10), unknown.is_whole) == (b"", False)
    padded = Decoder("gzip")
    assert (padded.decode(gzip.compress(b"abc") + bytes(9), 10), padded.is_whole) == (b"abc", True)
    torn = Decoder("gzip")
    assert (torn.decode(gzip.compress(b"abc")[:-3], 10), torn.is_whole) == (b"abc", False)
    assert Decoder("identity").decode(b"abc", 10) == b"abc"
    assert Decoder("gzip").decode(b"not gzip at all", 10) == b""
