"""Pull requests of a forge as records: what was said by one GraphQL question, contents by SHA over REST.

For each pull request: one question (title, body, comments, reviews, closed issues), one comparison (its files and merge base),
one tree, and two blobs a file. What cannot change is asked for once ever (`crawl.harvest.github`). An answer that is JSON of
another shape costs its pull request, or its repository, as `unreadable`.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from core.errors import InputError
from crawl.harvest.config import Api, Known, Rules
from crawl.harvest.dumps import closed_issues
from crawl.harvest.github import GitHub, GoneError
from crawl.harvest.judge import Side, judge_names, judge_repository, with_files
from crawl.harvest.licences import named
from crawl.harvest.record import Issue, Record, Remark, later, some_paths
from crawl.harvest.releases import NONE, REGULAR
from crawl.harvest.swebench import excluded_repository

PAGE = 100
COMPARED_FILES = 300  # GitHub lists no more files of a comparison
# What reading JSON of another shape raises, besides InputError: a key, a type, a number, an object that is none.
UNREADABLE = (InputError, KeyError, TypeError, ValueError, AttributeError)

QUESTION = """
query($owner: String!, $name: String!, $number: Int!) {
  repository(owner: $owner, name: $name) {
    pullRequest(number: $number) {
      title body url merged mergedAt createdAt baseRefOid headRefOid
      author { login }
      labels(first: 50) { nodes { name } }
      comments(first: 100) { nodes { author { login } body createdAt lastEditedAt } }
      reviews(first: 100) { nodes { author { login } body createdAt lastEditedAt
        comments(first: 50) { nodes { author { login } body createdAt lastEditedAt } } } }
      closingIssuesReferences(first: 10) { nodes { number title body createdAt author { login } repository { nameWithOwner } } }
    }
  }
}
"""


def closed_pulls(github: GitHub, repo: str, api: Api) -> list[int]:
    """Numbers of a repository's merged pull requests, sorted; the most recently made ones where there are too many."""
    found = github.pages(
        f"repos/{repo}/pulls", api.max_pulls, state="closed", per_page=PAGE, sort="created", direction="desc"
    )
    return sorted(int(p["number"]) for p in found if p.get("merged_at"))


def forge_records(
    github: GitHub,
    repo: str,
    numbers: Sequence[int] | None,
    api: Api,
    rules: Rules,
    tree_paths: int,
    benchmark: frozenset[str],
) -> Iterator[Record]:
    """Records of the given pull requests (None: all that are closed), by number."""
    whole = Record("repository", repo, "repository")
    if benchmarked := excluded_repository(repo, (), rules.exclude):
        yield whole.dropped("benchmark_repository", benchmarked)
        return
    try:
        known, license = _facts(github.get(f"repos/{repo}"))
        if fell := judge_repository(known, license, rules):
            yield whole.dropped(*fell)
            return
        wanted = list(numbers) if numbers is not None else closed_pulls(github, repo, api)
    except GoneError as e:
        yield whole.dropped("gone", str(e))
        return
    except UNREADABLE as e:  # of one repository: the others are asked for all the same
        yield whole.dropped("unreadable", _said(e))
        return
    about = replace(whole, kind="pull_request", license=license, stars=known.stars)
    for number in wanted:
        record = replace(about, key=f"pull/{number}", number=number)
        try:
            yield _pull(github, record, rules, tree_paths, benchmark)
        except GoneError as e:
            yield record.dropped("gone", str(e))
        except UNREADABLE as e:
            yield record.dropped("unreadable", _said(e))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"answer of another shape: {error!r}"


def _facts(value: dict[str, Any]) -> tuple[Known, str | None]:
    """What a repository's own page says of it."""
    license = named(str((value.get("license") or {}).get("spdx_id") or ""))
    copied = bool(value.get("fork") or value.get("mirror_url") or value.get("is_template"))
    return Known(stars=value.get("stargazers_count"), fork=copied, archived=bool(value.get("archived"))), license


def _pull(github: GitHub, record: Record, rules: Rules, tree_paths: int, benchmark: frozenset[str]) -> Record:
    owner, _, name = record.repo.partition("/")
    data = github.query(QUESTION, owner=owner, name=name, number=record.number)
    pull = (data.get("repository") or {}).get("pullRequest")
    if not pull:
        return record.dropped("gone", "no such pull request")
    record = _described(record, pull)
    if fell := judge_names(record.author, record.base_commit, benchmark):
        return record.dropped(*fell)
    if not record.merged:
        return record.dropped("not_merged")
    compared = github.get(f"repos/{record.repo}/compare/{record.base_commit}...{record.head_commit}", fixed=True)
    files = compared.get("files") or []
    if len(files) >= COMPARED_FILES:
        return record.dropped("too_many_files", f"{len(files)} and more, expected at most {rules.max_files}")
    base = compared["merge_base_commit"]["sha"]
    if fell := judge_names(None, base, benchmark):
        return record.dropped(*fell)
    made = with_files(replace(record, base_commit=base), _sides(github, record, base, files), rules)
    if made.drop:
        return made
    listed = github.get(f"repos/{record.repo}/git/trees/{base}", fixed=True, recursive=1)
    tree = sorted(str(e["path"]) for e in listed.get("tree", ()) if e.get("type") == "blob")
    return replace(made, tree=some_paths(tree, (f.path for f in made.files), tree_paths), tree_size=len(tree))


def _described(record: Record, pull: dict[str, Any]) -> Record:
    """The record with what was said."""
    made = replace(
        record,
        url=_text(pull, "url"),
        title=_text(pull, "title") or "",
        body=_text(pull, "body") or "",
        author=_login(pull),
        created_at=_text(pull, "createdAt"),
        merged_at=_text(pull, "mergedAt"),
        merged=bool(pull.get("merged")),
        labels=tuple(sorted(str(n["name"]) for n in _nodes(pull, "labels"))),
        base_commit=_text(pull, "baseRefOid"),
        head_commit=_text(pull, "headRefOid"),
        remarks=tuple(sorted(_remarks(pull), key=lambda r: r.at or "")),
    )
    linked = [
        Issue(int(n["number"]), _text(n, "title") or "", _text(n, "body") or "", _login(n), _text(n, "createdAt"))
        for n in _nodes(pull, "closingIssuesReferences")
        if str((n.get("repository") or {}).get("nameWithOwner", record.repo)).lower() == record.repo.lower()
    ]
    named_first = {n: i for i, n in enumerate(closed_issues(made, record.repo))}
    linked.sort(key=lambda issue: (named_first.get(issue.number, len(named_first)), issue.number))
    return replace(made, issues=tuple(linked))


def _remarks(pull: dict[str, Any]) -> Iterator[Remark]:
    for node in _nodes(pull, "comments"):
        yield _remark(node, "comment")
    for node in _nodes(pull, "reviews"):
        if (_text(node, "body") or "").strip():
            yield _remark(node, "review")
        yield from (_remark(n, "review") for n in _nodes(node, "comments") if (_text(n, "body") or "").strip())


def _remark(node: dict[str, Any], where: str) -> Remark:
    return Remark(
        _login(node), later([_text(node, "createdAt"), _text(node, "lastEditedAt")]), _text(node, "body") or "", where
    )


def _nodes(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [n for n in (value.get(name) or {}).get("nodes") or () if n]


def _login(value: dict[str, Any]) -> str | None:
    return _text(value.get("author") or {}, "login")


def _text(value: dict[str, Any], name: str) -> str | None:
    """A text or null. InputError for anything else: it would be found out only where records are written."""
    found = value.get(name)
    if not isinstance(found, str | None):
        raise InputError(f"{name} is {type(found).__name__}, expected a text")
    return found


def _sides(github: GitHub, record: Record, base: str, files: Sequence[dict[str, Any]]) -> list[Side]:
    return [_side(github, record, base, f) for f in sorted(files, key=lambda f: str(f["filename"]))]


def _side(github: GitHub, record: Record, base: str, file: dict[str, Any]) -> Side:
    """One file of a comparison. REST names the head's blob only; the base's content is found by commit and path."""
    path, status = str(file["filename"]), str(file["status"])
    modes = (NONE if status == "added" else REGULAR, NONE if status == "removed" else REGULAR)

    def read() -> tuple[bytes | None, bytes | None]:
        old = (
            None
            if status == "added"
            else _content(github.get(f"repos/{record.repo}/contents/{quote(path)}", fixed=True, ref=base))
        )
        new = (
            None
            if status == "removed"
            else _content(github.get(f"repos/{record.repo}/git/blobs/{file['sha']}", fixed=True))
        )
        return old, new

    return Side(path, str(file.get("previous_filename") or path), modes, (None, None), read)


def _content(value: dict[str, Any]) -> bytes:
    """The bytes of a blob or of a file; larger ones than 1 MB come without them."""
    if value.get("encoding") != "base64" or value.get("type") not in (None, "file", "blob"):
        raise InputError(
            f"content comes as {value.get('type')} in {value.get('encoding')!r}, expected a file in base64"
        )
    try:
        return base64.b64decode(value["content"])
    except (binascii.Error, KeyError, TypeError) as e:
        raise InputError(f"content is no base64: {e}") from e
