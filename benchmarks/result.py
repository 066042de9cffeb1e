"""What a benchmark gives back: tables, checks against a bound, raw figures. Shown on a terminal, kept as JSON, put into the docs.

Tables in `docs/benchmarks.md` stand between `<!-- NAME -->` and `<!-- /NAME -->` and are written from the JSON files alone, so
that no figure there is typed by hand.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import environment
from core.errors import StepwellError

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
DOCS = REPO / "docs" / "benchmarks.md"

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; floats are shown with three digits."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Check:
    """A figure that has a bound. `bound` is a floor when `at_least`, else a ceiling."""

    what: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Result:
    """One run of one benchmark."""

    name: str
    settings: dict[str, Any]
    tables: list[Table]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=environment)

    def to_json(self) -> dict[str, Any]:
        checks = [{**asdict(c), "met": c.met} for c in self.checks]
        return {**asdict(self), "checks": checks}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Result":
        tables = [Table(t["title"], tuple(t["columns"]), t["rows"]) for t in stored["tables"]]
        checks = [Check(c["what"], c["value"], c["bound"], c["at_least"]) for c in stored["checks"]]
        return cls(**{**stored, "tables": tables, "checks": checks})


def keep(result: Result, folder: Path = RESULTS) -> Path:
    """Write the result as `<name>.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def kept(folder: Path = RESULTS) -> list[Result]:
    """All results that were kept, by name."""
    return [Result.from_json(json.loads(p.read_text("utf-8"))) for p in sorted(folder.glob("*.json"))]


def show(result: Result) -> None:
    """Tables and checks for a person, then the whole result as JSON on the last line."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in result.tables:
        shown = RichTable(*table.columns, title=table.title)
        for row in table.rows:
            shown.add_row(*(_text(c) for c in row))
        console.print(shown)
    for line in [*result.notes, *(_check_line(c) for c in result.checks)]:
        console.print(line, markup=False, highlight=False)
    print(json.dumps(result.to_json(), ensure_ascii=False))


def markdown(result: Result) -> str:
    """The result as it stands in the docs."""
    e = result.environment
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items())
    lines = [
        f"{e['date'][:10]}, {e['cpu']}, {e['cores']} cores, {e['memory_gb']} GB, load {e['load_before']} at the start; "
        f"Python {e['python']}, {versions}.",
        f"Settings: {', '.join(f'{k} {v}' for k, v in result.settings.items())}.",
    ]
    for table in result.tables:
        lines += ["", f"{table.title}:", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [_row(map(_text, row)) for row in table.rows]
    if result.checks:
        lines += ["", *(f"- {_check_line(c)}" for c in result.checks)]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines)


def write_docs(results: Iterable[Result], path: Path = DOCS) -> list[str]:
    """Put each result between its marks in the page; returns the names of those that have no marks there."""
    page = path.read_text("utf-8")
    homeless = []
    for result in results:
        begin, end = f"<!-- {result.name} -->\n", f"<!-- /{result.name} -->"
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if opened and closed:
            page = f"{before}{begin}\n{markdown(result)}\n\n{end}{after}"
        else:
            homeless.append(result.name)
    path.write_text(page, "utf-8")
    return homeless


def alone(
    doc: str | None,
    options: Callable[[argparse.ArgumentParser], object],
    measure: Callable[[argparse.Namespace], Result],
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of one benchmark: measure, show, keep with `--keep`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--keep", action="store_true", help="write the result below benchmarks/results/")
    args = parser.parse_args(argv)
    try:
        result = measure(args)
    except StepwellError as error:
        raise SystemExit(f"error: {error}") from None
    if args.keep:
        keep(result)
    show(result)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _check_line(check: Check) -> str:
    verdict = "met" if check.met else "NOT met"
    return f"{check.what}: {check.value:.3g} (at {'least' if check.at_least else 'most'} {check.bound:g}: {verdict})"
