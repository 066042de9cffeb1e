"""WARC and ARC reading: real archives, deliberately broken ones, and every kind of damage made here."""

import bz2
import gzip
import io
import os
from pathlib import Path

import pytest
import zstandard

from core.records import Dropped, Failed, Found, Origin, Raw
from crawl.sources import CrawlSource, WarcSource, parse, records, units
from crawl.sources.http import parse_message, unchunk
from crawl.sources.members import MemberStream, TornMemberError
from crawl.sources.warc import read_warc

TYPES = ("response", "resource", "conversion")


@pytest.fixture
def archives() -> Path:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("STEPWELL_DATA") or root.parent / "shared" / "data") / "warc"
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}")
    return folder


def record(url: str, body: bytes, status: str = "200 OK", kind: str = "response", headers: str = "") -> bytes:
    block = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body if kind == "response" else body
    )
    head = f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n"
    declared = "application/http" if kind == "response" else "text/plain"
    return f"{head}Content-Type: {declared}\r\nContent-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


RECORDS = [record(f"http://h/{i}", f"<p>page {i}</p>".encode() * (i + 1) * 50) for i in range(5)]


def read(data: bytes) -> list[Raw | Dropped | Failed]:
    return list(read_warc(io.BytesIO(data), "w", TYPES, 1 << 20))


def urls(data: bytes) -> list[str | None]:
    return [r.url for r in read(data) if isinstance(r, Raw)]


def failures(data: bytes) -> list[Failed]:
    return [r for r in read(data) if isinstance(r, Failed)]


def members(pack=gzip.compress) -> list[bytes]:
    return [pack(r) for r in RECORDS]


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.ZstdCompressor().compress, bytes], ids=["gz", "zst", "plain"]
)
def test_records_carry_url_date_headers_and_where_they_lie(pack):
    parts = members(pack)
    found = read(b"".join(parts))
    assert [r.url for r in found] == [f"http://h/{i}" for i in range(5)]
    assert found[1].payload == b"<p>page 1</p>" * 100
    assert found[1].fetched_at.isoformat() == "2024-01-02T03:04:05+00:00"
    assert found[1].headers["content-type"] == "text/html"
    assert found[1].headers["warc-type"] == "response"
    offset = len(parts[0])
    trailer = 4 if pack is bytes else 0
    assert found[1].origin == Origin("w", offset, len(parts[1]) - trailer)


def test_one_big_member_gives_distinct_decompressed_positions():
    found = read(gzip.compress(b"".join(RECORDS)))
    assert [r.origin.offset for r in found] == [sum(map(len, RECORDS[:i])) for i in range(5)]


@pytest.mark.parametrize("cut", range(1, 60, 7))
@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.ZstdCompressor().compress, bytes], ids=["gz", "zst", "plain"]
)
def test_a_torn_tail_fails_once_at_the_last_record(pack, cut):
    parts = members(pack)
    whole = b"".join(parts)
    if pack is bytes and cut <= 4:
        pytest.skip("only the empty lines behind the last record are torn")
    torn = whole[:-cut]
    assert urls(torn)[:4] == [f"http://h/{i}" for i in range(4)]
    failed = failures(torn)
    if len(urls(torn)) == 4:
        assert [(f.reason, f.origin.offset) for f in failed] == [("torn_record", len(whole) - len(parts[-1]))]
    else:  # all of the record was there, the member's checksum was not
        assert len(failed) == 1


def test_every_prefix_of_an_archive_is_read_without_an_exception():
    for pack in (gzip.compress, bytes):
        data = b"".join(pack(r) for r in RECORDS[:2])
        for end in range(0, len(data), 13):
            assert len(failures(data[:end])) <= 1


@pytest.mark.parametrize(
    "garbage", [b"garbage!" * 50, b"line\r\nline\r\n" * 9, b"\x1f\x8b\x08 not gzip", bytes(range(256)) * 3]
)
@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gz", "plain"])
def test_garbage_between_records_costs_one_failure_and_no_record(pack, garbage):
    parts = members(pack)
    data = parts[0] + parts[1] + garbage + b"".join(parts[2:])
    assert urls(data) == [f"http://h/{i}" for i in range(5)]
    assert [f.reason for f in failures(data)] == ["torn_record"]


def test_damage_within_a_member_costs_that_record_only():
    parts = members()
    middle = len(parts[2]) // 2
    parts[2] = parts[2][:middle] + b"XXXXXXXX" + parts[2][middle + 8 :]
    assert urls(b"".join(parts)) == [f"http://h/{i}" for i in (0, 1, 3, 4)]
    assert [f.origin.offset for f in failures(b"".join(parts))] == [len(parts[0] + parts[1])]


@pytest.mark.parametrize("length", ["", "abc", "-5", "9" * 30, "99999", "1"])
def test_a_wrong_content_length_loses_no_later_record_of_another_member(length):
    head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {length}\r\n\r\nbody\r\n\r\n".encode()
    data = head + b"".join(RECORDS)
    found = urls(data)
    assert failures(data)
    assert found == [f"http://h/{i}" for i in range(5)] or length == "99999"


def test_what_is_no_document_is_dropped_or_passed_over():
    data = b"".join(
        [
            record("http://h/404", b"gone", "404 Not Found"),
            record("http://h/r", b"", kind="revisit"),
            record("http://h/q", b"GET /", kind="request"),
            record("http://h/m", b"x: y", kind="metadata"),
            record("dns:h", b"1.2.3.4", kind="resource"),
            record("http://h/big", b"x" * (2 << 20)),
            record("http://h/odd", b"x", headers="Content-Encoding: rot13\r\n"),
        ]
    )
    assert [(type(r).__name__, getattr(r, "reason", r.origin.path), getattr(r, "url", None)) for r in read(data)] == [
        ("Dropped", "http_status", "http://h/404"),
        ("Dropped", "record_type", "http://h/r"),
        ("Raw", "w", "dns:h"),
        ("Dropped", "too_large", "http://h/big"),
        ("Failed", "InputError", None),
    ]


def test_http_codings_are_undone_within_the_limit():
    def body(headers: str, data: bytes, limit: int = 1 << 20) -> bytes:
        return parse_message(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + data, limit).body

    assert body("Content-Encoding: gzip", gzip.compress(b"hello")) == b"hello"
    assert body("Content-Encoding: gzip", b"already plain") == b"already plain"
    assert body("Content-Encoding: zstd", zstandard.compress(b"hello")) == b"hello"
    assert body("Content-Encoding: gzip", gzip.compress(b"hello" * 99)[:-9]).startswith(b"hello")
    assert len(body("Content-Encoding: gzip", gzip.compress(b"\0" * 50_000_000), 1000)) == 1001
    chunked = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"
    assert body("Transfer-Encoding: chunked", chunked) == b"hello world"
    assert unchunk(b"<html>never chunked") == b"<html>never chunked"
    assert unchunk(b"5\r\nhello\r\nff\r\ntorn") == b"hellotorn"


def test_member_stream_positions_and_lines():
    stream = MemberStream(io.BytesIO(bz2.compress(b"ab\ncd") + bz2.compress(b"ef\n")))
    assert stream.readline(10) == b"ab\n"
    assert stream.readline(10) == b"cdef\n"
    assert stream.tell() == 8
    assert stream.readline(10) == b""
    assert stream.begins_member(5)
    with pytest.raises(TornMemberError):
        MemberStream(io.BytesIO(gzip.compress(bytes(range(256)))[:99])).read(256)


def test_all_real_archives_are_read_or_counted(archives):
    source = WarcSource(path=str(archives), files=("**/*",))
    found: dict[str, list] = {}
    for unit in units(source):
        path = unit.payload.paths[0]
        found[path] = list(records(source, unit))
        places = [(r.origin.offset, r.origin.length) for r in found[path]]
        assert len(set(places)) == len(places), path
        for raw in found[path]:
            if isinstance(raw, Raw):
                assert isinstance(parse(source, raw), Found | Dropped)
    assert len(found) == 79
    by_name = {path.rpartition("data/")[2]: rows for path, rows in found.items()}
    assert [r.reason for r in by_name["clipped.warc.gz"]] == ["torn_record"]
    assert len([r for r in by_name["warcfile.warc.gz"] if isinstance(r, Raw)]) == 16
    assert [r.payload for r in by_name["warcfile.warc.gz"]] == [r.payload for r in by_name["warcfile.warc.lz4"]]
    assert [r.url for r in by_name["example.arc.gz"]] == ["http://example.com/"]
    torn = [p for p, rows in found.items() if any(isinstance(r, Failed) for r in rows) and ".cdx" not in p]
    assert len(torn) == 9, torn  # two bad.arc, two .wacz, and five archives with damaged records


def test_well_formed_archives_agree_with_fastwarc(archives):
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    for path in sorted(archives.rglob("*.warc.gz")):
        ours = read_warc(open(path, "rb"), "w", TYPES, 64 << 20)  # noqa: SIM115
        ours = list(ours)
        if any(isinstance(r, Failed) for r in ours):
            continue
        theirs = []
        with open(path, "rb") as f:
            for r in ArchiveIterator(f, record_types=WarcRecordType.response, parse_http=True):
                if r.http_headers.status_code == 200:
                    theirs.append((r.headers.get("WARC-Target-URI").strip("<>"), r.stream_pos))
        mine = [
            (r.url, r.origin.offset) for r in ours if isinstance(r, Raw) and r.headers.get("warc-type") == "response"
        ]
        assert [u for u, _ in mine] == [u for u, _ in theirs], path
        if len({p for _, p in theirs}) == len(theirs) > 1:
            assert mine == theirs, path


def test_crawl_reads_the_captures_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c-0.warc.gz").write_bytes(b"".join(members()))
    crawl = CrawlSource(seeds=("http://a/",), user_agent="t/1 (+a@b)", document_kind="reference", license="CC0-1.0")
    source = crawl.captures(str(tmp_path))
    (unit,) = units(source)
    found = [parse(source, r) for r in records(source, unit)]
    assert [(f.kind, f.license, f.origin.path) for f in found] == [("reference", "CC0-1.0", "a/c-0.warc.gz")] * 5
    assert (unit.bytes, len(unit.name)) == (sum(map(len, members())), 16)
