"""Sections on what came in, what fell and why: headline, funnel, sums, reasons with samples."""

import re
from collections.abc import Iterable, Mapping

from pipelines.report import svg
from pipelines.report.accounts import DUPLICATE, REJECTED, Check, Counts, Facts, checks, dropped, drops, levels, tokens
from pipelines.report.markup import (
    NOTHING,
    Html,
    count,
    details,
    div,
    figure,
    join,
    paragraph,
    percent,
    section,
    short,
    span,
    table,
    tag,
)
from pipelines.report.measure import KEPT, Measures
from pipelines.report.samples import Dropped, Shown

_LONG_NUMBER = re.compile(r"\d+\.\d{7,}")  # limits are written as the exact value of their float32

_BLANK_LINES = re.compile(r"\s*\n\s*")


def headline(facts: Facts, bits: float | None) -> Html:
    """The five numbers, and whether all sums hold."""
    found = levels(facts)
    documents = sum(facts.rows.values())
    kept = facts.selects[-1].manifest.accounts["kept"] if facts.selects else None
    made = tokens(facts)
    total = sum(made["tokens"].values()) if made else None
    tiles = [
        (
            "records read",
            count(found[0].total) if found else NOTHING,
            "",
            f"from {len(found[0].left)} sources" if found else "",
        ),
        ("documents", count(documents) if found else NOTHING, "", f"in {len(facts.datasets)} datasets"),
        (
            "kept",
            count(kept),
            "good",
            f"{percent(kept, documents)} of documents" if kept is not None else "not decided",
        ),
        ("tokens", short(total) if total is not None else NOTHING, "", count(total) if total else "not tokenised"),
        ("bits per byte", figure(bits, 3), "", "held out" if bits is not None else "not evaluated"),
    ]
    return div("tiles", *(_tile(*t) for t in tiles))


def _tile(name: str, value: str, kind: str, note: str) -> Html:
    return div(f"tile {kind}", span("name", name), tag("strong", None, value), span("note", note))


def funnel(facts: Facts, kept_read: int) -> Html:
    """The picture, the datasets' colours and the sums."""
    found = levels(facts)
    if not found:
        return section("funnel", "What came in, what stayed", paragraph("No documents yet: run the stage `extract`."))
    colours = [(svg.colour(i), name) for i, name in enumerate(facts.names)]
    sums = list(checks(facts))
    if facts.selects:
        kept = facts.selects[-1].manifest.accounts["kept"]
        outside = sum(n for name, n in facts.rows.items() if name not in facts.judged)
        if all(facts.fate in facts.layers[name] for name in facts.judged):
            spelled = f"{kept_read - outside:,} rows of {facts.fate} that say keep"
            sums.append(Check(f"{facts.selects[-1].instance}: kept", kept, kept_read - outside, spelled))
    return section(
        "funnel",
        "What came in, what stayed",
        svg.legend(colours),
        div("wide", svg.funnel(found, facts.names)),
        _stale(facts),
        details(_verdict(sums), table(["sum", "is", "should be", ""], map(_sum_row, sums))),
        _by_dataset(facts),
    )


def _verdict(sums: list[Check]) -> Html:
    wrong = [c for c in sums if not c.holds]
    if not wrong:
        return span("ok", f"\N{CHECK MARK} All {len(sums)} accounts add up")
    return span("bad", f"\N{BALLOT X} {len(wrong)} of {len(sums)} accounts do not add up: {wrong[0].name}")


def _sum_row(c: Check) -> list[str]:
    mark = span("ok", "\N{CHECK MARK}") if c.holds else span("bad", "\N{BALLOT X}")
    return [c.name, count(c.left), join([count(c.right), " = ", c.spelled]), mark]


def _stale(facts: Facts) -> Html:
    if not facts.stale:
        return Html("")
    named = ", ".join(facts.stale)
    return div(
        "warning", f"Left out, because made from other documents than are there now: {named}. Run the pipeline again."
    )


def _by_dataset(facts: Facts) -> Html:
    """The funnel as a table."""
    found = levels(facts)
    rows = [
        [
            join([tag("i", {"class": f"swatch {svg.colour(i)}"}), name]),
            *(count(level.left.get(name)) for level in found),
        ]
        for i, name in enumerate(facts.names)
    ]
    made = tokens(facts)
    if made:
        for row, name in zip(rows, facts.names, strict=True):
            row.append(count(made["tokens"].get(name, 0)))
    total = [tag("b", None, "all"), *(count(level.total) for level in found)]
    total += [count(sum(made["tokens"].values()))] if made else []
    return table(["dataset", *(level.name for level in found), *(["tokens"] if made else [])], [*rows, total])


def reasons(facts: Facts, measures: Measures, docs: Mapping[str, Shown], records: Mapping[str, list[Dropped]]) -> Html:
    """Every reason with its share of each dataset, and ten samples behind it; the kept ones first."""
    parts: list[str] = []
    kept = measures.picked.get(KEPT, [])
    if kept:
        name = "Ten documents that were kept" if facts.selects else "Ten documents"
        parts.append(details(span("name", name), _cards(docs[p.doc_id] for p in kept)))
    if facts.selects:
        fell = dropped(facts.selects[-1], facts.names)
        total = facts.selects[-1].manifest.accounts["documents"]
        parts.append(tag("h3", None, f"Documents dropped: {count(sum(map(_sum, fell.values())))} of {count(total)}"))
        most = max(map(_sum, fell.values()), default=0)
        for reason, by in sorted(fell.items(), key=lambda x: (-_sum(x[1]), x[0])):
            shown = [docs[p.doc_id] for p in measures.picked.get(reason, [])]
            rule = facts.rules.get(reason)
            why = rule.predicate.text if rule else _why(reason)
            parts.append(details(_reason(facts, reason, why, by, most, total), _cards(shown)))
    lost = drops(facts)
    lost = {r: by for r, by in lost.items() if r != REJECTED}
    if lost:
        total = sum(level.total for level in levels(facts)[:1])
        parts.append(tag("h3", None, f"Records that became no document: {count(sum(map(_sum, lost.values())))}"))
        most = max(map(_sum, lost.values()))
        for reason, by in sorted(lost.items(), key=lambda x: (-_sum(x[1]), x[0])):
            parts.append(
                details(_reason(facts, reason, "at ingest", by, most, total), _records(records.get(reason, [])))
            )
    return section("reasons", "Why documents fell", *parts) if parts else Html("")


def _sum(by: Counts) -> int:
    return sum(by.values())


def _why(reason: str) -> str:
    """What a reason means that no rule of the policy gives."""
    known = {
        "duplicate_exact": "equal normalised text as a document that stays",
        "duplicate_minhash": "verified near-duplicate of a document that stays",
        "withdrawn": "named in a takedown",
        "rejected": "a stage that the policy reads failed on it",
    }
    return known.get(reason, "")


def _reason(facts: Facts, reason: str, why: str, by: Counts, most: int, total: int) -> Html:
    """The line of a reason: name, rule, a bar by dataset, count and share."""
    parts = [(svg.colour(i), by[d], f"{d}: {count(by[d])}") for i, d in enumerate(facts.names) if by.get(d)]
    return join(
        [
            span("name", reason),
            tag("code", {"title": why}, _LONG_NUMBER.sub(lambda m: f"{float(m.group()):.6g}", why)),
            svg.strip(parts, most),
            span("n", count(_sum(by))),
            span("n soft", percent(_sum(by), total)),
        ]
    )


def _cards(docs: Iterable[Shown]) -> Html:
    return div("cards", *(card(d) for d in docs))


def card(d: Shown, note: str = "") -> Html:
    """One document: title, address, what was measured, how its text begins."""
    facts = [d.dataset, f"{count(d.chars)} characters"]
    if d.picked.detail:
        facts.append(f"{'stays: ' if d.picked.reason.startswith(DUPLICATE) else ''}{d.picked.detail}")
    if note:
        facts.append(note)
    title = d.title or d.url or "without a title"
    return tag(
        "article",
        {"class": "doc"},
        tag("h4", {"dir": "auto"}, title),
        div("meta", *(span("fact", f) for f in facts), link(d.url), tag("code", None, f"id {d.picked.doc_id}")),
        tag(
            "p",
            {"dir": "auto"},
            _BLANK_LINES.sub("\n", d.preview) + ("\N{HORIZONTAL ELLIPSIS}" if d.chars > len(d.preview) else ""),
        ),
    )


def link(url: str | None) -> Html:
    """An address as a link if it is one of the web; anything else, such as `javascript:`, stays text."""
    if not url:
        return Html("")
    if url.lower().startswith(("http://", "https://")):
        return tag("a", {"href": url, "rel": "noreferrer noopener nofollow"}, url)
    return span("url", url)


def _records(records: list[Dropped]) -> Html:
    rows = [[r.dataset, _place(r), link(r.url), r.detail or ""] for r in records]
    return table(["dataset", "record", "url", "detail"], rows, text_columns=4)


def _place(r: Dropped) -> str:
    return r.path if r.offset is None else f"{r.path} at byte {r.offset:,}"
