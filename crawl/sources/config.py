"""The knobs of every kind of source, told apart by `kind`. `path` is any local path or fsspec URL: a folder, a file
or a glob."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.stage import execution
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

    path: str = execution(..., "local path or fsspec URL of a folder, a file or a glob")
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


class CrawlSource(_Common):
    """The captures folder of one of our crawls, read like any WARCs."""

    kind: Literal["crawl"] = "crawl"
    files: tuple[str, ...] = Field(default=WARC_FILES, description="globs below `path`")
    types: tuple[RecordType, ...] = Field(default=("response",), description="record types read")
    limits: Limits = Limits()


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


Source = Annotated[
    WarcSource | CrawlSource | FilesSource | JsonlSource | ParquetSource | DatatroveSource, Field(discriminator="kind")
]
