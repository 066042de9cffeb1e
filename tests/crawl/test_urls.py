"""Cleaning, canonical form and trap rules of URLs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crawl.urls import canonical, clean, host_of, key_of, origin_of, path_of, port_of, trap


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("HTTP://Example.COM:80/a/../b/./c?b=2&a=1&utm_source=x#f", "http://example.com/b/c?b=2&a=1&utm_source=x"),
        ("https://user:secret@example.com:443/", "https://example.com/"),
        (" http://example.com/a b\t", "http://example.com/a%20b"),
        ("http://bücher.de/ü", "http://xn--bcher-kva.de/%C3%BC"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://h/\ud800", "http://h/?"),
        ("javascript:alert(1)", None),
        ("mailto:a@b.c", None),
        ("data:text/html,x", None),
        ("ftp://example.com/", None),
        ("http://", None),
        ("http://[::1", None),
        ("http://h:99999/", None),
        ("http://a\x00b/", None),
        ("relative", None),
        ("", None),
    ],
)
def test_clean(raw: str, expected: str | None) -> None:
    assert clean(raw) == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("c", "http://h/a/c"),
        ("../c", "http://h/c"),
        ("?q", "http://h/a/b?q"),
        ("#top", "http://h/a/b"),
        ("//other/x", "http://other/x"),
        ("https:\\\\other\\x", "https://other/x"),
        ("http://[bad", None),
        ("", "http://h/a/b"),
    ],
)
def test_clean_against_a_base(link: str, expected: str | None) -> None:
    assert clean(link, "http://h/a/b") == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/p?b=2&a=1&utm_source=x&fbclid=y", "http://h/p?a=1&b=2"),
        ("http://h/p?a=&b=1", "http://h/p?a=&b=1"),  # an empty value is a value
        ("http://h/p?b=2&a=2&a=1", "http://h/p?a=2&a=1&b=2"),  # order among equal names means something
        ("http://h/%7euser/%2f%c3%a4", "http://h/~user/%2F%C3%A4"),
        ("http://h/p;jsessionid=ABC?PHPSESSID=1&sid=2", "http://h/p"),
        ("http://h./p", "http://h/p"),
        ("http://h:8080/p", "http://h:8080/p"),
        ("http://h/p?gclid=1", "http://h/p"),
        ("http://h/p??&", "http://h/p??"),
        ("http://h/p?side=1&gclids=2", "http://h/p?gclids=2&side=1"),  # whole names only
    ],
)
def test_canonical(url: str, expected: str) -> None:
    assert canonical(url) == expected


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.text("%abAB27ef&=?/;.", max_size=40))
def test_canonical_and_clean_are_idempotent(free: str, dense: str) -> None:
    for raw in (f"http://h/{free}?{dense}", f"http://h/{dense}?{free}"):
        url = clean(raw)
        assert url is not None
        assert clean(url) == url
        again = clean(canonical(url))
        assert again is not None
        assert canonical(again) == canonical(url)
        assert len(key_of(url)) == 16


def test_parts() -> None:
    assert host_of("http://A.b./x") == "a.b"
    assert host_of("http://[::1]/") == "[::1]"
    assert [port_of(u) for u in ("http://h/", "https://h/", "https://h:8443/")] == [80, 443, 8443]
    assert origin_of("https://h:8443/a?b") == "https://h:8443"
    assert path_of("http://h/a?b=1") == "/a?b=1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/" + "a" * 2040, "length"),
        ("http://h/" + "a" * 2039, None),
        ("http://h" + "/a1/b2/c3/d4" * 2 + "/x" * 0, None),
        ("http://h/" + "/".join(f"s{i}" for i in range(21)), "segments"),
        ("http://h/" + "/".join(f"s{i}" for i in range(20)), None),
        ("http://h/a/b/a/b/a/b/", "repeated"),
        ("http://h/x/x/x", "repeated"),
        ("http://h/x/x/y/x", None),
        ("http://h/calendar/2031/05", "calendar"),
        ("http://h/events?month=5&year=1987", "calendar"),
        ("http://h/calendar/2027/05", None),
        ("http://h/blog/2009/05/post", None),  # archives are old, and end
        ("http://h/calendar/id-120314", None),
    ],
)
def test_traps(url: str, expected: str | None) -> None:
    assert trap(url, 2026) == expected
