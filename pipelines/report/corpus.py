"""Sections on what the documents are: languages, lengths, signals with the policy's limits, duplicates."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from pipelines.report import svg
from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, count, div, figure, join, paragraph, percent, section, short, span, tag
from pipelines.report.measure import KEPT, LENGTH, Measures, Panel, Picked, group_counts
from pipelines.report.overview import card
from pipelines.report.samples import SIMILARITY_EDGES, Shown, Similarities

NAMES_SHOWN = 18  # languages or scripts; the others are summed up
SERIES = {KEPT: "kept", "dropped": "dropped", "documents": "kept"}  # series -> class


def languages(measures: Measures) -> Html:
    """Languages and scripts as bars of kept and dropped documents."""
    if not measures.names:
        return Html("")
    titles = {"language": "Languages", "script": "Scripts"}
    columns = [div("column", tag("h3", None, titles[c]), _names(by)) for c, by in sorted(measures.names.items())]
    return section("languages", "Languages", _legend(measures), div("columns", *columns))


def _legend(measures: Measures) -> Html:
    series = {name for by in (measures.histograms, measures.names) for drawn in by.values() for name in drawn}
    present = [name for name in SERIES if name in series]
    return svg.legend([(SERIES[name], name) for name in present])


def _names(by: Mapping[str, Counter[str]]) -> Html:
    total: Counter[str] = Counter()
    for counts in by.values():
        total.update(counts)
    order = sorted(total, key=lambda name: (-total[name], name))
    rows = [_row(name, {series: counts[name] for series, counts in by.items()}, total) for name in order[:NAMES_SHOWN]]
    if rest := order[NAMES_SHOWN:]:
        sums = {series: sum(counts[name] for name in rest) for series, counts in by.items()}
        rows.append(_row(f"{len(rest)} others", sums, total))
    return svg.bars(rows)


def _row(name: str, by: Mapping[str, int], total: Counter[str]) -> tuple[str, list[tuple[str, float, str]], str]:
    parts = [(SERIES[s], float(n), f"{name}: {count(n)} {s}") for s, n in by.items() if n]
    n = sum(by.values())
    return name, parts, f"{count(n)}, {percent(n, total.total())}"


def signals(facts: Facts, measures: Measures) -> Html:
    """Lengths large, the columns of the policy as small multiples."""
    drawn = [p for p in measures.panels if p.column in measures.histograms]
    means = [f"{d.name} {short(d.text_bytes / d.rows)} bytes in the mean" for d in facts.datasets if d.rows]
    if not drawn:
        return section("signals", "Lengths", paragraph("; ".join(means))) if means else Html("")
    length = [p for p in drawn if p.column == LENGTH]
    others = [p for p in drawn if p.column != LENGTH]
    parts: list[str] = [_legend(measures)]
    for p in length:
        parts += [tag("h3", None, "Characters in a document"), svg.histogram(_histogram(p, measures), 1100, 200)]
    if others:
        ruled = any(p.thresholds for p in others)
        note = "Lines are the policy's limits; on the shaded side a document falls. " if ruled else ""
        note += "Heights are square roots, so that tails can be seen."
        parts += [tag("h3", None, "Signals"), span("soft", note), div("panels", *(_panel(p, measures) for p in others))]
    return section("signals", "Lengths and signals", *parts, paragraph(span("soft", "; ".join(means))))


def _panel(p: Panel, measures: Measures) -> Html:
    words = "; ".join(t.label for t in p.thresholds)
    caption = tag("figcaption", None, tag("b", None, p.column), " ", span("soft", words))
    return tag("figure", None, caption, svg.histogram(_histogram(p, measures, root=True)))


def _histogram(p: Panel, measures: Measures, root: bool = False) -> svg.Histogram:
    """The panel's picture: logarithmic axes are cut to where there is anything."""
    series = measures.histograms[p.column]
    edges, logarithmic = p.edges, p.edges[-1] > 1e6
    first, last = 0, len(edges) - 1
    if logarithmic:
        used = np.flatnonzero(sum(series.values()))
        reach = [float(t.value) for t in p.thresholds]
        first = min([int(used[0]) if len(used) else 0, *(int(np.searchsorted(edges, v)) - 2 for v in reach)])
        last = max([int(used[-1]) + 1 if len(used) else 8, *(int(np.searchsorted(edges, v)) + 2 for v in reach)])
        first, last = max(first, 0), min(max(last, first + 8), len(edges) - 1)
    edges = edges[first : last + 1]
    drawn = tuple(
        (SERIES[s], s, counts[first:last]) for s, counts in sorted(series.items(), key=lambda x: x[0] != KEPT)
    )
    open_end = not logarithmic and not p.column.endswith(("fraction", "score"))
    return svg.Histogram(edges, drawn, _ticks(edges, logarithmic), p.thresholds, open_end, root)


def _ticks(edges: np.ndarray, logarithmic: bool) -> tuple[float, ...]:
    if not logarithmic:
        return tuple(float(x) for x in np.linspace(edges[0], edges[-1], 5))
    decades = [10.0**k for k in range(12) if edges[0] <= 10.0**k <= edges[-1]]
    if len(decades) >= 3:
        return tuple(decades)
    return tuple(float(edges[i]) for i in np.unique(np.linspace(0, len(edges) - 1, 5).astype(int)))


def duplicates(facts: Facts, measures: Measures, docs: Mapping[str, Shown], similar: Similarities | None) -> Html:
    """How large groups of duplicates are, how alike verified pairs are, and the largest groups."""
    parts: list[str] = []
    titles = {"exact": "Equal text", "minhash": "Near duplicates"}
    for relation in ("exact", "minhash"):
        if relation in measures.sizes:
            parts.append(_relation(titles[relation], relation, facts, measures, docs, similar))
    if not parts:
        return Html("")
    return section("duplicates", "Duplicates", *parts)


def _relation(
    title: str,
    relation: str,
    facts: Facts,
    measures: Measures,
    docs: Mapping[str, Shown],
    similar: Similarities | None,
) -> Html:
    groups = group_counts(measures.sizes[relation])
    members, found = sum(measures.sizes[relation].values()), sum(groups.values())
    noun = "cliques" if relation == "exact" else "components"
    said = f"{count(members)} of {count(sum(facts.rows.values()))} documents lie in {count(found)} {noun}"
    redundant = f"; {count(members - found)} of them are further copies." if relation == "exact" else "."
    left = [tag("h4", None, f"{noun.capitalize()} by size"), svg.bars(_sizes(groups, noun))]
    charts = [div("column", *left)] if groups else []
    if relation == "minhash" and similar is not None and similar.pairs:
        picture = svg.Histogram(SIMILARITY_EDGES, (("kept", "pairs", similar.counts),), (0, 0.25, 0.5, 0.75, 1))
        head = tag("h4", None, f"Jaccard similarity of {count(similar.pairs)} verified pairs")
        charts.append(div("column", head, svg.histogram(picture, 540, 180)))
    largest = [
        tag(
            "details",
            None,
            tag("summary", None, _group_line(size, picked, docs, noun)),
            _members(picked, docs, similar),
        )
        for size, picked in measures.largest[relation].values()
    ]
    return join([tag("h3", None, title), paragraph(said + redundant), div("columns", *charts), *largest])


def _sizes(groups: Mapping[int, int], noun: str) -> list[tuple[str, list[tuple[str, float, str]], str]]:
    """Groups by size: single sizes up to 5, then doubling ranges."""
    ranges: dict[tuple[int, int], int] = {}
    for n, found in groups.items():
        low = n if n <= 5 else 6 if n <= 10 else int(2 ** np.floor(np.log2((n - 1) / 5)) * 5 + 1)
        high = n if n <= 5 else 10 if n <= 10 else (low - 1) * 2
        ranges[low, high] = ranges.get((low, high), 0) + found
    return [
        (f"{a} docs" if a == b else f"{a} to {b}", [("dropped", float(n), f"{count(n)} {noun}")], count(n))
        for (a, b), n in sorted(ranges.items())
    ]


def _group_line(size: int, picked: list[Picked], docs: Mapping[str, Shown], noun: str) -> Html:
    first = docs[picked[0].doc_id]
    return join([span("n", f"{count(size)} documents"), span("name", first.title or first.url or first.preview[:80])])


def _members(picked: list[Picked], docs: Mapping[str, Shown], similar: Similarities | None) -> Html:
    return div("cards", *(card(docs[p.doc_id], _alike(p, similar)) for p in picked))


def _alike(p: Picked, similar: Similarities | None) -> str:
    """What is known of a member: its fate and its best verified pair."""
    fate = "stays" if p.reason == KEPT else f"fell: {p.reason}"
    node = p.clique or p.doc_id
    best = similar.best.get(node) if similar else None
    if best is not None:
        return f"{fate}, Jaccard {figure(best)} with its nearest"
    return f"{fate}, copy of {p.clique}" if p.clique and p.clique != p.doc_id else fate
