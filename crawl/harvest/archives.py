"""GH Archive's hourly files as an index: which pull requests were merged, where and when. Never their content.

In: `.json.gz` files of one event a line, of any year. Since October 2025 a PullRequestEvent has no title, body, commits or
`merged` field (gharchive.org issue 312), and the years before 2015 spell other fields; repository, number and time are in all
of them, so only these are read. Out: `Seen`, one a pull request and file. A closed event that says `merged: false` is left out,
one that does not say stays: the hydration decides.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from core.hashing import digest
from crawl.sources.members import MemberStream, TornMemberError

LINE_BYTES = 16 << 20
# A name becomes part of a URL's path: nothing in it may begin a query, another folder or another host.
REPOSITORY = re.compile(r"(?!\.\.?/)[A-Za-z0-9_.-]{1,100}/(?!\.\.?\Z)[A-Za-z0-9_.-]{1,100}")
CLOSED = ("closed", "merged")  # the cut format writes `merged` as an action of its own


class Seen(NamedTuple):
    """A pull request that an archive names."""

    repo: str
    number: int
    at: str  # of the event


class Index(NamedTuple):
    """What a file holds, and how much of it could not be read."""

    seen: list[Seen]
    lines: int
    bad_lines: int
    torn: int


def read_index(file: BinaryIO) -> Index:
    """The index of one file. Damaged lines and members are counted, never fatal."""
    stream = MemberStream(file)
    found: dict[tuple[str, int], str] = {}
    lines = bad = torn = 0
    while True:
        try:
            line = stream.readline(LINE_BYTES)
        except TornMemberError:
            torn += 1
            if not stream.resume():
                break
            continue
        if not line:
            break
        if not line.strip():
            continue
        lines += 1
        try:
            seen = _pull(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad += 1
            continue
        if seen is not None:
            at = found.get(seen[:2], "")
            found[seen[:2]] = max(at, seen.at)
    return Index([Seen(*k, at) for k, at in sorted(found.items())], lines, bad, torn)


def united(indexes: Iterable[Iterable[Seen]]) -> Iterator[tuple[str, list[int]]]:
    """(repository, numbers), both sorted, over any number of files in any order."""
    by_repo: dict[str, set[int]] = {}
    for index in indexes:
        for seen in index:
            by_repo.setdefault(seen.repo, set()).add(seen.number)
    yield from ((repo, sorted(numbers)) for repo, numbers in sorted(by_repo.items()))


def index_digest(index: Iterable[Seen]) -> str:
    return digest([list(seen) for seen in index])


def _pull(event: dict[str, Any]) -> Seen | None:
    """The pull request that an event closes, or None for every other event."""
    if event["type"] != "PullRequestEvent":
        return None
    payload = event["payload"]
    pull = payload.get("pull_request") or {}
    if payload.get("action") not in CLOSED or pull.get("merged") is False:
        return None
    number = payload.get("number") or pull["number"]
    return Seen(_repo_name(event), int(number), str(event["created_at"]))


def _repo_name(event: dict[str, Any]) -> str:
    """`repo.name` since 2015, `repository.owner` and `.name` before. ValueError where it is not owner/name."""
    old = event.get("repository")
    name = str(event["repo"]["name"]) if "repo" in event else f"{old['owner']}/{old['name']}" if old else ""
    if not REPOSITORY.fullmatch(name):
        raise ValueError(f"got {name[:100]!r}, expected owner/name")
    return name
