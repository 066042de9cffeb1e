"""kill -9 at drawn moments, then the same command: no page lost, none twice, WARC files valid throughout."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import ConfigError, StageError
from core.hashing import seeded
from crawl.frontier import Frontier, Scope
from crawl.stage import run_crawl
from tests.bounds import BOUND_S
from tests.crawl.loopback import Answer, Loopback, links, page, records, responses

ROUNDS = int(os.environ.get("STEPWELL_SOAK", "1"))
CHILD = """
import sys
from pathlib import Path
from crawl.stage import CrawlConfig, run_crawl
run_crawl(CrawlConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


def tree(pages: int) -> dict[str | tuple[str, str], Answer]:
    """A binary tree of pages, the same on every host."""
    return {"/" if i == 1 else f"/{i}": links(f"/{2 * i}", f"/{2 * i + 1}", "/") for i in range(1, pages + 1)}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kills_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    hosts = tuple(f"h{i}.test" for i in range(4))
    folder = tmp_path / "web"
    with Loopback(tree(25)) as web:
        config = web.config(*(f"http://{host}/" for host in hosts), hosts=hosts, warc_bytes=10_000, delay_s=0.005)
        command = [sys.executable, "-c", CHILD, config.model_dump_json(), str(folder)]
        kills = 0
        while True:
            wanted = len(web.requests) + 1 + int(70 * seeded(seed, f"at {kills}"))
            pause_s = 0.01 * seeded(seed, f"pause {kills}")  # falls into a fetch, a WARC write or a commit
            child = subprocess.Popen(command)
            web.on_request = _killer(child, wanted, pause_s)
            if child.wait() == 0:
                break
            assert child.returncode == -signal.SIGKILL
            kills += 1
        assert kills >= 2
        found = responses(folder)  # raises where a target occurs twice or a digest is wrong
        assert set(found) == {f"http://{r.host}{r.path}" for r in web.requests if r.path != "/robots.txt"}
        fetched = sorted((r.host, r.path) for r in web.requests if r.path != "/robots.txt")
        again = len(fetched) - len(set(fetched))
        leased_again = _query(folder, "SELECT sum(leases - 1) FROM page")
        assert again <= leased_again  # what was asked for twice is what was in flight when the axe fell
        assert run_crawl(config, folder).by_status == {"200": 4 * 25, "404": 4 * 26}
    assert len(list(folder.glob("web-*.warc.gz"))) > 3


def _killer(child: subprocess.Popen[bytes], wanted: int, pause_s: float) -> Callable[[int], None]:
    """Kills `child` shortly after the `wanted`-th request."""

    def kill(count: int) -> None:
        if count == wanted:
            time.sleep(pause_s)
            child.send_signal(signal.SIGKILL)

    return kill


def _query(folder: Path, sql: str) -> int:
    db = sqlite3.connect(folder / "frontier.sqlite")
    try:
        return int(db.execute(sql).fetchone()[0])
    finally:
        db.close()


def test_bytes_beyond_the_last_commit_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    with Loopback(tree(7)) as web:
        run_crawl(web.config(max_pages=5), folder)
        path = folder / "web-00000.warc.gz"
        good = path.read_bytes()
        path.write_bytes(good + good[: len(good) // 2])
        (folder / "web-00001.warc.gz").write_bytes(b"\x1f\x8b torn")
        run_crawl(web.config(), folder)
    assert path.read_bytes().startswith(good)
    assert not (folder / "web-00001.warc.gz").exists()
    assert len(responses(folder)) == 7 + 8


def test_the_frontier_says_where_each_response_lies(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    with Loopback(tree(20)) as web:
        run_crawl(web.config(warc_bytes=5_000), folder)
    db = sqlite3.connect(folder / "frontier.sqlite")
    rows = db.execute("SELECT url, file, offset, length FROM page WHERE state = 'done'").fetchall()
    db.close()
    assert len({file for _, file, _, _ in rows}) > 2
    found = records(folder)
    starts = [head["warc-filename"] for kind, _, _, head in found if kind == "warcinfo"]
    assert starts == sorted(path.name for path in folder.glob("*.warc.gz"))
    assert len({head["warc-record-id"] for *_, head in found}) == len(found) == len(starts) + 3 * len(rows)
    for i, (url, file, offset, length) in enumerate(rows):
        record = (folder / f"web-{file:05d}.warc.gz").read_bytes()[offset : offset + length]
        alone = tmp_path / f"one-{i}"
        alone.mkdir()
        (alone / "x.warc.gz").write_bytes(record)
        assert [(kind, target) for kind, target, *_ in records(alone)] == [("response", url)]


def test_lost_files_stop_the_crawl_instead_of_starting_over(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    with Loopback(tree(3)) as web:
        run_crawl(web.config(), folder)
        path = folder / "web-00000.warc.gz"
        os.truncate(path, 10)
        with pytest.raises(StageError, match="lost bytes"):
            run_crawl(web.config(), folder)
        (folder / "frontier.sqlite").unlink()
        with pytest.raises(ConfigError, match=r"no frontier\.sqlite"):
            run_crawl(web.config(), folder)
        assert path.stat().st_size == 10


def test_a_second_crawl_of_one_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    frontier = Frontier(folder / "frontier.sqlite", Scope(None, 1), 2026)
    with Loopback({}) as web, pytest.raises(StageError, match="in use"):
        run_crawl(web.config(), folder)
    frontier.close()
    assert not list(folder.glob("*.warc.gz"))


def test_a_full_disk_stops_the_crawl_and_a_new_start_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    noise = "".join(f"{i * 7919 % 100_003} " for i in range(40_000))
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n" + CHILD
    with Loopback({"/": links("/1", "/2", "/3"), "/1": page(noise), "/2": page(noise), "/3": page(noise)}) as web:
        config = web.config()
        child = subprocess.run(
            [sys.executable, "-c", limited, config.model_dump_json(), str(folder)],
            capture_output=True,
            check=False,
            timeout=BOUND_S,
        )
        assert child.returncode == 1
        assert b"StageError: crawl: cannot write" in child.stderr
        before = responses(folder) if _cut_as_a_start_would(folder) else {}
        summary = run_crawl(config, folder)
    after = responses(folder)
    assert set(before) < set(after)
    assert (summary.fetched, len(after)) == (4, 4)


def _cut_as_a_start_would(folder: Path) -> bool:
    length = _query(folder, "SELECT value FROM fact WHERE name = 'warc_length'")
    os.truncate(folder / "web-00000.warc.gz", length)
    return length > 0
