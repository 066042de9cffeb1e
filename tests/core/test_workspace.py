"""A folder of a store mirrored on this machine: whatever is written, committed and killed, the store holds the last commit."""

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from core import cache
from core.cache import cache_folder, fetched, make_room
from core.errors import StageError
from core.storage import Root
from core.workspace import INDEX, STAGED, STATE, Mirror, Plain, mirrored, workspace

FOLDER = "captures/web"
NAMES = st.sampled_from(["a", "b.txt", "sub/c", "sub/deep/d", "e"])
BYTES = st.binary(max_size=3)  # often of equal size within one tick of the clock, which is what fools time stamps


class KilledError(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


class Dying(Root):
    """A root that dies before its n-th change from now; afterwards every change dies, as after a kill."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.left = 1 << 30

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def write_json(self, name, value):
        self._step()
        super().write_json(name, value)

    def writing(self, name):
        self._step()
        return super().writing(name)

    def rename(self, source, target):
        self._step()
        super().rename(source, target)

    def remove(self, name):
        self._step()
        super().remove(name)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Machines: a cache each."""

    def use(machine: str) -> Path:
        monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / machine))
        return cache_folder()

    use("one")
    return use


@pytest.fixture
def root() -> Root:
    return Root(f"memory://{uuid.uuid4().hex}")


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def write(folder: Path, **contents: str) -> None:
    for name, text in contents.items():
        (folder / name).write_text(text)


class Machines(RuleBasedStateMachine):
    """Two machines work in one folder in turn. The model is what the last commit held, and what each machine has since."""

    @initialize()
    def begin(self) -> None:
        self.base = Path(os.environ["STEPWELL_TEST_CACHES"], uuid.uuid4().hex)
        self.url = f"memory://{uuid.uuid4().hex}"
        self.stored: dict[str, bytes] = {}
        self.commits = 0
        self.left_on: dict[str, tuple[int, dict[str, bytes]]] = {}  # machine -> commit it began from, its files
        self.entered = None

    @precondition(lambda self: self.entered is None)
    @rule(machine=st.sampled_from(["one", "two"]))
    def enter(self, machine: str) -> None:
        os.environ[cache.CACHE_ENV] = str(self.base / machine)
        self.root = Dying(self.url)
        self.entered = workspace(self.root, FOLDER)
        self.folder = self.entered.__enter__()
        found = files(self.folder.path)
        base, own = self.left_on.get(machine, (-1, {}))
        assert found == (
            own if base == self.commits else self.stored
        )  # its own work counts while nobody committed since
        self.machine, self.work = machine, found

    @precondition(lambda self: self.entered)
    @rule(name=NAMES, data=BYTES)
    def put(self, name: str, data: bytes) -> None:
        path = self.folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.work[name] = data

    @precondition(lambda self: self.entered)
    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        (self.folder.path / name).unlink(missing_ok=True)
        self.work.pop(name, None)

    @precondition(lambda self: self.entered)
    @rule()
    def commit(self) -> None:
        self.folder.commit()
        self._held()

    @precondition(lambda self: self.entered)
    @rule(after=st.integers(0, 12))
    def die(self, after: int) -> None:
        """Killed at the n-th change of the store by a commit, or right after it."""
        self.root.left = after
        before = self._commit_id()
        with suppress(KilledError):
            self.folder.commit()
        if self._commit_id() != before:
            self._held()
        self._leave()

    @precondition(lambda self: self.entered)
    @rule()
    def leave(self) -> None:
        self._leave()

    def _held(self) -> None:
        """A commit held; one without changes makes no new one, and whoever has the old one has the new."""
        if self.stored != self.work:
            self.commits += 1
        self.stored = dict(self.work)

    def _commit_id(self) -> str:
        return Root(self.url).read_json(f"{FOLDER}/{INDEX}")["commit"]

    def _leave(self) -> None:
        self.root.left = 1 << 30
        self.left_on[self.machine] = (self.commits, dict(self.work))
        self.entered.__exit__(None, None, None)
        self.entered = None

    @precondition(lambda self: self.entered is None)
    @rule()
    def a_third_machine_reads_the_last_commit(self) -> None:
        os.environ[cache.CACHE_ENV] = str(self.base / uuid.uuid4().hex)
        with workspace(Root(self.url), FOLDER) as folder:
            assert files(folder.path) == self.stored
            folder.commit()  # of nothing new
        assert files(mirrored(Root(self.url), FOLDER)) == self.stored
        assert below(Root(self.url)) == self.stored

    def teardown(self) -> None:
        if getattr(self, "entered", None):
            self._leave()
        if hasattr(self, "base"):
            shutil.rmtree(self.base, ignore_errors=True)


def below(root: Root) -> dict[str, bytes]:
    """All objects of the folder but the index."""
    fs = root._fs
    names = [name[len(root.path(FOLDER)) + 1 :] for name in fs.find(root.path(FOLDER))]
    return {name: root.read_bytes(f"{FOLDER}/{name}") for name in names if name != INDEX}


def test_any_sequence_of_writes_commits_and_kills_ends_as_the_last_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPWELL_TEST_CACHES", str(tmp_path))
    monkeypatch.setenv(cache.CACHE_ENV, "")  # restored when the test ends
    quick = settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machines, settings=quick)
