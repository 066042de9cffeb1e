"""Canary pages: benchmark tasks planted in the demo's web, so that a run can say what decontamination caught.

In:  HumanEval's tasks as its package has them (read at run time; no task stands in this repository). Out: (folder, title, article
HTML) of pages in four folders of one host; the folder says what was done to the task, and what should become of the page:

- `verbatim`    prompt and solution as they are: must be found
- `renumbered`  the prompts that are fullest of numbers, every number changed: found by looking past numbers, or not at all
- `reworded`    the description told with other words and no code: not found by equal runs of words; a report that counts it as
                caught would lie
- `clean`       a page about the same names without a sentence of the task: must not be found
"""

import html
import json
import re
from typing import Any

from pipelines.demo import render
from pipelines.demo.sites import CANARY_KINDS

TASKS = 8  # of each kind
PROSE_WORDS = 25  # a task whose description has fewer says too little to be reworded
DOCSTRING = re.compile(r'("""|\'\'\')(.*?)(?:>>>|\1)', re.DOTALL)
NUMBER = re.compile(r"\d+")

# Other words for the words that HumanEval's descriptions are made of. Cruder than a person would write, and enough: no run of
# eight words of a description survives it.
OTHER_WORDS = {
    "a": "some", "all": "every one of the", "an": "one", "and": "as well as", "are": "happen to be", "by": "through",
    "check": "find out", "contains": "has", "each": "every", "elements": "entries", "for": "on behalf of", "from": "out of",
    "function": "routine", "given": "handed over", "if": "whether", "in": "within", "input": "what it gets",
    "integer": "whole number", "integers": "whole numbers",
    "is": "happens to be",
    "it": "that", "list": "sequence", "number": "value", "numbers": "values",
    "of": "belonging to", "only": "just", "or": "or else", "other": "remaining", "return": "hand back", "returns": "hands back",
    "string": "piece of text", "strings": "pieces of text", "that": "which", "the": "this", "this": "the present",
    "to": "towards", "two": "a pair of", "which": "that", "with": "having", "you": "one", "your": "the", "write": "compose",
}  # fmt: skip


def canaries(text: str) -> list[tuple[str, str, str]]:
    """The pages of all kinds from the lines of HumanEval.jsonl, by kind."""
    tasks = [json.loads(line) for line in text.splitlines()]
    pages = []
    for kind in CANARY_KINDS:
        fit = _full_of_numbers if kind == "renumbered" else _tells
        for task in [task for task in tasks if fit(task)][:TASKS]:
            title = f"{task['entry_point'].replace('_', ' ').capitalize()}: {kind} canary"
            pages.append((kind, title, f"<h1>{title}</h1>\n{_BODIES[kind](task)}"))
    return pages


def _tells(task: dict[str, Any]) -> bool:
    """Whether there is prose to reword."""
    return len(description(task).split()) >= PROSE_WORDS


def _full_of_numbers(task: dict[str, Any]) -> bool:
    """Whether no thirteen words of the prompt stand together without a number, so that changed numbers break every such run."""
    words = re.findall(r"[^\W_]+", task["prompt"])
    return max(len(run.split()) for run in " ".join("1" if NUMBER.search(w) else "a" for w in words).split("1")) < 13


def description(task: dict[str, Any]) -> str:
    """The prose of a task's docstring, up to its first example."""
    found = DOCSTRING.search(task["prompt"])
    return " ".join(found[2].split()) if found else ""


def renumbered(text: str) -> str:
    """Every number replaced by another one of about its size."""
    return NUMBER.sub(lambda found: str(int(found[0]) + 1 + found.start() % 7), text)


def reworded(text: str) -> str:
    """The words of OTHER_WORDS replaced."""
    return re.sub(r"[A-Za-z]+", lambda found: OTHER_WORDS.get(found[0].lower(), found[0]), text)


def _code(text: str) -> str:
    return f"<p>Taken from a collection of exercises.</p>\n{render.from_code(text)[1]}"


def _verbatim(task: dict[str, Any]) -> str:
    return _code(task["prompt"] + task["canonical_solution"])


def _renumbered(task: dict[str, Any]) -> str:
    return _code(renumbered(task["prompt"]))


def _reworded(task: dict[str, Any]) -> str:
    return f"<p>Somebody asked for this. {html.escape(reworded(description(task)), quote=False)}</p>"


def _clean(task: dict[str, Any]) -> str:
    name = html.escape(task["entry_point"])
    return (
        f"<p>A reader asks whether {name} is a good name. It says what the caller gets, not how the work is done, and it can be "
        f"read aloud, so we would keep it. Names that begin with a verb suit routines which change something; those that "
        f"begin with a noun suit routines that only look. If {name} grows a second duty one day, split it before anybody "
        f"depends on both, and leave the old name to the half that most callers wanted.</p>"
    )


_BODIES = {"verbatim": _verbatim, "renumbered": _renumbered, "reworded": _reworded, "clean": _clean}
