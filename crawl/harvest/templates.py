"""The two dialogues of a change, after the stages of Agentless (arXiv 2407.01489): which files, then which edits.

    localise   problem + paths of the repository    -> paths to change
    repair     problem + contents of those files    -> SEARCH/REPLACE blocks (`crawl.harvest.blocks`)

A dialogue is a list of `Segment`s: who speaks (user, assistant) and what it is (`scaffold`, the template's own words;
`content`, what comes from the change; `answer`). Its text is their concatenation, and their byte ranges say what a phase learns
from: annealing masks the scaffold, mid-training turns them into a chat and masks what the user says (paper, appendix C).
Prompts hold nothing dated after the merge.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from crawl.harvest.blocks import Block, locate
from crawl.harvest.changes import pieces
from crawl.harvest.record import FileChange, Record, moment
from crawl.harvest.text import Masks, cleaned

TEMPLATES = ("localise", "repair")
VERSION = 1  # of the words below


class Segment(NamedTuple):
    """A piece of a dialogue."""

    role: str  # user, assistant
    kind: str  # scaffold, content, answer
    text: str


Span = tuple[int, int, str, str]  # start and end in UTF-8 bytes, role, kind


def localise(problem: str, shown: Sequence[str], tree_size: int, gold: Sequence[str]) -> list[Segment]:
    """The dialogue that ends in the paths of the change."""
    part = "" if len(shown) >= tree_size else f" ({len(shown)} of {tree_size})"
    return [
        Segment("user", "scaffold", "A problem in a repository is to be solved. Read it first.\n\n<problem>\n"),
        Segment("user", "content", problem),
        Segment("user", "scaffold", f"\n</problem>\n\nThese are files of the repository{part}:\n\n<files>\n"),
        Segment("user", "content", "\n".join(shown)),
        Segment(
            "user",
            "scaffold",
            "\n</files>\n\nWhich files must be changed or added? Name their paths, one a line, most changed first.\n\n",
        ),
        Segment("assistant", "answer", "\n".join(gold) + "\n"),
    ]


def repair(problem: str, windows: Sequence[tuple[str, str]], answer: str) -> list[Segment]:
    """The dialogue that ends in blocks. `windows`: (heading, lines of a file as they are)."""
    out = [
        Segment(
            "user", "scaffold", "A problem in a repository is to be solved by editing the files below.\n\n<problem>\n"
        ),
        Segment("user", "content", problem),
        Segment("user", "scaffold", "\n</problem>\n\n<files>\n"),
    ]
    for heading, text in windows:
        out += [
            Segment("user", "scaffold", f"--- {heading}\n"),
            Segment("user", "content", text),
            Segment("user", "scaffold", "\n"),
        ]
    return [
        *out,
        Segment(
            "user",
            "scaffold",
            "</files>\n\nAnswer with edits. Each names its file in a line `### path`, then a SEARCH/REPLACE block: after a line "
            "of seven `<` and SEARCH the lines to be replaced, exactly as they stand and enough of them to occur once in the "
            "file; after a line of seven `=` the lines that take their place; at the end a line of seven `>` and REPLACE. An "
            "empty SEARCH makes a new file; an empty REPLACE for all lines of a file removes it.\n\n",
        ),
        Segment("assistant", "answer", answer),
    ]


def problem_of(record: Record, masks: Masks) -> str:
    """What was wrong: the issues that the change closes, if they were there before it was merged; else its own title and
    body."""
    merged_at = moment(record.merged_at)
    asked = [i for i in record.issues if merged_at is None or ((at := moment(i.at)) is not None and at <= merged_at)]
    said = [(i.title, i.body) for i in asked] or [(record.title, record.body)]
    parts = (f"{masks.text(cleaned(title))}\n\n{masks.text(cleaned(body))}".strip() for title, body in said)
    return "\n\n".join(p for p in parts if p)


def gold_paths(files: Iterable[FileChange]) -> list[str]:
    """Paths of the change, most changed first."""
    return [f.path for f in sorted(files, key=lambda f: (-(f.added + f.removed), f.path))]


def windows(
    files: Sequence[FileChange], blocks: Mapping[str, Sequence[Block]], whole_lines: int, around: int
) -> list[tuple[str, str]]:
    """What is shown of each file that is there: all of it up to `whole_lines`, else the lines of its blocks with `around`
    more on either side."""
    out = []
    for file in files:
        lines = pieces(file.base)
        if file.base is None:
            continue
        if len(lines) <= whole_lines:
            out.append((file.path, file.base))
            continue
        for start, end in _ranges(lines, blocks[file.path], around):
            out.append((f"{file.path}, lines {start + 1} to {end} of {len(lines)}", "\n".join(lines[start:end])))
    return out


def _ranges(lines: list[str], blocks: Sequence[Block], around: int) -> list[tuple[int, int]]:
    """Ranges of lines around the places of blocks in the base; those that meet are one."""
    out: list[tuple[int, int]] = []
    for block in blocks:
        at = locate(block, lines)
        start, end = max(0, at - around), min(len(lines), at + len(block.search) + around)
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def joined(segments: Sequence[Segment]) -> tuple[str, list[Span]]:
    """The text and the byte range of each segment; neighbours of one role and kind are one."""
    spans: list[Span] = []
    at = 0
    for s in segments:
        end = at + len(s.text.encode("utf-8"))
        if spans and spans[-1][2:] == (s.role, s.kind):
            spans[-1] = (spans[-1][0], end, s.role, s.kind)
        elif end > at:
            spans.append((at, end, s.role, s.kind))
        at = end
    return "".join(s.text for s in segments), spans


def masked_for_annealing(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Byte ranges that annealing does not learn: the template's own words."""
    return [(start, end) for start, end, _, kind in spans if kind == "scaffold"]


def masked_for_chat(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Byte ranges that mid-training does not learn: what the user says."""
    out: list[tuple[int, int]] = []
    for start, end, role, _ in spans:
        if role == "user":
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], end)
            else:
                out.append((start, end))
    return out


def chat_messages(text: str, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """The dialogue in the paper's schema of a conversation: `role`, `content`, `loss_mask` (1: learned)."""
    data = text.encode("utf-8")
    out: list[dict[str, Any]] = []
    for start, end, role, _ in spans:
        said = data[start:end].decode("utf-8")
        if out and out[-1]["role"] == role:
            out[-1]["content"] += said
        else:
            out.append({"role": role, "content": said, "loss_mask": int(role == "assistant")})
    return out
