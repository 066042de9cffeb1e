"""The stage `extract`: any source's records to documents. Kernels are in `crawl.extract`, readers in `crawl.sources`, and the
commits, numbers and accounts in `core.ingest`."""

from functools import partial
from typing import Any

from core.ingest import Reader, ingest
from core.job import Job, Outcome
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from crawl import sources
from crawl.harvest.documents import reader as harvested


class ExtractConfig(StageConfig):
    """How documents are made is said by each source; nothing is left to say here."""


def reader(source: Any, name: str, root: Root) -> Reader:
    """A source's config as the functions that ingest calls. Crawls and harvests are read from what they left in the root."""
    if source.kind == "harvest":
        return harvested(name, root, source.rules.max_lines)
    if source.kind == "crawl":
        source = source.captures(f"{root.url}/captures/{name}")
    return Reader(
        name,
        partial(sources.units, source),
        partial(sources.records, source),
        partial(sources.parse, source),
        partial(sources.input_digest, source),
    )


def extract(job: Job) -> Outcome:
    """Read one source into documents, drops and rejects."""
    return ingest(job, reader(job.source, job.source_name, job.root))


STAGE = Stage(
    name="extract",
    kind=Kind.INGEST,
    config=ExtractConfig,
    fn=extract,
    where=False,
    libraries=("resiliparse", "fastwarc", "trafilatura", "pypdfium2", "lxml"),
)
