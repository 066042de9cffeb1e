"""Whole crawls against a web on loopback."""

from pathlib import Path

from crawl.stage import run_crawl
from tests.crawl.loopback import Loopback, links, moved, page, responses


def test_follows_links_within_scope_and_nothing_else(tmp_path: Path) -> None:
    site = {"/": links("/a", "b?x=1&utm_source=t", "http://other.test/", "mailto:x@y", "/a#frag"), "/a": links("/")}
    with Loopback(site | {"/b?x=1&utm_source=t": page("end")}) as web:
        summary = run_crawl(web.config(), tmp_path / "web")
    assert sorted(web.paths()) == ["/", "/a", "/b?x=1&utm_source=t"]
    assert summary.by_status == {"200": 3}
    assert summary.links_refused == {"scope": 1}
    assert (summary.stopped, summary.queued) == ("complete", 0)
    assert sorted(responses(tmp_path / "web")) == [f"http://a.test{p}" for p in sorted(web.paths())]


def test_a_complete_crawl_does_nothing_when_run_again(tmp_path: Path) -> None:
    with Loopback({"/": links("/a"), "/a": moved("/b"), "/b": page("end")}) as web:
        first = run_crawl(web.config(), tmp_path / "web")
        before = [(p.name, p.read_bytes()) for p in sorted(tmp_path.glob("web/*.warc.gz"))]
        asked = len(web.requests)
        again = run_crawl(web.config(), tmp_path / "web")
    assert len(web.requests) == asked
    assert [(p.name, p.read_bytes()) for p in sorted(tmp_path.glob("web/*.warc.gz"))] == before
    assert again.run_fetched == 0
    assert (again.fetched, again.by_status) == (first.fetched, {"200": 2, "301": 1})
