"""Roots: round trips, whole files or none, exclusive creation, URLs, full disks."""

import json
import os
import pickle
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from core.errors import ConfigError, StageError
from core.storage import Root
from pipelines.preflight import preflight
from tests.bounds import BOUND_S
from tests.builders import strays

TABLE = pa.table({"a": [1, 2, 3], "s": pa.array(["x", None, "z"], pa.large_string())})


@pytest.fixture(params=["path", "file", "memory"])
def root(request, tmp_path):
    return Root(
        {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}/r"}[request.param]
    )


def test_round_trips(root):
    assert root.write_table("t/x.parquet", TABLE.to_batches(max_chunksize=2), TABLE.schema, {"k": [1]}) == 3
    assert root.read_table("t/x.parquet").equals(TABLE)
    assert root.read_table("t/x.parquet", ["s"]).column_names == ["s"]
    assert root.note("t/x.parquet") == {"k": [1]}
    root.write_json("t/x.json", {"b": 1, "a": "é"})
    assert root.size("t/x.json") == len(root.read_bytes("t/x.json"))
    assert root.read_bytes("t/x.json") == '{\n "a": "é",\n "b": 1\n}\n'.encode()
    assert root.names("t") == ["x.json", "x.parquet"]
    root.rename("t/x.parquet", "u/v/y.parquet")
    assert root.exists("u/v/y.parquet")
    assert not root.exists("t/x.parquet")
    root.remove("u")
    assert not root.exists("u/v/y.parquet")
    root.remove("u")
    assert root.names("u") == []
    assert pickle.loads(pickle.dumps(root)).url == root.url


def test_an_empty_table_keeps_its_schema(root):
    assert root.write_table("e.parquet", [TABLE.slice(0, 0)], TABLE.schema) == 0
    assert root.write_table("f.parquet", [], TABLE.schema) == 0
    assert root.read_table("e.parquet").schema == root.read_table("f.parquet").schema == TABLE.schema


def test_a_local_file_goes_from_where_it_lies(root, tmp_path_factory, monkeypatch):
    source = tmp_path_factory.mktemp("elsewhere") / "source"
    source.write_bytes(b"x" * 100_000)
    monkeypatch.setattr("tempfile.tempdir", str(source.parent / "none"))  # not through a temporary file of this machine
    for _ in range(2):  # also over what is there
        root.upload(source, "a/b")
        assert root.read_bytes("a/b") == source.read_bytes() == b"x" * 100_000
    assert root.names("a") == ["b"]
    with pytest.raises(FileNotFoundError):
        root.upload(source.parent / "none", "a/c")
    assert root.names("a") == ["b"]


def test_an_exception_while_writing_leaves_nothing(root):
    root.write_bytes("t/old.parquet", b"before")

    def batches():
        yield TABLE
        raise ValueError("torn")

    for name in ("t/new.parquet", "t/old.parquet"):
        with pytest.raises(ValueError, match="torn"):
            root.write_table(name, batches(), TABLE.schema)
    assert root.names("t") == ["old.parquet"]
    assert root.read_bytes("t/old.parquet") == b"before"


def test_a_note_of_what_is_not_ours_is_none(root):
    assert root.note("none.parquet") is None
    for name, data in {"empty": b"", "text": b"hello", "torn": b"PAR1" + bytes(100) + b"\x10\0\0\0PAR1"}.items():
        root.write_bytes(f"{name}.parquet", data)
        assert root.note(f"{name}.parquet") is None
    root.write_table("plain.parquet", [TABLE], TABLE.schema)
    assert root.note("plain.parquet") is None


def test_exclusive_creation_has_one_winner(root):
    won, gate = [], threading.Barrier(8)

    def take(i):
        gate.wait()
        if root.create_exclusively("locks/x.json", str(i).encode()):
            won.append(i)

    if root.is_local:
        threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(won) == 1
        assert root.read_bytes("locks/x.json") == str(won[0]).encode()
        assert root.names("locks") == ["x.json"]
    else:  # a memory root lives in one thread of one process
        assert [root.create_exclusively("locks/x.json", b"1"), root.create_exclusively("locks/x.json", b"2")] == [
            True,
            False,
        ]


def test_urls():
    assert Root("memory://").url == "memory://"
    assert not Root("memory://").is_local
    assert Root("file:///tmp/a/").base == "/tmp/a"
    assert Root("~/x").base == str(Path.home() / "x")
    with pytest.raises(ConfigError, match="nope"):
        Root("nope://a").exists("b")
    with pytest.raises(StageError, match="local disk"):
        Root("memory://a").local_path("models")


FULL = """
import json, resource, signal, sys
import pyarrow as pa
from core.storage import Root
from core.errors import StageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Root(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
said = {}
big = pa.table({"a": pa.array([(i * 2654435761) % 2**61 for i in range(200_000)])})
for name, write in {
    "table": lambda: root.write_table("t/big.parquet", [big], big.schema, {"k": 1}),
    "bytes": lambda: root.write_bytes("t/old", b"x" * 1_000_000),
    "lock": lambda: root.create_exclusively("t/lock", b"x" * 1_000_000),
}.items():
    try:
        write()
    except StageError as e:
        said[name] = str(e)
print(json.dumps(said))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    Root(str(tmp_path)).write_bytes("t/old", b"before")
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, timeout=BOUND_S
    )
    said = json.loads(out.stdout)
    assert set(said) == {"table", "bytes", "lock"}
    assert all("cannot write" in line and "make room" in line and "\n" not in line for line in said.values())
    assert Root(str(tmp_path)).names("t") == ["old"]
    assert (tmp_path / "t/old").read_bytes() == b"before"
    assert strays(Root(str(tmp_path))) == []


def test_a_full_temporary_folder_is_named_and_not_the_store(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", FULL, "memory://a"], capture_output=True, text=True, check=True, env=env, timeout=BOUND_S
    )
    said = json.loads(out.stdout)
    assert set(said) == {"table", "bytes"}  # a lock's few bytes go to the store as they are
    for name, line in (("table", "/a/t/big.parquet"), ("bytes", "/a/t/old")):
        assert said[name].startswith(f"root: cannot write {tmp_path}/stepwell-")
        assert f", where TMPDIR points, on its way to {line}: " in said[name]
    assert list(tmp_path.iterdir()) == []


def test_without_any_temporary_folder_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StageError, match=r"^root: cannot make a temporary file for /a/x: .*TMPDIR"):
        Root("memory://a").write_bytes("x", b"")


def test_no_space_left_on_a_real_device(tmp_path):
    """/dev/full gives ENOSPC on every write."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    root = Root(str(tmp_path))

    def write():
        with root.writing("x") as path:
            Path(path).symlink_to(full)
            Path(path).write_bytes(b"x")

    with pytest.raises(StageError, match="No space left"):
        write()
    assert root.names("") == []


def test_preflight_refuses_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write below"):
        preflight(Root(str(tmp_path / "file" / "root")))
    with pytest.raises(ConfigError, match="cannot write below"):
        preflight(Root("/proc/stepwell"))
    preflight(Root(str(tmp_path / "new")))
    assert Root(str(tmp_path / "new")).names("") == []
