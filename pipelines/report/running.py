"""Sections on how it was made: throughput and memory of every stage, rejects, versions, the config."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from core.hashing import file_digest
from pipelines.report import svg
from pipelines.report.accounts import Done, Facts
from pipelines.report.markup import Html, count, cut, details, div, figure, paragraph, section, size, span, table, tag
from pipelines.report.samples import Rejects

_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]*(?=@)")


def throughput(facts: Facts) -> Html:
    """One row a step; annotate stages that shared a pass share its figures."""
    if not facts.done:
        return Html("")
    head = [
        "stage",
        "dataset",
        "documents",
        "docs/s",
        "MB/s",
        "seconds",
        "",
        "peak MB",
        "resumed",
        "run",
        span("accounts", "accounts"),
    ]
    most = max((d.manifest.observed.get("seconds", 0.0) for d in facts.done), default=0.0)
    runs = list(dict.fromkeys(str(d.manifest.observed.get("run_id")) for d in facts.done))
    rows = [_row(d, most, runs) for d in facts.done]
    fused = {tuple(d.manifest.observed["fused"]) for d in facts.done if len(d.manifest.observed.get("fused", ())) > 1}
    notes = [f"{', '.join(group)} read the text in one pass and share its figures." for group in sorted(fused)]
    keys = [f"run {i + 1}: {run}" for i, run in enumerate(runs)]
    engines = sorted(
        {f"{d.manifest.observed.get('engine')} engine on {d.manifest.observed.get('host')}" for d in facts.done}
    )
    about = span("soft", " ".join([*notes, "; ".join(keys) + ".", ", ".join(engines) + "."]))
    return section("throughput", "Throughput and memory", table(head, rows, text_columns=2), paragraph(about))


def _row(d: Done, most: float, runs: list[str]) -> list[str]:
    o = d.manifest.observed
    seconds = o.get("seconds", 0.0)
    docs = o.get("docs", d.manifest.accounts.get("documents"))
    return [
        d.instance,
        d.step.dataset or "all",
        count(docs),
        count(o.get("docs_per_s")),
        figure(o.get("mb_per_s")),
        figure(seconds, 1),
        svg.strip([("mean", seconds, f"{seconds:.1f} s")], most, 110, 10),
        size(o.get("peak_memory_bytes") or None),
        count(o.get("resumed_units")) if o.get("resumed_units") else "",
        str(runs.index(str(o.get("run_id"))) + 1),
        span("accounts", _accounts(d)),
    ]


def _accounts(d: Done) -> str:
    """The step's counts, without those by reason."""
    shown = {
        k: n for k, n in d.manifest.accounts.items() if "." not in k and k not in ("rows", "documents", "generation")
    }
    return ", ".join(f"{k.replace('_', ' ')} {count(n)}" for k, n in shown.items())


def failures(found: Iterable[Rejects]) -> Html:
    """Rejects by stage and reason, with one message of each."""
    rows = []
    for r in found:
        for reason, (n, example) in r.reasons.items():
            shown = count(n) if r.read == r.total else f"{count(n)} of the {count(r.read)} read"
            rows.append([r.stage, r.dataset, reason, cut(example, 160), shown])
    if not rows:
        return section("rejects", "Rejects", paragraph("No stage failed on any record or document."))
    return section("rejects", "Rejects", table(["stage", "dataset", "reason", "for example", "rejects"], rows, 4))


def versions(facts: Facts) -> Html:
    """Code, libraries, models, and the config as it was written."""
    libraries: dict[str, set[str]] = {}
    stages: dict[str, set[str]] = {}
    artifacts: dict[str, set[str]] = {}
    for d in facts.done:
        identity = d.manifest.identity
        stages.setdefault(identity.stage, set()).add(str(identity.version))
        for found, into in ((identity.libraries, libraries), (identity.artifacts, artifacts)):
            for name, value in found.items():
                into.setdefault(name, set()).add(value)
    pythons = {str(d.manifest.observed.get("python")) for d in facts.done}
    config = facts.pipeline.path
    left = [
        ["stepwell", _own_version()],
        ["python", ", ".join(sorted(pythons))],
        *([f"library {name}", ", ".join(sorted(v))] for name, v in sorted(libraries.items())),
    ]
    right = [
        *([f"stage {name}", ", ".join(sorted(v))] for name, v in stages.items()),
        *([f"content of {name}", ", ".join(sorted(v))] for name, v in sorted(artifacts.items())),
        [f"content of {config.name}", file_digest(config)],
    ]
    columns = [div("column", table(["what", "version"], part, 2)) for part in (left, right)]
    text = _PASSWORD.sub("***", config.read_text("utf-8"))
    shown = details(span("name", f"Config {config.name}"), tag("pre", None, text))
    return section("versions", "Versions and config", div("columns", *columns), shown)


def _own_version() -> str:
    try:
        return version("stepwell")
    except PackageNotFoundError:
        return "not installed"
