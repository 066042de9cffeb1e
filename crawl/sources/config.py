"""The knobs of every kind of source, told apart by `kind`. `path` is any local path or fsspec URL: a folder, a file
or a glob."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.stage import ConfigPath, execution
from crawl.config import CrawlConfig
from crawl.extract.limits import Limits

DocumentKind = Literal["web", "book", "paper", "code", "mail", "reference", "pull_request", "other"]
RecordType = Literal["response", "resource", "conversion"]

WARC_FILES = tuple(
    f"**/*.{kind}{packed}" for kind in ("warc", "arc", "warc.wet") for packed in ("", ".gz", ".zst", ".lz4")
)
JSONL_FILES = tuple(
    f"**/*.{kind}{packed}" for kind in ("jsonl", "ndjson") for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)
TEXT_FILES = tuple(f"**/*.{suffix}" for suffix in ("html", "htm", "xhtml", "pdf", "epub", "txt", "md", "eml"))


class _Common(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath = execution(..., "local path or fsspec URL of a folder, a file or a glob")
    document_kind: DocumentKind | None = Field(default=None, description="kind of every document; null: by its type")
    license: str | None = Field(
        default=None, description="licence of every document, an SPDX identifier where there is one"
    )


class WarcSource(_Common):
    """WARC and ARC files, plain or gz, zst, lz4; also WET (its records are conversions)."""

    kind: Literal["warc"] = "warc"
    files: tuple[str, ...] = Field(default=WARC_FILES, description="globs below `path`")
    types: tuple[RecordType, ...] = Field(
        default=("response", "resource", "conversion"), description="record types read"
    )
    limits: Limits = Limits()


class CrawlSource(CrawlConfig):
    """A crawl of ours: what the stage `crawl` fetches, and how its captures become documents."""

    kind: Literal["crawl"] = "crawl"
    document_kind: DocumentKind | None = Field(default=None, description="kind of every document; null: by its type")
    license: str | None = Field(default=None, description="licence of every document")
    limits: Limits = Limits()

    def captures(self, path: str) -> WarcSource:
        """The WARC files that the crawl left in `path`, as a source."""
        return WarcSource(
            path=path,
            types=("response",),
            document_kind=self.document_kind,
            license=self.license,
            limits=self.limits,
        )


class FilesSource(_Common):
    """One document a file: HTML, PDF, ePub, text, Markdown, mail."""

    kind: Literal["files"] = "files"
    files: tuple[str, ...] = Field(default=TEXT_FILES, description="globs below `path`")
    limits: Limits = Limits()


class JsonlSource(_Common):
    """One document a line; plain or gz, zst, bz2, xz."""

    kind: Literal["jsonl"] = "jsonl"
    files: tuple[str, ...] = Field(default=JSONL_FILES, description="globs below `path`")
    text: str = Field(default="text", description="key of the text")
    url: str | None = Field(default="url", description="key of the URL")
    id: str | None = Field(default="id", description="key of the source's own id, kept in metadata as `source_id`")
    metadata: tuple[str, ...] | None = Field(default=None, description="keys kept as metadata; null: all others")
    line_bytes: int = Field(
        default=256 << 20, gt=0, description="longest line read; a longer one is dropped as too_large"
    )


class ParquetSource(_Common):
    """One document a row."""

    kind: Literal["parquet"] = "parquet"
    files: tuple[str, ...] = Field(default=("**/*.parquet",), description="globs below `path`")
    text: str = Field(default="text", description="column of the text")
    url: str | None = Field(default=None, description="column of the URL")
    id: str | None = Field(default=None, description="column of the source's own id, kept in metadata as `source_id`")
    metadata: tuple[str, ...] = Field(default=(), description="columns kept as metadata")


class DatatroveSource(_Common):
    """Any datatrove reader, e.g. `datatrove.pipeline.readers.JsonlReader`; `path` is its data folder."""

    kind: Literal["datatrove"] = "datatrove"
    reader: str = Field(description="import path of the reader class")
    arguments: dict[str, Any] = Field(default_factory=dict, description="its other arguments")


class MadeSource(BaseModel):
    """A dataset that a stage of this pipeline makes from others: the next generation. It names its parents in `metadata`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["made"] = "made"
    stage: str = Field(description="the stage that makes it, such as augment or dialogues")


# What the readers read; a crawl is turned into the WARC files it left.
Stored = WarcSource | FilesSource | JsonlSource | ParquetSource | DatatroveSource

Source = Annotated[
    WarcSource | CrawlSource | FilesSource | JsonlSource | ParquetSource | DatatroveSource | MadeSource,
    Field(discriminator="kind"),
]
