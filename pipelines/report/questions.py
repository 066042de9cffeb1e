"""Section on the questions that models were asked: right answers' bits, accuracy, problems solved, and paired differences."""

import math
from typing import Any

from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, count, figure, join, percent, section, span, table, tag

ASKED = ["set", "questions", "bits per byte of the right answer", "preferred", "blind", "greedy"]
POSED = ["set", "problems", "solved", "without a number"]


def questions(facts: Facts) -> Html:
    """A table of questions and one of problems for each evaluation that asked any."""
    parts: list[Html] = []
    runs = [done for done in facts.done if done.step.entry.stage.name == "evaluate"]
    for done in runs:
        name = done.manifest.outputs["evaluation"]["file"]
        found: dict[str, Any] = facts.root.read_json(name) if facts.root.exists(name) else {}
        tables = [
            _table(head, row, found["against"], found[kind])
            for kind, head, row in (("questions", ASKED, _asked), ("problems", POSED, _posed))
            if found.get(kind)
        ]
        if tables:
            parts += [tag("h3", None, done.instance)] if len(runs) > 1 else []
            parts += tables
    return section("questions", "Questions", *parts) if parts else Html("")


def _table(head: list[str], row: Any, against: str | None, found: dict[str, Any]) -> Html:
    compared = any("less_than_other" in figures for figures in found.values())
    more = [f"less {against}", "detectable"] if compared else []
    body = [[name, *row(figures), *(_less(figures) if compared else [])] for name, figures in sorted(found.items())]
    return table([*head, *more], body)


def _asked(figures: dict[str, Any]) -> list[str]:
    error = figures["gold_bpb_error"]
    preferred = blind = ""
    if figures["accuracy"] is not None:
        preferred = join([percent(figures["accuracy"], 1), " ", _interval(figures, "accuracy_low", "accuracy_high")])
        blind = percent(figures["chance"], 1)
    known = error is not None and math.isfinite(error)  # of one question it is null, and was infinite in older files
    bits = join([figure(figures["gold_bpb"], 4), " ", span("soft", f"± {figure(error, 4)}" if known else "")])
    return [count(figures["questions"]), bits, preferred, blind, percent(figures["greedy_fraction"], 1)]


def _posed(figures: dict[str, Any]) -> list[str]:
    solved = join([percent(figures["right"], figures["questions"]), " ", _interval(figures, "low", "high")])
    return [count(figures["questions"]), solved, count(figures["without_number"])]


def _interval(figures: dict[str, Any], low: str, high: str) -> Html:
    return span("soft", f"{percent(figures[low], 1)} to {percent(figures[high], 1)}")


def _less(figures: dict[str, Any]) -> list[str]:
    """The paired difference: in bits per byte of the right answer, or in the share solved."""
    other = figures["less_than_other"]
    paired = other.get("gold_bpb", other)
    interval = span("soft", f"{paired['low']:+.4f} to {paired['high']:+.4f}")
    return [join([f"{paired['effect']:+.4f}", " ", interval]), figure(paired["least_effect"], 4)]
