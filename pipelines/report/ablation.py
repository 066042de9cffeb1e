"""Section on ablations: for each, every arm's difference by domain with its interval, and what counts as a tie.

In: `ablations/*/result.json` of a root. The same section alone is the page `ablations/NAME/report.html`.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.ablation.config import AA
from pipelines.ablation.result import HEAD, about, cells, read_result
from pipelines.ablation.trials import result_name
from pipelines.report import svg
from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, join, paragraph, percent, section, span, table, tag

METHOD = (
    "The interval covers another sample of documents and another seed. The grey band is the least effect that this many seeds "
    "and documents would find 4 times in 5, from the A/A arm (the baseline again, on another order of its data). A difference is "
    "a tie where the interval contains zero, where it lies within the band, or where it fails Holm's correction over all rows."
)


def ablations(facts: Facts) -> Html:
    """All ablations of the root; nothing where there are none."""
    names = [n for n in facts.root.names("ablations") if facts.root.exists(result_name(n))]
    parts = [one(read_result(facts.root, n)) for n in names]
    return section("ablations", "Ablations", paragraph(METHOD), *parts) if parts else Html("")


def page(result: Mapping[str, Any]) -> str:
    """One ablation as a page of its own."""
    from pipelines.report.page import fill

    body = section("ablations", f"Ablation {result['name']}", paragraph(METHOD), one(result))
    return fill(f"ablation {result['name']}", [body])


def one(result: Mapping[str, Any]) -> Html:
    """Heading, what was trained, the picture, the table, and what each arm read."""
    found = result["comparisons"]
    rows = [[span("soft", cell) if c["verdict"] == "tie" else cell for cell in cells(c)] for c in found]
    shares = sorted({name for a in result["arms"].values() for name in a["shares"]})
    read = [
        [
            "A/A" if arm == AA else arm,
            f"{result['tokens']:,}",
            f"{a['mixed_tokens']:,}",
            *(percent(a["shares"].get(s, 0.0), 1) for s in shares),
        ]
        for arm, a in result["arms"].items()
    ]
    return join(
        [
            tag("h3", None, result["name"]),
            *(paragraph(line) for line in about(result)),
            forest(found),
            table(HEAD, rows, text_columns=2),
            tag("h3", None, "What each arm read"),
            table(["arm", "tokens trained on", "tokens mixed", *shares], read),
        ]
    )


def forest(found: list[dict[str, Any]], width: float = 760) -> Html:
    """One line a comparison: the band of the least effect, the interval, the difference."""
    left, right, step = 190.0, 150.0, 24.0
    reach = max((abs(v) for c in found for v in (c["low"], c["high"], c["least_effect"] or 0.0)), default=0.0) or 1.0
    inner, height = width - left - right, step * len(found) + 22

    def at(value: float) -> float:
        return left + inner * (value + reach) / (2 * reach)

    shapes: list[str] = []
    for i, c in enumerate(found):
        y, name = i * step, cells(c)
        kind = {"better": "kept", "worse": "dropped"}.get(c["verdict"], "asked")
        if c["least_effect"] is not None:
            x = at(-c["least_effect"])
            shapes.append(svg.rect(x, y + 3, at(c["least_effect"]) - x, step - 6, "track", f"least effect {name[7]}"))
        shapes.append(svg.rect(at(c["low"]), y + 10, max(at(c["high"]) - at(c["low"]), 1), 4, kind, name[6]))
        shapes.append(svg.rect(at(c["effect"]) - 2.5, y + 6, 5, 12, kind, name[5]))
        shapes.append(svg.text(left - 8, y + 16, "end", f"{name[0]}, {c['domain']}"))
        shapes.append(svg.text(width - right + 8, y + 16, "soft", f"{name[5]}, {c['verdict']}"))
    floor = step * len(found)
    shapes.append(svg.path(f"M{at(0.0):.1f} 0V{floor:.1f}", "axis"))
    for value in (-reach, 0.0, reach):
        shapes.append(svg.text(at(value), floor + 16, "middle soft", f"{value:+.3f}" if value else "0"))
    return svg.picture(width, height, "differences in bits per byte", *shapes)
