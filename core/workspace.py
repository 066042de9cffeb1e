"""A folder below a root as a folder on this machine, for captures and models that foreign libraries write themselves.

On a local root it is the folder itself. On an object store it is a mirror in this machine's cache; what `commit` returned from is
safe in the store, under the files' own names, and a later entry, here or on another machine, begins with just that:

    FOLDER/<name>              the files as last committed
    FOLDER/.workspace.json     the index: an id of the commit, size and content hash of every file, moves not yet done
    FOLDER/.staged/<commit>/   changed files of a commit that is under way

A folder without an index, as in a local root that was copied to the store, is read once and gets one.

A commit puts changed files under staged names, then writes the index, which is the moment it holds, then moves them to their
names. A kill before the index leaves the commit before it in force; after it, the next entry ends the moves. So names never mix
two commits for a reader that comes after a commit, and a folder with an index is never listed. Cost: each changed file crosses
the network once and is copied once within the store.

The mirror of a killed run is used again where it began from the very commit that the store has now, and then holds work that is
newer; otherwise it is filled anew with what differs. One process at a time works in a folder: the runner's lock says so for all
machines, a file lock for this one. Nothing may write to the files while `commit` runs.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from core.cache import PART, Stored, fetch, look, make_room, place_of
from core.errors import StageError
from core.hashing import file_digest
from core.storage import Root
from core.stores import disk_faults

OWN = ".workspace."  # how the names of index, state and lock begin
INDEX, STATE, LOCK = (OWN + end for end in ("json", "state", "lock"))
STAGED = ".staged"
FORMAT = 1
RACY_NS = 2_000_000_000  # a file changed so lately may change again under the same time stamp (as git's index has it)
READER_WAIT_S = 60.0


class Plain:
    """A folder of a local root: every write is there at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def commit(self, files: Mapping[str, Path] | None = None) -> None:
        """Nothing is left to do."""

    def committed(self, wanted: Callable[[str], bool]) -> dict[str, Stored]:
        """Files of wanted names, sorted."""
        found = {name: path for name, path in sorted(_scan(self.path).items()) if wanted(name)}
        return {name: look(path) for name, path in found.items()}


@dataclass
class _Index:
    """What `.workspace.json` in the store says."""

    commit: str
    files: dict[str, Stored] = field(default_factory=dict)
    moves: dict[str, str] = field(default_factory=dict)  # name -> staged name
    gone: list[str] = field(default_factory=list)


class Mirror:
    """A folder of an object store, mirrored in `path`."""

    def __init__(
        self,
        root: Root,
        folder: str,
        needs: Callable[[Collection[str]], Collection[str]] | None,
        apart: Collection[str],
    ) -> None:
        self.root, self.folder, self.path = root, folder, place_of(root) / folder
        self._apart = apart
        self._needs = needs or (lambda names: names)
        self._seen: dict[str, tuple[int, int, str]] = {}  # name -> size, mtime_ns, content when last looked at
        self._released: set[str] = set()  # committed, and not needed here
        self._index = _Index("")

    def commit(self, files: Mapping[str, Path] | None = None) -> None:
        """Make the store's folder hold `files` (name -> where it lies; default: all that lie in `path`) and no others, save
        those that were committed before and are not needed here. Unchanged files cost a `stat`."""
        found = _scan(self.path) if files is None else dict(files)
        wanted = {name: self._look(name, path) for name, path in found.items()}
        wanted.update({name: self._index.files[name] for name in self._released - wanted.keys()})
        changed = sorted(name for name, stored in wanted.items() if self._index.files.get(name) != stored)
        gone = sorted(self._index.files.keys() - wanted.keys())
        if changed or gone:
            commit = uuid.uuid4().hex
            moves = {name: f"{STAGED}/{commit}/{i:06d}" for i, name in enumerate(changed)}
            for name, staged in moves.items():
                self._put(found[name], f"{self.folder}/{staged}", wanted[name])
            self._save_state([self._index.commit, commit])
            self._index = _Index(commit, wanted, moves, gone)
            self._write_index()
            self._publish(again=False)
        self._release()

    def committed(self, wanted: Callable[[str], bool]) -> dict[str, Stored]:
        """Committed files of wanted names, sorted."""
        return {name: stored for name, stored in sorted(self._index.files.items()) if wanted(name)}

    def enter(self) -> None:
        """Be at least as new as the store: for one who will write."""
        self._index = self._read_index() or self._adopt()
        if self._index.moves or self._index.gone:
            self._publish(again=True)
        else:
            self.root.remove(f"{self.folder}/{STAGED}")  # of a commit that was killed before it held
        state = self._state()
        if self._index.commit in state.get("bases", ()):
            self._released = set(state["released"])
        else:
            self.fill()

    def enter_to_read(self) -> None:
        """Hold just what the store holds."""
        self._index = self._read_index() or self._adopt()
        if not self._index.files or self._index.moves:
            raise StageError(
                f"{self.folder}: {'a commit is not done' if self._index.moves else 'nothing is'} in {self.root.url}; run the "
                "stage that writes it, then try again"
            )
        self._state()
        self.fill()

    def _adopt(self) -> _Index:
        """The first index of a folder: of nothing, or of what a local root had there before it was copied to the store. It has
        an id, by which the mirror of a run that is killed before its first commit knows its store."""
        index = _Index(uuid.uuid4().hex)
        for name in _names_below(self.root, self.folder):
            if not any(fnmatchcase(name, pattern) for pattern in self._apart):
                fetch(self.root, f"{self.folder}/{name}", self.path / name, None)
                index.files[name] = look(self.path / name)
        self._index = index
        self._write_index()
        return index

    def fill(self) -> None:
        """Fetch what differs from the store's files, and remove what it does not have."""
        (self.path / STATE).unlink(missing_ok=True)  # a kill from here on must not leave it vouching for a mixture
        stored = self._index.files
        needed = set(self._needs(stored))
        for name, path in _scan(self.path).items():
            if name not in needed or self._look(name, path) != stored[name]:
                path.unlink()
        _remove_empty(self.path)
        missing = [name for name in needed if not (self.path / name).exists()]
        make_room(sum(stored[name].bytes for name in missing), self.folder)
        for name in missing:
            fetch(self.root, f"{self.folder}/{name}", self.path / name, stored[name])
        self._released = stored.keys() - needed
        self._save_state([self._index.commit])

    def _look(self, name: str, path: Path) -> Stored:
        """Size and content of a local file, by its time stamp where that can be trusted."""
        at = path.stat()
        size, changed_ns, content = self._seen.get(name, (-1, -1, ""))
        if (size, changed_ns) != (at.st_size, at.st_mtime_ns):
            content = file_digest(path)
            safe = time.time_ns() - at.st_mtime_ns > RACY_NS
            self._seen[name] = (at.st_size, at.st_mtime_ns if safe else -1, content)
        return Stored(at.st_size, content)

    def _put(self, path: Path, name: str, stored: Stored) -> None:
        before = path.stat()
        self.root.upload(path, name)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns, after.st_size) != (stored.bytes, after.st_mtime_ns, stored.bytes):
            raise StageError(f"{self.folder}: {path} was written to while it was committed; run again")

    def _publish(self, again: bool) -> None:
        """Give staged files their names and remove what is gone. `again`: a run was killed somewhere in the middle of it."""
        for name, staged in self._index.moves.items():
            source = f"{self.folder}/{staged}"
            if not again or self.root.exists(source):
                self.root.rename(source, f"{self.folder}/{name}")
        for name in self._index.gone:
            self.root.remove(f"{self.folder}/{name}")
        self.root.remove(f"{self.folder}/{STAGED}")  # of commits that were killed before they held
        self._index.moves, self._index.gone = {}, []
        self._write_index()

    def _release(self) -> None:
        """Say which files are needed no more, then remove them here: in this order, or a kill would look like their removal."""
        self._released = self._index.files.keys() - set(self._needs(self._index.files))
        self._save_state([self._index.commit])
        for name in self._released:
            (self.path / name).unlink(missing_ok=True)
            self._seen.pop(name, None)

    def _read_index(self) -> _Index | None:
        name = f"{self.folder}/{INDEX}"
        try:
            stored = self.root.read_json(name)
            if stored["format"] != FORMAT:
                raise StageError(f"{name}: written in format {stored['format']}, expected {FORMAT}; upgrade stepwell")
            files = {file: Stored(*about) for file, about in stored["files"].items()}
            return _Index(stored["commit"], files, stored["moves"], stored["gone"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as e:
            raise StageError(f"{name}: not an index of ours, got {e!r}; restore it, or remove its folder") from e

    def _write_index(self) -> None:
        index = self._index
        value = {
            "format": FORMAT,
            "commit": index.commit,
            "files": index.files,
            "moves": index.moves,
            "gone": index.gone,
        }
        self.root.write_json(f"{self.folder}/{INDEX}", value)

    def _state(self) -> dict[str, Any]:
        """What this mirror knew when it was last whole; nothing where it is not, or its file is damaged."""
        try:
            state: dict[str, Any] = json.loads((self.path / STATE).read_bytes())
            self._seen = {name: (size, ns, content) for name, (size, ns, content) in state["seen"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._seen = {}
            return {}
        return state

    def _save_state(self, bases: Sequence[str]) -> None:
        value = {"bases": list(bases), "released": sorted(self._released), "seen": self._seen}
        temporary = self.path / (STATE + ".part")
        with disk_faults(str(temporary)), open(temporary, "w", encoding="utf-8") as f:
            json.dump(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path / STATE)


Workspace = Plain | Mirror


@contextlib.contextmanager
def workspace(
    root: Root,
    folder: str,
    needs: Callable[[Collection[str]], Collection[str]] | None = None,
    apart: Collection[str] = (),
    keep: bool = True,
) -> Iterator[Workspace]:
    """`folder` of a root to write to on this machine; commits when asked, never by itself.

    `needs` chooses of the committed names those that must lie here (default all), such as all but closed WARC files. Files whose
    names match a pattern of `apart` are written into the same folder of the root by other means, and are none of ours. With
    `keep` false a mirror is removed when the block ends well. StageError where another process of this machine is in it.
    """
    if root.is_local:
        yield Plain(root.local_path(folder))
        return
    mirror = Mirror(root, folder, needs, apart)
    with _alone(mirror.path, 0.0):
        mirror.enter()
        yield mirror
        if not keep:
            shutil.rmtree(mirror.path)


def mirrored(root: Root, folder: str, apart: Collection[str] = ()) -> Path:
    """`folder` of a root as it was last committed, to be read on this machine."""
    if root.is_local:
        return root.local_path(folder)
    mirror = Mirror(root, folder, None, apart)
    with _alone(mirror.path, READER_WAIT_S):
        mirror.enter_to_read()
    return mirror.path


@contextlib.contextmanager
def _alone(folder: Path, wait_s: float) -> Iterator[None]:
    """One process of this machine in `folder`; the kernel lets go when it ends, however that happens."""
    with disk_faults(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "wb")  # noqa: SIM115 - held for the block
    until = time.monotonic() + wait_s
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                if time.monotonic() >= until:
                    raise StageError(f"cache: {folder} is in use by another process; wait for it, or stop it") from e
                time.sleep(0.1)
        yield


def _scan(folder: Path) -> dict[str, Path]:
    """All files below a folder save our own, by their '/'-separated names."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((OWN, PART)))
    return {path.relative_to(folder).as_posix(): path for path in found}


def _names_below(root: Root, folder: str, prefix: str = "") -> Iterator[str]:
    """Names of all files below a folder of a store, but those with our own names."""
    for name in root.names(f"{folder}/{prefix}".rstrip("/")):
        inner = root.names(f"{folder}/{prefix}{name}")
        if inner in ([], [name]):  # a file, as this or that store answers
            if not name.startswith(OWN):
                yield prefix + name
        elif name != STAGED:
            yield from _names_below(root, folder, f"{prefix}{name}/")


def _remove_empty(folder: Path) -> None:
    """Folders without files do not exist in a store, and must not outlive theirs here."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
