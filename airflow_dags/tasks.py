"""A plan as plain data: what `pipelines plan --json` writes becomes tasks with ids that Airflow takes, and edges between them.

In: the plan's JSON. Out: `Task`s in the plan's order, one a step; the steps of a dataset share a group. Standard library only.
A step that can be cut into parts names the command that says which; what it makes for others to wait for has a URI.
An edge that follows from others is left out, for nearly every step reads the documents: the demo's 27 steps keep 35 edges of 89.
Cost: 0.13 s for 1,000 steps that wait for 200 others each.
"""

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

ID_CHARS = 100  # of a group's id, and of a task's in it: Airflow allows 250 to both together
OPTIONS = {"--engine": "STEPWELL_ENGINE", "--workers": "STEPWELL_WORKERS"}  # left out where the variable is empty
FIELDS = ("name", "stage", "dataset", "run", "why", "after", "makes", "command", "parts")
UP_TO_DATE = 99  # exit code of a step that had nothing to do: Bash's operator then calls its task skipped


class PlanError(ValueError):
    """A plan or its settings cannot be used. Airflow shows it as the import error of the DAG file."""


@dataclass(frozen=True)
class Task:
    """One step as a task."""

    name: str  # as in the plan: `signals [web]`
    stage: str
    group: str | None  # None: a stage over all datasets
    id: str  # within the group
    arguments: tuple[str, ...]  # of the command `pipelines`
    parts: tuple[str, ...]  # arguments of the command that prints the step's parts; empty: it has none
    after: tuple[str, ...]  # full ids
    makes: tuple[str, ...]  # URIs
    note: str  # what the plan said of it when it was written

    @property
    def full_id(self) -> str:
        """As Airflow names it."""
        return f"{self.group}.{self.id}" if self.group else self.id


def read_plan(path: Path) -> dict[str, Any]:
    """A plan file, checked. PlanError names the file and what to do."""
    try:
        plan = json.loads(path.read_text("utf-8"))
        _steps(plan)
        if missing := [name for name in ("root", "report") if name not in plan]:
            raise PlanError(f"no plan, {missing[0]!r} is missing; expected what `pipelines plan --json` writes")
    except (OSError, ValueError) as e:
        raise PlanError(f"{path}: {e}") from None
    return dict(plan)


def tasks(plan: Mapping[str, Any], leave_out_up_to_date: bool = False) -> tuple[Task, ...]:
    """The tasks of a plan. A step that is left out hands what it waits for on to those that wait for it."""
    steps = _steps(plan)
    left_out = {s["name"] for s in steps if leave_out_up_to_date and not s["run"]}
    waits = _reduced(_passed_on({s["name"]: s["after"] for s in steps}, left_out))
    groups, ids = _ids(steps)
    full = {name: f"{groups[name]}.{i}" if name in groups else i for name, i in ids.items()}
    return tuple(
        Task(
            name=s["name"],
            stage=s["stage"],
            group=groups.get(s["name"]),
            id=ids[s["name"]],
            arguments=tuple(s["command"][1:]),
            parts=tuple(s["parts"][1:] if s["parts"] else ()),
            after=tuple(full[name] for name in waits[s["name"]]),
            makes=tuple(uri(plan["root"], name) for name in s["makes"]),
            note="; ".join(s["why"]) if s["run"] else "up to date",
        )
        for s in steps
        if s["name"] not in left_out
    )


def uri(root: str, name: str = "") -> str:
    """Where a file or folder of a root is, without a user's name and password: the same for every plan of that root."""
    parts = urlsplit(root if "://" in root else f"file://{quote(root)}")
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
    return f"{place}/{quote(name)}" if name else place


def step_line(command: Iterable[str], arguments: Iterable[str], part: bool = False) -> str:
    """The line that Bash runs for a step, or for the part of it that STEPWELL_SHARDS names. What a person may type into a run's
    form comes in variables, never as part of the line."""
    options = [f'${{{variable}:+{option} "${variable}"}}' for option, variable in OPTIONS.items()]
    own = ['--shards "$STEPWELL_SHARDS"'] if part else [f"--up-to-date-code {UP_TO_DATE}"]
    return " ".join([plain_line(command, arguments), *own, '--run-id "$STEPWELL_RUN_ID"', *options])


def plain_line(command: Iterable[str], arguments: Iterable[str]) -> str:
    """The line that Bash runs for a command of words only. `exec`: a signal then finds the command itself."""
    return f"exec {plain(shlex.join([*command, *arguments]))}"


def plain(text: str) -> str:
    """`text` such that Airflow, which takes it for a Jinja template, gives it back unchanged."""
    return text.replace("{", "{{ '{' }}")


def safe_id(name: str) -> str:
    """A name in ASCII letters, digits, `-` and `_`, which both a group's and a task's id may hold."""
    short = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return short if len(short) <= ID_CHARS else f"{short[: ID_CHARS - 9]}-{_mark(name)}"


def _steps(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan's steps, known to have what a task needs, an absolute config path, and to wait for earlier steps only."""
    try:
        steps = [{field: step[field] for field in FIELDS} for step in plan["steps"]]
    except (KeyError, TypeError) as e:
        raise PlanError(f"no plan, {e!r} is wrong; expected what `pipelines plan --json` writes") from None
    seen: set[str] = set()
    for s in steps:
        if unknown := [name for name in s["after"] if name not in seen]:
            raise PlanError(f"step {s['name']!r} waits for {unknown[0]!r}, no step before it; write the plan anew")
        if s["name"] in seen:
            raise PlanError(f"step {s['name']!r} stands twice; write the plan anew")
        seen.add(s["name"])
        config = dict(zip(s["command"], s["command"][1:], strict=False)).get("-c", "")
        if not Path(config).is_absolute():
            raise PlanError(
                f"step {s['name']!r} names the config {config!r}, which a worker would look for in a folder of its own; "
                'write the plan with an absolute path: `pipelines plan --json -c "$PWD/p.yaml"`'
            )
    return steps


def _passed_on(after: Mapping[str, list[str]], left_out: set[str]) -> dict[str, list[str]]:
    """{step: steps it waits for} with none that is left out, whose own waits take its place."""
    out: dict[str, list[str]] = {}
    for name, before in after.items():
        parts = [out[b] if b in left_out else [b] for b in before]
        out[name] = list(dict.fromkeys(b for part in parts for b in part))
    return out


def _reduced(after: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """{step: steps it waits for} without those that one of the others waits for. Sets of steps are bits of an integer."""
    bit = {name: 1 << i for i, name in enumerate(after)}
    above: dict[str, int] = {}
    out = {}
    for name, before in after.items():
        indirect = direct = 0
        for b in before:
            indirect |= above[b]
            direct |= bit[b]
        above[name] = indirect | direct
        out[name] = [b for b in before if not bit[b] & indirect]
    return out


def _ids(steps: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """({step: group id} of those in a group, {step: task id within its group})."""
    boxes = _boxes(steps)
    # A dataset may bear a stage's name, and groups stand beside the steps that are in none.
    outside: dict[Hashable, str] = {("step", s["name"]): s["name"] for s in steps if s["name"] not in boxes}
    found = _distinct({**{("group", box): box for box in boxes.values()}, **outside})
    ids = {s["name"]: found["step", s["name"]] for s in steps if s["name"] not in boxes}
    for box in dict.fromkeys(boxes.values()):
        inside = _distinct({s["name"]: s["stage"] for s in steps if boxes.get(s["name"]) == box})
        ids |= {str(step): task_id for step, task_id in inside.items()}
    return {name: found["group", box] for name, box in boxes.items()}, ids


def _boxes(steps: list[dict[str, Any]]) -> dict[str, str]:
    """{step: name of its group}. A dataset that waits for steps outside which wait for it gets a second group, and so on: Airflow
    draws no graph in which groups wait for each other in a circle. Each edge between groups leads to a higher level."""
    level: dict[str, int] = {}
    dataset = {s["name"]: s["dataset"] for s in steps}
    for s in steps:
        level[s["name"]] = max((level[b] + (dataset[b] != s["dataset"]) for b in s["after"]), default=0)
    numbers: dict[str, list[int]] = {}
    for name in sorted((n for n in level if dataset[n]), key=level.__getitem__):
        seen = numbers.setdefault(dataset[name], [])
        seen += [level[name]] if level[name] not in seen else []
    places = {name: numbers[d].index(level[name]) for name, d in dataset.items() if d}
    return {name: f"{dataset[name]}-{place + 1}" if place else dataset[name] for name, place in places.items()}


def _distinct(names: Mapping[Hashable, str]) -> dict[Any, str]:
    """An id for each key from its name; those that would be alike bear a mark of their key."""
    ids = {key: safe_id(name) for key, name in names.items()}
    often = Counter(ids.values())
    return {key: i if often[i] == 1 else f"{i}-{_mark(repr(key))}" for key, i in ids.items()}


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
