"""What a root asks of its place: a local disk, an S3 server (`core.object_store`), or any other file system of fsspec.

`path` is the URL without its protocol, then the name. A version is what `replace` and `remove_version` compare: on S3 the ETag,
here a digest of the content. On a local disk comparing and writing happen under a file lock; on other file systems they are two
steps, and two processes that take them at the same moment can both succeed.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec

from core.errors import ConfigError, StageError
from core.hashing import digest

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
S3_PROTOCOLS = ("s3", "s3a")
# Protocols whose put makes an object visible whole; elsewhere a file is put under another name and then renamed.
WHOLE_PUTS = {"memory", "gs", "gcs", "oss", "abfs", "az", "adl"}


class Store(Protocol):
    """A place for files. What is not there is FileNotFoundError."""

    @property
    def is_local(self) -> bool: ...
    def exists(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def open(self, path: str) -> IO[bytes]: ...
    def open_random(self, path: str) -> Any: ...
    def read(self, path: str) -> bytes: ...
    def download(self, path: str, target: str) -> None: ...
    def put_file(self, local: str, path: str) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def versioned(self, path: str) -> tuple[bytes, str]: ...
    def replace(self, path: str, data: bytes, version: str, patience_s: float) -> str | None: ...
    def remove_version(self, path: str, version: str) -> bool: ...
    def rename(self, source: str, target: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def names(self, path: str) -> list[str]: ...
    def probe(self, path: str) -> list[str]: ...


def open_store(url: str) -> tuple[Store, str]:
    """The store behind a URL and the path of its root in it."""
    protocol, separator, rest = url.partition("://")
    if separator and protocol in S3_PROTOCOLS:
        from core.object_store import S3Store

        if not rest.strip("/"):
            raise ConfigError(f"root: got {url}, expected s3://bucket/folder")
        return S3Store(), rest.strip("/")
    try:
        fs, base = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise ConfigError(f"root: cannot open {url!r}: {e}; use a local path or install the protocol's package") from e
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        return LocalDisk(), base if separator else url
    return FsspecStore(fs, protocol in WHOLE_PUTS), base


class FsspecStore:
    """Any fsspec file system, as far as its driver goes: its retries, its errors. Its cache of listings is emptied before every
    question, as other processes write here too."""

    is_local = False

    def __init__(self, fs: Any, puts_whole: bool) -> None:
        self._fs, self._puts_whole = fs, puts_whole

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path))

    def size(self, path: str) -> int:
        self._fs.invalidate_cache()
        return int(self._fs.size(path))

    def open(self, path: str) -> IO[bytes]:
        self._fs.invalidate_cache()  # a size that is remembered would cut what was rewritten since
        return self._fs.open(path, "rb")

    open_random = open

    def read(self, path: str) -> bytes:
        with self.open(path) as f:
            return f.read()

    def download(self, path: str, target: str) -> None:
        self._fs.get_file(path, target)

    def put_file(self, local: str, path: str) -> None:
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        if self._puts_whole:
            self._fs.put_file(local, path)
            return
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self._fs.put_file(local, temporary)
            self._fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):  # the fault that led here is the one to tell
                self._fs.rm(temporary)
            raise

    def create(self, path: str, data: bytes) -> bool:
        """Exclusive as far as the driver knows the mode `x`; one that refuses it is asked first, then written to."""
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        try:
            with self._fs.open(path, "xb") as f:
                f.write(data)
        except FileExistsError:
            return False
        except (ValueError, NotImplementedError):
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, data)
        return True

    def versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, digest(data.hex())

    def replace(self, path: str, data: bytes, version: str, patience_s: float) -> str | None:
        if not _is_still(self, path, version):
            return None
        self._fs.pipe_file(path, data)
        return digest(data.hex())

    def remove_version(self, path: str, version: str) -> bool:
        if not _is_still(self, path, version):
            return False
        self.remove(path)
        return True

    def rename(self, source: str, target: str) -> None:
        self._fs.makedirs(self._fs._parent(target), exist_ok=True)
        self._fs.mv(source, target)

    def remove(self, path: str) -> None:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    def names(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def probe(self, path: str) -> list[str]:
        """Write and delete one file; whether a second exclusive creation is refused."""
        first, second = self.create(path, b"1"), self.create(path, b"2")
        self.remove(path)
        return ["it has no exclusive creation"] if second or not first else []


class LocalDisk:
    """This machine's files: written beside their name, then renamed."""

    is_local = True

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def size(self, path: str) -> int:
        return os.path.getsize(path)

    def open(self, path: str) -> IO[bytes]:
        return open(path, "rb")

    open_random = open

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def download(self, path: str, target: str) -> None:
        shutil.copyfile(path, target)

    def put_file(self, local: str, path: str) -> None:
        """`local` lies in the target's folder (see `temporary`): renamed once its bytes are on the disk."""
        _sync(local)
        os.replace(local, path)

    def create(self, path: str, data: bytes) -> bool:
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            Path(temporary).write_bytes(data)
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return True

    def versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, digest(data.hex())

    def replace(self, path: str, data: bytes, version: str, patience_s: float) -> str | None:
        with _alone(path):
            if not _is_still(self, path, version):
                return None
            with replacing(path) as temporary:
                Path(temporary).write_bytes(data)
        return digest(data.hex())

    def remove_version(self, path: str, version: str) -> bool:
        with _alone(path):
            if not _is_still(self, path, version):
                return False
            os.unlink(path)
        return True

    def rename(self, source: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def probe(self, path: str) -> list[str]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(b"")
        os.unlink(path)
        return []


@contextlib.contextmanager
def temporary(store: Store, target: str) -> Iterator[str]:
    """A local path to write to before `put_file`: in the target's folder where that is local. Gone afterwards. A full or failing
    disk is a StageError."""
    if store.is_local:
        folder, name = os.path.split(target)
        path, place = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp", target
        with disk_faults(place):
            os.makedirs(folder, exist_ok=True)
    else:
        handle, path = _on_its_way(target)
        os.close(handle)
        place = f"{path}, where TMPDIR points, on its way to {target}"
    try:
        with disk_faults(place):
            yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _on_its_way(target: str) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix="stepwell-")
    except OSError as e:  # without room Python finds no folder for temporary files at all
        raise StageError(
            f"root: cannot make a temporary file for {target}: {e}; make room where TMPDIR points, or name another folder in it"
        ) from e


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A name in the same folder that becomes `path` if the block ends well, and is gone otherwise."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(folder, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def disk_faults(target: str) -> Iterator[None]:
    """A full, read-only or broken disk ends the stage in one line; what was committed stays."""
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_FAULTS:
            raise
        raise StageError(f"root: cannot write {target}: {e}; mend the disk or make room, then run again") from e


def _is_still(store: "LocalDisk | FsspecStore", path: str, version: str) -> bool:
    """Whether a file is there and of this version."""
    try:
        return store.versioned(path)[1] == version
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """One process at a time for this file on this machine's disks."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        guard = os.open(path + ".guard", os.O_RDWR | os.O_CREAT)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        guard = os.open(os.path.dirname(path), os.O_RDONLY)  # on a full disk a lock can still be released
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel drops it when this process ends, however that happens
        yield
    finally:
        os.close(guard)


def _sync(path: str) -> None:
    """Flush a file to disk before it gets its name, or a power cut could leave the name with half the bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
