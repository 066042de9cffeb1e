"""HTML: sniffing, decoding, guards, facts, maths, and the doubt rule."""

import pytest

from core.records import Dropped, Found, Origin, Raw
from crawl.extract import Limits, extract, guard
from crawl.extract.facts import iso_date, read_facts
from crawl.extract.html import read_page
from crawl.extract.maths import clean_tex
from crawl.extract.sniff import decode, media_type, python_codec

PARAGRAPH = "A river carries sand to the sea, and the sea gives it back to the beach in storms. " * 6


def page(body: str, head: str = "") -> str:
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def article(text: str = PARAGRAPH) -> str:
    menu = "".join(f"<li><a href='/{i}'>Menu {i}</a></li>" for i in range(8))
    return page(f"<nav><ul>{menu}</ul></nav><main><h1>Sand</h1><p>{text}</p></main><footer>Imprint</footer>")


def run(data: bytes, content_type: str | None = None, limits: Limits | None = None) -> Found | Dropped:
    return extract(Raw(Origin("a"), data, url="http://x.org/dir/a.html", content_type=content_type), limits)


@pytest.mark.parametrize(
    ("data", "declared", "expected"),
    [
        (b"%PDF-1.7 ...", "text/html", "application/pdf"),
        (b"\xef\xbb\xbf  <!DOCTYPE html><p>x", "text/plain", "text/html"),
        (b"<!-- a\ncomment --><html>", "application/octet-stream", "text/html"),
        (b"\x89PNG\r\n\x1a\n", "text/html", "image/png"),
        (b"hello", "Text/Markdown; charset=utf-8", "text/markdown"),
        (b"hello <p class=a>there", None, "text/html"),
        (b"hello", None, "text/plain"),
        (b"\x00\x01\x02\x03hello", None, "application/octet-stream"),
        (b"PK\x03\x04" + b"\x00" * 26 + b"mimetypeapplication/epub+zip", None, "application/epub+zip"),
    ],
)
def test_first_bytes_beat_the_header(data, declared, expected):
    assert media_type(data, declared) == expected


@pytest.mark.parametrize(
    ("data", "content_type", "text", "source"),
    [
        ("\ufeffZoë".encode("utf-16-le"), "text/html; charset=utf-8", "Zoë", "bom"),
        ("Zoë".encode("latin-1"), "text/html; charset=iso-8859-1", "Zoë", "http"),
        ("<meta charset=windows-1251>Привет".encode("cp1251"), None, "<meta charset=windows-1251>Привет", "meta"),
        ("日本語①".encode("cp932"), "text/html; charset=Shift_JIS", "日本語①", "http"),
        ("Zoë".encode(), "text/html; charset=rot13", "Zoë", "default"),
        (
            ("Привет, как дела? " * 40).encode("koi8-r"),
            "text/html; charset=utf-8",
            "Привет, как дела? " * 40,
            "detected",
        ),
    ],
)
def test_charset_order_and_disbelief(data, content_type, text, source):
    decoded = decode(data, content_type)
    assert (decoded.text, decoded.source, decoded.replaced) == (text, source, 0)


def test_undecodable_bytes_are_replaced_and_counted_but_not_the_pages_own():
    decoded = decode(b"ok \xff\xfe and \xef\xbf\xbd " + b"fine " * 200, "text/plain; charset=utf-8")
    assert decoded.replaced == 2
    assert decoded.text.count("\ufffd") == 3
    assert python_codec("hex") is None


def test_article_keeps_main_text_and_facts():
    head = (
        "<title> Sand \n &amp; sea</title><link rel=canonical href='/canon'>"
        "<meta property='article:published_time' content='2024-05-01T10:00:00Z'>"
    )
    found = run(article().replace("<head>", "<head>" + head).encode())
    assert isinstance(found, Found)
    assert PARAGRAPH.strip() in found.text
    assert "Menu 3" not in found.text
    assert found.kind == "web"
    m = found.metadata
    assert (m["title"], m["language"], m["canonical"]) == ("Sand & sea", "en", "http://x.org/canon")
    assert m["date"] == "2024-05-01T10:00:00+00:00"
    assert m["links"][:2] == ["http://x.org/0", "http://x.org/1"]
    assert (m["extractor"], m["extractor_reason"]) == ("resiliparse", "default")


def test_short_main_content_is_asked_of_trafilatura_and_the_reason_kept():
    hidden = "".join(f"<p>{PARAGRAPH}{i}</p>" for i in range(5))
    read = read_page(page(f"<div class='sidebar'>{hidden}</div><main><p>Teaser.</p></main>"))
    assert read.reason.startswith("main_share=0.0")
    assert PARAGRAPH.strip() in read.text
    assert read.extractor in ("trafilatura", "resiliparse-all")


def test_lists_tables_and_code_stay_readable():
    body = (
        f"<main><h2>Head</h2><p>{PARAGRAPH}</p><ol><li>first step<li>second step</ol>"
        "<table><tr><th>Name<th>Size<tr><td>sand<td>2 mm</table><pre>def f(x):\n    return x\n</pre></main>"
    )
    text = read_page(page(body)).text
    assert "1. first step" in text
    assert "Name | Size\nsand | 2 mm" in text
    assert "def f(x):\n    return x" in text


def test_formulas_become_latex_once():
    katex = (
        "<span class='katex'><span class='katex-mathml'><math><semantics><mi>E</mi><annotation "
        "encoding='application/x-tex'>E = m &lt; c^2</annotation></semantics></math></span>"
        "<span class='katex-html'>E=m&lt;c2</span></span>"
    )
    wiki = "<math alttext='{\\displaystyle x_1}'><mi>x</mi></math>"
    mathjax = "<span class='MathJax'>sum</span><script type='math/tex; mode=display'>\\sum_i a_i</script>"
    text = read_page(page(f"<main><p>{PARAGRAPH} Let {katex} and {wiki} and {mathjax} hold for $5.</p></main>")).text
    assert "Let $E = m < c^2$ and $x_1$ and $$\\sum_i a_i$$ hold for $5." in text
    assert clean_tex("{\\displaystyle  \\alpha }") == "\\alpha"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01T00:00:00", "2024-05-01"),
        ("2024/5/1 at noon", "2024-05-01"),
        ("20240230", None),
        ("2024-13-01", None),
        ("May 1, 2024", None),
        (None, None),
        (5, None),
    ],
)
def test_iso_date(value, expected):
    assert iso_date(value) == expected


def test_date_from_json_ld_and_bad_json_ld_and_links_are_bounded():
    from selectolax.lexbor import LexborHTMLParser

    head = (
        '<script type="application/ld+json">{broken</script>'
        '<script type="application/ld+json">{"@graph":[{"datePublished":"2023-01-02"}]}</script>'
    )
    links = "<a href='http://[bad'>x</a><a href='javascript:x()'>x</a>" + "".join(
        f"<a href='/{i}#f'>x</a>" for i in range(999)
    )
    facts = read_facts(LexborHTMLParser(page(links, head)), "http://x.org/")
    assert facts.date == "2023-01-02"
    assert len(facts.links) == 256
    assert facts.links[0] == "http://x.org/0"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<div>" * 100_000 + "deep text", "deep text"),
        ("<div>" * 100_000 + "deep text" + "</div>" * 100_000, "deep text"),
        ("<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">attributes</p>", "attributes"),
        ("<p>a\x00b</p>", "a"),
        ("<p>lone \ud800 surrogate</p>", "lone \ufffd surrogate"),
        ("<p>" + "word " * 1_000_000 + "</p>", "word word"),
        ("<p>hello world</p>" * 30_000, "hello world"),
        ("<a href=x>y</a> " * 5_000, "y"),
        ("<table><tr><td>" * 20_000 + "cell", "cell"),
        ("<p><font><b><i>" * 10_000 + "styled", "styled"),
        ("", ""),
        ("<html><body></body></html>", ""),
    ],
)
def test_poisoned_pages_neither_crash_nor_hang(html, expected):
    assert expected in read_page(html).text


def test_depth_counts_only_elements_that_need_an_end():
    assert guard.depth("<div><p><p><br><b>x</b><script>'<div><div>'</script></div>", stop=99) == 2
    assert not guard.too_deep("<br><p>" * 5_000)
    assert guard.too_deep("<div>" * 600)
    assert guard.too_deep("<div/>" * 600)
    assert not guard.too_deep("<svg><path d='M0'/></svg>" + "<svg><use href='#a'/>" * 300)


def test_drops_name_their_reason():
    assert run(b"").reason == "empty"
    assert run(b"<html><body> </body></html>").reason == "empty"
    assert run(b"\x00\x00\x00").reason == "empty"
    unsupported = run(b'{"a": 1}', "application/json")
    assert (unsupported.reason, unsupported.detail) == ("unsupported", "application/json")
    assert run(b"<html>" + b"a" * 100, limits=Limits(html_bytes=50)).reason == "too_large"
    assert run(b"a" * 100, limits=Limits(record_bytes=50)).reason == "too_large"
    assert run(b"abc", "text/plain", Limits(min_chars=4)).reason == "too_short"
    assert run(b"<p>" + b"word " * 10_000_000).reason == "too_large"
