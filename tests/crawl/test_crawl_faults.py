"""What a hostile or broken server can do to a crawl. Every server here is a real socket on loopback."""

import gzip
import json
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import threading
import time
import zlib
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from crawl.stage import CrawlSummary, run_crawl
from tests.bounds import BOUND_S
from tests.crawl.loopback import Answer, Loopback, Pages, in_turn, links, moved, page, records, responses


def crawl_of(tmp_path: Path, pages: Pages, **knobs: object) -> tuple[CrawlSummary, Loopback, Path]:
    with Loopback(pages) as web:
        return run_crawl(web.config(**knobs), tmp_path / "web"), web, tmp_path / "web"


def metadata(folder: Path) -> dict[str, dict]:
    return {target: json.loads(block) for kind, target, block, _ in records(folder) if kind == "metadata"}


def truncations(folder: Path) -> dict[str, str | None]:
    return {target: head.get("warc-truncated") for kind, target, _, head in records(folder) if kind == "response"}


def chunked(*pieces: bytes, **headers: str) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()).encode()
    return head + b"\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (*pieces, b""))


# robots.txt, as the crawl lives it


@pytest.mark.parametrize("status", [404, 410, 400])
def test_no_robots_file_allows_all(tmp_path: Path, status: int) -> None:
    summary, web, _ = crawl_of(tmp_path, {"/robots.txt": page("", status), "/": page("home")})
    assert (summary.fetched, web.paths()) == (1, ["/"])


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_a_robots_file_that_stays_out_of_reach_shuts_the_host(tmp_path: Path, status: int) -> None:
    summary, web, _ = crawl_of(tmp_path, {"/robots.txt": page("", status), "/": page("home")}, max_tries=3)
    assert web.paths() == []
    assert [r.path for r in web.requests] == ["/robots.txt"] * 3
    assert summary.not_fetched == {"robots_unreachable": 1}


def test_a_robots_file_is_asked_for_again_before_pages_are_given_up(tmp_path: Path) -> None:
    robots = in_turn(page("", 503), page("User-agent: *\nDisallow: /no", kind="text/plain"))
    summary, web, _ = crawl_of(tmp_path, {"/robots.txt": robots, "/": links("/no", "/yes"), "/yes": page()})
    assert web.paths() == ["/", "/yes"]
    assert summary.not_fetched == {"robots": 1}


def test_robots_redirects_speak_for_the_first_origin(tmp_path: Path) -> None:
    pages: Pages = {
        ("a.test", "/robots.txt"): moved("http://b.test/r"),
        "/r": page("User-agent: stepbot\nDisallow: /no", kind="text/plain"),
        "/": links("/no"),
    }
    summary, web, _ = crawl_of(tmp_path, pages, hosts=("a.test", "b.test"))
    assert web.paths("a.test") == ["/"]
    assert summary.not_fetched == {"robots": 1}


def test_a_torn_robots_file_is_no_permission(tmp_path: Path) -> None:
    torn = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nUser-agent: *\n"
    _, web, _ = crawl_of(tmp_path, {"/robots.txt": torn, "/": page()}, max_tries=2)
    assert web.paths() == []


@pytest.mark.parametrize(
    "answer",
    [
        page(b"\x0b\x02\x80", Content_Encoding="br"),
        page(gzip.compress(b"User-agent: *\n")[:-9], Content_Encoding="gzip"),
    ],
)
def test_a_robots_file_that_cannot_be_decoded_is_no_permission(tmp_path: Path, answer: bytes) -> None:
    summary, web, _ = crawl_of(tmp_path, {"/robots.txt": answer, "/": page()}, max_tries=2)
    assert web.paths() == []
    assert summary.not_fetched == {"robots_unreachable": 1}


# Redirects and addresses


def test_redirect_loops_and_chains_end(tmp_path: Path) -> None:
    pages: dict[str, Answer] = {
        "/": links("/ring1", "/0", "/self"),
        "/ring1": moved("/ring2"),
        "/ring2": moved("/ring1"),
    }
    pages |= {f"/{i}": moved(f"/{i + 1}", 302) for i in range(10)} | {"/self": moved("/self")}
    summary, web, _ = crawl_of(tmp_path, pages)
    assert sorted(web.paths()) == sorted(["/", "/ring1", "/ring2", "/self", *(f"/{i}" for i in range(6))])
    assert summary.links_refused == {"redirects": 1}


def test_a_redirect_that_only_adds_a_session_is_followed(tmp_path: Path) -> None:
    pages: Pages = {"/": moved("/?sid=1"), "/?sid=1": links("/in"), "/in": page("text")}
    summary, web, folder = crawl_of(tmp_path, pages)
    assert web.paths() == ["/", "/?sid=1", "/in"]
    assert summary.by_status == {"200": 2, "301": 1}
    assert len(responses(folder)) == summary.fetched == 3


def test_a_cookie_wall_ends_where_it_began(tmp_path: Path) -> None:
    summary, web, _ = crawl_of(tmp_path, {"/": moved("/?sid=1"), "/?sid=1": moved("/?sid=2"), "/?sid=2": moved("/")})
    assert web.paths() == ["/", "/?sid=1", "/?sid=2"]
    assert summary.by_status == {"301": 3}


def test_redirects_never_reach_private_addresses_or_other_schemes(tmp_path: Path) -> None:
    pages: dict[str, Answer] = {"/": links("/1", "/2", "/3", "/4")}
    pages |= {
        "/1": moved("http://10.0.0.1/"),
        "/2": moved("http://0xa9fea9fe/latest/meta-data"),
        "/3": moved("file:///etc/passwd"),
    }
    pages |= {"/4": moved("http://a.test:22/")}
    summary, web, _ = crawl_of(tmp_path, pages, scope="any")
    assert web.paths() == ["/", "/1", "/2", "/3", "/4"]
    assert summary.not_fetched == {"address": 3}


def test_a_private_address_behind_a_name_is_not_connected_to(tmp_path: Path) -> None:
    with Loopback({"/": page("secret")}) as web:
        summary = run_crawl(web.config(allow_networks=(), max_tries=1), tmp_path / "web")
    assert web.requests == []
    assert (summary.fetched, summary.not_fetched) == (0, {"address": 1})


def test_robots_redirects_do_not_reach_private_addresses_either(tmp_path: Path) -> None:
    pages: Pages = {"/robots.txt": moved("http://192.168.0.1/robots.txt"), "/": page("home")}
    summary, web, _ = crawl_of(tmp_path, pages, max_tries=2)
    assert web.paths() == []
    assert summary.not_fetched == {"robots_unreachable": 1}


# Faults and retries


def test_retry_after_is_obeyed_and_only_the_last_answer_is_kept(tmp_path: Path) -> None:
    pages: Pages = {"/": in_turn(page("", 429, Retry_After="1"), page("at last"))}
    summary, web, folder = crawl_of(tmp_path, pages)
    first, second = (r for r in web.requests if r.path == "/")
    assert second.began_at - first.ended_at >= 1.0
    assert summary.by_status == {"200": 1}
    assert b"at last" in responses(folder)["http://a.test/"]
    assert metadata(folder)["http://a.test/"]["tries"] == 2


def test_a_page_that_stays_broken_costs_max_tries_requests(tmp_path: Path) -> None:
    pages: Pages = {"/": links("/503", "/ok"), "/503": page("sorry", 503), "/ok": page()}
    summary, web, _ = crawl_of(tmp_path, pages, max_tries=3)
    assert web.paths().count("/503") == 3
    assert summary.by_status == {"200": 2, "503": 1}


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_connection_resets_are_retried(tmp_path: Path) -> None:
    summary, web, _ = crawl_of(tmp_path, {"/": in_turn(reset, reset, page("home"))})
    assert summary.by_status == {"200": 1}
    assert web.paths() == ["/", "/", "/"]


def test_a_dead_host_is_given_up(tmp_path: Path) -> None:
    pages: dict[str, Answer] = {"/": links(*(f"/{i}" for i in range(50)))} | {f"/{i}": reset for i in range(50)}
    summary, web, _ = crawl_of(tmp_path, pages, max_tries=5)
    assert len(web.paths()) == 1 + 15  # three openings of five faults each
    assert summary.not_fetched == {"host_down": 50}


def test_a_body_cut_short_is_retried_then_kept_as_truncated(tmp_path: Path) -> None:
    short = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100\r\n\r\n<a href=/x>"
    pages: Pages = {"/": short, "/x": in_turn(short, page("whole"))}
    _, web, folder = crawl_of(tmp_path, pages, max_tries=2)
    assert web.paths().count("/") == 2
    assert truncations(folder) == {"http://a.test/": "disconnect", "http://a.test/x": None}
    assert responses(folder)["http://a.test/"] == short


def test_slow_headers_time_out_and_slow_bodies_are_cut(tmp_path: Path) -> None:
    released = threading.Event()

    def silent(_: socket.socket) -> None:
        released.wait(20)

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while not released.wait(0.02):
            connection.sendall(b"x")

    with Loopback({"/": links("/silent", "/drip"), "/silent": silent, "/drip": drip}) as web:
        config = web.config(read_timeout_s=0.3, total_timeout_s=1.0, max_tries=2)
        summary = run_crawl(config, tmp_path / "web")
        released.set()
    assert summary.not_fetched == {"timeout": 1}
    assert truncations(tmp_path / "web")["http://a.test/drip"] == "time"


def test_garbage_and_huge_headers_are_no_answers(tmp_path: Path) -> None:
    pages: Pages = {
        "/": links("/garbage", "/huge", "/empty", "/ok"),
        "/garbage": b"\x00\xff SSH-2.0 \r\n\r\n",
        "/huge": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\nbody",
        "/empty": b"",
        "/ok": page("fine"),
    }
    summary, _, _ = crawl_of(tmp_path, pages, max_tries=1)
    assert summary.not_fetched == {"disconnect": 1, "protocol": 2}
    assert summary.by_status == {"200": 2}


# Sizes and encodings


def test_the_kind_is_judged_on_enough_bytes_however_they_arrive(tmp_path: Path) -> None:
    def slowly(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n")
        for piece in (b"%", b"PDF-1.7", b" and the rest"):
            connection.sendall(piece)
            time.sleep(0.05)

    _, _, folder = crawl_of(tmp_path, {"/": slowly})
    assert metadata(folder)["http://a.test/"]["kind"] == "pdf"


def test_a_gzip_bomb_is_cut_before_it_unfolds(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(40 << 20), 1)
    pages: Pages = {"/": page(bomb, Content_Encoding="gzip")}
    _, _, folder = crawl_of(tmp_path, pages)
    assert truncations(folder) == {"http://a.test/": "length"}
    assert len(responses(folder)["http://a.test/"]) < 1 << 17


def test_caps_hold_for_bodies_as_received_and_as_decoded(tmp_path: Path) -> None:
    text = "".join(f"<p>{i * 7919 % 100_003}</p>" for i in range(4000)).encode()
    pages: Pages = {
        "/": links("/plain", "/packed", "/big.pdf", "/small.pdf"),
        "/plain": page(text),
        "/packed": page(zlib.compress(text), Content_Encoding="deflate"),
        "/big.pdf": page(b"%PDF-1.7" + text, kind="application/pdf"),
        "/small.pdf": page(b"%PDF-1.7 small", kind="application/octet-stream"),
    }
    summary, _, folder = crawl_of(tmp_path, pages, text_bytes=20_000, document_bytes=15_000)
    assert truncations(folder) == {
        "http://a.test/": None, "http://a.test/plain": "length", "http://a.test/packed": "length",
        "http://a.test/small.pdf": None,
    }  # fmt: skip
    head, _, body = responses(folder)["http://a.test/plain"].partition(b"\r\n\r\n")
    assert (len(body), body) == (20_000, text[:20_000])
    assert f"Content-Length: {len(text)}".encode() in head
    assert summary.not_fetched == {"length": 1}


def test_unwanted_types_are_dropped_by_bytes_not_by_name(tmp_path: Path) -> None:
    pages: Pages = {
        "/": links("/i.png", "/liar.pdf", "/unnamed", "/blob", "/page.txt"),
        "/i.png": page(b"\x89PNG", kind="image/png"),
        "/liar.pdf": page("<html>not a pdf", kind="application/pdf"),
        "/unnamed": page("<!doctype html><a href=/found>", kind=""),
        "/found": page("text"),
        "/blob": page(b"\x7fELF", kind="application/octet-stream"),
        "/page.txt": page("plain words", kind="text/plain"),
    }
    summary, _, folder = crawl_of(tmp_path, pages)
    assert summary.not_fetched == {"type": 3}
    kinds = {target.removeprefix("http://a.test"): facts["kind"] for target, facts in metadata(folder).items()}
    assert kinds == {"/": "html", "/unnamed": "html", "/found": "html", "/page.txt": "txt"}


def test_chunked_and_packed_bodies_are_stored_as_received_and_read_decoded(tmp_path: Path) -> None:
    packed = gzip.compress(b'<a href="/two">two</a>') + gzip.compress(b'<a href="/three">three</a>')
    raw = zlib.compressobj(wbits=-15)
    pages: Pages = {
        "/": chunked(b"<a hr", b"ef=/one>", b"one</a>"),
        "/one": chunked(packed[:7], packed[7:], Content_Encoding="gzip"),
        "/two": page(raw.compress(b"<a href=/four>") + raw.flush(), Content_Encoding="deflate"),
        "/three": page(b"\x00\x01 not brotli", Content_Encoding="br"),
        "/four": page(b"broken", Content_Encoding="gzip"),
    }
    summary, web, folder = crawl_of(tmp_path, pages)
    assert web.paths() == ["/", "/one", "/two", "/three", "/four"]
    assert responses(folder)["http://a.test/one"] == pages["/one"]
    assert summary.fetched == 5


def test_broken_chunks_are_kept_up_to_the_break(tmp_path: Path) -> None:
    broken = chunked(b"<a href=/x>")[:-5] + b"zz\r\nmore"
    _, web, folder = crawl_of(tmp_path, {"/": broken, "/x": page()}, max_tries=2)
    assert web.paths() == ["/", "/", "/x"]
    assert truncations(folder)["http://a.test/"] == "unspecified"


def test_a_wrong_charset_does_not_hide_links(tmp_path: Path) -> None:
    home = '<meta charset="latin1"><a href="/ä">x</a><a href="/plain">y</a>'.encode()
    pages: Pages = {"/": page(home, kind="text/html; charset=utf8mb4-nonsense"), "/plain": page()}
    _, web, _ = crawl_of(tmp_path, pages)
    assert "/plain" in web.paths()
    assert len(web.paths()) == 3


def test_odd_but_lawful_answers(tmp_path: Path) -> None:
    pages: Pages = {
        "/": b"HTTP/1.1 103 Early Hints\r\nLink: </s.css>\r\n\r\n" + links("/304", "/204", "/close"),
        "/304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
        "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
        "/close": b"HTTP/1.0 200 OK\nContent-Type: text/html\n\nuntil the end",
    }
    summary, _, folder = crawl_of(tmp_path, pages)
    assert summary.by_status == {"200": 2, "204": 1, "304": 1}
    assert responses(folder)["http://a.test/"].startswith(b"HTTP/1.1 200")
    assert responses(folder)["http://a.test/close"] == pages["/close"]


# What is written down


def test_use_statements_are_recorded_with_the_page(tmp_path: Path) -> None:
    robots = "User-agent: *\nContent-Signal: ai-train=no\nContent-Usage: train-ai=n\nAllow: /\n"
    robots += "\nUser-agent: GPTBot\nDisallow: /"
    body = '<meta name="Robots" content="noai"><meta name="tdm-reservation" content="1">'
    pages: Pages = {"/robots.txt": page(robots, kind="text/plain"), "/": page(body, X_Robots_Tag="noimageai")}
    _, _, folder = crawl_of(tmp_path, pages)
    assert metadata(folder)["http://a.test/"]["use"] == {
        "headers": [["x-robots-tag", "noimageai"]],
        "metas": [["robots", "noai"], ["tdm-reservation", "1"]],
        "robots": {
            "content-signal": ["ai-train=no"],
            "content-usage": ["train-ai=n"],
            "disallowed_agents": ["GPTBot"],
        },
    }


def test_records_name_each_other(tmp_path: Path) -> None:
    _, web, folder = crawl_of(tmp_path, {"/": links("/x"), "/x": page("end")})
    found = records(folder)
    assert [kind for kind, *_ in found] == ["warcinfo", *["response", "request", "metadata"] * 2]
    for i in (1, 4):
        response, request, facts = (headers for *_, headers in found[i : i + 3])
        assert request["warc-concurrent-to"] == facts["warc-refers-to"] == response["warc-record-id"]
        assert response["warc-ip-address"] == "127.0.0.1"
    assert found[2][2] == next(r.head for r in web.requests if r.path == "/")
    assert b"stepbot/1.0 (+https://example.org/bot)" in found[2][2]
    assert metadata(folder)["http://a.test/x"]["parent"] == "http://a.test/"


def test_links_are_not_followed_against_the_header_or_the_element(tmp_path: Path) -> None:
    pages: Pages = {"/": links("/header", "/element"), "/header": page("<a href=/x>", X_Robots_Tag="noindex, nofollow")}
    _, web, _ = crawl_of(tmp_path, pages | {"/element": page('<meta name="robots" content="none"><a href="/y">')})
    assert web.paths() == ["/", "/header", "/element"]


# Politeness


def test_one_request_at_a_time_per_host_with_the_delay_between(tmp_path: Path) -> None:
    pages: dict[str | tuple[str, str], Answer] = {
        "/": links("/1", "/2"), "/1": page("one"), "/2": page("two"),
        ("b.test", "/robots.txt"): page("User-agent: *\nCrawl-delay: 0.4", kind="text/plain"),
    }  # fmt: skip
    with Loopback(pages) as web:
        seeds = ("http://a.test/", "http://b.test/")
        run_crawl(web.config(*seeds, hosts=("a.test", "b.test"), delay_s=0.2), tmp_path / "web")
    for host, delay_s in (("a.test", 0.2), ("b.test", 0.4)):
        asked = [r for r in web.requests if r.host == host]
        assert len(asked) == 4
        gaps = [later.began_at - earlier.ended_at for earlier, later in pairwise(asked[1:])]
        assert min(gaps) >= delay_s - 0.05, gaps
        assert asked[1].began_at - asked[0].ended_at >= 0.2 - 0.05  # after robots.txt, whose delay is not known yet


def test_one_address_is_not_asked_too_often_under_many_names(tmp_path: Path) -> None:
    hosts = tuple(f"h{i}.test" for i in range(4))
    with Loopback({"/": page("x")}) as web:
        seeds = tuple(f"http://{host}/" for host in hosts)
        run_crawl(web.config(*seeds, hosts=hosts, address_delay_s=0.1), tmp_path / "web")
    times = sorted(r.began_at for r in web.requests)
    assert len(times) == 8
    assert times[-1] - times[0] >= 0.7 - 0.05


def test_a_crawl_delay_is_capped_and_a_slow_host_rests_longer(tmp_path: Path) -> None:
    def slowly(connection: socket.socket) -> None:
        time.sleep(0.2)
        connection.sendall(links("/next"))

    robots = page("User-agent: *\nCrawl-delay: 86400", kind="text/plain")
    pages: Pages = {"/": slowly, "/next": page(), ("b.test", "/robots.txt"): robots}
    with Loopback(pages) as web:
        seeds = ("http://a.test/", "http://b.test/")
        config = web.config(*seeds, hosts=("a.test", "b.test"), delay_factor=2.0, max_crawl_delay_s=0.1)
        assert run_crawl(config, tmp_path / "web").stopped == "complete"
    for host in ("a.test", "b.test"):
        home, after = (r for r in web.requests if r.host == host and r.path != "/robots.txt")
        assert after.began_at - home.ended_at >= 0.4 - 0.05


def test_robots_files_are_asked_for_once_a_day_and_origin(tmp_path: Path) -> None:
    pages: Pages = {"/": links("/1", "/2"), "/1": page(), "/2": page(), "/robots.txt": page("", kind="text/plain")}
    with Loopback(pages) as web:
        run_crawl(web.config(max_pages=2), tmp_path / "web")
        run_crawl(web.config(max_pages=2), tmp_path / "web")
        assert [r.path for r in web.requests].count("/robots.txt") == 1
        with closing(sqlite3.connect(tmp_path / "web" / "frontier.sqlite")) as db:
            (expires_at,) = db.execute("SELECT expires_at FROM robots").fetchone()
            assert 86_000 < expires_at - time.time() <= 86_400
            db.execute("UPDATE robots SET expires_at = ?", (time.time() - 1,))
            db.commit()
        run_crawl(web.config(), tmp_path / "web")
    assert [r.path for r in web.requests].count("/robots.txt") == 2
    assert len(web.paths()) == 3


# Limits


def endless(connection: socket.socket) -> None:
    stamp = time.monotonic_ns()
    connection.sendall(links(*(f"/p{stamp}-{i}" for i in range(20))))


class Endless(dict[object, Answer]):
    """A web without an end: every path links to twenty new ones."""

    def get(self, key: object, default: Answer = b"") -> Answer:  # type: ignore[override]
        return page("", 404) if "robots" in str(key) else endless


def test_page_limits_hold_exactly_and_can_be_raised(tmp_path: Path) -> None:
    hosts = tuple(f"h{i}.test" for i in range(8))
    with Loopback({}) as web:
        web.pages = Endless()  # type: ignore[assignment]
        seeds = tuple(f"http://{host}/" for host in hosts)
        first = run_crawl(web.config(*seeds, hosts=hosts, max_pages=37), tmp_path / "web")
        assert len(web.paths()) == first.fetched == len(responses(tmp_path / "web")) == 37
        same = run_crawl(web.config(*seeds, hosts=hosts, max_pages=37), tmp_path / "web")
        more = run_crawl(web.config(*seeds, hosts=hosts, max_pages=50), tmp_path / "web")
        assert len(web.paths()) == len(responses(tmp_path / "web")) == 50
    assert [s.stopped for s in (first, same, more)] == ["max_pages"] * 3
    assert (same.run_fetched, more.run_fetched) == (0, 13)


def test_host_limit_leaves_pages_queued(tmp_path: Path) -> None:
    with Loopback({}) as web:
        web.pages = Endless()  # type: ignore[assignment]
        summary = run_crawl(web.config(max_pages_per_host=5), tmp_path / "web")
    assert len(web.paths()) == summary.fetched == 5
    assert summary.stopped == "complete"
    assert summary.queued > 0


def test_byte_limit_is_never_passed(tmp_path: Path) -> None:
    hosts = tuple(f"h{i}.test" for i in range(8))
    with Loopback({}) as web:
        web.pages = Endless()  # type: ignore[assignment]
        seeds = tuple(f"http://{host}/" for host in hosts)
        summary = run_crawl(web.config(*seeds, hosts=hosts, max_bytes=80_000), tmp_path / "web")
    assert summary.stopped == "max_bytes"
    assert summary.received_bytes <= 80_000
    assert len(responses(tmp_path / "web")) == summary.fetched > 0


def test_time_limit_stops_a_crawl_that_would_wait(tmp_path: Path) -> None:
    with Loopback({"/": links("/later"), "/later": page()}) as web:
        summary = run_crawl(web.config(delay_s=3600.0, max_s=0.5), tmp_path / "web")
    assert (summary.stopped, summary.queued) == ("max_s", 1)


# TLS


def test_tls_verifies_the_name_at_the_pinned_address(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=a.test"]
    command += ["-addext", "subjectAltName=DNS:a.test", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=BOUND_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with Loopback({"/": page("safe")}, context) as web:
        seeds = ("https://a.test/", "https://b.test/")
        config = web.config(*seeds, hosts=("a.test", "b.test"), ca_file=str(cert), max_tries=1)
        summary = run_crawl(config, tmp_path / "web")
    assert list(responses(tmp_path / "web")) == ["https://a.test/"]
    assert summary.not_fetched == {"robots_unreachable": 1}
