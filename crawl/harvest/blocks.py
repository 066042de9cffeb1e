"""SEARCH/REPLACE blocks: derived from two versions of a file, written, parsed and applied, byte-exact.

    ### path/of/file.py
    <<<<<<< SEARCH
    lines of the base, unique in it
    =======
    lines that take their place
    >>>>>>> REPLACE

A line here is a *piece* of `crawl.harvest.changes`: what lies between two LFs, so a file without a final line end, one with
CRLF and an empty one are all written without a special case. A SEARCH of no lines makes a file that was not there; a REPLACE of
no lines for all that a file has removes it. A line that a parser could take for a marker cannot be written:
`MarkerCollisionError`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.errors import InputError
from crawl.harvest.changes import Edit, edits, pieces

HEADING = "### "
SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
CONTEXT_LINES = 3  # around a change before uniqueness asks for more; as in a unified diff


class MarkerCollisionError(InputError):
    """A line of the file reads like a marker of the format."""


class Block(NamedTuple):
    """One replacement. `search` and `replace` are pieces, unique as a run within the file."""

    path: str
    search: tuple[str, ...]
    replace: tuple[str, ...]


def derive(path: str, base: str | None, head: str | None, most: int) -> list[Block]:
    """The blocks that turn `base` into `head`, top to bottom; context grows until each SEARCH is found once, both in the
    base and where the earlier blocks have been applied. InputError beyond `most` changed lines or at a marker."""
    if base == head:
        return []
    old, new = pieces(base), pieces(head)
    if base is None or head is None:
        blocks = [Block(path, tuple(old), tuple(new))]
    else:
        found = edits(old, new, most)
        if found is None:
            raise InputError(f"dialogues: {path} has more than {most} changed lines; raise max_lines")
        blocks = _unique(path, old, new, found)
    for block in blocks:
        if any(map(_collides, (*block.search, *block.replace))):
            raise MarkerCollisionError(f"dialogues: {path} holds a line that reads like a marker")
    return blocks


def _unique(path: str, old: list[str], new: list[str], found: Sequence[Edit]) -> list[Block]:
    """Blocks from ranges of the base around each edit, widened until each is found once."""
    ranges = _settled([_wider(e.start, e.end, CONTEXT_LINES, old) for e in found], found)
    while True:
        spans = [_in_head(r, found) for r in ranges]
        i = _first_ambiguous(old, new, spans)
        if i is None:
            return [Block(path, tuple(old[a:b]), tuple(new[c:d])) for a, b, c, d in spans]
        start, end = ranges[i]
        ranges[i] = _wider(start, end, max(1, end - start), old)  # three times as long: few rounds even in a long file
        ranges = _settled(ranges, found)


def _wider(start: int, end: int, lines: int, old: Sequence[str]) -> tuple[int, int]:
    return max(0, start - lines), min(len(old), end + lines)


def _settled(ranges: Sequence[tuple[int, int]], found: Sequence[Edit]) -> list[tuple[int, int]]:
    """Ranges of the base that hold every edit they touch as a whole; those that meet become one."""
    out: list[tuple[int, int]] = []
    for start, end in sorted([*ranges, *((e.start, e.end) for e in found)]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _in_head(span: tuple[int, int], found: Sequence[Edit]) -> tuple[int, int, int, int]:
    """A settled range of the base with the range of the head that takes its place."""
    start, end = span
    before = sum((e.to_end - e.to) - (e.end - e.start) for e in found if e.end < start)
    inside = sum((e.to_end - e.to) - (e.end - e.start) for e in found if start <= e.end and e.start <= end)
    return start, end, start + before, end + before + inside


def _first_ambiguous(old: list[str], new: list[str], spans: Sequence[tuple[int, int, int, int]]) -> int | None:
    """Index of the first block whose SEARCH is not found exactly once; None where all are."""
    whole = _run(old)
    for i, (start, end, to, _) in enumerate(spans):
        search = _run(old[start:end])
        if _count(whole, search) != 1 or _count(_run([*new[:to], *old[start:]]), search) != 1:
            return i
    return None


def _run(lines: Sequence[str]) -> str:
    return "\n" + "\n".join(lines) + "\n"


def _count(text: str, run: str) -> int:
    """Places where a run of whole lines occurs, overlapping ones included; 2 stands for more."""
    first = text.find(run)
    return 0 if first < 0 else 1 if text.find(run, first + 1) < 0 else 2


def _collides(line: str) -> bool:
    return line.startswith(("<<<<<<<", ">>>>>>>", "|||||||")) or line.rstrip() == DIVIDER


def render(blocks: Sequence[Block]) -> str:
    """The blocks as text, one heading for each run of blocks of the same file. Ends with LF."""
    out: list[str] = []
    before = None
    for block in blocks:
        if block.path != before:
            out.append(f"{HEADING}{block.path}")
        out += [SEARCH, *block.search, DIVIDER, *block.replace, REPLACE]
        before = block.path
    return "\n".join([*out, ""])


def parse(text: str) -> list[Block]:
    """The blocks of a text. Lines outside of blocks are comments, but for headings. InputError where a block is torn."""
    blocks: list[Block] = []
    path: str | None = None
    search: list[str] | None = None
    replace: list[str] | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if replace is not None:
            if line == REPLACE:
                blocks.append(Block(path or "", tuple(search or ()), tuple(replace)))
                search = replace = None
            else:
                replace.append(line)
        elif search is not None:
            if line == DIVIDER:
                replace = []
            else:
                search.append(line)
        elif line == SEARCH:
            if path is None:
                raise InputError(f"blocks: line {number} begins a block before any `{HEADING}path`")
            search = []
        elif line.startswith(HEADING):
            path = line.removeprefix(HEADING)
    if search is not None:
        raise InputError(f"blocks: the last block of {path} has no end")
    return blocks


def apply(blocks: Sequence[Block], files: Mapping[str, str | None]) -> dict[str, str | None]:
    """`files` (path -> text, None where there is no file) after all blocks, one after the other. InputError where a SEARCH
    is not found exactly once."""
    after = {path: pieces(text) for path, text in files.items()}
    for block in blocks:
        lines = after.setdefault(block.path, [])
        after[block.path] = _replaced(block, lines)
    return {path: "\n".join(lines) if lines else None for path, lines in after.items()}


def _replaced(block: Block, lines: list[str]) -> list[str]:
    if not block.search:
        if lines:
            raise InputError(f"blocks: an empty SEARCH makes a file, and {block.path} is there")
        return list(block.replace)
    start = locate(block, lines)
    return [*lines[:start], *block.replace, *lines[start + len(block.search) :]]


def locate(block: Block, lines: list[str]) -> int:
    """Index of the first line of a block's SEARCH in a file's lines. InputError where it is not found exactly once."""
    text, run = _run(lines), _run(block.search)
    found = _count(text, run) if lines and block.search else 0
    if found != 1:
        raise InputError(f"blocks: SEARCH in {block.path} is found {'not at all' if not found else 'more than once'}")
    return text.count("\n", 0, text.find(run))
