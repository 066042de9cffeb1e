"""The laws of a root, on every kind of place: a disk, S3, memory, and a file system that only fsspec knows."""

import os
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from core import object_store
from core.errors import ConfigError, StageError
from core.object_store import PART_BYTES, READ_AHEAD_BYTES, TAIL_BYTES
from core.storage import Root

TABLE = pa.table({"a": [1, 2, 3], "s": pa.array(["x", None, "z"], pa.large_string())})
PATIENCE_S = 30.0


class Shelf(DirFileSystem):
    """A folder of this machine under a protocol of its own: what a mount or a cluster's file system is to fsspec."""

    protocol = "shelf"

    def __init__(self, **settings):
        super().__init__(os.environ["SHELF"], LocalFileSystem(auto_mkdir=False), **settings)


fsspec.register_implementation("shelf", Shelf, clobber=True)


@pytest.fixture(params=["local", "memory", "shelf", "s3"])
def root(request, tmp_path, monkeypatch):
    monkeypatch.setenv("SHELF", str(tmp_path))
    if request.param == "s3":
        return Root(request.getfixturevalue("s3").url)
    urls = {
        "local": str(tmp_path),
        "memory": f"memory://{uuid.uuid4().hex}/r",
        "shelf": f"shelf://{uuid.uuid4().hex}/r",
    }
    return Root(urls[request.param])


def test_files(root):
    assert not root.exists("t")
    assert not root.exists("t/x.json")
    assert root.names("t") == []
    root.write_json("t/x.json", {"b": 1, "a": "é"})
    assert root.exists("t/x.json")  # at once: nothing remembers that it was not there
    assert root.exists("t")
    assert not root.exists("t/x")
    assert root.read_bytes("t/x.json") == '{\n "a": "é",\n "b": 1\n}\n'.encode()
    root.write_bytes("t/x.json", b"")
    assert root.size("t/x.json") == 0
    assert root.read_bytes("t/x.json") == b""
    root.write_bytes("t/deep/er/y", b"y")
    root.write_bytes("t/%20 +ü&?#", b"z")
    assert root.names("t") == sorted(["%20 +ü&?#", "deep", "x.json"])
    assert root.read_bytes("t/%20 +ü&?#") == b"z"
    root.rename("t/deep/er/y", "u/v/y")
    assert root.read_bytes("u/v/y") == b"y"
    assert not root.exists("t/deep/er/y")
    root.write_bytes("u/w", b"w")
    root.rename("u/w", "u/v/y")  # over what is there
    assert root.read_bytes("u/v/y") == b"w"
    root.write_bytes("uv", b"a neighbour")
    root.remove("u")
    root.remove("u")
    assert not root.exists("u")
    assert [n for n in root.names("u") if root.exists(f"u/{n}")] == []  # SeaweedFS names an empty folder for a while
    assert root.read_bytes("uv") == b"a neighbour"
    for read in (root.read_bytes, root.size, root.open, root.versioned):
        with pytest.raises(FileNotFoundError):
            read("none")
    assert pickle.loads(pickle.dumps(root)).read_bytes("uv") == b"a neighbour"


def test_tables(root):
    assert root.write_table("t/x.parquet", TABLE.to_batches(max_chunksize=2), TABLE.schema, {"k": [1]}) == 3
    assert root.read_table("t/x.parquet").equals(TABLE)
    assert root.read_table("t/x.parquet", ["s"]).column_names == ["s"]
    assert root.note("t/x.parquet") == {"k": [1]}
    assert root.note("t/none.parquet") is None
    for name, data in {"empty": b"", "text": b"hello", "torn": b"PAR1" + bytes(100) + b"\x10\0\0\0PAR1"}.items():
        root.write_bytes(f"{name}.parquet", data)
        assert root.note(f"{name}.parquet") is None

    def torn():
        yield TABLE
        raise ValueError("torn")

    for name in ("t/new.parquet", "t/x.parquet"):
        with pytest.raises(ValueError, match="torn"):
            root.write_table(name, torn(), TABLE.schema)
    assert root.names("t") == ["x.parquet"]
    assert root.read_table("t/x.parquet").equals(TABLE)


def test_large_files(root, tmp_path):
    """In parts on S3: sizes about every border of parts, ranges and the end that comes first."""
    source, back = tmp_path / "source", tmp_path / "back"
    block = os.urandom(1 << 20)
    whole = block * (2 * PART_BYTES // len(block) + 1)
    for size in (TAIL_BYTES, TAIL_BYTES + 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + TAIL_BYTES + 7):
        data = whole[:size]
        source.write_bytes(data)
        with root.writing("big") as path, open(path, "wb") as f:
            f.write(data)
        assert root.size("big") == size
        root.download("big", back)
        assert back.read_bytes() == data
        with root.open("big") as f:
            assert f.read(10) == data[:10]
            f.seek(-5, os.SEEK_END)
            assert f.read(100) == data[-5:]
            f.seek(size - TAIL_BYTES - 3 if size > TAIL_BYTES + 3 else 0)
            at = f.tell()
            assert f.read(9) == data[at : at + 9]
            f.seek(0)
            assert b"".join(iter(lambda f=f: f.read(READ_AHEAD_BYTES + 11), b"")) == data
    with pytest.raises(FileNotFoundError):
        root.download("none", back)
    assert not back.exists()


def test_a_large_copy_goes_in_parts(s3, monkeypatch):
    """S3 copies 5 GB at most in one request; here the limit is what a test can send. An upload in parts is known by its ETag."""
    monkeypatch.setattr(object_store, "COPY_BYTES", 5 << 20)  # the least that S3 allows
    root, client = Root(s3.url), s3.server.client()
    whole = os.urandom(11 << 20)
    for size, parts in ((5 << 20, 0), ((5 << 20) + 1, 2), (11 << 20, 3)):
        root.write_bytes("%20 +ü&?#", whole[:size])
        root.rename("%20 +ü&?#", "copy")
        assert root.read_bytes("copy") == whole[:size]
        assert not root.exists("%20 +ü&?#")
        etag = client.head_object(Bucket=s3.bucket, Key="root/copy")["ETag"]
        assert etag.strip('"').partition("-")[2] == (str(parts) if parts else "")
    assert s3.server.unfinished(s3.bucket) == []
    with pytest.raises(FileNotFoundError):
        root.rename("none", "copy")


def test_a_large_table(root):
    """Many row groups, read a group and a column at a time as the stages do."""
    rows = pa.table({"n": list(range(60_000)), "s": pa.array([f"{i:040x}" for i in range(60_000)], pa.large_string())})
    root.write_table("t.parquet", rows.to_batches(max_chunksize=7_000), rows.schema, {"k": 1})
    assert root.size("t.parquet") > TAIL_BYTES
    with root.parquet("t.parquet") as f:
        groups = [f.read_row_group(g, columns=["s"]) for g in range(f.num_row_groups)]
    assert pa.concat_tables(groups).equals(rows.select(["s"]))


def test_exclusive_creation_and_versions(root):
    assert root.create_exclusively("locks/x", b"1")
    assert not root.create_exclusively("locks/x", b"2")
    data, first = root.versioned("locks/x")
    assert data == b"1"
    second = root.replace("locks/x", b"3", first, PATIENCE_S)
    assert second is not None
    assert root.replace("locks/x", b"4", first, PATIENCE_S) is None
    assert root.versioned("locks/x") == (b"3", second)
    assert not root.remove_version("locks/x", first)
    assert root.read_bytes("locks/x") == b"3"
    assert root.remove_version("locks/x", second)
    assert not root.remove_version("locks/x", second)
    assert root.replace("locks/x", b"5", second, PATIENCE_S) is None
    assert not root.exists("locks/x")


def test_of_many_at_once_one_wins(root):
    if root.url.startswith(("memory", "shelf")):
        pytest.skip("no atomic replacement there, and none is promised")
    gate = threading.Barrier(8)

    def create(i):
        gate.wait()
        return root.create_exclusively("locks/x", f"{i}".encode())

    def take(i):
        gate.wait()
        return root.replace("locks/x", f"{i} again".encode(), version, PATIENCE_S) is not None

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
        data, version = root.versioned("locks/x")
        assert won == [f"{i}".encode() == data for i in range(8)]
        assert sum(won) == 1
        won = list(pool.map(take, range(8)))
        assert won == [f"{i} again".encode() == root.read_bytes("locks/x") for i in range(8)]
        assert sum(won) == 1


def test_the_probe_leaves_nothing_and_finds_nothing_lacking(root, caplog):
    root.probe()
    assert caplog.text == ""
    assert [n for n in root.names("") if not n.startswith("seaweed")] == []


def test_a_password_in_a_url_is_refused_without_being_repeated():
    with pytest.raises(ConfigError, match="got a password in the ftp:// URL") as e:
        Root("ftp://me:hunter2@files.example/data")
    assert "hunter2" not in str(e.value)
    assert Root("hdfs://me@name.example/data").url == "hdfs://me@name.example/data"


def test_an_s3_url_needs_a_bucket():
    with pytest.raises(ConfigError, match="expected s3://bucket/folder"):
        Root("s3://").exists("x")


def test_a_file_replaced_while_it_is_read_is_not_mixed(s3):
    root = Root(s3.url)
    root.write_bytes("x", bytes(TAIL_BYTES + 100))
    with root.open("x") as f:
        root.write_bytes("x", b"1" * (TAIL_BYTES + 100))
        with pytest.raises(StageError, match="was replaced while it was read"):
            f.read()
