"""robots.txt: RFC 9309 by section, and 353 real files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crawl.robots import MAX_BYTES, Robots, parse, product_token, verdict

ROOT = "http://h"


def allows(body: str | bytes, path: str, token: str = "stepbot") -> bool:
    return parse(body.encode() if isinstance(body, str) else body, token).allows(ROOT + path)


@pytest.fixture(scope="module")
def real_files() -> list[Path]:
    data = Path(os.environ.get("STEPWELL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (data / "robots").is_dir():
        pytest.skip(f"no real robots.txt files at {data / 'robots'}")
    return sorted((data / "robots").iterdir())


@pytest.mark.parametrize(
    ("body", "path", "expected"),
    [
        # 2.2.1: groups of our token are merged, in any case; others and rules before any group do not count
        ("User-agent: stepbot\nDisallow: /a\n\nUser-agent: STEPBOT/2.0\nDisallow: /b", "/b", False),
        ("User-agent: stepbot\nDisallow: /a\n\nUser-agent: STEPBOT/2.0\nDisallow: /b", "/a", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: stepbot\nAllow: /", "/x", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: stepbot\nDisallow:", "/x", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: stepbot", "/x", True),
        ("User-agent: bot\nDisallow: /", "/x", True),
        ("User-agent: stepbot-news\nDisallow: /", "/x", True),
        ("Disallow: /\nUser-agent: other\nDisallow: /", "/x", True),
        ("User-agent: a\nUser-agent: stepbot\nUser-agent: b\nDisallow: /x", "/x", False),
        ("User-agent: *\nDisallow: /a\nUser-agent: *\nDisallow: /b", "/a", False),
        # 2.2.2: the longest match wins, Allow wins a tie, escapes are compared decoded
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
        ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", True),
        ("User-agent: *\nDisallow: /%7Euser", "/~user", False),
        ("User-agent: *\nDisallow: /ä", "/%C3%A4", False),
        ("User-agent: *\nDisallow: /a?q=", "/a?q=1", False),
        ("User-agent: *\nDisallow: /", "/robots.txt", True),
        # 2.2.3: wildcards
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf", False),
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf?z", True),
        # 2.2.4 and 2.3.1.5: other records end no group, one bad line costs one line
        ("User-agent: stepbot\nCrawl-delay: 5\nUser-agent: other\nDisallow: /", "/x", False),
        ("User-agent: stepbot\nSitemap: http://h/s.xml\nUser-agent: other\nDisallow: /", "/x", False),
        ("User-agent: *\nContent-Signal: ai-train=no\nDisallow: /x", "/x", False),
        ("User-agent: *\n\x00\x01 ??\nDisallow /x\n<p>", "/x", False),
        ("user agent: *\nDisalow: /x", "/x", False),
        ("User-agent: * # all\rDisallow: /x # not this\r", "/x", False),
        ("<html><body>not found</body></html>", "/x", True),
        ("", "/x", True),
    ],
)
def test_rules(body: str, path: str, expected: bool) -> None:
    assert allows(body, path) is expected


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_hides_no_group(mark: bytes) -> None:
    assert not allows(mark + b"User-agent: *\nDisallow: /x", "/x")


def test_utf16_and_stray_bytes_are_read() -> None:
    assert not allows("User-agent: *\nDisallow: /x".encode("utf-16"), "/x")
    assert not allows(b"User-agent: *\nDisallow: /caf\xe9\nDisallow: /x", "/caf%E9")


def test_rules_after_the_cap_do_not_count_and_a_cut_line_is_dropped() -> None:
    head = b"User-agent: *\nDisallow: /early\n"
    filler = b"#" * 63 + b"\n"
    body = head + filler * ((MAX_BYTES - len(head)) // 64)
    body += b"Disallow: /" + b"y" * (MAX_BYTES - len(body)) + b"\nDisallow: /late\n"
    robots = parse(body, "stepbot")
    assert not robots.allows(ROOT + "/early")
    assert robots.allows(ROOT + "/late")
    assert robots.allows(ROOT + "/yyy")


@pytest.mark.parametrize(
    ("status", "allowed", "settled"),
    [
        (200, True, True), (404, True, True), (410, True, True), (302, True, True),
        (401, False, False), (403, False, False), (429, False, False), (500, False, False), (None, False, False),
    ],
)  # fmt: skip
def test_what_an_answer_means(status: int | None, allowed: bool, settled: bool) -> None:
    robots, is_settled = verdict(status, b"", "stepbot")
    assert (robots.allows(ROOT + "/x"), is_settled) == (allowed, settled)


@pytest.mark.parametrize(
    ("line", "delay_s"),
    [("2.5", 2.5), ("0", 0.0), ("ten", None), ("-1", None), ("inf", None), ("nan", None), ("", None)],
)
def test_crawl_delay(line: str, delay_s: float | None) -> None:
    body = f"User-agent: other\nCrawl-delay: 99\n\nUser-agent: *\nCrawl-delay: {line}\nDisallow: /x".encode()
    robots = parse(body, "stepbot")
    assert robots.delay_s == delay_s
    assert not robots.allows(ROOT + "/x")


def test_opt_outs_name_the_agents_and_lines_that_concern_a_page() -> None:
    body = b"User-agent: *\nContent-Usage: train-ai=n\nUser-agent: CCBot\nUser-agent: GPTBot\nDisallow: /private\n"
    robots = parse(body, "stepbot")
    assert robots.opt_outs(ROOT + "/private/x")["disallowed_agents"] == ["CCBot", "GPTBot"]
    assert "disallowed_agents" not in robots.opt_outs(ROOT + "/public")
    assert Robots(blanket="allow").opt_outs(ROOT + "/") == {}


@pytest.mark.parametrize(
    ("agent", "token"),
    [("StepBot/1.0 (+http://x)", "stepbot"), ("my-bot_x (a@b.c)", "my-bot_x"), ("1bot", ""), ("", "")],
)
def test_product_token(agent: str, token: str) -> None:
    assert product_token(agent) == token


def test_real_files_agree_with_protego_where_protego_follows_the_rfc(real_files: list[Path]) -> None:
    """353 files, 2 agents, paths taken from their own rules. Files with the two known gaps of Protego are left out."""
    from protego import Protego

    compared = 0
    for path in real_files:
        body = path.read_bytes()
        if body.startswith(b"\xef\xbb\xbf") or b"\x00" in body or len(body) > 100_000 or b"delay" in body.lower():
            continue
        theirs = Protego.parse(body.decode("utf-8", "surrogateescape"))
        values = [line.partition(b":")[2].strip() for line in body.splitlines() if b"llow:" in line]
        paths = {v.decode("ascii", "ignore").replace("*", "x").replace("$", "") for v in values[:40]}
        for token in ("stepbot", "googlebot"):
            ours = parse(body, token)
            for sample in {"/", "/index.html"} | {p for p in paths if p.startswith("/")}:
                compared += 1
                assert ours.allows(ROOT + sample) == theirs.can_fetch(ROOT + sample, token), (path.name, token, sample)
    assert compared > 2000


@given(st.binary(max_size=200), st.text(max_size=20))
def test_no_bytes_break_the_parser(body: bytes, path: str) -> None:
    robots = parse(b"User-agent: *\nDisallow: /x\n" + body, "stepbot")
    robots.allows(ROOT + "/" + path.encode("utf-8", "replace").decode())
    assert "*" in robots.groups
