"""What is shown of single documents and records: text of sampled rows, drops at ingest, rejects, similarities of pairs.

Text is read a row group at a time and only where a sampled document lies: at most ten groups of 16 MB for each reason.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.hashing import seeded
from core.ingest import side_name
from core.manifest import Manifest
from mixtures.policy import withdrawn_rows
from mixtures.released import applied
from pipelines.report.accounts import Facts
from pipelines.report.measure import SAMPLES, SEED, Measures, Picked

PREVIEW_CHARS = 300
REJECT_FILES = 500  # read for the table of rejects, in seeded order; beyond, the report says that it shows a part
WITHDRAWN_TITLE = "taken down, not shown"
SIMILARITY_EDGES = np.linspace(0, 1, 41)


@dataclass(frozen=True)
class Shown:
    """A document as it is shown."""

    picked: Picked
    dataset: str
    url: str | None
    title: str | None
    chars: int
    preview: str


@dataclass(frozen=True)
class Dropped:
    """A record that became no document, as it is shown."""

    dataset: str
    reason: str
    path: str
    offset: int | None
    url: str | None
    detail: str | None


def shown(facts: Facts, measures: Measures) -> dict[str, Shown]:
    """Every picked document by doc_id."""
    picked = [p for ps in measures.picked.values() for p in ps]
    picked += [p for groups in measures.largest.values() for _, ps in groups.values() for p in ps]
    by_shard: dict[tuple[int, int], set[Picked]] = {}
    for p in picked:
        by_shard.setdefault((p.dataset, p.shard), set()).add(p)
    out: dict[str, Shown] = {}
    for place in sorted(by_shard):
        rows = sorted({p.row: p for p in by_shard[place]}.items())
        out.update({s.picked.doc_id: s for s in _read(facts, place, [p for _, p in rows])})
    return out


def _read(facts: Facts, place: tuple[int, int], picked: Sequence[Picked]) -> Iterable[Shown]:
    """Documents of one shard, in row order, their texts with all spans applied: a report is passed on like any release."""
    dataset = facts.datasets[place[0]]
    shard = dataset.shards[place[1]]
    layers = [name for name in facts.layers[dataset.name] if "spans" in dataset.layer_columns(name)]
    with facts.root.parquet(dataset.documents_name(shard)) as f:
        ends = np.cumsum([f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)])
        groups = np.searchsorted(ends, [p.row for p in picked], side="right")
        for g in np.unique(groups).tolist():
            mine = [p for p, group in zip(picked, groups, strict=True) if group == g]
            table = f.read_row_group(g, columns=["doc_id", "text", "url", "metadata"], use_threads=False)
            first = int(ends[g - 1]) if g else 0
            table = table.take(pa.array([p.row - first for p in mine]))
            for name in layers:
                spans = dataset.read_layer(name, shard, ["spans"]).column("spans").take(pa.array([p.row for p in mine]))
                table = table.append_column(f"{name}.spans", spans)
            yield from _shown(facts, dataset.name, mine, table, [f"{name}.spans" for name in layers])


def _shown(facts: Facts, dataset: str, picked: list[Picked], table: pa.Table, spans: list[str]) -> Iterable[Shown]:
    """Rows of `table` as they are shown; of a document that was taken down nothing but its id."""
    listed = pa.array(sorted(facts.withdrawn), pa.large_string())
    hidden = withdrawn_rows(table, listed)
    texts = applied(table.combine_chunks().to_batches()[0], spans)
    urls, metadata = (table.column(c).to_pylist() for c in ("url", "metadata"))
    for p, text, url, about, gone in zip(picked, texts, urls, metadata, hidden, strict=True):
        if gone or p.reason == "withdrawn":
            yield Shown(p, dataset, None, WITHDRAWN_TITLE, 0, "")
        else:
            yield Shown(p, dataset, url, _title(about), len(text), text[:PREVIEW_CHARS])


def _title(metadata: str) -> str | None:
    found = json.loads(metadata).get("title")
    return str(found) if found else None


def drop_samples(facts: Facts) -> dict[str, list[Dropped]]:
    """Ten records of each reason that ingest dropped. Files are chosen by the hash of their unit's name, rows by the hash of
    their origin: not quite every record alike, but without reading more than ten files for each reason and dataset."""
    found: dict[str, list[tuple[float, Dropped]]] = {}
    for dataset in facts.names:
        manifest = facts.documents(dataset)
        for unit, reasons in sorted(_chosen_units(manifest).items()) if manifest else ():
            for row in facts.root.read_table(side_name("drops", dataset, unit)).to_pylist():
                if row["reason"] not in reasons:
                    continue
                o = row["origin"]
                rank = seeded(SEED, f"{dataset}/{o['path']}#{o['offset']}")
                d = Dropped(dataset, row["reason"], o["path"], o["offset"], row["url"], row["detail"])
                best = sorted([*found.get(d.reason, []), (rank, d)], key=lambda x: (x[0], x[1].path))
                found[d.reason] = best[:SAMPLES]
    return {reason: [d for _, d in best] for reason, best in found.items()}


def _chosen_units(manifest: Manifest) -> dict[str, set[str]]:
    """Unit -> reasons to read of it: for each reason the ten units of lowest rank that dropped a record for it."""
    by_reason: dict[str, list[str]] = {}
    for unit, m in manifest.units.items():
        for reason in m["drops"]:
            by_reason.setdefault(reason, []).append(unit)
    chosen: dict[str, set[str]] = {}
    for reason, units in by_reason.items():
        for unit in sorted(units, key=lambda u: (seeded(SEED, u), u))[:SAMPLES]:
            chosen.setdefault(unit, set()).add(reason)
    return chosen


@dataclass(frozen=True)
class Rejects:
    """How often a stage failed on records of a dataset, by reason, with one message of each."""

    stage: str
    dataset: str
    total: int
    reasons: dict[str, tuple[int, str]]
    read: int  # rejects that the reasons were counted on


def rejects(facts: Facts) -> list[Rejects]:
    """Every stage and dataset with rejects."""
    out = []
    for dataset in facts.datasets:
        manifest = facts.documents(dataset.name)
        if manifest and manifest.accounts["rejects"]:
            names = [side_name("rejects", dataset.name, u) for u, m in manifest.units.items() if m["rejects"]]
            rows = [(r["reason"], r["detail"]) for n in _some(names) for r in facts.root.read_table(n).to_pylist()]
            out.append(_counted("ingest", dataset.name, manifest.accounts["rejects"], rows))
        for layer, made in facts.layers[dataset.name].items():
            total = made.accounts.get("rejected", 0)
            if total:
                names = [dataset.layer_name(layer, s) for s in dataset.shards if made.outputs[s.name]["rejected"]]
                errors = [facts.root.read_table(n, ["error"]).column("error").drop_null() for n in _some(names)]
                rows = [(e.partition(":")[0], e) for column in errors for e in column.to_pylist()]
                out.append(_counted(layer, dataset.name, total, rows))
    return out


def _some(names: list[str]) -> list[str]:
    return sorted(names, key=lambda n: (seeded(SEED, n), n))[:REJECT_FILES]


def _counted(stage: str, dataset: str, total: int, rows: list[tuple[str, str | None]]) -> Rejects:
    counts = Counter(reason for reason, _ in rows)
    example = {reason: detail or "" for reason, detail in sorted(rows, key=lambda r: (r[0], r[1] or ""), reverse=True)}
    ordered = sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    return Rejects(stage, dataset, total, {r: (n, example[r]) for r, n in ordered}, len(rows))


@dataclass(frozen=True)
class Similarities:
    """All verified pairs: how alike they are, and for some documents their best pair."""

    pairs: int
    counts: np.ndarray  # by SIMILARITY_EDGES
    best: dict[str, float]


def similarities(facts: Facts, wanted: Iterable[str]) -> Similarities | None:
    """Read the relation of `minhash` a row group at a time. None where there is none."""
    done = facts.of("minhash")
    if done is None:
        return None
    ids = pa.array(sorted(set(wanted)), pa.large_string())
    found = Similarities(0, np.zeros(len(SIMILARITY_EDGES) - 1, np.int64), {})
    for name in sorted(n for n in done.manifest.outputs if n.endswith(".parquet")):
        with facts.root.parquet(name) as f:
            for g in range(f.num_row_groups):
                table = f.read_row_group(g, columns=["a", "b", "jaccard"], use_threads=False)
                values = np.asarray(table.column("jaccard").cast(pa.float64()))
                found = Similarities(
                    found.pairs + len(values), found.counts + np.histogram(values, SIMILARITY_EDGES)[0], found.best
                )
                _note_best(found.best, table, ids)
    return found


def _note_best(best: dict[str, float], table: pa.Table, ids: pa.Array) -> None:
    for side in ("a", "b"):
        rows = table.filter(pc.is_in(table.column(side), value_set=ids))
        for row in rows.to_pylist():
            best[row[side]] = max(best.get(row[side], 0.0), row["jaccard"])


def metrics(facts: Facts, folder: str) -> list[dict[str, Any]]:
    """Rows of a model's `metrics.jsonl`; a last line that a kill cut short is left out, no file is no rows."""
    name = f"{folder}/metrics.jsonl"
    if not facts.root.exists(name):
        return []
    return [json.loads(line) for line in facts.root.read_bytes(name).split(b"\n")[:-1]]
