"""Units of every kind of source, and JSONL, Parquet and datatrove reading."""

import bz2
import gzip
import json
import lzma
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import TypeAdapter

from core.errors import ConfigError
from core.records import Dropped, Failed, Found, Raw
from crawl.sources import (
    DatatroveSource,
    FilesSource,
    JsonlSource,
    ParquetSource,
    Source,
    input_digest,
    listing,
    parse,
    records,
    units,
)
from crawl.sources.listing import GROUP_FILES, Input, Piece, grouped, path_hash


def rows(source) -> list:
    return [r for u in units(source) for r in records(source, u)]


def write_lines(path: Path, lines: list) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_sources_are_told_apart_by_kind():
    source = TypeAdapter(Source).validate_python({"kind": "jsonl", "path": "x", "text": "body"})
    assert isinstance(source, JsonlSource)
    assert source.text == "body"


def test_groups_do_not_depend_on_order_of_creation_and_a_new_file_touches_one_or_two():
    files = sorted((Input(f"d/{i:05}.txt", 10) for i in range(5_000)), key=lambda f: f.path)
    before = grouped(files)
    assert [p for u in before for p in u.payload.paths] == [f.path for f in files]
    assert max(len(u.payload.paths) for u in before) <= GROUP_FILES
    assert len({u.name for u in before}) == len(before)
    after = grouped(sorted([*files, Input("d/02500x.txt", 10)], key=lambda f: f.path))
    assert len(set(after) - set(before)) <= 2
    assert len({u.payload.paths for u in before} & {u.payload.paths for u in after}) >= len(before) - 1


def test_large_files_split_groups_and_borders_are_by_hash():
    files = [Input(f"{i}.txt", 40 << 20) for i in range(6)]
    assert all(len(u.payload.paths) == 1 for u in grouped(files))
    border = next(f"{i}.txt" for i in range(9_999) if path_hash(f"{i}.txt") % 256 == 0)
    assert [u.payload.paths for u in grouped([Input(border, 1), Input("~", 1)])] == [(border,), ("~",)]


def test_files_are_read_in_order_with_their_types(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("# Title\n\ntext")
    (tmp_path / "sub" / "a.html").write_text("<p>hello there</p>")
    (tmp_path / "z.txt").write_bytes(b"x" * 100)
    (tmp_path / "skip.bin").write_bytes(b"x")
    source = FilesSource(path=str(tmp_path), limits={"record_bytes": 50})
    found = rows(source)
    assert [r.origin.path for r in found] == ["b.md", "sub/a.html", "z.txt"]
    assert isinstance(found[2], Dropped)
    assert [parse(source, r).text for r in found[:2]] == ["# Title\n\ntext", "hello there"]
    one = FilesSource(path=str(tmp_path / "sub" / "a.html"))
    assert [r.origin.path for r in rows(one)] == ["a.html"]
    assert [r.origin.path for r in rows(FilesSource(path=str(tmp_path / "*.md")))] == ["b.md"]
    with pytest.raises(ConfigError, match="no file matches"):
        units(FilesSource(path=str(tmp_path / "nothing")))


def test_jsonl_bad_lines_fail_by_number_and_the_rest_is_read(tmp_path):
    lines = [
        {"text": "one", "url": "http://a/", "id": 7, "lang": "en"},
        b"{not json",
        {"text": 5},
        [1],
        b"",
        {"text": "  "},
        {"url": "no text"},
        b'{"text": "caf\xe9"}',
        b"[" * 200_000,
        {"text": "last \ud800"},
    ]
    write_lines(tmp_path / "a.jsonl", lines)
    source = JsonlSource(path=str(tmp_path), license="MIT")
    found = rows(source)
    failed = [r for r in found if isinstance(r, Failed)]
    assert [f.detail.split(":")[0] for f in failed] == ["line 2", "line 3", "line 4", "line 8", "line 9"]
    assert [f.reason for f in failed][:3] == ["JSONDecodeError", "InputError", "InputError"]
    parsed = [parse(source, r) for r in found if isinstance(r, Raw)]
    assert [type(p) for p in parsed] == [Found, Dropped, Dropped, Found]
    assert parsed[0].metadata == {"lang": "en", "source_id": "7"}
    assert (parsed[0].url, parsed[0].license, parsed[0].kind) == ("http://a/", "MIT", "other")
    assert parsed[1].reason == "empty"


def test_jsonl_ranges_give_every_line_once(tmp_path, monkeypatch):
    lines = [{"text": "x" * random.Random(i).randrange(60), "n": i} for i in range(200)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    source = JsonlSource(path=str(path))
    whole = rows(source)
    file = Input("a.jsonl", path.stat().st_size)
    for step in (1, 7, 64, 1000):
        pieces = listing.ranges(file, step)
        assert sum(u.bytes for u in pieces) == file.bytes
        assert [r for u in pieces for r in records(source, u)] == whole
    assert [u.name[-2:] for u in listing.ranges(file, 1000)][:2] == ["-0", "-1"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("zst", zstandard.compress), ("bz2", bz2.compress), ("xz", lzma.compress)],
)
def test_compressed_jsonl_and_its_torn_tail(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    noise = random.Random(1)
    data = b"".join(json.dumps({"text": f"{noise.random()}" * 3}).encode() + b"\n" for i in range(3_000))
    path.write_bytes(pack(data))
    source = JsonlSource(path=str(path))
    assert len(rows(source)) == 3_000
    path.write_bytes(pack(data)[:-20])
    torn = rows(source)
    assert [r.reason for r in torn if isinstance(r, Failed)] == ["torn_record"]


def test_half_line_at_the_end_fails_and_a_whole_one_without_newline_does_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b')
    assert [getattr(r, "reason", "raw") for r in rows(JsonlSource(path=str(path)))] == ["raw", "torn_record"]
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert len(rows(JsonlSource(path=str(path)))) == 2


def test_long_lines_work_up_to_the_limit(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 50_000_000}, {"text": "after"}])
    found = rows(JsonlSource(path=str(path)))
    assert [len(r.payload["text"]) for r in found] == [50_000_000, 5]
    short = rows(JsonlSource(path=str(path), line_bytes=1 << 20))
    assert [getattr(r, "reason", "raw") for r in short] == ["too_large", "raw"]


def test_parquet_columns_row_groups_and_damage(tmp_path, monkeypatch):
    table = pa.table({"body": ["a", None, "c", "d"], "link": ["http://a/", "", None, "x"], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="none")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    source = ParquetSource(path=str(tmp_path), text="body", url="link", id="n")
    found = rows(source)
    assert [r.origin.offset for r in found] == [0, 1, 2, 3, None]
    assert isinstance(found[-1], Failed)
    parsed = [parse(source, r) for r in found[:-1]]
    assert [getattr(p, "text", None) for p in parsed] == ["a", None, "c", "d"]
    assert parsed[0].metadata == {"source_id": "1"}
    monkeypatch.setattr("crawl.sources.read.RANGE_BYTES", 1)
    split = units(source)
    assert [u.payload for u in split][:2] == [Piece(("a.parquet",), 0, 1), Piece(("a.parquet",), 1, 2)]
    assert [r for u in split for r in records(source, u)] == found
    with pytest.raises(ConfigError, match=r"lacks columns \['text'\], got \['body', 'link', 'n'\]"):
        units(ParquetSource(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="is int64, expected string"):
        units(ParquetSource(path=str(tmp_path), text="n"))


def test_datatrove_reader(tmp_path):
    pytest.importorskip("datatrove")
    table = pa.table({"text": ["one", "two"], "id": ["i1", "i2"], "lang": ["en", None], "url": [None, "http://t/"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = DatatroveSource(path=str(tmp_path), reader="datatrove.pipeline.readers.ParquetReader")
    (unit,) = units(source)
    parsed = [parse(source, r) for r in records(source, unit)]
    assert [p.text for p in parsed] == ["one", "two"]
    assert (parsed[0].metadata["source_id"], parsed[0].metadata["lang"], parsed[1].url) == ("i1", "en", "http://t/")
    with pytest.raises(ConfigError, match="no datatrove reader"):
        units(DatatroveSource(path=str(tmp_path), reader="datatrove.pipeline.readers.Nothing"))


def test_digests_follow_the_bytes_of_the_range(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 50}] * 10)
    source = JsonlSource(path=str(path))
    first, second = listing.ranges(Input("a.jsonl", path.stat().st_size), 400)[:2]
    before = input_digest(source, first), input_digest(source, second)
    data = bytearray(path.read_bytes())
    data[450] = ord("y")
    path.write_bytes(data)
    assert input_digest(source, first) == before[0]
    assert input_digest(source, second) != before[1]
    assert pickle.loads(pickle.dumps(first)) == first
