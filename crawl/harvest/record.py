"""Base records: one change with all that is known of it, as a line of JSON in `captures/<source>/<unit>.jsonl.zst`.

A record either holds a change (`files` with whole contents before and after, as exact text) or says why it was left behind
(`drop`: reason and detail), so that nothing is skipped without a count. Kinds: `pull_request`, `merge`, `commit`, `issue`,
`release_pair`. Times are ISO 8601, UTC. Null is unknown.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import xxhash


@dataclass(frozen=True)
class FileChange:
    """One file. `base` is None where it was new, `head` where it was removed; both are the exact text."""

    path: str
    base: str | None
    head: str | None
    removed: int = 0  # lines
    added: int = 0
    language: str | None = None
    test: bool = False


@dataclass(frozen=True)
class Remark:
    """Something said about the change."""

    author: str | None
    at: str | None  # when written or last edited, whichever is later
    text: str
    where: str = "comment"  # comment, review, issue


@dataclass(frozen=True)
class Issue:
    """An issue that the change closes."""

    number: int
    title: str
    body: str
    author: str | None = None
    at: str | None = None


@dataclass(frozen=True)
class Record:
    """One change, or why there is none."""

    kind: str
    repo: str
    key: str  # unique within the repository: `pull/12`, `commit/<sha>`, `release/8.1.8`
    number: int | None = None
    url: str | None = None
    title: str = ""
    body: str = ""
    author: str | None = None
    created_at: str | None = None
    merged_at: str | None = None
    merged: bool | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None
    stars: int | None = None
    base_commit: str | None = None
    head_commit: str | None = None
    issues: tuple[Issue, ...] = ()
    remarks: tuple[Remark, ...] = ()
    files: tuple[FileChange, ...] = ()
    left_out: tuple[str, ...] = ()  # paths of the change that are no source
    tree: tuple[str, ...] = ()  # paths of the base, sorted; a part of them in large repositories
    tree_size: int = 0  # of the whole base
    drop: str | None = None
    detail: str | None = None

    def dropped(self, reason: str, detail: str | None = None) -> "Record":
        """The same change left behind: what names it stays, what it holds goes."""
        return Record(
            kind=self.kind,
            repo=self.repo,
            key=self.key,
            number=self.number,
            url=self.url,
            drop=reason,
            detail=detail[:300] if detail else None,
        )


def line_of(record: Record) -> bytes:
    """The record as one line of JSON, the same bytes for the same record."""
    value = {k: v for k, v in asdict(record).items() if v is not None and v != "" and v != ()}
    return json.dumps(value, sort_keys=True).encode("ascii") + b"\n"  # escapes hold lone surrogates, UTF-8 does not


def from_json(value: dict[str, Any]) -> Record:
    """The record in a parsed line. KeyError or TypeError where it is not one of ours."""
    own = dict(value)
    own["files"] = tuple(FileChange(**{"base": None, "head": None, **f}) for f in own.get("files", ()))
    own["remarks"] = tuple(Remark(**r) for r in own.get("remarks", ()))
    own["issues"] = tuple(Issue(**i) for i in own.get("issues", ()))
    for name in ("labels", "left_out", "tree"):
        own[name] = tuple(own.get(name, ()))
    return Record(**own)


def record_digest(line: bytes) -> str:
    """By which a document names the record it was made from."""
    return xxhash.xxh3_128_hexdigest(line.rstrip(b"\n"))


def moment(text: str | None) -> datetime | None:
    """A time of a forge or of git; None where there is none or it cannot be read."""
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def later(times: Iterable[str | None]) -> str | None:
    """The latest of some times, as it was written."""
    known = [(at, text) for text in times if text and (at := moment(text)) is not None]
    return max(known)[1] if known else None


def some_paths(paths: Iterable[str], touched: Iterable[str], most: int) -> tuple[str, ...]:
    """At most `most` of a tree's paths, sorted: the touched ones, their neighbours, then others in an order that only
    their names decide."""
    wanted = set(touched)
    folders = {p.rpartition("/")[0] for p in wanted}
    ranked = sorted(
        paths,
        key=lambda p: (
            p not in wanted,
            p.rpartition("/")[0] not in folders,
            xxhash.xxh3_64_intdigest(p.encode("utf-8", "surrogatepass")),
            p,
        ),
    )
    return tuple(sorted(ranked[:most]))
