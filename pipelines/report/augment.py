"""Section on knowledge augmentation: passages, what was asked and paid, which answers became documents, and samples of both."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.ingest import side_name
from mixtures.augment.answers import answers_name
from pipelines.report.accounts import Done, Facts
from pipelines.report.markup import Html, count, cut, div, figure, join, paragraph, percent, section, span, table, tag

SAMPLES = 5
SHOWN_CHARS = 600
ACCEPTED = "accepted"
COLUMNS = ("key", "template", "text", "answer", "model")


@dataclass(frozen=True)
class Judged:
    """One answer with what became of it."""

    row: dict[str, Any]
    reason: str  # ACCEPTED, or why it fell
    detail: str


def augmentation(facts: Facts) -> Html:
    """The whole section; nothing where no stage of it has run."""
    passages, answers = facts.of("passages"), facts.of("answers")
    parts: list[str] = []
    if passages is not None:
        a = passages.manifest.accounts
        parts.append(
            paragraph(
                f"{count(a['passages'])} passages of {count(a['candidates'])} candidates, dense in knowledge, cover "
                f"{count(a['covered_entities'])} of {count(a['entities'])} entities of the inventory."
            )
        )
    if answers is not None:
        parts.append(paragraph(_paid(answers)))
        parts += [part for name in _made(facts) for part in _dataset(facts, answers, name)]
    return section("augmentation", "Augmentation", *parts) if parts else Html("")


def _made(facts: Facts) -> list[str]:
    """Datasets that the stage `augment` has made."""
    return [d.step.dataset for d in facts.done if d.step.entry.stage.name == "augment" and d.step.dataset]


def _paid(answers: Done) -> str:
    """One sentence on requests, tokens and money."""
    a, o, config = answers.manifest.accounts, answers.manifest.observed, answers.config
    ended = {"complete": "", "max_cost": "; the cost cap ended the run", "max_s": "; the time limit ended the run"}
    asked = f"{count(a['requests'])} requests to {config.model}: {count(a['answered'])} answered"
    others = "".join(f", {count(a[k])} {k}" for k in ("refused", "failed", "unsent") if a[k])
    tokens = f"{count(a['prompt_tokens'])} prompt and {count(a['completion_tokens'])} completion tokens"
    cap = f" of at most {figure(config.max_cost)}" if config.max_cost is not None else ""
    return f"{asked}{others}{ended.get(o.get('stopped', ''), '')}. {tokens}; cost of the log {figure(o.get('cost'), 4)}{cap}."


def _dataset(facts: Facts, answers: Done, name: str) -> list[str]:
    manifest = facts.documents(name)
    assert manifest is not None  # `_made` found it
    a = manifest.accounts
    said = f"{count(a['documents'])} of {count(a['records'])} answers became documents ({percent(a['documents'], a['records'])})."
    judged = _judged(facts, answers, name, list(manifest.units))
    head = tag("h3", None, f"Dataset {name} ", span("soft", said))
    return [head, _by_template(judged), div("cards", *(_sample(j) for j in _picked(judged)))]


def _judged(facts: Facts, answers: Done, name: str, units: Sequence[str]) -> list[Judged]:
    """Every answer, in the order of keys."""
    fell: dict[str, tuple[str, str]] = {}
    for folder in ("drops", "rejects"):
        for file in (side_name(folder, name, unit) for unit in units):
            if facts.root.exists(file):
                for r in facts.root.read_table(file, ["origin", "reason", "detail"]).to_pylist():
                    fell[r["origin"]["path"].rpartition("/")[2]] = (r["reason"], r["detail"] or "")
    rows = facts.root.read_table(answers_name(answers.instance), COLUMNS).to_pylist()
    return [Judged(row, *fell.get(row["key"], (ACCEPTED, ""))) for row in rows]


def _by_template(judged: Sequence[Judged]) -> Html:
    """Answers, accepted ones and reasons, a template a row."""
    reasons = [r for r, _ in Counter(j.reason for j in judged).most_common() if r != ACCEPTED]
    templates = sorted({j.row["template"] for j in judged})
    body = []
    for template in templates:
        by = Counter(j.reason for j in judged if j.row["template"] == template)
        shares = percent(by[ACCEPTED], by.total())
        body.append(
            [template, count(by.total()), f"{count(by[ACCEPTED])} ({shares})", *(count(by[r]) for r in reasons)]
        )
    return table(["template", "answers", "accepted", *(r.replace("_", " ") for r in reasons)], body)


def _picked(judged: Sequence[Judged]) -> list[Judged]:
    """Up to SAMPLES answers: accepted ones first, then one of each reason; the lowest keys of each."""
    picked = [j for j in judged if j.reason == ACCEPTED][: SAMPLES - 1]
    seen: set[str] = {ACCEPTED}
    for j in judged:
        if j.reason not in seen and len(picked) < SAMPLES:
            seen.add(j.reason)
            picked.append(j)
    rest = [j for j in judged if j not in picked]
    return [*picked, *rest[: SAMPLES - len(picked)]]


def _sample(j: Judged) -> Html:
    fate = j.reason if not j.detail else f"{j.reason}: {cut(j.detail, 80)}"
    return tag(
        "article",
        {"class": "doc"},
        tag("h4", None, j.row["template"]),
        div("meta", span("fact", fate), span("fact", j.row["model"]), tag("code", None, f"request {j.row['key']}")),
        tag("p", {"dir": "auto"}, tag("b", None, "Passage: "), cut(j.row["text"], SHOWN_CHARS)),
        tag("p", {"dir": "auto"}, tag("b", None, "Answer: "), join([cut(j.row["answer"], SHOWN_CHARS)])),
    )
