"""Section on changes: what was harvested, why changes fell, and which dialogues were made of the others."""

import json
from collections import Counter
from collections.abc import Mapping

from core.dataset import Dataset
from core.manifest import Manifest
from pipelines.report import svg
from pipelines.report.accounts import Done, Facts
from pipelines.report.markup import Html, count, div, join, paragraph, percent, section, table, tag

NAMES_SHOWN = 12  # languages or reasons; the others are summed up
ROUND_TRIP = "drops.round_trip"  # of the account of dialogues


def changes(facts: Facts) -> Html:
    """Records and drops of each harvest, dialogues by template, the share of answers that led back byte for byte."""
    harvests = [d for d in facts.done if d.step.entry.stage.name == "harvest"]
    makers = [d for d in facts.done if d.step.entry.stage.name == "dialogues"]
    if not harvests and not makers:
        return Html("")
    mine = {d.step.dataset for d in (*harvests, *makers)}
    counted = {d.name: _metadata(d) for d in facts.datasets if d.name in mine}
    parts = [_harvested(d, counted.get(d.step.dataset or "", {})) for d in harvests]
    parts += [_dialogues(d.manifest, counted.get(d.step.dataset or "", {})) for d in makers]
    return section("changes", "Changes and dialogues", *parts)


def _harvested(done: Done, by: Mapping[str, Counter[str]]) -> Html:
    accounts = done.manifest.accounts
    dropped = Counter({k.removeprefix("dropped."): n for k, n in accounts.items() if k.startswith("dropped.")})
    kept = accounts["records"] - accounts["dropped"]
    said = f"{count(accounts['records'])} records, {count(kept)} of them kept"
    columns = [_column("Kinds", by.get("change", Counter())), _column("Languages", by.get("language", Counter()))]
    columns.append(_column("Why records fell", dropped))
    indexed = accounts.get("indexed_pulls")
    note = f"Archives name {count(indexed)} pull requests." if indexed else ""
    return join([tag("h3", None, f"{done.step.dataset}: {said}"), paragraph(note), div("columns", *columns)])


def _dialogues(manifest: Manifest, by: Mapping[str, Counter[str]]) -> Html:
    """Dialogues by template; the round trip is checked for every answer of `repair`, so its share is measured."""
    made, failed = by.get("template", Counter()), manifest.accounts.get(ROUND_TRIP, 0)
    tried = made["repair"] + failed
    rows = [[name, count(n)] for name, n in sorted(made.items())]
    fell = Counter({k.removeprefix("drops."): n for k, n in manifest.accounts.items() if k.startswith("drops.")})
    trips = f"{percent(made['repair'], tried)} of {count(tried)} answers gave the files of the head byte for byte."
    return join(
        [
            tag("h3", None, f"{manifest.dataset}: {count(manifest.accounts['documents'])} dialogues"),
            paragraph(trips if tried else "No answers of `repair`."),
            table(["template", "dialogues"], rows),
            div("columns", _column("Languages", by.get("language", Counter())), _column("Why there is none", fell)),
        ]
    )


def _column(title: str, by: Counter[str]) -> Html:
    """Bars of the most frequent names."""
    if not by:
        return Html("")
    order = sorted(by, key=lambda name: (-by[name], name))
    shown = [(name, by[name]) for name in order[:NAMES_SHOWN]]
    if rest := order[NAMES_SHOWN:]:
        shown.append((f"{len(rest)} others", sum(by[name] for name in rest)))
    total = by.total()
    rows = [(name, [("kept", float(n), count(n))], f"{count(n)}, {percent(n, total)}") for name, n in shown]
    return div("column", tag("h3", None, title), svg.bars(rows))


def _metadata(dataset: Dataset) -> dict[str, Counter[str]]:
    """How often each kind of change, language and template occurs; nothing for datasets that have none of them."""
    found: dict[str, Counter[str]] = {"change": Counter(), "language": Counter(), "template": Counter()}
    for shard in dataset.shards:
        for batch in dataset.read(shard, ["kind", "metadata"]):
            for kind, text in zip(batch.column("kind").to_pylist(), batch.column("metadata").to_pylist(), strict=True):
                if kind == "pull_request":
                    value = json.loads(text)
                    for name, counts in found.items():
                        if value.get(name):
                            counts[str(value[name])] += 1
    return found
