"""Which changes are kept: the rules that every kind of input shares, as a function from what is known to a reason.

Reasons: `benchmark_repository`, `benchmark_commit`, `license_unknown`, `license_not_permissive`, `stars`, `fork`, `archived`,
`bot`, `too_many_files`, `too_many_lines`, `file_too_large`, `not_utf8`, `symlink`, `submodule`, `renamed_file`, `lock_file`,
`vendored_file`, `generated_file`, `binary_file`, `missing_object`, `no_change`, `no_known_language`. Cheap ones are judged
before contents are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from crawl.harvest.changes import changed_lines, edits, pieces
from crawl.harvest.config import Known, Rules
from crawl.harvest.git import BLOB, SUBMODULE, SYMLINK
from crawl.harvest.languages import is_test, language_of, unwanted
from crawl.harvest.licences import permissive
from crawl.harvest.record import FileChange, Record
from crawl.harvest.text import is_bot

Fell = tuple[str, str | None]  # reason, detail


class Side(NamedTuple):
    """One file of a change before its content is read. `read` fetches a side's bytes; None where there is no file."""

    path: str
    old_path: str
    modes: tuple[str, str]  # as git writes them; zeros where there is no file
    sizes: tuple[int | None, int | None]  # bytes; None where there is no file
    read: Callable[[], tuple[bytes | None, bytes | None]]


def judge_repository(known: Known, license: str | None, rules: Rules) -> Fell | None:
    """Why nothing of a repository is taken."""
    if known.fork:
        return "fork", None
    if known.archived:
        return "archived", None
    if known.stars is None and rules.unknown_stars == "drop":
        return "stars", "unknown"
    if known.stars is not None and known.stars < rules.min_stars:
        return "stars", f"{known.stars}, expected at least {rules.min_stars}"
    if license is None:
        return ("license_unknown", None) if rules.unknown_license == "drop" else None
    allowed = license in rules.licenses if rules.licenses is not None else permissive(license)
    return None if allowed else ("license_not_permissive", license)


def judge_names(author: str | None, base_commit: str | None, benchmark: frozenset[str]) -> Fell | None:
    """Why a change falls by who made it and where it begins."""
    if author and is_bot(author):
        return "bot", author
    if base_commit and base_commit.lower() in benchmark:
        return "benchmark_commit", base_commit
    return None


def with_files(record: Record, sides: Sequence[Side], rules: Rules) -> Record:
    """The record with its files, or dropped."""
    kept: list[Side] = []
    left_out: list[str] = []
    for side in sides:
        reason = _unreadable(side, rules) or unwanted(side.path)
        if reason is None:
            kept.append(side)
        elif rules.unwanted_files == "leave_out" and reason in _LEAVABLE:
            left_out.append(side.path)
        else:
            return record.dropped(reason, side.path)
    if len(kept) > rules.max_files:
        return record.dropped("too_many_files", f"{len(kept)}, expected at most {rules.max_files}")
    files: list[FileChange] = []
    lines = 0
    for side in kept:
        made = _file(side, rules.max_lines - lines)
        if isinstance(made, FileChange):
            files.append(made)
            lines += made.removed + made.added
        elif made[0] in _LEAVABLE and rules.unwanted_files == "leave_out":
            left_out.append(side.path)
        elif made[0] != "no_change":  # a change of mode alone changes no content
            return record.dropped(*made)
    return _judge_whole(replace(record, files=tuple(files), left_out=tuple(sorted(left_out))), rules)


_LEAVABLE = frozenset({"lock_file", "vendored_file", "generated_file", "binary_file"})


def _unreadable(side: Side, rules: Rules) -> str | None:
    modes = {m for m in side.modes if set(m) != {"0"}}
    if SUBMODULE in modes:
        return "submodule"
    if SYMLINK in modes:
        return "symlink"
    if side.path != side.old_path:
        return "renamed_file"
    if not modes <= set(BLOB):
        return "missing_object"
    try:
        side.path.encode("utf-8")
    except UnicodeEncodeError:
        return "not_utf8"
    if "\n" in side.path or "\r" in side.path:
        return "odd_path"
    return "file_too_large" if max(s or 0 for s in side.sizes) > rules.file_bytes else None


def _file(side: Side, lines_left: int) -> FileChange | Fell:
    base, head = side.read()
    if base == head:
        return "no_change", side.path
    if reason := next((r for r in (unwanted(side.path, x) for x in (base, head) if x is not None) if r), None):
        return reason, side.path
    try:
        old, new = (None if x is None else x.decode("utf-8") for x in (base, head))
    except UnicodeDecodeError:
        return "not_utf8", side.path
    found = edits(pieces(old), pieces(new), lines_left)
    if found is None:
        return "too_many_lines", f"at {side.path}"
    removed, added = changed_lines(found)
    return FileChange(side.path, old, new, removed, added, language_of(side.path), is_test(side.path))


def _judge_whole(record: Record, rules: Rules) -> Record:
    if not record.files:
        return record.dropped("no_change", "no file is left")
    languages = {f.language for f in record.files if f.language is not None}
    if not languages.intersection(rules.languages if rules.languages is not None else languages):
        return record.dropped("no_known_language", ", ".join(f.path for f in record.files[:3]))
    return record
