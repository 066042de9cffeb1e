"""HTML that is safe by construction: `tag` escapes every child that is not `Html`, so text of documents cannot become markup."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Control characters are no HTML: they show as the pictures that Unicode has for them (U+2400 ff.), C1 as U+FFFD.
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n\r"} | {0x7F: 0x2421}
_CONTROLS = _PICTURES | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
NOTHING = "\N{EN DASH}"  # shown where a figure was not measured


class Html(str):
    """Markup that was made here. A plain `str` is text."""

    __slots__ = ()


def escape(text: Any) -> Html:
    """Any value as text; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    plain = str(text).translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(plain, quote=True))


def join(parts: Iterable[str]) -> Html:
    return Html("".join(p if isinstance(p, Html) else escape(p) for p in parts))


def tag(name: str, attributes: Mapping[str, Any] | None, *children: str) -> Html:
    """One element. An attribute of None is left out, one of True stands alone."""
    shown = [
        f" {key}" if value is True else f' {key}="{escape(value)}"'
        for key, value in (attributes or {}).items()
        if value is not None and value is not False
    ]
    return Html(f"<{name}{''.join(shown)}>{join(children)}</{name}>")


def div(kind: str, *children: str) -> Html:
    return tag("div", {"class": kind}, *children)


def span(kind: str, *children: str) -> Html:
    return tag("span", {"class": kind}, *children)


def paragraph(*children: str) -> Html:
    return tag("p", None, *children)


def details(summary: str, body: str) -> Html:
    return tag("details", None, tag("summary", None, summary), body)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> Html:
    """A table whose first `text_columns` columns are text and whose others are figures, set to the right."""

    def row(cells: Sequence[str], kind: str) -> Html:
        return tag(
            "tr", None, *(tag(kind, {"class": None if i < text_columns else "n"}, c) for i, c in enumerate(cells))
        )

    body = [row(cells, "td") for cells in rows]
    return div("wide", tag("table", None, tag("thead", None, row(head, "th")), tag("tbody", None, *body)))


def section(anchor: str, title: str, *children: str) -> Html:
    return tag("section", {"id": anchor}, tag("h2", None, title), *children)


def count(n: float | None) -> str:
    """A whole number with thousands separators."""
    return NOTHING if n is None else f"{n:,.0f}"


def figure(x: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals; NaN and None are shown as not measured."""
    return NOTHING if x is None or x != x else f"{x:,.{digits}f}"


def percent(part: float, whole: float) -> str:
    """A share to one decimal; what is not nothing never reads 0.0 %."""
    if not whole:
        return NOTHING
    share = 100 * part / whole
    return "<0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def short(n: float) -> str:
    """A number for an axis or a tile: 1,234 as 1.2 k, 3.4 M, 5.6 G."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def size(n: float | None) -> str:
    """Bytes as MB."""
    return NOTHING if n is None else f"{n / 1e6:,.1f}"


def cut(text: str, most: int) -> str:
    """`text` of at most `most` characters, an ellipsis at the end where it was longer."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
