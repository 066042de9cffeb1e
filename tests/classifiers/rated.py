"""A small corpus that all six raters can learn from, and stages run on it as the runner would run them."""

from typing import Any

import pyarrow as pa

from core.dataset import Dataset
from core.engines.local import LocalEngine
from core.job import Job, Outcome
from core.manifest import Identity, Manifest, write_manifest
from core.schema import DOCUMENTS, TEXT
from core.stage import Kind, Stage
from core.storage import Root
from tests.builders import annotate_all, document, make_dataset, make_layer
from tests.pipelines.small_pipeline import prose

CURATED = "The {0} is a kind of {1}. It was founded in 1{2:03d} and named after Anna Berg, who described {0} in Basel. "
MANUAL = "First open the panel, then try {0} with {1}. You will see the value change, as in the next step below. "
NEWS = "{0} moved, {1} removed\nchanged again\nsee ticket {2}\nmore of {0}\n"
THINGS = (
    "granite",
    "copper",
    "harbour",
    "lantern",
    "meadow",
    "orchid",
    "pepper",
    "quartz",
    "ribbon",
    "saddle",
    "timber",
)


def sentences(pattern: str, seed: int, count: int) -> str:
    """`count` fillings of a pattern: the same for the same seed."""
    return "".join(
        pattern.format(
            THINGS[(seed * 3 + i) % len(THINGS)], THINGS[(seed + i * i + 1) % len(THINGS)], (seed * 37 + i) % 1000
        )
        for i in range(count)
    )


def rows(count: int = 120) -> dict[str, list[dict[str, Any]]]:
    """web: manuals and news of six sites, and prose; reference: two curated sites."""
    web, reference = [], []
    for i in range(count):
        name = ("tutorial", "releases", "stories")[i % 3]
        text = (sentences(MANUAL, i, 8), sentences(NEWS, i, 9), prose(i, 9))[i % 3]
        web.append(("web", f"https://{name}.site{i % 6}.example/{name}/{i}.html", f"{text}\nPage {i}."))
    for i in range(count * 2 // 3):
        text = sentences(CURATED, i, 3 + i % 5) + prose(1000 + i, 4)
        reference.append(("reference", f"https://en.book{i % 2}.example/{i}", f"Entry {i}\n{text}"))
    return {
        name: [document(name, url, text, url=url, kind=kind) for kind, url, text in made]
        for name, made in (("web", web), ("reference", reference))
    }


def corpus(root: Root, shards: int = 2, made: dict[str, list[dict[str, Any]]] | None = None) -> tuple[Dataset, ...]:
    """Datasets in `shards` shards, all of them English."""
    out = []
    for ordinal, (name, docs) in enumerate((made or rows()).items()):
        tables = [pa.Table.from_pylist(docs[i::shards], schema=DOCUMENTS) for i in range(shards)]
        dataset = make_dataset(root, name, tables, ordinal)
        make_layer(dataset, "language", {"language": pa.array(["en"] * dataset.rows, TEXT)})
        out.append(dataset)
    return tuple(out)


def run(stage: Stage, root: Root, datasets: tuple[Dataset, ...], engine: Any = None, **config: Any) -> Outcome:
    """Run a stage and record what it put out."""
    made = stage.config(**config)
    identity = Identity(stage.name, stage.version, made.model_dump(mode="json"), {})
    own = engine or LocalEngine(root.local_path(f"exchange/{stage.name}"), 0)
    artifacts = stage.artifacts(made) if stage.artifacts else {}
    job = Job(stage, stage.name, made, root, own, datasets, identity.digest(), artifacts=artifacts, code="code")
    try:
        if stage.kind is Kind.ANNOTATE:
            return annotate_all(job)
        outcome: Outcome = stage.fn(job)
    finally:
        if engine is None:
            own.clear()
            own.close()
    write_manifest(root, Manifest(stage.name, None, identity, outcome.outputs, outcome.accounts))
    return outcome


def layer(datasets: tuple[Dataset, ...], name: str) -> dict[str, dict[str, Any]]:
    """Rows of a layer by doc_id."""
    out = {}
    for d in datasets:
        for shard in d.shards:
            ids = d.read_table(shard, ["doc_id"]).column("doc_id").to_pylist()
            out.update(zip(ids, d.read_layer(name, shard).to_pylist(), strict=True))
    return out
