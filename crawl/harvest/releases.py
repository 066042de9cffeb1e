"""Two versions of a package as one change, with the changelog's entry as its problem: labelled `release_pair`.

In: two trees (`crawl.harvest.trees`). Out: one record. The changelog itself and what packing wrote (PKG-INFO, egg-info) are
left out of the change: the first is the problem, the second nobody wrote. A release is many changes at once, so most pairs are
too large for the rules; patch releases fit.
"""

import re
from pathlib import PurePosixPath

from crawl.harvest.config import ReleasePair, Rules
from crawl.harvest.judge import Side, judge_repository, with_files
from crawl.harvest.licences import LICENCE_FILE, named, recognise
from crawl.harvest.record import Record, some_paths
from crawl.harvest.swebench import excluded_package
from crawl.harvest.trees import read_tree

_CHANGELOG = re.compile(r"(?i)^(?:changes|changelog|history|news|release[-_]?notes|whatsnew)(?:\.(?:rst|md|txt))?$")
_PLACES = ("", "docs/", "doc/", "docs/source/")
_VERSION = re.compile(r"(?<![\w.])v?\d+\.\d+(?:\.\d+)*(?:[a-z]+\d+)?(?![\w.]*\d)")
_UNDERLINE = re.compile(r"^([=\-~^\"'*+#])\1{2,}\s*$")
HEADING_CHARS = 80  # a longer line that names a version is prose
_FIELDS = (
    r"^License-Expression: (.+)$",
    r"^License: (?!UNKNOWN)(.{1,60})$",
    r"^Classifier: License :: (?:.+ :: )?(.+)$",
)
REGULAR, NONE = "100644", "000000"


def release_record(pair: ReleasePair, rules: Rules, tree_paths: int) -> Record:
    """The pair's record, or why there is none. InputError where a tree cannot be read."""
    record = Record(
        "release_pair", pair.name, f"release/{pair.version}", title=f"{pair.name} {pair.version}", merged=True
    )
    if benchmarked := excluded_package(pair.name, rules.exclude):
        return record.dropped("benchmark_repository", benchmarked)
    base, head = read_tree(pair.base), read_tree(pair.head)
    license = pair.license or license_of(head)
    if fell := judge_repository(pair, license, rules):
        return record.dropped(*fell)
    changelogs = [p for p in head if _is_changelog(p)]
    entry = next((e for p in changelogs if (e := entry_of(head[p].decode("utf-8", "replace"), pair.version))), None)
    if entry is None:
        return record.dropped("no_changelog_entry", f"version {pair.version} in {changelogs}")
    paths = sorted(p for p in {*base, *head} if base.get(p) != head.get(p) and not _is_changelog(p))
    described = Record(
        kind=record.kind,
        repo=record.repo,
        key=record.key,
        title=record.title,
        body=entry,
        merged=True,
        license=license,
        stars=pair.stars,
        tree=some_paths(base, paths, tree_paths),
        tree_size=len(base),
    )
    return with_files(described, [_side(p, base.get(p), head.get(p)) for p in paths], rules)


def _side(path: str, base: bytes | None, head: bytes | None) -> Side:
    modes = (NONE if base is None else REGULAR, NONE if head is None else REGULAR)
    sizes = (None if base is None else len(base), None if head is None else len(head))
    return Side(path, path, modes, sizes, lambda: (base, head))


def _is_changelog(path: str) -> bool:
    name = PurePosixPath(path).name
    return path.removesuffix(name) in _PLACES and _CHANGELOG.match(name) is not None


def entry_of(changelog: str, version: str) -> str | None:
    """What a changelog says below the heading of one version, up to the next version's; None where there is nothing."""
    lines = changelog.replace("\r\n", "\n").split("\n")
    wanted = re.compile(rf"(?<![\w.])v?{re.escape(version)}(?![\w.]*\d)")
    begin = next((i for i in range(len(lines)) if wanted.search(lines[i]) and _is_heading(lines, i)), None)
    if begin is None:
        return None
    first = begin + 2 if begin + 1 < len(lines) and _UNDERLINE.match(lines[begin + 1]) else begin + 1
    end = next((i for i in range(first, len(lines)) if _VERSION.search(lines[i]) and _is_heading(lines, i)), len(lines))
    body = lines[first:end]
    while body and (not body[-1].strip() or _UNDERLINE.match(body[-1]) or body[-1].startswith(".. _")):
        body.pop()  # an overline or a label belongs to the next heading
    return "\n".join(body).strip() or None


def _is_heading(lines: list[str], i: int) -> bool:
    line = lines[i]
    if len(line) > HEADING_CHARS or line[:1].isspace():
        return False
    underlined = i + 1 < len(lines) and bool(_UNDERLINE.match(lines[i + 1]))
    return (
        underlined
        or line.startswith("#")
        or bool(re.match(r"^\[?(?:version\s+|v)?\d+\.\d+[^ ]*\]?(?:\s*[-(:].*)?$", line, re.I))
    )


def license_of(tree: dict[str, bytes]) -> str | None:
    """The licence that package metadata names, else the one whose text lies at the top."""
    for path in sorted(p for p in tree if p == "PKG-INFO" or p.endswith(".dist-info/METADATA")):
        head = tree[path].decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n", 1)[0]
        for pattern in _FIELDS:
            if (match := re.search(pattern, head, re.MULTILINE)) and (spdx := named(match[1])):
                return spdx
    texts = (tree[p].decode("utf-8", "replace") for p in sorted(tree) if LICENCE_FILE.match(PurePosixPath(p).name))
    return next((spdx for text in texts if (spdx := recognise(text))), None)
