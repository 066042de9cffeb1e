"""Where raw records come from: WARCs, crawls, files, JSONL, Parquet, datatrove readers, behind four functions."""

from crawl.sources.config import (
    CrawlSource,
    DatatroveSource,
    FilesSource,
    JsonlSource,
    MadeSource,
    ParquetSource,
    Source,
    WarcSource,
)
from crawl.sources.read import input_digest, parse, records, units

__all__ = [
    "CrawlSource",
    "DatatroveSource",
    "FilesSource",
    "JsonlSource",
    "MadeSource",
    "ParquetSource",
    "Source",
    "WarcSource",
    "input_digest",
    "parse",
    "records",
    "units",
]
