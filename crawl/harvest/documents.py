"""Base records as documents of kind `pull_request`: title, body, closed issues, what was said, and the diff.

In: `captures/<source>/*.jsonl.zst`. Out: `Found` with metadata `repo`, `number`, `change` (pull_request, merge, commit, issue,
release_pair), `merged`, `merged_at`, `base_commit`, `head_commit`, `labels`, `languages`, `files`, `added`, `removed`, `tests`,
`stars`, `left_out`, and `record`, the digest by which `dialogues` finds the record again. People are masked as `user1`,
`user2`; names of files and their contents stay as they are (`classifiers.pii` looks at those). Records that were dropped become
drops.
"""

from collections.abc import Iterator
from functools import partial

from core.engines.contract import Unit
from core.errors import InputError
from core.ingest import Reader
from core.records import Dropped, Failed, Found, Raw
from core.storage import Root
from crawl import sources
from crawl.harvest.changes import unified
from crawl.harvest.record import Record, from_json, line_of, record_digest
from crawl.harvest.text import Masks, cleaned
from crawl.sources.config import JsonlSource

RECORDS = ("*.jsonl.zst",)  # of the captures' own folder: what lies deeper is index and answers


def reader(name: str, root: Root, rules_lines: int) -> Reader:
    """The captures of one harvest as ingest reads them."""
    stored = captures(f"{root.url}/captures/{name}")
    return Reader(
        name,
        partial(sources.units, stored),
        partial(records, stored),
        partial(parse, rules_lines),
        partial(sources.input_digest, stored),
    )


def captures(path: str) -> JsonlSource:
    """The record files in a folder as a source of lines."""
    return JsonlSource(path=path, files=RECORDS, text="title", url="url")


def records(stored: JsonlSource, unit: Unit) -> Iterator[Raw | Dropped | Failed]:
    return sources.records(stored, unit)


def parse(max_lines: int, raw: Raw) -> Found | Dropped:
    """The document of a record. InputError where the line is no record."""
    record = record_of(raw.payload)
    if record.drop is not None:
        return Dropped(
            raw.origin, record.drop, f"{record.repo} {record.key}: {record.detail or ''}".strip(": "), record.url
        )
    masks = masks_of(record)
    text = document_text(record, masks, max_lines)
    if not text.strip():
        return Dropped(raw.origin, "empty", f"{record.repo} {record.key}", record.url)
    return Found(raw.origin, text, record.url, "pull_request", record.license, metadata=_metadata(record, masks))


def record_of(value: dict[str, object]) -> Record:
    """The record in a parsed line."""
    try:
        return from_json(value)
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"harvest: the line is no record: {e}") from e


def masks_of(record: Record) -> Masks:
    """The people of a change, its author first."""
    said = [r.author for r in record.remarks]
    return Masks(a for a in (record.author, *(i.author for i in record.issues), *said) if a)


def document_text(record: Record, masks: Masks, max_lines: int) -> str:
    """Everything that was said, then the diff."""
    parts = [masks.text(cleaned(record.title)), masks.text(cleaned(record.body))]
    parts += [
        issue
        for i in record.issues
        if (issue := masks.text(f"Issue #{i.number}: {cleaned(i.title)}\n\n{cleaned(i.body)}"))
    ]
    for remark in record.remarks:
        said = masks.text(cleaned(remark.text))
        if said:
            parts.append(f"{masks.name(remark.author)}: {said}")
    diff = "".join(unified(f.path, f.base, f.head, max_lines) for f in record.files)
    return "\n\n".join(p for p in (*parts, diff) if p)


def _metadata(record: Record, masks: Masks) -> dict[str, object]:
    languages = sorted({f.language for f in record.files if f.language})
    found = {
        "title": masks.text(record.title),
        "change": record.kind,
        "repo": record.repo,
        "number": record.number,
        "merged": record.merged,
        "merged_at": record.merged_at,
        "base_commit": record.base_commit,
        "head_commit": record.head_commit,
        "labels": list(record.labels),
        "stars": record.stars,
        "languages": languages,
        "language": max(
            languages, key=lambda x: sum(f.added + f.removed for f in record.files if f.language == x), default=None
        ),
        "files": len(record.files),
        "added": sum(f.added for f in record.files),
        "removed": sum(f.removed for f in record.files),
        "tests": any(f.test for f in record.files),
        "left_out": len(record.left_out),
        "record": record_digest(line_of(record)),
    }
    return {k: v for k, v in found.items() if v is not None and v != []}
