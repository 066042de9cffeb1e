"""Which files a source has and how they are cut into units, as a function of the set of inputs only.

Small files are grouped at content-defined borders: a group ends after a path whose hash is divisible by 256, and a
group that is still too large is cut after its path of the smallest hash, again and again. A new file therefore changes
the group it falls into, where counting to 512 would shift every group behind it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import xxhash
from fsspec.utils import glob_translate

from core.engines.contract import Unit
from core.errors import ConfigError

GROUP_BORDER = 256  # a path in 256 ends a group
GROUP_FILES = 512
GROUP_BYTES = 64 << 20
RANGE_BYTES = 64 << 20  # of a splittable file
MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Piece:
    """What a unit of a source reads: whole files, or one range of one file (bytes of JSONL, row groups of Parquet)."""

    paths: tuple[str, ...]  # relative to the source, '/' separated
    start: int = 0
    end: int | None = None  # None: to the end


@dataclass(frozen=True)
class Input:
    """One file of a source."""

    path: str  # relative to the source
    bytes: int


class Folder:
    """The files below a source's path, on whatever store it names."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fs, full = fsspec.core.url_to_fs(path)
        if "file" in self.fs.protocol:
            full = os.path.abspath(full)  # `find` answers without '..', so the root must not hold any
        self.pattern: str | None = None
        if MAGIC.search(full):
            cut = full.rfind("/", 0, MAGIC.search(full).start())  # type: ignore[union-attr]
            self.root, self.pattern = full[: max(cut, 0)], full[cut + 1 :]
        elif self.fs.isfile(full):
            self.root, _, name = full.rpartition("/")
            self.pattern = re.sub(r"([*?\[])", r"[\1]", name)
        else:
            self.root = full.rstrip("/")

    def inputs(self, globs: Sequence[str]) -> list[Input]:
        """Matching files sorted by relative path. A path that is a file or glob is taken as it is, whatever `globs`
        say."""
        wanted = [re.compile(glob_translate(g)) for g in ([self.pattern] if self.pattern else globs)]
        found = []
        for full, info in self._find().items():
            relative = full[len(self.root) :].lstrip("/")
            if any(w.match(relative) for w in wanted):
                found.append(Input(relative, int(info.get("size") or 0)))
        if not found:
            raise ConfigError(
                f"source: no file matches, got {self.path!r} with {list(globs)}, expected at least one; "
                "check the path, or set `files` to the names you have"
            )
        return sorted(found, key=lambda i: i.path)

    def open(self, relative: str) -> BinaryIO:
        return self.fs.open(self.full(relative), "rb")

    def size(self, relative: str) -> int:
        return int(self.fs.size(self.full(relative)))

    def full(self, relative: str) -> str:
        return f"{self.root}/{relative}"

    def _find(self) -> dict[str, Any]:
        try:
            return self.fs.find(self.root or "/", detail=True)
        except FileNotFoundError:
            return {}


def path_hash(relative: str) -> int:
    return xxhash.xxh3_64_intdigest(relative.encode("utf-8", "surrogatepass"))


def unit_name(relative: str, number: int | None = None) -> str:
    """16 hex digits of the relative path, and the number of the range where there are several."""
    name = f"{path_hash(relative):016x}"
    return name if number is None else f"{name}-{number}"


def whole(file: Input) -> Unit:
    """A unit that reads one file from end to end."""
    return Unit(unit_name(file.path), Piece((file.path,)), file.bytes)


def grouped(files: Sequence[Input]) -> list[Unit]:
    """Units of many small files, from files sorted by path. A group is named by its first path."""
    units = []
    start = 0
    for i, file in enumerate(files):
        if path_hash(file.path) % GROUP_BORDER == 0 or i == len(files) - 1:
            for group in _fitting(files[start : i + 1]):
                paths = tuple(f.path for f in group)
                units.append(Unit(unit_name(paths[0]), Piece(paths), sum(f.bytes for f in group)))
            start = i + 1
    return units


def ranges(file: Input, step: int = RANGE_BYTES) -> list[Unit]:
    """Units of one splittable file, `step` bytes each; a file of one range is a whole unit."""
    if file.bytes <= step:
        return [whole(file)]
    starts = range(0, file.bytes, step)
    return [
        Unit(unit_name(file.path, n), Piece((file.path,), s, min(s + step, file.bytes)), min(step, file.bytes - s))
        for n, s in enumerate(starts)
    ]


def _fitting(files: Sequence[Input]) -> list[Sequence[Input]]:
    """`files` cut into groups within the bounds, after the path of the smallest hash each time."""
    done: list[Sequence[Input]] = []
    todo = [files]
    while todo:
        group = todo.pop()
        if len(group) == 1 or (len(group) <= GROUP_FILES and sum(f.bytes for f in group) <= GROUP_BYTES):
            done.append(group)
            continue
        cut = 1 + min(range(len(group) - 1), key=lambda i: path_hash(group[i].path))
        todo += [group[cut:], group[:cut]]
    return done
