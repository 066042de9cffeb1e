"""The loop of a crawl: lease a page, ask robots.txt, fetch, commit; many hosts at once, each of them alone.

In: an open frontier, WARC writer and fetcher. Out: WARC records and frontier rows, and the reason for which the loop
ended.

One event loop owns the frontier. Finished pages meet in `_commit_all`: what waits there goes to the WARC in one write
and one fsync (in a thread), then to the frontier in one transaction, so a disk that syncs in 10 ms still commits
hundreds of pages a second. A page whose robots.txt is unknown gives its turn to the robots.txt, and comes back after
the host's delay.
"""

import asyncio
import email.utils
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from core.hashing import seeded

from .addresses import RefusedError
from .config import CrawlConfig
from .content import parameter
from .fetch import BudgetSpent, Capture, Fetcher, UnfetchedError
from .frontier import Frontier, Lease, Outcome, RobotsRow
from .links import PageLinks, directives, read_links
from .robots import MAX_AGE_S, MAX_BYTES, MAX_REDIRECTS, Robots, product_token, verdict
from .saving import Saver
from .urls import clean, origin_of
from .warc import Entry, Location, WarcWriter

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_BACKOFF_S = 3600.0
MAX_RETRY_AFTER_S = 86_400.0  # a host that asks for more is asked again after a day
MAX_ADAPTIVE_DELAY_S = 30.0  # Heritrix maxDelayMs
IN_THREAD_BYTES = 1 << 18  # parsing more than this would hold the loop for over 10 ms
ROBOTS_IN_THREAD_BYTES = 1 << 16  # 512 kB of wildcard rules compile in 1.2 s
ROBOTS_IN_MEMORY = 1024
USE_HEADERS = ("content-usage", "content-signal", "tdm-reservation", "tdm-policy", "x-robots-tag")

Progress = Callable[[int, int], None]  # (answers kept, bytes received), both since the crawl began


@dataclass
class _Finished:
    outcome: Outcome
    entry: Entry | None  # None: nothing for the WARC
    committed: asyncio.Future[None]


class Crawler:
    """Runs one crawl to its end or to a limit."""

    def __init__(
        self,
        config: CrawlConfig,
        frontier: Frontier,
        warc: WarcWriter,
        fetcher: Fetcher,
        progress: Progress | None,
        saver: Saver | None = None,
    ) -> None:
        self.config, self.frontier, self.warc, self.fetcher, self.progress = config, frontier, warc, fetcher, progress
        self.saver = saver
        self.kinds = frozenset[str](config.kinds)
        self.token = product_token(config.user_agent)
        self._began = time.monotonic()
        self._run_s = frontier.fact("run_s")
        self._received_bytes = frontier.fact("received_bytes")
        self._good = frontier.good_position()
        self._outbox: asyncio.Queue[_Finished] = asyncio.Queue()
        self._parsed: OrderedDict[str, tuple[float, Robots]] = OrderedDict()

    @property
    def facts(self) -> dict[str, float]:
        """Totals over all runs of this crawl."""
        run_s = self._run_s + time.monotonic() - self._began
        return {"run_s": run_s, "received_bytes": self._received_bytes + self.fetcher.budget.received_bytes}

    async def run(self) -> str:
        """Crawl until `complete`, `max_pages`, `max_bytes` or `max_s`, and say which."""
        tasks: set[asyncio.Task[None]] = set()
        committer = asyncio.create_task(self._commit_all())
        try:
            while True:
                if stopped := self._limit():
                    return stopped
                self._start(tasks)
                if not tasks and self.frontier.next_ready() is None:
                    return "complete"
                await self._wait(tasks, committer)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not committer.done():
                await self._outbox.join()
            committer.cancel()
            self.frontier.commit([], [], self._good, self.facts)

    def _limit(self) -> str | None:
        if self.frontier.captured >= self.config.max_pages:
            return "max_pages"
        if self.fetcher.budget.spent:
            return "max_bytes"
        return "max_s" if self.facts["run_s"] >= self.config.max_s else None

    @property
    def _has_room(self) -> bool:
        """Every leased page may become an answer kept, so it counts against `max_pages` from the start."""
        leased = self.frontier.leased
        return leased < self.config.concurrency and self.frontier.captured + leased < self.config.max_pages

    def _start(self, tasks: set[asyncio.Task[None]]) -> None:
        while self._has_room and (lease := self.frontier.lease(time.time())):
            tasks.add(asyncio.create_task(self._visit(lease)))

    async def _wait(self, tasks: set[asyncio.Task[None]], committer: asyncio.Task[None]) -> None:
        """Until a page is finished, another host may be asked, or the time is up. Faults of the program are raised."""
        wait_s = self.config.max_s - self.facts["run_s"]
        if self._has_room and (ready := self.frontier.next_ready()) is not None:
            wait_s = min(wait_s, ready - time.time())
        done, _ = await asyncio.wait({*tasks, committer}, timeout=max(wait_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        tasks -= done
        for task in done:
            task.result()

    async def _visit(self, lease: Lease) -> None:
        try:
            found = await self._attempt(lease)
        except BudgetSpent:
            self.frontier.release(lease, self._next_at(None, 0.0))
            return
        except asyncio.CancelledError:
            self.frontier.release(lease, self._next_at(None, 0.0))
            raise
        if found:
            finished = _Finished(*found, asyncio.get_running_loop().create_future())
            self._outbox.put_nowait(finished)
            await asyncio.shield(finished.committed)  # a cancelled visit is committed all the same

    async def _attempt(self, lease: Lease) -> tuple[Outcome, Entry | None] | None:
        """One try at a page; None where the page went back to the queue."""
        try:
            robots = await self._robots(lease)
        except RefusedError as e:
            return Outcome(lease, "refused", reason=e.reason), None
        if robots is None:
            return None
        if not robots.allows(lease.url):
            reason = "robots_unreachable" if robots.blanket == "disallow" else "robots"
            return Outcome(lease, "refused", reason=reason), None
        try:
            capture = await self.fetcher.fetch(lease.url, self.kinds)
        except RefusedError as e:
            return Outcome(lease, "refused", self._next_at(robots, 0.0), reason=e.reason), None
        except UnfetchedError as e:
            return self._fault(lease, robots, e.reason, None)
        last_try = lease.tries + 1 >= self.config.max_tries
        if capture.status in RETRIED and not last_try:
            return self._fault(lease, robots, f"status_{capture.status}", capture)
        if capture.truncated in ("disconnect", "unspecified") and not last_try:
            return self._fault(lease, robots, capture.truncated, capture)
        return await self._done(lease, robots, capture)

    def _next_at(self, robots: Robots | None, fetch_s: float) -> float:
        """When the host may be asked again, in epoch seconds."""
        config = self.config
        asked_s = min((robots and robots.delay_s) or 0.0, config.max_crawl_delay_s)
        adaptive_s = min(config.delay_factor * fetch_s, MAX_ADAPTIVE_DELAY_S)
        return time.time() + max(config.delay_s, asked_s, adaptive_s)

    def _backoff_s(self, name: str, tries: int) -> float:
        """Doubling wait with a jitter of +-25% that depends on the URL only."""
        wait_s = min(self.config.retry_s * 2.0**tries, MAX_BACKOFF_S)
        return wait_s * (0.75 + 0.5 * seeded(tries, name))

    def _fault(self, lease: Lease, robots: Robots, reason: str, capture: Capture | None) -> tuple[Outcome, None] | None:
        """Queue again after a wait, or fail for good. Retry-After binds page and host."""
        next_at = self._next_at(robots, capture.fetch_s if capture else 0.0)
        if lease.tries + 1 >= self.config.max_tries:
            return Outcome(lease, "failed", next_at, reason=reason, fault=True), None
        ready_at = time.time() + self._backoff_s(lease.url, lease.tries)
        if capture and (asked_s := retry_after_s(capture.header("retry-after"), time.time())) is not None:
            ready_at = next_at = max(next_at, time.time() + min(asked_s, MAX_RETRY_AFTER_S))
        status = capture.status if capture else None
        self.frontier.retry(lease, reason, status, ready_at, next_at, self.config.breaker_s)
        return None

    async def _done(self, lease: Lease, robots: Robots, capture: Capture) -> tuple[Outcome, Entry]:
        page = await self._links(capture)
        outcome = Outcome(
            lease,
            "done",
            self._next_at(robots, capture.fetch_s),
            status=capture.status,
            digest=xxhash.xxh3_128_hexdigest(memoryview(capture.raw)[capture.header_bytes :]),
            links=page.links,
            redirect=redirect_of(capture),
            fault=capture.status in RETRIED,
        )
        return outcome, Entry(capture, _metadata(lease, capture, page, robots))

    async def _links(self, capture: Capture) -> PageLinks:
        if capture.kind != "html":
            return PageLinks()
        charset = parameter(capture.header("content-type"), "charset")
        body = bytes(capture.content)
        if len(body) > IN_THREAD_BYTES:
            page = await asyncio.to_thread(read_links, body, charset, capture.url)
        else:
            page = read_links(body, charset, capture.url)
        if any("nofollow" in directives(value) for name, value in capture.headers if name == "x-robots-tag"):
            page.links = []
        return page

    async def _robots(self, lease: Lease) -> Robots | None:
        """The rules for this page; None where they had to be fetched first, and the page went back to the queue."""
        origin, now = origin_of(lease.url), time.time()
        held = self._parsed.get(origin)
        if held and held[0] > now:
            self._parsed.move_to_end(origin)
            return held[1]
        row = self.frontier.robots(origin)
        if row is None or row.expires_at <= now:
            await self._fetch_robots(lease, origin, row)
            return None
        robots, _ = verdict(row.status, row.body, self.token)
        if len(row.body) > ROBOTS_IN_THREAD_BYTES:
            await asyncio.to_thread(robots.allows, lease.url)  # the first question compiles the rules
        self._parsed[origin] = (row.expires_at, robots)
        if len(self._parsed) > ROBOTS_IN_MEMORY:
            self._parsed.popitem(last=False)
        return robots

    async def _fetch_robots(self, lease: Lease, origin: str, before: RobotsRow | None) -> None:
        """Ask for robots.txt and store what came. After `max_tries` an origin without an answer is shut for a day."""
        capture = await self._robots_answer(f"{origin}/robots.txt")
        status = capture.status if capture else None
        body = bytes(capture.content) if capture and status is not None and 200 <= status < 300 else b""
        settled = verdict(status, b"", self.token)[1]
        next_at = self._next_at(None, capture.fetch_s if capture else 0.0)
        tries = (before.tries if before else 0) + 1
        if settled or tries >= self.config.max_tries:
            row = RobotsRow(time.time() + MAX_AGE_S, 0, status, body)
        else:
            row = RobotsRow(0.0, tries, status, body)
            asked_s = retry_after_s(capture.header("retry-after"), time.time()) if capture else None
            wait_s = self._backoff_s(origin, tries - 1) if asked_s is None else min(asked_s, MAX_RETRY_AFTER_S)
            next_at = max(next_at, time.time() + wait_s)
        self.frontier.store_robots(origin, row)
        self.frontier.release(lease, next_at)

    async def _robots_answer(self, url: str) -> Capture | None:
        """The answer after at most five redirects, to whatever authority; None where there was none.

        `RefusedError` where the origin itself lies at an address out of bounds, and so all its pages.
        """
        for hop in range(MAX_REDIRECTS + 1):
            try:
                capture = await self.fetcher.fetch(url, None, MAX_BYTES + 1)
            except UnfetchedError:
                return None
            except RefusedError:
                if hop == 0:
                    raise
                return None
            target = redirect_of(capture)
            if target is None:
                break
            url = target
        if capture.garbled or capture.truncated in ("time", "disconnect", "unspecified"):
            return None  # half a file could lack the rule that shuts us out
        return capture

    async def _commit_all(self) -> None:
        """Group commit: WARC bytes are synced before the frontier calls a page done."""
        while True:
            batch = [await self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get_nowait())
            await self._commit(batch)
            for finished in batch:
                self._outbox.task_done()
                finished.committed.set_result(None)

    async def _commit(self, batch: list[_Finished]) -> None:
        places: list[Location | None] = [None] * len(batch)
        written = [i for i, finished in enumerate(batch) if finished.entry]
        good = self._good
        if written:
            entries = [entry for finished in batch if (entry := finished.entry)]
            found, good = await asyncio.to_thread(self.warc.append, entries)
            for i, place in zip(written, found, strict=True):
                places[i] = place
        self.frontier.commit([finished.outcome for finished in batch], places, good, self.facts)
        self._good = good  # not before: without the rows, these bytes are to be cut
        if self.progress:
            self.progress(self.frontier.captured, int(self.facts["received_bytes"]))
        if self.saver and self.saver.due(good.file):
            await asyncio.to_thread(self.saver.save, good.file)  # no record is written meanwhile: this task writes them


def redirect_of(capture: Capture) -> str | None:
    """The cleaned target of a redirect; None for other answers, and for targets that are not http(s)."""
    location = capture.header("location")
    if capture.status not in REDIRECTS or not location:
        return None
    return clean(location.encode("latin-1").decode("utf-8", "replace"), capture.url)


def retry_after_s(value: str, now: float) -> float | None:
    """Seconds to wait by a Retry-After header: a number of seconds or an HTTP date. None where it is neither."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - now, 0.0) if value else None
    except (ValueError, OverflowError):
        return None


def _metadata(lease: Lease, capture: Capture, page: PageLinks, robots: Robots) -> dict[str, Any]:
    """The facts beside a capture, and every statement about its use that came with it. Nothing is decided here."""
    said: dict[str, Any] = {}
    for name, value in capture.headers:
        if name in USE_HEADERS:
            said.setdefault("headers", []).append([name, value])
    if page.metas:
        said["metas"] = [list(meta) for meta in page.metas]
    if lines := robots.opt_outs(capture.url):
        said["robots"] = lines
    return {
        "parent": lease.parent,
        "depth": lease.depth,
        "hops": lease.hops,
        "tries": lease.tries + 1,
        "kind": capture.kind,
        "garbled": capture.garbled,
        "fetch_ms": round(capture.fetch_s * 1000),
        "links": len(page.links),
        "use": said,
    }
