"""The section on conversations: how many came and left by reason and domain, their languages, difficulty, verifiers."""

from collections import Counter
from typing import Any

import pyarrow.compute as pc

from core.dataset import Dataset
from pipelines.report import svg
from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, count, div, figure, join, paragraph, percent, section, table, tag

COLUMNS = (
    "shape",
    "domain",
    "prompt_language",
    "answer_language",
    "verifier",
    "difficulty",
    "pass_rate",
    "switch_fraction",
)
BINS = 10  # of the pass rates
NAMES_SHOWN = 12
LEFT_OUT = "left_out."


def conversations(facts: Facts) -> Html:
    """Conversations in and out; empty where the pipeline has no stage `chat` or no conversations."""
    found = [_measured(facts, d) for d in facts.datasets if "chat" in facts.layers.get(d.name, {})]
    found = [rows for rows in found if rows]
    if not found:
        return Html("")
    rows = [row for dataset in found for row in dataset]
    kept = sum(row["kept"] for row in rows)
    switched = sum((row["switch_fraction"] or 0) > 0.05 for row in rows)
    said = (
        f"{count(len(rows))} conversations, {count(kept)} stay; "
        f"{count(switched)} switch language in more than 5 % of their letters."
    )
    columns = [
        div("column", tag("h3", None, "Language of the answer"), _bars(rows, "answer_language")),
        div(
            "column",
            tag("h3", None, "Verifier"),
            _bars(rows, "verifier"),
            tag("h3", None, "Difficulty"),
            _bars(rows, "difficulty"),
        ),
    ]
    return section(
        "conversations",
        "Conversations",
        paragraph(said),
        _domains(facts, rows),
        div("columns", *columns),
        _rates(rows),
        _exports(facts),
    )


def _measured(facts: Facts, dataset: Dataset) -> list[dict[str, Any]]:
    """The columns of every conversation of a dataset, and whether it stays (with no select: all do)."""
    fated = facts.fate if facts.fate in facts.layers.get(dataset.name, {}) else None
    wanted = [f"chat.{c}" for c in COLUMNS] + ([f"{fated}.keep", f"{fated}.reason"] if fated else [])
    rows: list[dict[str, Any]] = []
    for shard in dataset.shards:
        read = dataset.read_table(shard, wanted)
        for row in read.filter(pc.is_valid(read.column("chat.shape"))).to_pylist():
            fate = (
                {"kept": row[f"{fated}.keep"], "reason": row[f"{fated}.reason"]}
                if fated
                else {"kept": True, "reason": None}
            )
            rows.append({"dataset": dataset.name, **{c: row[f"chat.{c}"] for c in COLUMNS}, **fate})
    return rows


def _domains(facts: Facts, rows: list[dict[str, Any]]) -> Html:
    """In, out and what fell, by dataset and domain."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["domain"] or ""), []).append(row)
    body = []
    for (dataset, domain), mine in sorted(groups.items()):
        reasons = Counter(r["reason"] for r in mine if not r["kept"])
        fell = ", ".join(f"{reason} {count(n)}" for reason, n in reasons.most_common())
        kept = sum(r["kept"] for r in mine)
        body.append([dataset, domain, fell, count(len(mine)), count(kept), percent(kept, len(mine))])
    return table(["dataset", "domain", "fell by", "in", "stay", "share"], body, text_columns=3)


def _bars(rows: list[dict[str, Any]], column: str) -> Html:
    """Counts of a column's values, most frequent first; what is null is named none."""
    counts = Counter(row[column] or "none" for row in rows)
    order = sorted(counts, key=lambda name: (-counts[name], name))[:NAMES_SHOWN]
    return svg.bars(
        [(name, [("kept", float(counts[name]), count(counts[name]))], count(counts[name])) for name in order]
    )


def _rates(rows: list[dict[str, Any]]) -> Html:
    """Pass rates as bars of a tenth each; nothing where no record has one."""
    rates = [row["pass_rate"] for row in rows if row["pass_rate"] is not None]
    if not rates:
        return Html("")
    bins = Counter(min(int(r * BINS), BINS - 1) for r in rates)
    drawn = [
        (
            f"{figure(i / BINS, 1)} to {figure((i + 1) / BINS, 1)}",
            [("kept", float(bins[i]), count(bins[i]))],
            count(bins[i]),
        )
        for i in range(BINS)
    ]
    return join([tag("h3", None, f"Pass rates of {count(len(rates))} tasks"), svg.bars(drawn)])


def _exports(facts: Facts) -> Html:
    """What the exports wrote and left out."""
    body = []
    for stage in ("sft", "rl"):
        if done := facts.of(stage):
            a = done.manifest.accounts
            left = ", ".join(f"{k.removeprefix(LEFT_OUT)} {count(n)}" for k, n in a.items() if k.startswith(LEFT_OUT))
            body.append([stage, left, count(a["considered"]), count(a["records"]), count(a["bytes"])])
    return (
        table(["export", "left out by", "considered", "records", "bytes"], body, text_columns=2) if body else Html("")
    )
