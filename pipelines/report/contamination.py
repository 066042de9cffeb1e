"""Section on what decontamination found: by benchmark and split, by method, how long the found ranges are, which canaries.

In:  the layer of each `decontaminate` in the pipeline, the URLs of hits, the index's description. Items touched are counted from
`found`, so a page that holds two items counts for both; documents are counted once a benchmark.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup.finder import METHODS, index_folder
from pipelines.demo.sites import CANARY_HOST, CANARY_KINDS
from pipelines.report import svg
from pipelines.report.accounts import Done, Facts
from pipelines.report.markup import Html, count, details, div, figure, join, paragraph, percent, section, table, tag

SAMPLES = 12  # hits listed
COLUMNS = ("hit", "benchmark", "split", "item", "method", "longest_run", "coverage", "items", "spans", "found")
EXPECTED = {
    "verbatim": "found",
    "renumbered": "found where equal but for numbers",
    "reworded": "not found",
    "clean": "not found",
}


@dataclass
class _Seen:
    """What the layers of one instance hold."""

    items: defaultdict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    documents: Counter[tuple[str, str]] = field(default_factory=Counter)
    methods: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    span_bytes: list[int] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)
    planted: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)


def contamination(facts: Facts) -> Html:
    """One part for each instance that ran; nothing where the stage is not in the pipeline."""
    parts = [_instance(facts, done) for done in facts.done if done.step.entry.stage.name == "decontaminate"]
    return section("contamination", "Contamination", *parts) if parts else Html("")


def _instance(facts: Facts, done: Done) -> Html:
    seen = _read(facts, done.instance)
    a, index = done.manifest.accounts, facts.root.read_json(f"{index_folder(done.instance)}/index.json")
    counted = index["counted"]
    said = (
        f"{count(a['hit_docs'])} of {count(a['docs'])} documents hold something of {count(counted['items'])} benchmark "
        f"items or of {count(index['held_out_docs'])} held-out documents. {count(counted['unsearchable_items'])} items cannot "
        f"be searched for: too short, without an answer, or of common words only; {count(counted['empty_items'])} are empty."
    )
    rules = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in index["rules"].items())
    about = (
        f"Index {index['fingerprint'][:12]}: {count(counted['ngrams'])} windows of {count(counted['passages'])} passages, "
        f"{count(counted['short_questions'])} short questions, {count(index['held_out_ngrams'])} windows of held-out text. "
        f"Thresholds: {rules}."
    )
    columns = (
        [div("column", tag("h4", None, "Found ranges by length"), svg.bars(_lengths(seen.span_bytes)))]
        if seen.span_bytes
        else []
    )
    if seen.planted:
        columns.append(div("column", tag("h4", None, "Residual recall on planted canaries"), _canaries(seen)))
    return join(
        [
            tag("h3", None, done.instance),
            paragraph(said),
            _by_benchmark(seen, _items_of(facts, done.instance)),
            div("columns", *columns) if columns else Html(""),
            details("Hits, the strongest first", _samples(seen)) if seen.samples else Html(""),
            paragraph(about),
        ]
    )


def _read(facts: Facts, instance: str) -> _Seen:
    seen = _Seen()
    for dataset in facts.datasets:
        if instance not in facts.layers.get(dataset.name, {}):
            continue
        for shard in dataset.shards:
            layer = dataset.read_table(shard, ["doc_id", "url", *(f"{instance}.{c}" for c in COLUMNS)])
            layer = layer.rename_columns(["doc_id", "url", *COLUMNS])
            _count_canaries(seen, layer)
            for row in layer.filter(pc.fill_null(layer.column("hit"), False)).to_pylist():
                _count(seen, row)
    seen.samples.sort()
    seen.samples = [row[1:] for row in seen.samples[:SAMPLES]]
    return seen


def canaries(facts: Facts, instance: str) -> dict[str, tuple[int, int]]:
    """By kind of canary: how many pages were found, and how many were planted."""
    seen = _read(facts, instance)
    return {kind: (seen.caught[kind], seen.planted[kind]) for kind in CANARY_KINDS}


def _count(seen: _Seen, row: dict[str, Any]) -> None:
    methods: dict[tuple[str, str], str] = {}
    for found in row["found"]:
        key = (found["benchmark"], found["split"])
        seen.items[key].add(found["item"])
        methods.setdefault(key, found["method"])  # the strongest comes first
    for key, method in methods.items():
        seen.documents[key] += 1
        seen.methods[key][method] += 1
    seen.span_bytes += [s["end"] - s["start"] for s in row["spans"]]
    rank = f"{METHODS.index(row['method'])}{(1 << 40) - row['longest_run']:014d}{row['doc_id']}"
    name = f"{row['benchmark']}/{row['item']}" + (f" and {count(row['items'] - 1)} more" if row["items"] > 1 else "")
    where = row["url"] or row["doc_id"]
    seen.samples.append([rank, name, where, row["method"], count(row["longest_run"]), figure(row["coverage"])])


def _count_canaries(seen: _Seen, layer: pa.Table) -> None:
    planted = layer.filter(pc.fill_null(pc.match_substring(layer.column("url"), f"//{CANARY_HOST}/"), False))
    for row in planted.select(["url", "hit"]).to_pylist():
        kind = urlsplit(row["url"]).path.strip("/").partition("/")[0]
        if kind in CANARY_KINDS:
            seen.planted[kind] += 1
            seen.caught[kind] += bool(row["hit"])


def _items_of(facts: Facts, instance: str) -> Counter[tuple[str, str]]:
    """Items in the index by benchmark and split."""
    names = ["benchmark", "split", "item"]
    table = facts.root.read_table(f"{index_folder(instance)}/passages.parquet", names)
    return Counter((r["benchmark"], r["split"]) for r in table.group_by(names).aggregate([]).to_pylist())


def _by_benchmark(seen: _Seen, items: Counter[tuple[str, str]]) -> Html:
    keys = sorted(items.keys() | seen.documents.keys())
    rows = [
        [
            benchmark,
            split,
            count(items[benchmark, split]) if items[benchmark, split] else "",
            count(len(seen.items[benchmark, split])),
            percent(len(seen.items[benchmark, split]), items[benchmark, split]) if items[benchmark, split] else "",
            count(seen.documents[benchmark, split]),
            *(count(seen.methods[benchmark, split][method]) for method in METHODS),
        ]
        for benchmark, split in keys
    ]
    head = ["benchmark", "split", "items", "touched", "share", "documents", *METHODS]
    return table(head, rows, text_columns=2)


def _lengths(sizes: list[int]) -> list[tuple[str, list[tuple[str, float, str]], str]]:
    """Ranges by length in bytes, doubling."""
    powers, counts = np.unique(np.floor(np.log2(np.maximum(sizes, 1))).astype(int), return_counts=True)
    return [
        (f"{count(2**p)} to {count(2 ** (p + 1) - 1)} bytes", [("dropped", float(n), f"{count(n)} ranges")], count(n))
        for p, n in zip(powers.tolist(), counts.tolist(), strict=True)
    ]


def _canaries(seen: _Seen) -> Html:
    rows = [
        [
            kind,
            EXPECTED[kind],
            count(seen.planted[kind]),
            count(seen.caught[kind]),
            percent(seen.caught[kind], seen.planted[kind]),
        ]
        for kind in CANARY_KINDS
    ]
    return table(["canary", "expected", "planted", "caught", "share"], rows, text_columns=2)


def _samples(seen: _Seen) -> Html:
    return table(["item", "document", "method", "longest run", "coverage"], seen.samples, text_columns=3)
