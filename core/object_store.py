"""A root on an S3 server: objects that appear whole, conditional writes for locks, reads whose every byte was asked for.

`path` is bucket/key throughout. A written object is visible at once and whole, so a put is what a rename is on a disk. Versions
are ETags. Listings are never cached. Uploads above PART_BYTES and copies above COPY_BYTES go in parts: `core.object_store_parts`.

Costs in requests: note 1 GET (the file's end), small file 1 GET, exists 1 HEAD (2 if it is not there), rename 1 HEAD
+ 1 copy + 1 delete.
"""

import contextlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from core.errors import ConfigError, StageError
from core.object_store_calls import (
    PROBE_PATIENCE_S,
    REFUSALS,
    TornError,
    at_once,
    code_of,
    is_unmatched,
    persistently,
)
from core.object_store_parts import Upload, in_parts

PART_BYTES = 16 << 20  # S3 allows 5 MB to 5 GB; memory is TRANSFERS of them
COPY_BYTES = 256 << 20  # S3 copies 5 GB at most in one request, of which no byte may come for READ_S; chosen, untested
TAIL_BYTES = 64 << 10  # what a Parquet file's footer takes, or a small file altogether
READ_AHEAD_BYTES = 8 << 20

T = TypeVar("T")


class S3Store:
    """Objects of one server. Holds no connection: see `connect`."""

    is_local = False

    def exists(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self._head(path)
            return True
        bucket, key = _split(path)
        listed = self._call(path, lambda c: c.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=1))
        return bool(listed.get("Contents"))

    def size(self, path: str) -> int:
        return int(self._head(path)["ContentLength"])

    def open(self, path: str) -> IO[bytes]:
        return io.BufferedReader(ObjectFile(self, path), READ_AHEAD_BYTES)

    def open_random(self, path: str) -> "ObjectFile":
        """For readers that know which bytes they want, such as Parquet's."""
        return ObjectFile(self, path)

    def read(self, path: str) -> bytes:
        return self.versioned(path)[0]

    def versioned(self, path: str) -> tuple[bytes, str]:
        """The object and the version that these bytes are."""
        bucket, key = _split(path)

        def get(client: Any) -> tuple[bytes, str]:
            answer = client.get_object(Bucket=bucket, Key=key)
            return _body(answer), answer["ETag"]

        return self._call(path, get)

    def range(self, path: str, start: int, stop: int, version: str) -> bytes:
        """Bytes [start, stop) of just this version."""
        bucket, key = _split(path)

        def get(client: Any) -> bytes:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=version)
            data = _body(answer)
            if "ContentRange" not in answer:  # a server may answer a range with the whole
                data = data[start:stop]
            if len(data) != stop - start:
                raise TornError(f"{len(data)} of {stop - start} bytes")
            return data

        with _one_version(path):
            return self._call(path, get)

    def tail(self, path: str) -> tuple[bytes, int, str]:
        """The last bytes of an object, at most TAIL_BYTES; its size and version. One request."""
        bucket, key = _split(path)

        def get(client: Any) -> tuple[bytes, int, str]:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=-{TAIL_BYTES}")
            data = _body(answer)
            total = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else len(data)
            if len(data) < min(total, TAIL_BYTES):
                raise TornError(f"{len(data)} of the last {TAIL_BYTES} bytes")
            return data, total, answer["ETag"]

        try:
            return self._call(path, get)
        except StageError as e:
            if code_of(e.__cause__ or e) != "InvalidRange":
                raise
            data, version = self.versioned(path)  # an empty object has no last byte
            return data, len(data), version

    def download(self, path: str, target: str) -> None:
        """Copy an object to a local file, several ranges at once."""
        data, size, version = self.tail(path)
        with open(target, "wb") as f:
            f.truncate(size)
            f.seek(size - len(data))
            f.write(data)
        starts = range(0, size - len(data), PART_BYTES)
        fd = os.open(target, os.O_WRONLY)
        try:

            def part(start: int) -> None:
                os.pwrite(fd, self.range(path, start, min(start + PART_BYTES, size - len(data)), version), start)

            at_once(part, starts)
        finally:
            os.close(fd)

    def put_file(self, local: str, path: str) -> None:
        size = os.path.getsize(local)
        bucket, key = _split(path)

        def put(client: Any, upload: Upload, start: int, stop: int) -> dict[str, Any]:
            data = _local_range(local, start, stop)
            answer: dict[str, Any] = client.upload_part(**upload, Body=data)
            return answer

        if size > PART_BYTES:
            in_parts(bucket, key, size, PART_BYTES, put)
            return
        data = _local_range(local, 0, size)
        self._call(path, lambda c: c.put_object(Bucket=bucket, Key=key, Body=data))

    def create(self, path: str, data: bytes, patience_s: float | None = None) -> bool:
        """Put `data`, which no other caller writes, only if nothing is there."""
        return self._put_if(path, data, {"IfNoneMatch": "*"}, patience_s) is not None

    def replace(self, path: str, data: bytes, version: str, patience_s: float | None = None) -> str | None:
        """Put `data`, which no other caller writes, over just this version; the new version, or None."""
        return self._put_if(path, data, {"IfMatch": version}, patience_s)

    def _put_if(self, path: str, data: bytes, condition: dict[str, str], patience_s: float | None) -> str | None:
        bucket, key = _split(path)
        try:
            put = self._call(path, lambda c: c.put_object(Bucket=bucket, Key=key, Body=data, **condition), patience_s)
            return str(put["ETag"])
        except FileNotFoundError:  # what should have been replaced is gone
            return None
        except Exception as e:
            if not is_unmatched(e):
                raise
        # The first try may have succeeded and only its answer been lost: then what is there is ours.
        try:
            there, version = self.versioned(path)
        except FileNotFoundError:
            return None
        return version if there == data else None

    def remove_version(self, path: str, version: str) -> bool:
        """Delete just this version. Compared first too, as not every store knows a conditional delete."""
        bucket, key = _split(path)
        try:
            if self._head(path)["ETag"] != version:
                return False
            self._call(path, lambda c: c.delete_object(Bucket=bucket, Key=key, IfMatch=version))
        except FileNotFoundError:
            return False
        except Exception as e:
            if not is_unmatched(e):
                raise
            return False
        return True

    def rename(self, source: str, target: str) -> None:
        """Copy on the server, then delete. Killed in between, both are there."""
        bucket, key = _split(target)
        old_bucket, old_key = _split(source)
        head = self._head(source)
        place = {"CopySource": {"Bucket": old_bucket, "Key": old_key}, "CopySourceIfMatch": head["ETag"]}

        def copy(client: Any, upload: Upload, start: int, stop: int) -> dict[str, Any]:
            answer = client.upload_part_copy(**upload, **place, CopySourceRange=f"bytes={start}-{stop - 1}")
            copied: dict[str, Any] = answer["CopyPartResult"]
            return copied

        with _one_version(source):
            if head["ContentLength"] > COPY_BYTES:
                in_parts(bucket, key, head["ContentLength"], COPY_BYTES, copy)
            else:
                self._call(source, lambda c: c.copy_object(Bucket=bucket, Key=key, **place))
        self._delete(source)

    def remove(self, path: str) -> None:
        """One object, or all below the name. One request each, as a bulk delete reports its failures inside a success
        and not every store has it."""
        self._delete(path)
        bucket, _ = _split(path)
        at_once(self._delete, [f"{bucket}/{name}" for name in self._keys(path)])

    def names(self, path: str) -> list[str]:
        bucket, key = _split(path)
        prefix = f"{key}/" if key else ""
        found: set[str] = set()
        for page in self._pages(path, {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}):
            found.update(entry["Prefix"].rstrip("/") for entry in page.get("CommonPrefixes", ()))
            found.update(entry["Key"] for entry in page.get("Contents", ()) if entry["Key"] != prefix)
        return sorted(name[len(prefix) :] for name in found)

    def probe(self, path: str) -> list[str]:
        """Write, read and delete one object, and try both kinds of conditional write: what the store does not hold to is
        returned, a sentence each."""
        data, missing = uuid.uuid4().hex.encode(), []
        bucket, _ = _split(path)
        try:
            first = self.create(path, data, PROBE_PATIENCE_S)
        except ConfigError:
            self._need_bucket(bucket)  # some stores refuse to write into a bucket that is not there
            raise
        if not first or self.create(path, data + b"2", PROBE_PATIENCE_S):
            missing.append("it ignores If-None-Match")
        elif self.replace(path, data + b"3", '"0123456789abcdef0123456789abcdef"', PROBE_PATIENCE_S) is not None:
            missing.append("it ignores If-Match")
        self._delete(path)
        return missing

    def _need_bucket(self, bucket: str) -> None:
        """A bucket that is not there is an error; of one that may not be asked about nothing is said."""
        try:
            with contextlib.suppress(ConfigError, StageError):
                self._call(bucket, lambda c: c.head_bucket(Bucket=bucket), PROBE_PATIENCE_S)
        except FileNotFoundError:
            got, expected = REFUSALS["NoSuchBucket"]
            raise ConfigError(f"root: s3://{bucket}: got {got}, expected {expected}") from None

    def _head(self, path: str) -> dict[str, Any]:
        bucket, key = _split(path)
        answer: dict[str, Any] = self._call(path, lambda c: c.head_object(Bucket=bucket, Key=key))
        return answer

    def _delete(self, path: str) -> None:
        bucket, key = _split(path)
        self._call(path, lambda c: c.delete_object(Bucket=bucket, Key=key))

    def _keys(self, path: str) -> Iterator[str]:
        bucket, key = _split(path)
        for page in self._pages(path, {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}):
            yield from (entry["Key"] for entry in page.get("Contents", ()))

    def _pages(self, path: str, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
        more: dict[str, Any] = {}
        while True:
            page = self._page(path, {**wanted, **more})
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        page: dict[str, Any] = self._call(path, lambda c: c.list_objects_v2(**wanted))
        return page

    def _call(self, path: str, call: Callable[[Any], T], patience_s: float | None = None) -> T:
        return persistently(call, f"s3://{path}", patience_s)


class ObjectFile(io.RawIOBase):
    """One version of an object as a file. Its end comes with the opening; every other read is a request for just that range."""

    def __init__(self, store: S3Store, path: str) -> None:
        self._store, self._path, self._at = store, path, 0
        self._tail, self._size, self._version = store.tail(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        start, self._at = self._at, max(self._at, stop)
        if start >= stop:
            return b""
        kept = self._size - len(self._tail)
        if start >= kept:
            return self._tail[start - kept : stop - kept]
        body = self._store.range(self._path, start, min(stop, kept), self._version)
        return body + self._tail[: stop - kept] if stop > kept else body

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _body(answer: dict[str, Any]) -> bytes:
    """The whole body; shorter than announced is torn (botocore checks length and, where the store gave one, checksum)."""
    data: bytes = answer["Body"].read()
    if len(data) != answer["ContentLength"]:
        raise TornError(f"{len(data)} of {answer['ContentLength']} bytes")
    return data


@contextlib.contextmanager
def _one_version(path: str) -> Iterator[None]:
    """For reads that name a version: another one in its place is a StageError."""
    try:
        yield
    except Exception as e:
        if not is_unmatched(e):
            raise
        raise StageError(f"root: s3://{path} was replaced while it was read; let other runs end, then run again") from e


def _local_range(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(start)
        return f.read(stop - start)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key
