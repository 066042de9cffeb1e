"""What ingest passes around before documents exist: raw records in, found documents, drops and failures out.

A source is read in two steps, so that one bad record can be named and skipped: `records(source, unit)` yields `Raw` in a fixed
order and must survive broken input; `parse(source, raw)` may raise, hang or crash on one record, and costs that record only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a record lies: `path` relative to its source with '/', byte offset and length as stored (None: the whole file).

    Where a format has no byte offsets `offset` counts otherwise and `length` is None: the row in Parquet and datatrove files,
    the position in the decompressed stream of a file that is one gzip member."""

    path: str
    offset: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Raw:
    """One record as read. `payload` is what `parse` needs: bytes of a body, a JSON object, a table row."""

    origin: Origin
    payload: Any
    url: str | None = None
    content_type: str | None = None
    fetched_at: datetime | None = None
    # lower-case names; `warc-...` names from the record itself
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A document to be. Ingest adds doc_id and source, replaces lone surrogates, and counts them."""

    origin: Origin
    text: str
    url: str | None
    kind: str
    license: str | None = None
    fetched_at: datetime | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # JSON-like; title, date, links, extractor, ...


@dataclass(frozen=True)
class Dropped:
    """A record that is rightly no document: empty, unsupported type, encrypted, too short, HTTP error page."""

    origin: Origin
    reason: str
    detail: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Failed:
    """A record on which reading or parsing failed; counts against the reject budget."""

    origin: Origin
    reason: str  # exception class, 'timeout', 'crash', 'torn_record'
    detail: str | None = None


def well_formed(text: str) -> tuple[str, int]:
    """`text` with lone surrogates as U+FFFD, and how many there were: Arrow and every tokenizer refuse them."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        count = sum("\ud800" <= c <= "\udfff" for c in text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), count
