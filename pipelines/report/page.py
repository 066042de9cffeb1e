"""The page as a whole: sections in reading order, put into `page.html`, written in one piece."""

from importlib.resources import files
from pathlib import Path
from string import Template

from core.storage import Root
from pipelines.config import Pipeline
from pipelines.report import (
    ablation,
    augment,
    clusters,
    corpus,
    harvest,
    overview,
    posttrain,
    questions,
    raters,
    running,
    training,
)
from pipelines.report.accounts import gather
from pipelines.report.contamination import contamination
from pipelines.report.markup import Html, escape, join, tag
from pipelines.report.measure import measure
from pipelines.report.samples import drop_samples, rejects, shown, similarities

REPORT = "report.html"


def write_report(pipeline: Pipeline, root: Root, out: Path | None) -> str:
    """Write the report to `out`, or to `report.html` in the root, and return where it lies."""
    data = render(pipeline, root).encode("utf-8")
    if out is None:
        root.write_bytes(REPORT, data)
        return f"{root.url}/{REPORT}"
    Root(str(out.resolve().parent)).write_bytes(out.name, data)
    return str(out)


def render(pipeline: Pipeline, root: Root) -> str:
    """The whole page. Sections whose stages have not run are left out."""
    facts = gather(pipeline, root)
    measures = measure(facts)
    docs = shown(facts, measures)
    members = [p for groups in measures.largest.values() for _, picked in groups.values() for p in picked]
    similar = similarities(facts, (p.clique or p.doc_id for p in members))
    evaluated = training.evaluation(facts)
    body = [
        overview.headline(facts, training.bits_per_byte(evaluated)),
        overview.funnel(facts, measures.kept),
        overview.reasons(facts, measures, docs, drop_samples(facts)),
        corpus.languages(measures),
        corpus.signals(facts, measures),
        raters.quality(facts),
        corpus.duplicates(facts, measures, docs, similar),
        clusters.clusters(facts),
        contamination(facts),
        harvest.changes(facts),
        augment.augmentation(facts),
        posttrain.conversations(facts),
        training.mixtures(facts),
        training.model(facts, evaluated),
        questions.questions(facts),
        ablation.ablations(facts),
        running.throughput(facts),
        running.failures(rejects(facts)) if facts.datasets else Html(""),
        running.versions(facts),
    ]
    return fill(pipeline.path.stem, [part for part in body if part])


def fill(title: str, body: list[Html]) -> str:
    """The template with a title and sections, allowed by its policy to apply its own style and to load nothing."""
    template = Template(files("pipelines.report").joinpath("page.html").read_text("utf-8"))
    return template.substitute(title=escape(title), contents=_contents(body), body=join(body))


def _contents(body: list[Html]) -> Html:
    """Links to the sections that are there."""
    names = {
        "funnel": "Funnel",
        "reasons": "Reasons",
        "languages": "Languages",
        "signals": "Signals",
        "quality": "Quality",
        "duplicates": "Duplicates",
        "clusters": "Clusters",
        "contamination": "Contamination",
        "changes": "Changes",
        "augmentation": "Augmentation",
        "conversations": "Conversations",
        "mixtures": "Mixtures",
        "model": "Model",
        "questions": "Questions",
        "ablations": "Ablations",
        "throughput": "Throughput",
        "rejects": "Rejects",
        "versions": "Versions",
    }
    whole = "".join(part[:60] for part in body)
    return join(tag("a", {"href": f"#{a}"}, name) for a, name in names.items() if f'id="{a}"' in whole)
