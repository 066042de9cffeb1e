"""Section on the clusters: how even they are before and after the quotas, and what the largest are about."""

from typing import Any

from pipelines.report import svg
from pipelines.report.accounts import Facts
from pipelines.report.markup import (
    Html,
    count,
    cut,
    details,
    figure,
    join,
    paragraph,
    percent,
    section,
    span,
    table,
    tag,
)

NAME_CHARS = 40  # of the first sample, which names a cluster in the picture


def clusters(facts: Facts) -> Html:
    """What `rebalance` trimmed; nothing where the pipeline has no such stage."""
    done = facts.of("rebalance")
    name = f"relations/{done.instance}/report.json" if done else ""
    if not done or not facts.root.exists(name):
        return Html("")
    report = facts.root.read_json(name)
    said = (
        f"{count(report['docs'])} documents in {count(report['clusters'])} clusters; quotas ({report['rule']}, by "
        f"{report['amount']}) leave {count(report['kept_docs'])}, {percent(report['kept_docs'], report['docs'])}."
    )
    parts: list[str] = [paragraph(said), _evenness(report)]
    if largest := report["largest"]:
        picture = svg.bars([_bar(c) for c in largest], 760)
        legend = svg.legend([("kept", "within quota"), ("dropped", "over quota")])
        parts += [tag("h3", None, "Largest clusters"), legend, picture, _samples(largest)]
    parts += [tag("h3", None, "By dataset"), _datasets(report["datasets"])]
    return section("clusters", "Clusters", *parts)


def _evenness(report: dict[str, Any]) -> Html:
    rows = [
        ["Gini coefficient (0: all equal)", figure(report["gini"], 3), figure(report["kept_gini"], 3)],
        [
            "effective clusters (exp of the entropy)",
            figure(report["effective"], 1),
            figure(report["kept_effective"], 1),
        ],
    ]
    return table(["", "before", "after"], rows)


def _name(c: dict[str, Any]) -> str:
    return str(c["samples"][0]["title"]) if c["samples"] else f"cluster {c['cluster']}"


def _bar(c: dict[str, Any]) -> tuple[str, list[tuple[str, float, str]], str]:
    lost = c["docs"] - c["kept_docs"]
    parts = [("kept", float(c["kept_docs"]), f"{count(c['kept_docs'])} within quota")]
    if lost:
        parts.append(("dropped", float(lost), f"{count(lost)} over quota"))
    return cut(_name(c), NAME_CHARS), parts, f"{count(c['docs'])}, {percent(lost, c['docs'])} trimmed"


def _samples(largest: list[dict[str, Any]]) -> Html:
    """One folded list a cluster: its datasets and first documents."""
    return join(
        details(
            join([span("n", f"{count(c['docs'])} documents, {count(c['kept_docs'])} stay"), span("name", _name(c))]),
            join(
                [
                    _datasets(c["datasets"]),
                    tag(
                        "ul",
                        None,
                        *(tag("li", None, s["title"], " ", span("soft", s["url"] or "")) for s in c["samples"]),
                    ),
                ]
            ),
        )
        for c in largest
    )


def _datasets(found: dict[str, dict[str, int]]) -> Html:
    rows = [
        [name, count(n["docs"]), count(n["kept_docs"]), percent(n["docs"] - n["kept_docs"], n["docs"])]
        for name, n in sorted(found.items())
    ]
    return table(["dataset", "documents", "within quota", "trimmed"], rows)
