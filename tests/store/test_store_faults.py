"""Throttling, errors and torn connections between this process and the store cost time, never bytes."""

import os

import pyarrow as pa
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from core import object_store, object_store_calls
from core.errors import StageError
from core.object_store import PART_BYTES, TAIL_BYTES
from core.storage import Root
from tests.store.proxy import KINDS, Fault

TABLE = pa.table({"n": list(range(40_000)), "s": pa.array([f"{i:032x}" for i in range(40_000)], pa.large_string())})
SHORT_S = 1.0
SMALL_PART_BYTES = 5 << 20  # the least that S3 allows


@pytest.fixture
def root(s3, proxy):
    return Root(s3.url)


def worked(root: Root, n: int, big: bytes, tmp_path) -> None:
    """Everything a root does, checked."""
    root.write_bytes(f"{n}/a", b"a" * n)
    assert root.read_bytes(f"{n}/a") == b"a" * n
    root.write_table(f"{n}/t.parquet", TABLE.to_batches(max_chunksize=9_000), TABLE.schema, {"n": n})
    assert root.note(f"{n}/t.parquet") == {"n": n}
    assert root.read_table(f"{n}/t.parquet").equals(TABLE)
    root.rename(f"{n}/t.parquet", f"{n}/u/t.parquet")
    assert root.read_table(f"{n}/u/t.parquet", ["n"]).equals(TABLE.select(["n"]))
    assert root.create_exclusively(f"{n}/lock", b"mine")
    assert not root.create_exclusively(f"{n}/lock", b"theirs")
    version = root.replace(f"{n}/lock", b"mine still", root.versioned(f"{n}/lock")[1], 60.0)
    assert version is not None
    assert root.versioned(f"{n}/lock") == (b"mine still", version)
    with root.writing(f"{n}/big") as path, open(path, "wb") as f:
        f.write(big)
    root.download(f"{n}/big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == big
    root.rename(f"{n}/big", f"{n}/copy")
    assert root.read_bytes(f"{n}/copy") == big
    assert root.names(str(n)) == ["a", "copy", "lock", "u"]
    root.remove(str(n))
    assert not root.exists(str(n))


def test_every_kind_of_fault_on_every_kind_of_call(root, s3, proxy, tmp_path, monkeypatch, soak):
    monkeypatch.setenv("FSSPEC_S3", '{"config_kwargs": {"read_timeout": 2}}')  # below a stall: it becomes a timeout
    for what in ("PART_BYTES", "COPY_BYTES"):
        monkeypatch.setattr(object_store, what, SMALL_PART_BYTES)
    big = os.urandom(SMALL_PART_BYTES + 100_000)
    for n, kind in enumerate(KINDS * max(1, int(soak / 10)), start=1):
        proxy.seed = n
        proxy.faults = [Fault(kind, 0.3, times=3 if kind == "stall" else None)]
        worked(root, n, big, tmp_path)
    proxy.faults = []
    assert all(proxy.done[kind] for kind in KINDS)
    assert s3.server.unfinished(s3.bucket) == []
    assert s3.server.keys(s3.bucket) == []


def test_a_changed_byte_is_seen_where_the_store_gave_a_checksum(root, proxy):
    root.write_bytes("x.json", b'{"rows": 1}')
    proxy.faults = [Fault("flipped", where="GET .*x.json", times=2)]
    assert root.read_bytes("x.json") == b'{"rows": 1}'
    assert proxy.done["flipped"] == 2


def test_a_throttled_store_is_given_up_in_one_line_and_nothing_is_written(root, s3, proxy, monkeypatch):
    monkeypatch.setattr(object_store_calls, "PATIENCE_S", SHORT_S)
    root.write_bytes("old", b"before")
    proxy.faults = [Fault("slow_down")]
    with pytest.raises(StageError) as e:
        root.write_bytes("old", b"after")
    assert "503 SlowDown" in str(e.value)
    assert "run again" in str(e.value)
    assert "\n" not in str(e.value)
    assert proxy.done["slow_down"] >= 3
    with pytest.raises(StageError, match="503"):
        root.read_bytes("old")
    proxy.faults = []
    assert root.read_bytes("old") == b"before"


@pytest.mark.parametrize("kind", ["torn", "truncated"])
def test_a_body_that_never_comes_whole_is_not_data(root, proxy, monkeypatch, kind):
    monkeypatch.setattr(object_store_calls, "PATIENCE_S", SHORT_S)
    root.write_bytes("x", os.urandom(TAIL_BYTES * 3))
    proxy.faults = [Fault(kind, where="GET")]
    for read in (root.read_bytes, lambda name: root.open(name).read()):
        with pytest.raises(StageError, match="no whole answer"):
            read("x")


def test_a_refusal_whose_body_is_torn_is_asked_for_again(root, proxy):
    """botocore passes such a fault on as urllib3 raised it."""
    proxy.faults = [Fault("torn", where="GET", times=2)]
    with pytest.raises(FileNotFoundError):
        root.read_bytes("none")
    assert proxy.done["torn"] == 2


def test_an_answer_that_was_lost_is_not_a_lost_race(root, proxy):
    """The store did it, the client was not told: the try after it meets its own success."""
    proxy.faults = [Fault("lost", where="PUT", times=1)]
    assert root.create_exclusively("lock", b"mine")
    assert proxy.done["lost"] == 1
    version = root.versioned("lock")[1]
    proxy.faults = [Fault("lost", where="PUT", times=2)]
    version = root.replace("lock", b"mine too", version, 60.0)
    assert version is not None
    assert proxy.done["lost"] == 2
    proxy.faults = [Fault("lost", where="DELETE", times=3)]
    root.remove_version("lock", version)
    assert proxy.done["lost"] == 3
    assert not root.exists("lock")


def test_a_lost_completion_is_not_a_failed_upload(root, s3, proxy):
    data = os.urandom(PART_BYTES + 1)
    proxy.faults = [Fault("lost", where=r"POST .*uploadId=", times=1)]
    root.write_bytes("big", data)
    assert proxy.done["lost"] == 1
    assert root.read_bytes("big") == data
    assert s3.server.unfinished(s3.bucket) == []


def test_an_upload_that_fails_leaves_no_parts(root, s3, proxy, monkeypatch):
    monkeypatch.setattr(object_store_calls, "PATIENCE_S", SHORT_S)
    proxy.faults = [Fault("error", where="partNumber=2")]
    with pytest.raises(StageError, match="500 InternalError"):
        root.write_bytes("big", bytes(3 * PART_BYTES))
    assert s3.server.unfinished(s3.bucket) == []
    assert not root.exists("big")


def test_requests_that_small_things_cost(root, proxy):
    """A note, a manifest, a small table: one request each."""
    root.write_table("t.parquet", [TABLE], TABLE.schema, {"n": 1})
    assert root.size("t.parquet") > TAIL_BYTES
    root.write_json("m.json", {})
    asked = len(proxy.requests)
    root.note("t.parquet")
    root.read_json("m.json")
    assert [r.partition(" ")[0] for r in proxy.requests[asked:]] == ["GET", "GET"]


def test_a_store_that_ignores_conditions_is_named(root, s3, proxy, caplog, monkeypatch):
    """As some do. Such a store is played by a proxy that drops the headers and signs what is left."""
    forwarded, dropped = proxy._forwarded, {"if-none-match"}

    async def unconditional(lines, body):
        return await forwarded(signed_without(dropped, lines, s3), body)

    monkeypatch.setattr(proxy, "_forwarded", unconditional)
    root.probe()
    assert "it ignores If-None-Match, so two runs may hold one lock" in caplog.text
    caplog.clear()
    dropped.clear()
    dropped.add("if-match")
    root.probe()
    assert "it ignores If-Match, so two runs may hold one lock" in caplog.text
    assert s3.server.keys(s3.bucket) == []


def signed_without(dropped, lines, s3):
    """The lines of a request's head without some headers, with a signature that fits."""
    method, target, version = lines[0].split(" ")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    unsigned = {*dropped, "authorization", "x-amz-date", "expect", "user-agent"}
    kept = {k: v for k, v in headers.items() if k.lower() not in unsigned}
    request = AWSRequest(method, f"http://{headers['Host']}{target}", headers=kept)
    request.context["payload_signing_enabled"] = True
    request.context["has_streaming_input"] = False
    S3SigV4Auth(Credentials(s3.key, s3.secret), "s3", "us-east-1").add_auth(request)
    return [f"{method} {target} {version}", *(f"{k}: {v}" for k, v in request.headers.items()), "", ""]
