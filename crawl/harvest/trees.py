"""A version of a package as path -> bytes, from a folder, an sdist, a wheel, a zip or a tar file.

Nothing is unpacked to disk and no link is followed. A member whose name leaves the archive is an InputError: such an archive
was made to harm. One top folder, as source archives have it, is cut off.
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from core.errors import InputError

TREE_BYTES = 256 << 20  # unpacked, and
TREE_FILES = 50_000  # files: beyond either it is no package but a trap or a data set (chosen)


def read_tree(path: str) -> dict[str, bytes]:
    """All regular files by path, '/' separated. InputError where it cannot be read whole."""
    place = Path(path)
    read = _folder if place.is_dir() else _zip if zipfile.is_zipfile(place) else _tar
    found: dict[str, bytes] = {}
    size = 0
    try:
        for name, data in read(place):
            size += len(data)
            if len(found) >= TREE_FILES or size > TREE_BYTES:
                raise InputError(f"harvest: {place.name} holds more than {TREE_FILES:,} files or {TREE_BYTES:,} bytes")
            found[_inside(name, place.name)] = data
    except (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as e:
        raise InputError(f"harvest: {place.name} cannot be read: {e}") from e
    tops = {name.partition("/")[0] for name in found}
    if len(tops) == 1 and all("/" in name for name in found) and not place.is_dir():
        found = {name.partition("/")[2]: data for name, data in found.items()}
    return dict(sorted(found.items()))


def _inside(name: str, archive: str) -> str:
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or not plain.parts or plain.parts[0].endswith(":"):
        raise InputError(f"harvest: {archive} holds {name!r}, which leaves its folder")
    return str(plain)


def _folder(place: Path) -> Iterator[tuple[str, bytes]]:
    for base, folders, names in os.walk(place, followlinks=False):
        folders[:] = sorted(f for f in folders if f != ".git")
        for name in sorted(names):
            path = Path(base, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(place).as_posix(), path.read_bytes()


def _zip(place: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(place) as archive:
        for member in archive.infolist():
            link = (member.external_attr >> 16) & 0o170000 == 0o120000
            if not member.is_dir() and not link:
                yield member.filename, _some(archive.open(member).read(TREE_BYTES + 1), member.filename)


def _tar(place: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(place) as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                if member.size > TREE_BYTES:
                    raise InputError(f"harvest: {member.name!r} has {member.size:,} bytes, limit {TREE_BYTES:,}")
                yield member.name, content.read()


def _some(data: bytes, name: str) -> bytes:
    if len(data) > TREE_BYTES:
        raise InputError(f"harvest: {name!r} has more than {TREE_BYTES:,} bytes")
    return data
