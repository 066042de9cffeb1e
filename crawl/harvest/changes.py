"""What changed between two texts, line by line, exactly.

A text is its *pieces*: `text.split("\\n")`. Joined again by "\\n" they are the text, whatever its line ends are and whether or
not it ends with one; a missing file has no pieces, an empty one has one. The differences are found by Myers' greedy algorithm
(1986), whose cost grows with the number of changed lines and not with the size of the file, and which can stop at a limit.
"""

from typing import NamedTuple

CONTEXT_LINES = 3  # of a unified diff, as git shows it


class Edit(NamedTuple):
    """Pieces `base[start:end]` become `head[to:to_end]`."""

    start: int
    end: int
    to: int
    to_end: int


def pieces(text: str | None) -> list[str]:
    """A file's pieces; none where there is no file."""
    return [] if text is None else text.split("\n")


def edits(base: list[str], head: list[str], most: int) -> list[Edit] | None:
    """The fewest removed and added lines that lead from `base` to `head`, in order; None where they are more than
    `most`."""
    first = 0
    while first < min(len(base), len(head)) and base[first] == head[first]:
        first += 1
    last = 0
    while last < min(len(base), len(head)) - first and base[-1 - last] == head[-1 - last]:
        last += 1
    path = _path(base[first : len(base) - last], head[first : len(head) - last], most)
    if path is None:
        return None
    found: list[Edit] = []
    x = y = first
    for to_x, to_y in [*((a + first, b + first) for a, b in path), (len(base) - last, len(head) - last)]:
        if (x, y) != (to_x, to_y):
            found.append(Edit(x, to_x, y, to_y))
        x, y = to_x + 1, to_y + 1  # behind the pair of equal lines
    return found


def _path(a: list[str], b: list[str], most: int) -> list[tuple[int, int]] | None:
    """Indexes of the equal lines on a shortest edit path, in order."""
    n, m = len(a), len(b)
    reach = {1: 0}
    trace: list[dict[int, int]] = []
    for d in range(min(n + m, most) + 1):
        trace.append(dict(reach))
        for k in range(-d, d + 1, 2):
            down = k == -d or (k != d and reach[k - 1] < reach[k + 1])
            x = reach[k + 1] if down else reach[k - 1] + 1
            while x < n and x - k < m and a[x] == b[x - k]:
                x += 1
            reach[k] = x
            if x >= n and x - k >= m:
                return _backtrack(trace, n, m)
    return None


def _backtrack(trace: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    equal: list[tuple[int, int]] = []
    for d in range(len(trace) - 1, -1, -1):
        reach, k = trace[d], x - y
        down = k == -d or (k != d and reach[k - 1] < reach[k + 1])
        before_k = k + 1 if down else k - 1
        before_x = reach[before_k] if d else 0
        before_y = before_x - before_k if d else 0
        while x > before_x and y > before_y:
            x, y = x - 1, y - 1
            equal.append((x, y))
        x, y = before_x, before_y
    return equal[::-1]


def changed_lines(found: list[Edit]) -> tuple[int, int]:
    """(removed, added) lines."""
    return sum(e.end - e.start for e in found), sum(e.to_end - e.to for e in found)


def unified(path: str, base: str | None, head: str | None, most: int) -> str:
    """A unified diff as `git apply` takes it; empty where nothing changed. ValueError beyond `most` changed lines."""
    a, b = _lines(base), _lines(head)
    found = edits(a, b, most)
    if found is None:
        raise ValueError(f"{path}: more than {most} changed lines")
    out = [f"diff --git a/{path} b/{path}\n"]
    if base is None:
        out.append("new file mode 100644\n")
    if head is None:
        out.append("deleted file mode 100644\n")
    if found:
        out.append(f"--- {'/dev/null' if base is None else 'a/' + path}\n")
        out.append(f"+++ {'/dev/null' if head is None else 'b/' + path}\n")
    elif (base is None) == (head is None):
        return ""
    for group in _grouped(found):
        out += _hunk(a, b, group)
    return "".join(out)


def _lines(text: str | None) -> list[str]:
    """Lines with their LF; only the last may lack it."""
    if not text:
        return []
    parts = text.split("\n")
    return [p + "\n" for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _grouped(found: list[Edit]) -> list[list[Edit]]:
    """Edits whose contexts meet stand in one hunk."""
    groups: list[list[Edit]] = []
    for edit in found:
        if groups and edit.start - groups[-1][-1].end <= 2 * CONTEXT_LINES:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


def _hunk(a: list[str], b: list[str], group: list[Edit]) -> list[str]:
    start = max(0, group[0].start - CONTEXT_LINES)
    end = min(len(a), group[-1].end + CONTEXT_LINES)
    to = group[0].to - (group[0].start - start)
    to_end = group[-1].to_end + (end - group[-1].end)
    out = [f"@@ -{_range(start, end)} +{_range(to, to_end)} @@\n"]
    at = start
    for edit in group:
        out += [_marked(" ", line) for line in a[at : edit.start]]
        out += [_marked("-", line) for line in a[edit.start : edit.end]]
        out += [_marked("+", line) for line in b[edit.to : edit.to_end]]
        at = edit.end
    return [*out, *(_marked(" ", line) for line in a[at:end])]


def _range(start: int, end: int) -> str:
    """A hunk's range: the first line counts from 1, and an empty range names the line before it."""
    count = end - start
    return f"{start + 1 if count else start}" + (f",{count}" if count != 1 else "")


def _marked(sign: str, line: str) -> str:
    return f"{sign}{line}" if line.endswith("\n") else f"{sign}{line}\n\\ No newline at end of file\n"
