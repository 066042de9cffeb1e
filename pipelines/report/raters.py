"""The section on quality: the raters' cards, how much each tier holds, how raters agree, and titles from each tier.

In: `cards.json` of `train_raters`; the layers of `tiers`, `raters` and `language`, shard by shard. Agreement of two raters is
Cohen's kappa with quadratic weights over their 20 buckets (Cohen 1968): 1 is the same bucket always, 0 what chance gives. Titles
are those of the lowest `seeded(SEED, doc_id)` of each tier.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from classifiers.percentiles import BUCKETS
from classifiers.raters.labels import RATERS
from classifiers.tiers import TIERS
from core.dataset import Dataset
from core.hashing import seeded_column
from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, count, cut, div, figure, join, paragraph, percent, section, span, table, tag
from pipelines.report.measure import SEED, Measures, Picked
from pipelines.report.samples import shown

TITLES = 5  # of each tier
TITLE_CHARS = 90
LANGUAGES_SHOWN = 12


@dataclass
class Tally:
    """Sums over all shards."""

    mass: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (dataset, language, tier) -> bytes
    docs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (dataset, tier)
    joint: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # two raters -> int64 [20, 20]
    picked: dict[str, list[Picked]] = field(default_factory=dict)


def quality(facts: Facts) -> Html:
    """Cards of the raters and what the tiers hold; nothing where the pipeline has neither."""
    trained, tiers = facts.of("train_raters"), facts.of("tiers")
    parts: list[str] = []
    if trained is not None:
        parts += _cards(facts.root.read_json(f"models/{trained.instance}/cards.json"))
    if tiers is not None:
        tally = tallied(facts, tiers.instance, tiers.config.raters)
        parts += [*_mass(facts, tally), *_agreement(tally), *_titles(facts, tally)]
    return section("quality", "Quality", *parts) if parts else Html("")


def _cards(cards: list[dict[str, Any]]) -> list[str]:
    head = ["rater", "languages", "documents", "good", "sources", "weak-label AUC", "held out", "length", "compression"]
    rows = [
        [
            c["rater"],
            cut(", ".join(c["languages"]), 40),
            count(c["docs"]),
            percent(c["base_rate"], 1) if c["base_rate"] is not None else "",
            count(c["sources"]),
            *(figure(c[k]) for k in ("weak_label_auc", "held_out_auc", "length_auc", "compression_auc")),
        ]
        for c in cards
    ]
    said = (
        "AUC against weak labels, not people. Held out: by models that saw no document of the same source (a site, or a way of "
        "spoiling text), pairs within a language; beside it what length and compression ratio alone reach on the same pairs."
    )
    rules = [paragraph(tag("b", None, c["rater"]), " ", span("soft", _rule(c))) for c in cards]
    folded = tag("details", None, tag("summary", None, "How the labels were made"), *rules)
    return [tag("h3", None, "Raters"), table(head, rows, 2), paragraph(span("soft", said)), folded]


def _rule(card: dict[str, Any]) -> str:
    return f"{card['labels']}. {card['note']}" if card["note"] else str(card["labels"])


def tallied(facts: Facts, tiers: str, raters: str) -> Tally:
    """One pass over the layers."""
    out = Tally()
    wanted = [
        f"{tiers}.tier",
        *(f"{tiers}.{r}_bucket" for r in RATERS),
        f"{raters}.bytes",
        "language.language",
        "doc_id",
    ]
    for i, dataset in enumerate(facts.datasets):
        if tiers not in facts.layers[dataset.name]:
            continue
        for j, shard in enumerate(dataset.shards):
            read = dataset.read_table(shard, wanted)
            row = pa.array(np.arange(read.num_rows))
            read = read.append_column("row", row).filter(pc.is_valid(read.column(f"{tiers}.tier")))
            _add(out, dataset, (i, j), read.rename_columns([n.rpartition(".")[2] for n in read.column_names]))
    return out


def _add(out: Tally, dataset: Dataset, place: tuple[int, int], read: pa.Table) -> None:
    sums = read.group_by(["language", "tier"], use_threads=False).aggregate([("bytes", "sum"), ("bytes", "count")])
    for row in sums.to_pylist():
        out.mass[dataset.name, row["language"] or "none", row["tier"]] += row["bytes_sum"]
        out.docs[dataset.name, row["tier"]] += row["bytes_count"]
    bucket = {r: pc.fill_null(read.column(f"{r}_bucket"), -1).to_numpy() for r in RATERS}
    for a, b in combinations(RATERS, 2):
        both = (bucket[a] >= 0) & (bucket[b] >= 0)
        at = bucket[a][both].astype(np.int64) * BUCKETS + bucket[b][both]
        seen = out.joint.setdefault((a, b), np.zeros((BUCKETS, BUCKETS), np.int64))
        seen += np.bincount(at, minlength=BUCKETS * BUCKETS).reshape(BUCKETS, BUCKETS)
    rank = seeded_column(SEED, read.column("doc_id"))
    ids, names, rows = (read.column(c).to_pylist() for c in ("doc_id", "tier", "row"))
    for i in np.argsort(rank, kind="stable").tolist():
        best = out.picked.setdefault(names[i], [])
        best.append(Picked(float(rank[i]), ids[i], *place, rows[i], names[i]))
        best.sort(key=lambda p: (p.rank, p.doc_id))
        del best[TITLES:]


def kappa(joint: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights of a square table of counts; None where it is not defined."""
    total = joint.sum()
    if not total:
        return None
    step = np.arange(len(joint))
    apart = (step[:, None] - step[None, :]) ** 2.0
    by_chance = float((np.outer(joint.sum(axis=1), joint.sum(axis=0)) * apart).sum() / total)
    return 1.0 - float((joint * apart).sum()) / by_chance if by_chance else None


def _mass(facts: Facts, tally: Tally) -> list[str]:
    """Documents by dataset and tier, and shares of bytes by language and tier."""
    names = [d.name for d in facts.datasets if any(k[0] == d.name for k in tally.docs)]
    highest = list(reversed(TIERS))
    rows = []
    for name in names:
        whole = sum(n for (dataset, _, _), n in tally.mass.items() if dataset == name)
        held = [sum(n for (d, _, t), n in tally.mass.items() if (d, t) == (name, tier)) for tier in highest]
        cells = [f"{percent(m, whole)} ({count(tally.docs[name, t])})" for m, t in zip(held, highest, strict=True)]
        rows.append([name, "all", *cells])
    by_language: Counter[str] = Counter()
    for (_, language, _), n in tally.mass.items():
        by_language[language] += n
    for language, whole in sorted(by_language.items(), key=lambda x: (-x[1], x[0]))[:LANGUAGES_SHOWN]:
        held = [sum(n for (_, lang, t), n in tally.mass.items() if (lang, t) == (language, tier)) for tier in highest]
        rows.append(["all", language, *(percent(m, whole) for m in held)])
    head = ["dataset", "language", *(t.replace("_", " ") for t in highest)]
    return [tag("h3", None, "Tiers: share of bytes (documents)"), table(head, rows, 2)]


def _agreement(tally: Tally) -> list[str]:
    def cell(a: str, b: str) -> str:
        found = tally.joint.get((a, b), tally.joint.get((b, a)))
        return "" if a == b or found is None else figure(kappa(found))

    rows = [[a, *(cell(a, b) for b in RATERS)] for a in RATERS]
    return [tag("h3", None, "Agreement of raters (kappa)"), table(["", *RATERS], rows)]


def _titles(facts: Facts, tally: Tally) -> list[str]:
    docs = shown(facts, Measures((), picked=tally.picked))
    columns = []
    for tier in reversed(TIERS):
        found = [docs[p.doc_id] for p in tally.picked.get(tier, [])]
        items = [tag("li", None, cut(s.title or s.url or s.preview, TITLE_CHARS)) for s in found]
        columns.append(div("column", tag("h4", None, tier.replace("_", " ")), tag("ul", None, *items)))
    return [tag("h3", None, "A few of each"), div("columns", join(columns))]
