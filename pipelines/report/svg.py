"""Pictures as inline SVG: bars, histograms, curves, the funnel. Colours are classes of the page's style sheet.

All functions take numbers and plain text and give `Html`; text is escaped by `markup.tag`. Sizes are in CSS pixels; a picture
shrinks with the page and never grows past its own width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.report.markup import Html, count, cut, join, percent, short, tag

LINE_POINTS = 600  # of one curve; more are averaged in equal spans of steps
COLOURS = 8  # classes c0 .. c7


def colour(ordinal: int) -> str:
    return f"c{ordinal % COLOURS}"


def picture(width: float, height: float, label: str, *shapes: str) -> Html:
    attributes = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "role": "img", "aria-label": label}
    return tag("svg", attributes, *shapes)


def rect(x: float, y: float, width: float, height: float, kind: str, title: str | None = None) -> Html:
    attributes = {"x": _r(x), "y": _r(y), "width": _r(max(width, 0)), "height": _r(max(height, 0)), "class": kind}
    return tag("rect", attributes, *([tag("title", None, title)] if title else []))


def text(x: float, y: float, kind: str, words: str, title: str | None = None) -> Html:
    children = [words, *([tag("title", None, title)] if title else [])]
    return tag("text", {"x": _r(x), "y": _r(y), "class": kind}, *children)


def path(points: str, kind: str, title: str | None = None) -> Html:
    return tag("path", {"d": points, "class": kind}, *([tag("title", None, title)] if title else []))


def strip(parts: Sequence[tuple[str, float, str]], whole: float, width: float = 260, height: float = 14) -> Html:
    """One bar of (class, value, title) parts laid end to end, on a track that stands for `whole`."""
    x, shapes = 0.0, [rect(0, 0, width, height, "track")]
    for kind, value, title in parts:
        length = width * value / whole if whole else 0.0
        shapes.append(rect(x, 0, max(length, 1.0 if value else 0.0), height, kind, title))
        x += length
    return picture(width, height, "bar", *shapes)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str]], width: float = 540) -> Html:
    """Horizontal bars, one a row: label, (class, value, title) parts, and the text at the end."""
    left, right, step = 110.0, 128.0, 22.0
    most = max((sum(value for _, value, _ in parts) for _, parts, _ in rows), default=0) or 1
    shapes: list[str] = []
    for i, (label, parts, note) in enumerate(rows):
        x, y = left, i * step
        shapes.append(text(left - 8, y + 15, "end", cut(label, 17), label))
        for kind, value, title in parts:
            length = (width - left - right) * value / most
            shapes.append(rect(x, y + 3, max(length, 1.0 if value else 0.0), step - 6, kind, title))
            x += length
        shapes.append(text(x + 6, y + 15, "soft", note))
    return picture(width, max(step * len(rows), 1), "bars", *shapes)


@dataclass(frozen=True)
class Threshold:
    """A limit of the policy drawn into a histogram: documents on the `below` side of `value` (or above it) fall."""

    value: float
    below: bool
    label: str


@dataclass(frozen=True)
class Histogram:
    """Counts between `edges` (one more than counts), stacked by series. Bins are drawn equally wide, whatever their edges."""

    edges: np.ndarray
    series: tuple[tuple[str, str, np.ndarray], ...]  # class, name, counts
    ticks: tuple[float, ...]
    thresholds: tuple[Threshold, ...] = ()
    open_end: bool = False  # the last bin holds everything above, too
    root: bool = False  # a bar's height is the square root of its count; its parts keep their shares

    def at(self, value: float) -> float:
        """Position of a value on the axis, 0 to 1."""
        return float(np.interp(value, self.edges, np.linspace(0, 1, len(self.edges))))


def histogram(h: Histogram, width: float = 350, height: float = 132) -> Html:
    """Stacked bars over an axis with ticks; thresholds are lines, and the side that falls is shaded."""
    left, top, bottom = 36.0, 6.0, 20.0
    inner, floor = width - left - 8, height - bottom
    bins = len(h.edges) - 1
    totals = np.sum([counts for _, _, counts in h.series], axis=0, dtype=float)
    most = float(totals.max(initial=0))
    step = inner / max(bins, 1)
    shares = totals / (most or 1)
    scale = (floor - top) * (np.sqrt(shares) if h.root else shares) / np.maximum(totals, 1)  # pixels a document, by bin
    shapes: list[str] = []
    for t in h.thresholds:
        x = left + inner * h.at(t.value)
        shapes.append(
            rect(left if t.below else x, top, x - left if t.below else left + inner - x, floor - top, "falls")
        )
    base = np.zeros(bins)
    for kind, name, counts in h.series:
        for i in np.flatnonzero(counts):
            tall = max(counts[i] * scale[i], 0.75)
            title = f"{_range(h, int(i))}: {count(counts[i])} {name}"
            shapes.append(
                rect(left + i * step, floor - base[i] * scale[i] - tall, max(step - 0.6, 0.6), tall, kind, title)
            )
        base = base + counts
    for t in h.thresholds:
        x = left + inner * h.at(t.value)
        shapes.append(path(f"M{_r(x)} {_r(top)}V{_r(floor)}", "limit", t.label))
    shapes.append(path(f"M{_r(left)} {_r(floor)}H{_r(left + inner)}", "axis"))
    shapes.append(text(left - 5, top + 9, "end soft", short(most)))
    for tick in h.ticks:
        plus = "+" if h.open_end and tick == h.ticks[-1] and tick >= h.edges[-1] else ""
        shapes.append(text(left + inner * h.at(tick), height - 5, "middle soft", short(tick) + plus))
    return picture(width, height, "histogram", *shapes)


def _range(h: Histogram, i: int) -> str:
    last = h.open_end and i == len(h.edges) - 2
    return f"{h.edges[i]:.4g} and more" if last else f"{h.edges[i]:.4g} to {h.edges[i + 1]:.4g}"


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    kind: str  # class
    name: str
    x: np.ndarray
    y: np.ndarray

    def thinned(self) -> "Curve":
        """At most LINE_POINTS points, each the mean of an equal span. NaN is a gap in the line."""
        if len(self.x) <= LINE_POINTS:
            return self
        starts = np.linspace(0, len(self.x), LINE_POINTS, endpoint=False).astype(np.int64)
        known = np.isfinite(self.y)
        lengths, held = np.diff(starts, append=len(self.x)), np.add.reduceat(known, starts, dtype=np.int64)
        sums = np.add.reduceat(np.where(known, self.y, 0.0), starts)
        y = np.where(held > 0, sums / np.maximum(held, 1), np.nan)
        return Curve(self.kind, self.name, np.add.reduceat(self.x, starts) / lengths, y)

    def points(self, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
        """Path data."""
        parts, down = [], False
        for x, y in zip(self.x.tolist(), self.y.tolist(), strict=True):
            if math.isfinite(y):
                parts.append(f"{'L' if down else 'M'}{_r(at_x(x))} {_r(at_y(y))}")
            down = math.isfinite(y)
        return "".join(parts)


def lines(curves: Sequence[Curve], x_name: str, y_name: str, width: float = 720, height: float = 280) -> Html:
    """Curves over shared axes."""
    drawn = [c for c in (c.thinned() for c in curves) if np.isfinite(c.y).any()]
    if not drawn:
        return Html("")
    left, top, bottom, right = 48.0, 12.0, 34.0, 12.0
    xs, ys = np.concatenate([c.x for c in drawn]), np.concatenate([c.y[np.isfinite(c.y)] for c in drawn])
    x_ticks, y_ticks = nice_ticks(xs.min(), xs.max(), 8), nice_ticks(ys.min(), ys.max(), 5)
    x_low, x_high = xs.min(), max(xs.max(), xs.min() + 1e-9)
    y_low, y_high = min(y_ticks[0], ys.min()), max(y_ticks[-1], ys.max())

    def at_x(value: float) -> float:
        return float(left + (width - left - right) * (value - x_low) / (x_high - x_low))

    def at_y(value: float) -> float:
        return float(height - bottom - (height - top - bottom) * (value - y_low) / (y_high - y_low))

    shapes: list[str] = []
    for tick in y_ticks:
        shapes.append(path(f"M{_r(left)} {_r(at_y(tick))}H{_r(width - right)}", "grid"))
        shapes.append(text(left - 6, at_y(tick) + 4, "end soft", short(tick)))
    shapes += [text(at_x(t), height - bottom + 15, "middle soft", short(t)) for t in x_ticks if x_low <= t <= x_high]
    for c in drawn:
        shapes.append(path(c.points(at_x, at_y), f"curve {c.kind}", c.name))
    shapes.append(text(width - right, height - 4, "end soft", x_name))
    shapes.append(text(left + 4, top + 8, "soft", y_name))
    return picture(width, height, f"{y_name} by {x_name}", *shapes)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values that cover [low, high], about so many; at least two."""
    spread = float(high - low) or max(abs(float(high)), 1.0) * 0.1
    raw = spread / max(about, 1)
    power = 10.0 ** np.floor(np.log10(raw))
    step = float(next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999) * power)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(k * step) for k in np.arange(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Level:
    """One column of the funnel: what is left by dataset, and what was lost on the way to it by reason."""

    name: str
    left: Mapping[str, int]
    lost: Mapping[str, int] = field(default_factory=dict)
    verb: str = ""  # how the lost ones were lost
    note: str = ""  # said in place of that

    @property
    def total(self) -> int:
        return sum(self.left.values())


def funnel(levels: Sequence[Level], datasets: Sequence[str], width: float = 1100) -> Html:
    """Columns from left to right, stacked by dataset, joined by bands that narrow where documents fall."""
    top, tall, bar, reasons, last = 44.0, 230.0, 22.0, 5, 190.0
    height = top + tall + 30 + 16 * (reasons + 2)
    most = max((level.total for level in levels), default=0) or 1
    pitch = (width - last) / max(len(levels) - 1, 1)
    shapes: list[str] = []
    before: dict[str, tuple[float, float]] = {}
    for i, level in enumerate(levels):
        x, y = 4 + i * pitch, top
        shapes.append(rect(x, top, bar, tall, "track", f"{count(most - level.total)} of {count(most)} are gone"))
        now: dict[str, tuple[float, float]] = {}
        for ordinal, name in enumerate(datasets):
            h = tall * max(level.left.get(name, 0), 0) / most
            now[name] = (y, y + h)
            y += h
            if name in before:
                shapes.append(_band(x - pitch + bar, before[name], x, now[name], f"band {colour(ordinal)}"))
            title = f"{name}: {count(level.left.get(name, 0))} {level.name}"
            shapes.append(rect(x, now[name][0], bar, h, colour(ordinal), title))
        before = now
        shapes.append(text(x, 16, "strong", level.name))
        shapes.append(text(x, 34, "big", count(level.total)))
        shapes += _losses(
            level, x, top + tall + 22, reasons, int(min(pitch, last) / 6.6), levels[i - 1].total if i else 0
        )
    return picture(width, height, "funnel", *shapes)


def _band(x0: float, a: tuple[float, float], x1: float, b: tuple[float, float], kind: str) -> Html:
    m = _r((x0 + x1) / 2)
    over = f"M{_r(x0)} {_r(a[0])}C{m} {_r(a[0])} {m} {_r(b[0])} {_r(x1)} {_r(b[0])}"
    under = f"L{_r(x1)} {_r(b[1])}C{m} {_r(b[1])} {m} {_r(a[1])} {_r(x0)} {_r(a[1])}Z"
    return path(over + under, kind)


def _losses(level: Level, x: float, y: float, most: int, chars: int, before: int) -> list[Html]:
    lost = sorted(((n, reason) for reason, n in level.lost.items() if n), key=lambda p: (-p[0], p[1]))
    if not level.verb:
        return [text(x, y, "strong", level.note)]
    total = sum(n for n, _ in lost)
    out = [text(x, y, "fell", f"\N{MINUS SIGN}{count(total)} {level.verb} ({percent(total, before)})")]
    for k, (n, reason) in enumerate(lost[:most]):
        out.append(text(x, y + 18 + 16 * k, "soft", cut(f"{count(n)} {reason}", chars), f"{count(n)} {reason}"))
    if rest := lost[most:]:
        words = f"{count(sum(n for n, _ in rest))} for {len(rest)} more reasons"
        out.append(text(x, y + 18 + 16 * most, "soft", words))
    return out


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """(class, name) pairs as a line of swatches."""
    return tag(
        "div",
        {"class": "legend"},
        *(tag("span", None, join([tag("i", {"class": f"swatch {kind}"}), name])) for kind, name in entries),
    )


def _r(x: float) -> str:
    """Coordinates to a tenth of a pixel: the page stays small, and equal on every machine."""
    return f"{x:.1f}".rstrip("0").rstrip(".")
