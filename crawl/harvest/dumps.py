"""`archive.json` dumps: one repository's issues and pull requests with all that was said, as one JSON object.

In: a file, plain or gz, and the clone of the same repository where one is configured: a dump has no contents, so without a
clone its records are discussions. Out: records of pull requests and issues, by number. What is said is cleaned and masked when
a document is made of it (`crawl.harvest.documents`).
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import InputError
from crawl.harvest.config import Dump, Rules
from crawl.harvest.git import Git
from crawl.harvest.history import with_contents
from crawl.harvest.judge import judge_names, judge_repository
from crawl.harvest.record import Issue, Record, Remark, later
from crawl.harvest.swebench import excluded_repository
from crawl.harvest.text import is_bot, without_comments

DUMP_BYTES = 2 << 30  # unpacked; chosen: the largest seen is 3 MB
# GitHub's closing keywords; an issue of another repository is none of ours.
_CLOSES = re.compile(
    r"(?i)\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+(?:https://github\.com/([\w.-]+/[\w.-]+)/issues/|#)(\d+)\b"
)
# StarCoder keeps a discussion of one person if it is no longer than this (arXiv 2305.06161, section 3.3).
ALONE_CHARS, ALONE_EVENTS = 7_000, 10


def dump_records(
    dump: Dump, git: Git | None, rules: Rules, tree_paths: int, benchmark: frozenset[str]
) -> Iterator[Record]:
    """The records of a dump. InputError where it cannot be read."""
    data = read_dump(dump.path)
    repo = str(data.get("repo") or dump.name)
    whole = Record("repository", repo, "repository")
    if benchmarked := excluded_repository(repo, git.first_commits() if git else (), rules.exclude):
        yield whole.dropped("benchmark_repository", benchmarked)
        return
    if fell := judge_repository(dump, dump.license, rules):
        yield whole.dropped(*fell)
        return
    issues = {int(i["number"]): i for i in data.get("issues", []) if isinstance(i, dict) and "number" in i}
    for value in sorted(issues.values(), key=lambda i: int(i["number"])):
        yield judged_discussion(_record("issue", repo, value, dump), rules)
    pulls = [p for p in data.get("pulls", []) if isinstance(p, dict) and "number" in p]
    for value in sorted(pulls, key=lambda p: int(p["number"])):
        record = _record("pull_request", repo, value, dump)
        record = replace(record, issues=tuple(_issue(issues[n]) for n in closed_issues(record, repo) if n in issues))
        fell = judge_names(record.author, record.base_commit, benchmark)
        if fell:
            yield record.dropped(*fell)
        elif not record.merged:
            yield record.dropped("not_merged", str(value.get("state")))
        elif git is None:
            yield judged_discussion(record, rules)
        else:
            yield _hydrated(record, git, rules, tree_paths)


def read_dump(path: str) -> dict[str, Any]:
    """The object in a dump, gunzipped where it is packed."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            unpack = zlib.decompressobj(wbits=31)
            data = unpack.decompress(data, DUMP_BYTES)
            if not unpack.eof:
                raise InputError(f"harvest: {Path(path).name} is cut off, or larger than {DUMP_BYTES:,} bytes")
        value = json.loads(data)
    except (OSError, ValueError, zlib.error, gzip.BadGzipFile, RecursionError) as e:
        raise InputError(f"harvest: {Path(path).name} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"harvest: {Path(path).name} holds {type(value).__name__}, expected an object")
    return value


def _hydrated(record: Record, git: Git, rules: Rules, tree_paths: int) -> Record:
    """A pull request with the contents that the clone has of its two commits."""
    try:
        base = git.merge_base(record.base_commit or "", record.head_commit or "")
    except InputError:
        return record.dropped("missing_object", f"{record.base_commit} or {record.head_commit} is not in the clone")
    if base is None:
        return record.dropped("missing_object", "base and head have no common history")
    return with_contents(replace(record, base_commit=base), git, rules, tree_paths)


def judged_discussion(record: Record, rules: Rules) -> Record:
    """What has no diff must say something by itself: StarCoder's rules for issues."""
    said = [r for r in record.remarks if not is_bot(r.author or "")]
    if is_bot(record.author or ""):
        return record.dropped("bot", record.author)
    size = len(record.body) + sum(len(r.text) for r in said)
    if size < rules.min_text:
        return record.dropped("too_short", f"{size} characters, expected at least {rules.min_text}")
    people = {record.author, *(r.author for r in said)}
    if len(people) < 2 and (size > ALONE_CHARS or len(said) + 1 > ALONE_EVENTS):
        return record.dropped("monologue", f"{size} characters of one person")
    return replace(record, remarks=tuple(said))


def closed_issues(record: Record, repo: str) -> list[int]:
    """Numbers of the issues that a pull request says it closes, in its own repository, in the order named."""
    found = _CLOSES.findall(without_comments(f"{record.title}\n{record.body}"))
    return list(dict.fromkeys(int(n) for other, n in found if not other or other.lower() == repo.lower()))


def _record(kind: str, repo: str, value: dict[str, Any], dump: Dump) -> Record:
    number = int(value["number"])
    return Record(
        kind=kind,
        repo=repo,
        key=f"{'pull' if kind == 'pull_request' else 'issues'}/{number}",
        number=number,
        url=_string(value.get("url")) or None,
        title=_string(value.get("title")),
        body=_string(value.get("body")),
        author=_string(value.get("author")) or None,
        created_at=value.get("createdAt"),
        merged_at=value.get("mergedAt"),
        merged=(value.get("state") == "MERGED") if kind == "pull_request" else None,
        labels=tuple(sorted(str(label) for label in value.get("labels") or ())),
        license=dump.license,
        stars=dump.stars,
        base_commit=value.get("baseRefOid"),
        head_commit=value.get("headRefOid"),
        remarks=tuple(sorted(_remarks(value), key=lambda r: r.at or "")),
    )


def _remarks(value: dict[str, Any]) -> Iterator[Remark]:
    """Comments, reviews and the comments of reviews that hold words."""
    for comment in value.get("comments") or ():
        yield _remark(comment, comment.get("author"), "comment")
    for review in value.get("reviews") or ():
        if _string(review.get("body")).strip():
            yield _remark(review, review.get("author"), "review")
        for comment in review.get("comments") or ():
            if _string(comment.get("body")).strip():
                yield _remark(comment, review.get("author"), "review")


def _remark(value: dict[str, Any], author: Any, where: str) -> Remark:
    at = later([value.get("createdAt"), value.get("updatedAt")])
    return Remark(_string(author) or None, at, _string(value.get("body")), where)


def _issue(value: dict[str, Any]) -> Issue:
    at = value.get("createdAt")
    author = _string(value.get("author")) or None
    return Issue(int(value["number"]), _string(value.get("title")), _string(value.get("body")), author, at)


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""
