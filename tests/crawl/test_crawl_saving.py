"""A crawl into an object store: what a machine takes with it is fetched again on the next, and no page is there twice."""

import sqlite3
import uuid
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from core.cache import CACHE_ENV
from core.storage import Root
from core.workspace import workspace
from crawl.saving import COMMIT_S, Saver, copy_database, needed, saved
from crawl.stage import CrawlSummary, run_crawl
from crawl.warc import file_number
from tests.crawl.loopback import Answer, Loopback, links, responses

PAGES = 40


class LostError(BaseException):
    """The machine is gone."""


class Counted(Saver):
    """Saves as often as it may, and loses the machine after a number of times."""

    left = 1 << 30

    def save(self, file: int) -> None:
        super().save(file)
        self.left -= 1
        if self.left == 0:
            raise LostError


def tree() -> dict[str | tuple[str, str], Answer]:
    return {"/" if i == 1 else f"/{i}": links(f"/{2 * i}", f"/{2 * i + 1}") for i in range(1, PAGES + 1)}


@pytest.fixture
def root() -> Root:
    return Root(f"memory://{uuid.uuid4().hex}")


def crawled(root: Root, web: Loopback, saves: int = 1 << 30, commit_s: float = 0.0, **knobs: object) -> CrawlSummary:
    """One run of a machine."""
    with workspace(root, "captures/web", partial(needed, "web")) as folder, saved(folder) as saver:
        assert saver is not None
        saver = Counted(folder, commit_s)
        saver.left = saves
        return run_crawl(web.config(**knobs), folder.path, None, saver)


def stored(root: Root, folder: Path) -> dict[str, bytes]:
    """The responses in the store's WARC files; one that is there twice is an error."""
    folder.mkdir()
    for name in root.names("captures/web"):
        if file_number(name, "web") is not None:
            root.download(f"captures/web/{name}", folder / name)
    return responses(folder)


@pytest.mark.parametrize("commit_s", [0.0, COMMIT_S])
def test_a_lost_machine_costs_what_came_since_the_last_commit(root, tmp_path, monkeypatch, commit_s):
    with Loopback(tree()) as web:
        for machine, saves in enumerate((1, 2, 3)):
            monkeypatch.setenv(CACHE_ENV, str(tmp_path / f"{machine}"))
            with pytest.raises(LostError):
                crawled(root, web, saves, commit_s, warc_bytes=4_000, concurrency=1)
        monkeypatch.setenv(CACHE_ENV, str(tmp_path / "last"))
        summary = crawled(root, web, warc_bytes=4_000)
        asked = len(web.paths())
    found = stored(root, tmp_path / "files")
    assert len(found) == summary.fetched >= PAGES  # and the links that lead nowhere
    assert {f"http://a.test/{i}" for i in range(2, PAGES + 1)} <= set(found)
    assert asked <= len(found) + 3 * 20  # what a commit lacked: at most a WARC file of 4 kB each time
    assert len(list((tmp_path / "last").glob("*/captures/web/*.warc.gz"))) == 1


def test_a_raised_limit_goes_on_from_the_store(root, tmp_path, monkeypatch):
    with Loopback(tree()) as web:
        monkeypatch.setenv(CACHE_ENV, str(tmp_path / "one"))
        first = crawled(root, web, max_pages=5, commit_s=COMMIT_S)
        monkeypatch.setenv(CACHE_ENV, str(tmp_path / "two"))
        second = crawled(root, web, commit_s=COMMIT_S)
        assert (first.stopped, second.stopped) == ("max_pages", "complete")
        assert second.run_fetched == second.fetched - 5
        assert len(web.paths()) == second.fetched == len(stored(root, tmp_path / "files"))


def test_an_interrupted_crawl_is_committed(root, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "one"))

    def interrupted(web: Loopback) -> None:
        with workspace(root, "captures/web") as folder, saved(folder) as saver:
            run_crawl(web.config(max_pages=3), folder.path, None, saver)
            raise KeyboardInterrupt

    with Loopback(tree()) as web, pytest.raises(KeyboardInterrupt):
        interrupted(web)
    assert len(stored(root, tmp_path / "files")) == 3


def test_the_copy_of_a_database_in_use_is_whole_and_one_file(tmp_path):
    with closing(sqlite3.connect(tmp_path / "live.sqlite", isolation_level=None)) as live:
        live.executescript("PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0; CREATE TABLE t (x)")
        live.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
        live.execute("BEGIN")
        live.execute("INSERT INTO t VALUES (-1)")
        copy_database(tmp_path / "live.sqlite", tmp_path / "copy.sqlite")
        live.execute("COMMIT")
    with closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        assert copy.execute("SELECT count(*), min(x) FROM t").fetchone() == (1000, 0)
    assert sorted(p.name for p in tmp_path.glob("copy*")) == ["copy.sqlite"]


def test_closed_files_are_not_needed():
    names = ["frontier.sqlite", "web-00000.warc.gz", "web-00002.warc.gz", "web-100000.warc.gz", "web-0001.warc.gz"]
    assert needed("web", names) == ["frontier.sqlite", "web-100000.warc.gz", "web-0001.warc.gz"]
    assert needed("web", ["frontier.sqlite"]) == ["frontier.sqlite"]
