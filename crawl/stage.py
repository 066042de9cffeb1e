"""StepCrawl: from seed URLs to WARC files, politely, and from where it was after any kill.

In: `CrawlConfig`. Out, in one folder named after the dataset: `<name>-<nnnnn>.warc.gz` (see `crawl.warc`) and
`frontier.sqlite` (see `crawl.frontier`). A crawl is a capture: two crawls of a changing web differ, and determinism
starts from what the first one wrote. The same folder again goes on where the last run ended; a complete crawl does
nothing; a raised limit goes on from the old one.

Redirects are pages of their own: robots.txt, scope, address and politeness are judged at each hop, and each hop has
its record.
"""

import asyncio
import json
import sqlite3
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import ConfigError, StageError
from core.job import Job, Outcome
from core.stage import Kind, Stage, StageConfig
from core.workspace import workspace

from .addresses import Addresses, parse_entry
from .config import CrawlConfig
from .crawler import Crawler, Progress
from .fetch import Budget, Fetcher, Limits
from .frontier import Frontier, Scope
from .saving import Saver, needed, saved
from .urls import clean, host_of
from .warc import WarcWriter, file_number, warc_files

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


async def crawl(
    config: CrawlConfig, folder: Path, progress: Progress | None = None, saver: Saver | None = None
) -> CrawlSummary:
    """Crawl into `folder` until nothing is left or a limit is reached.

    ConfigError before the first request; StageError where the disk fails, after which the same call goes on.
    """
    seeds = _seeds(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "frontier.sqlite"
    if not path.exists() and warc_files(folder, folder.name):
        raise ConfigError(f"crawl: {folder} holds WARC files but no frontier.sqlite; restore it, or use a new folder")
    try:
        with closing(_frontier(config, path, seeds)) as frontier:
            return await _crawl(config, folder, frontier, progress, saver)
    except (OSError, sqlite3.Error) as e:
        raise StageError(
            f"crawl: cannot write to {folder}, got {e!r}, expected a sound disk with room; mend and start again"
        ) from e


async def _crawl(
    config: CrawlConfig, folder: Path, frontier: Frontier, progress: Progress | None, saver: Saver | None
) -> CrawlSummary:
    good = frontier.good_position()
    with closing(WarcWriter(folder, folder.name, good, _warcinfo(config), config.warc_bytes)) as warc:
        before, before_s = frontier.captured, frontier.fact("run_s")
        stopped = await Crawler(config, frontier, warc, _fetcher(config, frontier), progress, saver).run()
        return _summary(frontier, warc, stopped, before, before_s)


def run_crawl(
    config: CrawlConfig, folder: Path, progress: Progress | None = None, saver: Saver | None = None
) -> CrawlSummary:
    """`crawl` in an event loop of its own."""
    return asyncio.run(crawl(config, folder, progress, saver))


def _seeds(config: CrawlConfig) -> list[str]:
    """Cleaned seeds of the config and its file, where empty lines and lines that begin with '#' say nothing."""
    lines = list(config.seeds)
    if config.seeds_file is not None:
        try:
            lines += Path(config.seeds_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"crawl: seeds_file cannot be read, got {e}; expected UTF-8 text, one URL a line") from e
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    cleaned = [(line, clean(line)) for line in wanted]
    problems = [f"crawl: seed is no http(s) URL, got {line!r}; mend or remove it" for line, url in cleaned if not url]
    if problems or not cleaned:
        raise ConfigError(*(problems or ["crawl: seeds hold no URL, got none, expected at least one; name one"]))
    return [url for _, url in cleaned if url]


def _frontier(config: CrawlConfig, path: Path, seeds: list[str]) -> Frontier:
    hosts = {"seeds": [host_of(url) for url in seeds], "listed": list(config.hosts), "any": []}[config.scope]
    names = None if config.scope == "any" else frozenset(host.lower().removeprefix("www.") for host in hosts)
    scope = Scope(names, config.max_depth, config.max_redirects, config.max_pages_per_host)
    frontier = Frontier(path, scope, datetime.now(UTC).year, rested_at=time.time() + config.delay_s)
    frontier.add_seeds(seeds)
    return frontier


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
    addresses = Addresses(_resolver(config), config.networks)
    return Fetcher(addresses, config.user_agent, limits, budget, config.ca_file)


def _resolver(config: CrawlConfig) -> dict[str, str]:
    if config.resolver_file is None:
        return config.resolver
    try:
        stored = json.loads(Path(config.resolver_file).read_bytes())
        for entry in stored.values():
            parse_entry(entry, 80)
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(
            f"crawl: resolver_file cannot be used, got {e}; expected a JSON object of name: address"
        ) from e
    return {**stored, **config.resolver}


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


class CrawlStageConfig(StageConfig):
    """What and how to crawl is said by each source of kind `crawl`; nothing is left to say here."""


def capture(job: Job) -> Outcome:
    """The stage: one source's captures, in `captures/<source>` of the root. Its WARC files are the log that counts."""
    name = job.source_name
    with (
        workspace(job.root, f"captures/{name}", partial(needed, name)) as folder,
        job.display.task(f"{job.instance}: {name}", job.source.max_pages, 0) as advance,
    ):
        seen = [0, 0]

        def progress(docs: int, bytes: int) -> None:
            advance(docs - seen[0], bytes - seen[1], docs - seen[0])
            seen[:] = [docs, bytes]

        with saved(folder) as saver:
            summary = run_crawl(job.source, folder.path, progress, saver)
        files = folder.committed(lambda file: file_number(file, name) is not None)
    outputs = {file: {"content": stored.content, "bytes": stored.bytes} for file, stored in files.items()}
    accounts = {"fetched": summary.fetched, "not_fetched": sum(summary.not_fetched.values()), "queued": summary.queued}
    observed = {**summary.to_json(), "docs": summary.run_fetched, "bytes": summary.received_bytes}
    observed["warc_bytes"] = sum(stored.bytes for stored in files.values())  # also of files that lie in the store only
    return Outcome(outputs=outputs, accounts=accounts, observed=observed)


STAGE = Stage(
    name="crawl",
    kind=Kind.CAPTURE,
    config=CrawlStageConfig,
    fn=capture,
    where=False,
    per_dataset=True,
    libraries=("protego", "h11", "can_ada", "selectolax", "resiliparse"),
)
