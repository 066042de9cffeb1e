"""Files of an object store on this machine: where they lie, how they get there, and what makes room for them.

Below STEPWELL_CACHE (default: `stepwell` in the user's cache folder, XDG_CACHE_HOME or ~/.cache):

    <root>/<folder>/...        mirrors of folders that a stage works in (`core.workspace`), by a hash of the root's URL
    fetched/<xx>/<content>/    immutable files, such as token shards, by the hash of their content

Mirrors stay until their stage or a person removes them. Fetched files may be removed at any time, and are, those used longest
ago first, while the disk would be left with less than a tenth of it free: a path of one is good until the next is fetched. Who
opens it at once asks `opened`, who hands its path on asks `held`.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import xxhash

from core.errors import ConfigError, StageError
from core.hashing import file_digest
from core.storage import Root
from core.stores import disk_faults

CACHE_ENV = "STEPWELL_CACHE"
PART = ".part-"  # how the names of half-fetched files and of held ones' folders begin
LEAST_FREE_BYTES = 1 << 30  # of the cache's disk, which others use too: chosen, untested
TRIES = 3  # to open what others may remove: they remove what was used longest ago first, so the second should do
KEPT_FREE_FRACTION = 0.1  # of it, below which fetched files make room: chosen, untested

T = TypeVar("T")


class Stored(NamedTuple):
    """Size and content of a file in the store."""

    bytes: int
    content: str  # xxh3_128 of its bytes


def fetched(root: Root, names: Sequence[str], content: str) -> list[Path]:
    """Files that belong to `content` (a hash), on this machine: below a local root themselves, else brought here once.
    FileNotFoundError where the store has none."""
    if root.is_local:
        return [root.local_path(name) for name in names]
    folder = cache_folder() / "fetched" / content[:2] / content
    paths = [folder / name.rsplit("/", 1)[-1] for name in names]
    if not all(path.exists() for path in paths):
        make_room(sum(root.size(name) for name in names), names[0])  # for all at once: it may take this very folder
        for name, path in zip(names, paths, strict=True):
            if not path.exists():
                fetch(root, name, path, None)
    with contextlib.suppress(FileNotFoundError):  # another process may just have made room
        os.utime(folder)
    return paths


def opened(root: Root, names: Sequence[str], content: str, read: Callable[[list[Path]], T]) -> T:
    """What `read` makes of `fetched` files. Another process may make room just before it has them open (and not after: what is
    open or mapped stays): they are fetched again. FileNotFoundError where the store has none."""
    for _ in range(0 if root.is_local else TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return read(fetched(root, names, content))
    return read(fetched(root, names, content))


@contextlib.contextmanager
def held(root: Root, name: str) -> Iterator[Path]:
    """A small file on this machine, which stays for the block: below a local root itself, else a copy that is in nobody's way.
    FileNotFoundError where the store has none."""
    if root.is_local:
        yield root.local_path(name)
        return
    folder = cache_folder() / f"{PART}{uuid.uuid4().hex[:8]}"
    path = folder / name.rsplit("/", 1)[-1]
    try:
        fetch(root, name, path, None)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(root: Root, name: str, path: Path, stored: Stored | None) -> None:
    """Bring one file of a store here, whole or not at all. One that is not as `stored` says is a StageError."""
    temporary = path.with_name(f"{PART}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with disk_faults(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        root.download(name, temporary)
        if stored is not None and (got := look(temporary)) != stored:
            raise StageError(
                f"{name}: not the file that the index of its folder names, got {got.bytes} bytes of hash {got.content[:8]}, "
                f"expected {stored.bytes} of {stored.content[:8]}; restore it, or remove its folder to begin anew"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def look(path: Path) -> Stored:
    """Size and content of a local file."""
    return Stored(path.stat().st_size, file_digest(path))


def cache_folder() -> Path:
    """Where mirrors and fetched files lie: STEPWELL_CACHE, else the user's cache folder."""
    own = os.environ.get(CACHE_ENV)
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepwell"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cache: cannot make {base}: {e}; name a folder on a local disk in {CACHE_ENV}") from e
    return base


def place_of(root: Root) -> Path:
    """The part of the cache that belongs to one root."""
    return cache_folder() / xxhash.xxh3_64_hexdigest(root.url.encode())


def make_room(need: int, what: str) -> None:
    """Remove fetched files, those used longest ago first, while the disk would be left too full. StageError where it would be
    full all the same."""
    base = cache_folder()
    disk = shutil.disk_usage(base)
    kept_free = max(LEAST_FREE_BYTES, int(disk.total * KEPT_FREE_FRACTION))
    if need and disk.free - need < kept_free:
        for folder in sorted((base / "fetched").glob("*/*"), key=_used_at):
            shutil.rmtree(folder, ignore_errors=True)  # a shard that is mapped lives on until it is let go
            if shutil.disk_usage(base).free - need >= kept_free:
                break
    free = shutil.disk_usage(base).free
    if need and free - need < LEAST_FREE_BYTES:
        raise StageError(
            f"cache: {what} needs {need / 1e9:.2f} GB below {base}, got {free / 1e9:.2f} GB free, expected "
            f"{LEAST_FREE_BYTES / 1e9:.1f} GB more than that; make room, or name a larger disk in {CACHE_ENV}"
        )


def _used_at(path: Path) -> float:
    """When a folder was last asked for; one that another process just removed sorts first."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
