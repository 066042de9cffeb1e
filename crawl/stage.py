"""StepCrawl: from seed URLs to WARC files, politely, and from where it was after any kill.

In: `CrawlConfig`. Out, in one folder named after the dataset: `<name>-<nnnnn>.warc.gz` (see `crawl.warc`) and
`frontier.sqlite` (see `crawl.frontier`). A crawl is a capture: two crawls of a changing web differ, and determinism
starts from what the first one wrote. The same folder again goes on where the last run ended; a complete crawl does
nothing; a raised limit goes on from the old one.

Redirects are pages of their own: robots.txt, scope, address and politeness are judged at each hop, and each hop has
its record.
"""

import asyncio
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.stage import Kind, Stage

from .addresses import Addresses
from .config import CrawlConfig
from .crawler import Crawler, Progress
from .fetch import Budget, Fetcher, Limits
from .frontier import Frontier, Scope, read_seeds
from .urls import host_of
from .warc import WarcWriter, warc_files

__all__ = ["STAGE", "CrawlConfig", "CrawlSummary", "crawl", "run_crawl"]


@dataclass(frozen=True)
class CrawlSummary:
    """Totals over all runs of a crawl folder; `run_*` and `pages_per_s` are of this run alone."""

    stopped: str  # complete, max_pages, max_bytes or max_s
    fetched: int  # answers kept
    queued: int  # pages known and not yet asked for
    by_status: dict[str, int]  # answers kept, by HTTP status
    not_fetched: dict[str, int]  # pages asked for or judged in vain: robots, address, type, timeout, host_down, ...
    links_refused: dict[str, int]  # links never queued: scope, depth, redirects, trap_...
    received_bytes: int
    warc_bytes: int
    total_s: float
    run_fetched: int
    run_s: float
    pages_per_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def crawl(config: CrawlConfig, folder: Path, progress: Progress | None = None) -> CrawlSummary:
    """Crawl into `folder` until nothing is left or a limit is reached. ConfigError before the first request."""
    seeds = _seeds(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "frontier.sqlite"
    if not path.exists() and warc_files(folder, folder.name):
        raise ConfigError(f"crawl: {folder} holds WARC files but no frontier.sqlite; restore it, or use a new folder")
    frontier = Frontier(path, _scope(config, seeds), datetime.now(UTC).year)
    try:
        frontier.add_seeds(seeds)
        warc = WarcWriter(folder, folder.name, frontier.good_position(), _warcinfo(config), config.warc_bytes)
        try:
            crawler = Crawler(config, frontier, warc, _fetcher(config, frontier), progress)
            before, before_s = frontier.captured, frontier.fact("run_s")
            stopped = await crawler.run()
            return _summary(frontier, warc, stopped, before, before_s)
        finally:
            warc.close()
    finally:
        frontier.close()


def run_crawl(config: CrawlConfig, folder: Path, progress: Progress | None = None) -> CrawlSummary:
    """`crawl` in an event loop of its own."""
    return asyncio.run(crawl(config, folder, progress))


def _seeds(config: CrawlConfig) -> list[str]:
    lines = list(config.seeds)
    if config.seeds_file is not None:
        try:
            lines += config.seeds_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"crawl: seeds_file cannot be read, got {e}") from e
    good, bad = read_seeds(lines)
    problems = [f"crawl: seed is no http(s) URL, got {line!r}" for line in bad]
    if problems or not good:
        raise ConfigError(*(problems or ["crawl: seeds hold no URL, expected at least one"]))
    return good


def _scope(config: CrawlConfig, seeds: list[str]) -> Scope:
    hosts = {"seeds": [host_of(url) for url in seeds], "listed": list(config.hosts), "any": []}[config.scope]
    names = None if config.scope == "any" else frozenset(host.lower().removeprefix("www.") for host in hosts)
    return Scope(names, config.max_depth, config.max_redirects, config.max_pages_per_host)


def _fetcher(config: CrawlConfig, frontier: Frontier) -> Fetcher:
    limits = Limits(
        config.connect_timeout_s,
        config.read_timeout_s,
        config.total_timeout_s,
        config.address_delay_s,
        config.text_bytes,
        config.document_bytes,
    )
    budget = Budget(config.max_bytes - int(frontier.fact("received_bytes")))
    addresses = Addresses(config.resolver, config.networks)
    return Fetcher(addresses, config.user_agent, limits, budget, config.ca_file)


def _warcinfo(config: CrawlConfig) -> dict[str, str]:
    return {
        "software": "stepwell crawl",
        "format": "WARC File Format 1.1",
        "http-header-user-agent": config.user_agent,
        "robots": "RFC 9309",
    }


def _summary(frontier: Frontier, warc: WarcWriter, stopped: str, before: int, before_s: float) -> CrawlSummary:
    total_s = frontier.fact("run_s")
    run_s, run_fetched = total_s - before_s, frontier.captured - before
    return CrawlSummary(
        stopped=stopped,
        fetched=frontier.captured,
        queued=frontier.counts("state").get("queued", 0),
        by_status=frontier.counts("status"),
        not_fetched=frontier.counts("reason"),
        links_refused=frontier.refused_links(),
        received_bytes=int(frontier.fact("received_bytes")),
        warc_bytes=warc.total_bytes(),
        total_s=round(total_s, 3),
        run_fetched=run_fetched,
        run_s=round(run_s, 3),
        pages_per_s=round(run_fetched / run_s, 2) if run_s > 0 else 0.0,
    )


def _capture(job: Any) -> dict[str, Any]:
    """The stage: captures of the job's dataset lie in `captures/<dataset>` of the root."""
    folder = Path(job.root.local_path(f"captures/{job.datasets[0].name}"))
    return run_crawl(job.config, folder, job.progress).to_json()


STAGE = Stage(
    name="crawl",
    kind=Kind.CAPTURE,
    config=CrawlConfig,
    fn=_capture,
    libraries=("protego", "h11", "can_ada", "selectolax", "resiliparse"),
)
