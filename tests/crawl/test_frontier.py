"""The frontier by itself: order, one lease per host, retries, breaker, caps, and what survives a reopening."""

from pathlib import Path

import pytest

from crawl.frontier import MAX_QUERIES_PER_PATH, Frontier, Lease, Outcome, RobotsRow, Scope
from crawl.warc import Location, Position

ANY = Scope(hosts=None, max_depth=3)
NOWHERE = Position(0, 0)


def open_at(folder: Path, scope: Scope = ANY, rested_at: float = 0.0) -> Frontier:
    return Frontier(folder / "frontier.sqlite", scope, 2026, rested_at)


def leased(frontier: Frontier, now: float = 10.0) -> Lease:
    lease = frontier.lease(now)
    assert lease is not None
    return lease


def finish(frontier: Frontier, lease: Lease, **fields: object) -> None:
    outcome = Outcome(lease, "done", **{"status": 200, **fields})  # type: ignore[arg-type]
    frontier.commit([outcome], [Location(0, 0, 1)], Position(0, 1), {})


def test_hosts_take_turns_and_pages_come_in_order_of_discovery(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/1", "http://a/2", "http://b/1", "http://b/2"])
    first, second = leased(frontier), leased(frontier)
    assert {first.url, second.url} == {"http://a/1", "http://b/1"}
    assert frontier.lease(10.0) is None  # one page in flight per host
    finish(frontier, first, next_at=15.0)
    assert frontier.lease(14.9) is None
    assert frontier.next_ready() == 15.0
    assert leased(frontier, 15.0).url == first.url.replace("/1", "/2")
    frontier.close()


def test_a_page_is_known_under_its_canonical_url(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/?x=1&y=2", "http://a/?y=2&x=1", "http://a/?y=2&x=1&utm_source=mail"])
    finish(frontier, leased(frontier), links=["http://a/?x=1&y=2&fbclid=z"])
    assert frontier.lease(10.0) is None
    assert frontier.counts("state") == {"done": 1}
    frontier.close()


def test_depth_scope_and_traps_are_counted_when_they_refuse(tmp_path: Path) -> None:
    frontier = open_at(tmp_path, Scope(frozenset({"a.org", ".b.org"}), max_depth=1))
    frontier.add_seeds(["http://a.org/"])
    wanted = ["http://www.a.org/x", "http://sub.b.org/", "http://deep.sub.b.org/"]
    others = ["http://b.org/", "http://xa.org/", "http://a.org.evil/", "http://a.org/x/x/x/x/"]
    finish(frontier, leased(frontier), links=wanted + others)
    found = [leased(frontier) for _ in wanted]
    assert sorted(lease.url for lease in found) == sorted(wanted)
    assert {(lease.depth, lease.parent) for lease in found} == {(1, "http://a.org/")}
    finish(frontier, found[0], links=["http://a.org/too-deep"])
    assert frontier.refused_links() == {"depth": 1, "scope": 3, "trap_repeated": 1}
    frontier.close()


def test_one_path_has_a_bounded_number_of_queries(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(
        [f"http://a/search?page={i}" for i in range(MAX_QUERIES_PER_PATH + 7)] + ["http://a/other?page=1"]
    )
    assert frontier.counts("state") == {"queued": MAX_QUERIES_PER_PATH + 1}
    assert frontier.refused_links() == {"trap_queries": 7}
    frontier.close()


def test_a_faulty_page_waits_while_its_host_goes_on(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/1", "http://a/2"])
    frontier.retry(leased(frontier), "timeout", None, ready_at=100.0, next_at=11.0, open_s=900.0)
    second = leased(frontier, 11.0)
    assert second.url == "http://a/2"
    finish(frontier, second)
    assert frontier.next_ready() == 100.0
    again = leased(frontier, 100.0)
    assert (again.url, again.tries) == ("http://a/1", 1)
    frontier.close()


def test_the_breaker_opens_after_five_faults_and_gives_up_at_the_third_opening(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds([f"http://a/{i}" for i in range(30)])
    now = 10.0
    for opening in range(1, 4):
        for _ in range(5):
            frontier.retry(leased(frontier, now), "connect", None, now + 1e6, now, 900.0)
        if opening < 3:
            assert frontier.next_ready() == now + 900.0
            now += 900.0
    assert frontier.next_ready() is None
    assert frontier.counts("reason") == {"host_down": 30}
    frontier.close()


def test_an_answer_closes_the_breaker_again(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds([f"http://a/{i}" for i in range(30)])
    for _ in range(4):
        frontier.retry(leased(frontier), "connect", None, 1e6, 10.0, 900.0)
    finish(frontier, leased(frontier))
    for _ in range(4):
        frontier.retry(leased(frontier), "connect", None, 1e6, 10.0, 900.0)
    assert frontier.next_ready() == 10.0
    frontier.close()


def test_what_a_dead_process_held_is_queued_again_after_the_delay(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/1", "http://b/1"])
    finish(frontier, leased(frontier), links=["http://c/"])
    held = leased(frontier)
    frontier._db.close()  # as a kill would: no commit, no release
    frontier._lock.close()
    frontier = open_at(tmp_path, rested_at=77.0)
    others = [leased(frontier, 76.0)]
    assert held.url not in {lease.url for lease in others}
    assert frontier.lease(76.0) is None
    assert leased(frontier, 77.0).url == held.url
    assert (frontier.captured, frontier.good_position()) == (1, Position(0, 1))
    frontier.close()


def test_releasing_leaves_no_trace_but_the_pause(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/1"])
    lease = leased(frontier)
    frontier.release(lease, 20.0)
    assert (frontier.leased, frontier.next_ready()) == (0, 20.0)
    assert leased(frontier, 20.0) == lease
    frontier.close()


def test_redirects_count_their_hops_and_keep_the_depth(tmp_path: Path) -> None:
    frontier = open_at(tmp_path, Scope(None, max_depth=0, max_hops=1))
    frontier.add_seeds(["http://a/"])
    finish(frontier, leased(frontier), redirect="http://b/", status=301)
    lease = leased(frontier)
    assert (lease.url, lease.depth, lease.hops) == ("http://b/", 0, 1)
    finish(frontier, lease, redirect="http://c/", status=301)
    assert frontier.next_ready() is None
    assert frontier.refused_links() == {"redirects": 1}
    frontier.close()


def test_a_failed_commit_changes_nothing(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    frontier.add_seeds(["http://a/1"])
    lease = leased(frontier)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        frontier.commit([Outcome(lease, "done"), Outcome(lease, "done")], [None], NOWHERE, {"run_s": 5.0})
    assert frontier.counts("state") == {"leased": 1}
    assert frontier.fact("run_s") == 0.0
    frontier.close()


def test_robots_answers_survive(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    row = RobotsRow(5.0, 2, 200, b"User-agent: *\xff")
    frontier.store_robots("http://a", row)
    frontier.close()
    frontier = open_at(tmp_path)
    assert frontier.robots("http://a") == row
    assert frontier.robots("http://b") is None
    frontier.close()


def test_hot_statements_use_their_indexes(tmp_path: Path) -> None:
    frontier = open_at(tmp_path)
    plans = {
        "SELECT id FROM host WHERE ready_at <= 1 ORDER BY ready_at LIMIT 1": "host_ready",
        "SELECT ready_at FROM host WHERE ready_at IS NOT NULL ORDER BY ready_at": "host_ready",
        "SELECT id FROM page WHERE host = 1 AND state = 'queued' ORDER BY ready_at, id LIMIT 1": "page_queued",
        "SELECT 1 FROM page WHERE host = 1 AND state = 'leased'": "page_leased",
        "SELECT 1 FROM page WHERE key = x'00'": "sqlite_autoindex_page_1",
    }
    for statement, index in plans.items():
        plan = " ".join(str(row[3]) for row in frontier._db.execute("EXPLAIN QUERY PLAN " + statement))
        assert index in plan, plan
        assert "TEMP B-TREE" not in plan, plan
    frontier.close()
