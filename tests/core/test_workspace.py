"""A folder of a store mirrored on this machine: whatever is written, committed and killed, the store holds the last commit."""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from core import cache
from core.cache import TRIES, cache_folder, fetched, held, make_room, opened
from core.errors import StageError
from core.storage import Root
from core.workspace import INDEX, STAGED, mirrored, workspace

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

    def upload(self, source, name):
        self._step()
        super().upload(source, name)

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
        if self.stored:
            assert files(mirrored(Root(self.url), FOLDER)) == self.stored
        assert below(Root(self.url)) == self.stored

    def teardown(self) -> None:
        if getattr(self, "entered", None):
            self._leave()
        if hasattr(self, "base"):
            shutil.rmtree(self.base, ignore_errors=True)


def below(root: Root, folder: str = FOLDER) -> dict[str, bytes]:
    """All objects of the folder but the index, as fsspec lists them."""
    fs, base = fsspec.core.url_to_fs(f"{root.url}/{folder}")
    names = [name[len(base) + 1 :] for name in fs.find(base)]
    return {name: root.read_bytes(f"{folder}/{name}") for name in names if name != INDEX}


def test_any_sequence_of_writes_commits_and_kills_ends_as_the_last_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPWELL_TEST_CACHES", str(tmp_path))
    monkeypatch.setenv(cache.CACHE_ENV, "")  # restored when the test ends
    quick = settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machines, settings=quick)


def test_a_local_root_is_worked_in_itself(tmp_path):
    root = Root(str(tmp_path))
    (tmp_path / FOLDER).mkdir(parents=True)
    with workspace(root, FOLDER) as folder:
        assert folder.path == tmp_path / FOLDER == mirrored(root, FOLDER)
        write(folder.path, a="1", b="23")
        folder.commit()
        assert folder.committed(lambda name: name == "b") == {"b": (2, xxhash.xxh3_128_hexdigest(b"23"))}
    assert files(tmp_path / FOLDER) == {"a": b"1", "b": b"23"}


def test_only_changed_files_cross_and_removed_ones_go(caches, root):
    with workspace(root, FOLDER) as folder:
        write(folder.path, a="1", b="2", c="3")
        folder.commit()
    puts: list[str] = []
    counted = Counting(root.url, puts)
    with workspace(counted, FOLDER) as folder:
        write(folder.path, b="two", d="4")
        (folder.path / "c").unlink()
        folder.commit()
        assert len([name for name in puts if STAGED in name]) == 2
        puts.clear()
        folder.commit()
        assert puts == []
    assert below(root) == {"a": b"1", "b": b"two", "d": b"4"}


def test_what_a_killed_commit_staged_goes_with_the_next_entry(caches, root):
    dying = Dying(root.url)
    with suppress(KilledError), workspace(dying, FOLDER) as folder:
        write(folder.path, a="1")
        dying.left = 1  # the file, and not the index
        folder.commit()
    assert list(below(root).values()) == [b"1"]
    caches("two")
    with workspace(root, FOLDER):
        assert below(root) == {}


class Counting(Root):
    """A root that says what is put into it."""

    def __init__(self, url: str, puts: list[str]) -> None:
        super().__init__(url)
        self.puts = puts

    def upload(self, source, name):
        self.puts.append(name)
        super().upload(source, name)

    def writing(self, name):
        assert STAGED not in name  # what lies on this disk is not written to it again
        self.puts.append(name)
        return super().writing(name)


def test_closed_files_leave_this_machine_and_stay_committed(caches, root):
    def needs(names):
        return [name for name in names if name == max(names)]

    with workspace(root, FOLDER, needs) as folder:
        for name in "abc":
            write(folder.path, **{name: name * 3})
            folder.commit()
            assert list(files(folder.path)) == [name]
        assert list(folder.committed(lambda name: True)) == ["a", "b", "c"]
    caches("two")
    with workspace(root, FOLDER, needs) as folder:
        assert files(folder.path) == {"c": b"ccc"}
        write(folder.path, c="longer")
        folder.commit()
    assert below(root) == {"a": b"aaa", "b": b"bbb", "c": b"longer"}


def test_files_may_be_committed_from_elsewhere(caches, root, tmp_path):
    (tmp_path / "copy").write_text("a consistent copy")
    with workspace(root, FOLDER) as folder:
        write(folder.path, live="being written", log="1")
        folder.commit({"live": tmp_path / "copy", "log": folder.path / "log"})
    assert below(root) == {"live": b"a consistent copy", "log": b"1"}


def test_a_folder_that_was_copied_to_the_store_is_taken_over(caches, root):
    for name in ("web-00000.warc.gz", "sub/x", "evaluation-01.json", ".workspace.lock"):
        root.write_bytes(f"{FOLDER}/{name}", name.encode())
    with workspace(root, FOLDER, apart=["evaluation*.json"]) as folder:
        assert set(files(folder.path)) == {"web-00000.warc.gz", "sub/x"}
        folder.commit()
    assert files(mirrored(root, FOLDER)) == files(folder.path)
    assert root.exists(f"{FOLDER}/evaluation-01.json")


def test_a_folder_removed_from_the_store_begins_anew(caches, root):
    with workspace(root, FOLDER) as folder:
        (folder.path / "step-1").mkdir()
        (folder.path / "step-1" / "weights").write_text("w")
        folder.commit()
    root.remove(FOLDER)
    with workspace(root, FOLDER) as folder:
        assert [p.name for p in folder.path.iterdir() if not p.name.startswith(".")] == []
    with pytest.raises(StageError, match="nothing is in memory:"):
        mirrored(root, FOLDER)


def test_a_file_that_something_else_wrote_is_named(caches, root):
    with workspace(root, FOLDER) as folder:
        write(folder.path, a="1")
        folder.commit()
    root.write_bytes(f"{FOLDER}/a", b"2")
    caches("two")
    with pytest.raises(
        StageError, match=r"captures/web/a: not the file that the index of its folder names, got 1 bytes"
    ):
        mirrored(root, FOLDER)
    root.write_bytes(f"{FOLDER}/{INDEX}", b"{}")
    with pytest.raises(StageError, match="not an index of ours"), workspace(root, FOLDER):
        pass


def test_two_processes_of_a_machine_do_not_share_a_folder(caches, root):
    with (
        workspace(root, FOLDER),
        pytest.raises(StageError, match="in use by another process"),
        workspace(Root(root.url), FOLDER),
    ):
        pass
    with workspace(root, FOLDER, keep=False) as folder:
        write(folder.path, a="1")
        folder.commit()
    assert not folder.path.exists()
    assert below(root) == {"a": b"1"}


def test_fetched_files_come_once_and_make_room(caches, root, tmp_path):
    for end in ("bin", "idx"):
        root.write_bytes(f"tokens/s0.{end}", end.encode())
    paths = fetched(root, ["tokens/s0.idx", "tokens/s0.bin"], "abcdef")
    assert [path.read_bytes() for path in paths] == [b"idx", b"bin"]
    root.remove("tokens")
    assert fetched(root, ["tokens/s0.idx", "tokens/s0.bin"], "abcdef") == paths
    with pytest.raises(FileNotFoundError):
        fetched(root, ["tokens/s0.bin"], "other")
    with pytest.raises(StageError, match=r"cache: models/x needs .* GB below .*; make room, or name a larger disk"):
        make_room(1 << 60, "models/x")
    assert not paths[0].exists()
    assert fetched(Root(str(tmp_path)), ["a/b"], "abcdef") == [tmp_path / "a/b"]


def test_a_held_file_stays_where_everything_else_makes_room(caches, root, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "s0.bin", "s1.bin"):
        root.write_bytes(f"tokens/{name}", name.encode())
    monkeypatch.setattr(cache, "KEPT_FREE_FRACTION", 1.0)
    with held(root, "tokens/tokenizer.json") as path:
        first = fetched(root, ["tokens/s0.bin"], "abcdef")[0]
        fetched(root, ["tokens/s1.bin"], "fedcba")
        assert not first.exists()
        assert (path.name, path.read_bytes()) == ("tokenizer.json", b"tokenizer.json")
    assert not path.parent.exists()
    with pytest.raises(FileNotFoundError), held(root, "tokens/none"):
        pass
    with held(Root(str(tmp_path)), "a/b") as path:
        assert path == tmp_path / "a/b"


@pytest.mark.parametrize("evictions", [TRIES - 1, TRIES])
def test_what_is_evicted_before_it_is_opened_is_fetched_again(caches, root, evictions):
    root.write_bytes("tokens/s0.bin", b"bin")
    left = [evictions]

    def read(paths: list[Path]) -> bytes:
        if left[0]:
            left[0] -= 1
            shutil.rmtree(paths[0].parent)  # what `make_room` of another process does
        return paths[0].read_bytes()

    if evictions < TRIES:
        assert opened(root, ["tokens/s0.bin"], "abcdef", read) == b"bin"
    else:
        with pytest.raises(FileNotFoundError):
            opened(root, ["tokens/s0.bin"], "abcdef", read)
