"""The `git` binary as a subprocess that can do nothing but read one repository.

A repository comes from anywhere. No hook, filter, text conversion, pager, credential prompt, replacement object or system
configuration is used, nothing is fetched, and only plumbing is called: what a repository's own config could start (signature
checks, external diffs, file system monitors) is not reached. Every command has a time limit.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.errors import ConfigError, InputError

_SAFE = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.untrackedCache=false"),
    *("-c", "core.attributesFile=/dev/null"),
    *("-c", "log.showSignature=false"),
    *("-c", "protocol.allow=never"),
    *("-c", "safe.directory=*"),  # the clone may be another user's: nothing of it is executed
)
_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
BLOB = ("100644", "100755")
SYMLINK, SUBMODULE = "120000", "160000"


class Entry(NamedTuple):
    """One file of a difference between two trees; a mode of zeros and no blob where there is no file."""

    old_mode: str
    new_mode: str
    old_blob: str | None
    new_blob: str | None
    status: str  # A, D, M, T, R
    path: str
    old_path: str  # as `path` unless renamed


class Commit(NamedTuple):
    """What a commit says of itself."""

    sha: str
    parents: tuple[str, ...]
    author: str
    mail: str
    authored_s: int
    committed_s: int
    message: str


@dataclass(frozen=True)
class Git:
    """One repository. InputError where a command fails or takes too long."""

    path: str
    timeout_s: float = 300.0

    def run(self, *arguments: str, given: bytes | None = None) -> bytes:
        """Standard output of one git command."""
        command = ["git", *_SAFE, "-C", self.path, "--no-pager", "--literal-pathspecs", *arguments]
        try:
            done = subprocess.run(
                command,
                input=given,
                stdin=subprocess.DEVNULL if given is None else None,
                capture_output=True,
                # A folder that only lies within some repository is none: git must not look above it.
                env={**_environment(), "GIT_CEILING_DIRECTORIES": str(Path(self.path).resolve().parent)},
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"git: {arguments[0]} took longer than {self.timeout_s:g} s in {self._name}") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"git: {arguments[0]} ended with {done.returncode} in {self._name}: {said[0][:200]}")
        return done.stdout

    @property
    def _name(self) -> str:
        return Path(self.path).name

    def lines(self, *arguments: str, given: bytes | None = None) -> list[str]:
        return self.run(*arguments, given=given).decode("utf-8", "replace").splitlines()

    def state(self) -> str:
        """All refs with their targets: as long as it stands, so does everything that can be read."""
        head = self.lines("rev-parse", "--verify", "-q", "HEAD")
        return "\n".join([*head, *self.lines("for-each-ref", "--format=%(objectname) %(refname)")])

    def refs(self, pattern: str) -> dict[str, str]:
        """Names below `pattern` -> object."""
        rows = (line.split(" ", 1) for line in self.lines("for-each-ref", "--format=%(objectname) %(refname)", pattern))
        return {name: sha for sha, name in rows}

    def first_commits(self) -> tuple[str, ...]:
        """Commits of HEAD's history without parents."""
        return tuple(self.lines("rev-list", "--max-parents=0", "HEAD"))

    def first_parents(self) -> list[str]:
        """The main line, oldest first."""
        return self.lines("rev-list", "--first-parent", "--reverse", "HEAD")

    def commits(self, shas: Iterable[str]) -> Iterator[Commit]:
        """Commits by name; those that are missing are passed over."""
        for sha, kind, data in self.objects(shas):
            if kind == "commit":
                yield _commit(sha, data)

    def objects(self, names: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
        """(name, type, content) of each object; type `missing` where it is not there."""
        wanted = list(names)
        out = self.run("cat-file", "--batch", given="".join(f"{n}\n" for n in wanted).encode()) if wanted else b""
        at = 0
        for name in wanted:
            end = out.index(b"\n", at)
            head = out[at:end].split(b" ")
            at = end + 1
            if len(head) != 3:
                yield name, "missing", b""
                continue
            size = int(head[2])
            yield name, head[1].decode("ascii"), out[at : at + size]
            at += size + 1

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of each object that is there."""
        if not names:
            return {}
        rows = [
            line.split(" ") for line in self.lines("cat-file", "--batch-check", given="\n".join([*names, ""]).encode())
        ]
        return {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[1] != "missing"}

    def merge_base(self, a: str, b: str) -> str | None:
        """The best common ancestor, or None where the histories are unrelated."""
        try:
            return self.lines("merge-base", a, b)[0]
        except InputError as e:
            if "ended with 1 " in str(e):
                return None
            raise

    def difference(self, base: str, head: str) -> list[Entry]:
        """Files that differ between two commits, by path. Renames are found (git's own 50 %)."""
        out = self.run("diff-tree", "-r", "-z", "--raw", "--no-abbrev", "-M", "-l400", "--no-ext-diff", base, head)
        parts = out.decode("utf-8", "surrogateescape").split("\0")
        entries = []
        i = 0
        while i + 1 < len(parts):
            old_mode, new_mode, old, new, status = parts[i].lstrip(":").split(" ")
            renamed = status[0] in "RC"
            path = parts[i + 2] if renamed else parts[i + 1]
            before, after = (None if set(x) == {"0"} else x for x in (old, new))
            entries.append(Entry(old_mode, new_mode, before, after, status[0], path, parts[i + 1]))
            i += 3 if renamed else 2
        return sorted(entries, key=lambda e: e.path)

    def tree(self, commit: str) -> list[str]:
        """All paths of a commit, sorted; those that are not UTF-8 are left out."""
        names = self.run("ls-tree", "-r", "-z", "--name-only", commit).split(b"\0")
        return sorted(path for name in names if name and (path := _text(name)) is not None)

    def root_file(self, wanted: re.Pattern[str]) -> str | None:
        """Text of the first file at the top of HEAD whose name fits."""
        names = self.run("ls-tree", "-z", "HEAD").decode("utf-8", "replace").split("\0")
        for row in names:
            about, _, name = row.partition("\t")
            if name and about.split(" ")[0] in BLOB and wanted.match(name):
                return next(self.objects([about.split(" ")[2]]))[2].decode("utf-8", "replace")
        return None


def open_repository(path: str, timeout_s: float) -> Git:
    """A repository that can be read. ConfigError where git is not installed, InputError where this is no repository."""
    require_git()
    git = Git(path, timeout_s)
    if not Path(path).is_dir():
        raise InputError(f"git: no such folder, got {path}; expected a clone")
    if not _SHA.fullmatch(git.lines("rev-parse", "--verify", "HEAD")[0]):
        raise InputError(f"git: {Path(path).name} has no commits")
    return git


def require_git() -> None:
    """ConfigError where the binary is missing."""
    if shutil.which("git") is None:
        raise ConfigError(
            "harvest: no `git` on this machine, expected version 2.30 or later; install it to read repositories"
        )


def _environment() -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.devnull,
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_PAGER": "cat",
    }


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


_PERSON = re.compile(rb"^(author|committer) (.*?) ?<([^>]*)> (-?\d+)", re.MULTILINE)


def _commit(sha: str, data: bytes) -> Commit:
    head, _, message = data.partition(b"\n\n")
    parents = tuple(line[7:].decode("ascii") for line in head.split(b"\n") if line.startswith(b"parent "))
    people = {m[1]: m for m in _PERSON.finditer(head)}
    author, committer = people.get(b"author"), people.get(b"committer")
    return Commit(
        sha,
        parents,
        author[2].decode("utf-8", "replace") if author else "",
        author[3].decode("utf-8", "replace") if author else "",
        int(author[4]) if author else 0,
        int(committer[4]) if committer else 0,
        message.decode("utf-8", "replace"),
    )
