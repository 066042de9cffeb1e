"""What `rebalance` trimmed: each cluster before and after, how even they are, and what the largest are about.

Out, below `relations/<instance>/`:

- `clusters.parquet`  cluster, docs, amount, quota, kept_docs, kept_amount; one row for each cluster that has documents
- `report.json`       totals, Gini coefficient and effective clusters before and after, totals by dataset, and the `SHOWN` largest
                      clusters by amount with their datasets and the first documents by rank
"""

import json
import operator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset
from core.engines.contract import Frame
from core.hashing import digest, table_digest
from core.job import Job, Outcome
from core.rows import dataset_of, local_of, shard_of
from mixtures.quotas import effective, gini

SHOWN = 20  # clusters in the report
SAMPLES = 5  # documents of each
TITLE_CHARS = 100
CLUSTERS = pa.schema(
    [(name, pa.int64()) for name in ("cluster", "docs", "amount", "quota", "kept_docs", "kept_amount")]
)


def kept_of(clusters: int, ranked: pa.Table) -> np.ndarray:
    """int64 [clusters, 2]: documents and amount within quota, by cluster."""
    kept = ranked.filter(ranked.column("within_quota"))
    cluster = kept.column("cluster").to_numpy()
    out = np.zeros((clusters, 2), dtype=np.int64)
    out[:, 0] = np.bincount(cluster, minlength=clusters)
    np.add.at(out[:, 1], cluster, kept.column("amount").to_numpy())
    return out


def by_dataset(shown: np.ndarray, datasets: int, ranked: pa.Table) -> np.ndarray:
    """int64 [len(shown) + 1, datasets, 2]: documents and kept documents of the shown clusters, and of all in the last line."""
    place = np.full(max(int(shown.max(initial=-1)), int(pc.max(ranked.column("cluster")).as_py() or 0)) + 1, -1)
    place[shown] = np.arange(len(shown))
    line = place[ranked.column("cluster").to_numpy()]
    dataset = dataset_of(ranked.column("row").to_numpy())
    kept = np.asarray(ranked.column("within_quota").combine_chunks())
    out = np.zeros((len(shown) + 1, datasets, 2), dtype=np.int64)
    for column, chosen in ((0, np.ones(len(kept), bool)), (1, kept)):
        here = chosen & (line >= 0)
        np.add.at(out[:, :, column], (line[here], dataset[here]), 1)
        out[-1, :, column] = np.bincount(dataset[chosen], minlength=datasets)
    return out


def first_of(shown: np.ndarray, ranked: pa.Table) -> pa.Table:
    """The first `SAMPLES` documents of the shown clusters."""
    early = pc.less(ranked.column("rank_in_cluster"), SAMPLES)
    return ranked.filter(pc.and_(early, pc.is_in(ranked.column("cluster"), value_set=pa.array(shown, pa.int32()))))


def write_trim(job: Job, ranked: Frame, sizes: np.ndarray, quotas: np.ndarray, outcome: Outcome) -> dict[str, Any]:
    """Write both files, name them in `outcome.outputs`, and return the report."""
    engine, label = job.engine, job.instance
    kept = engine.fold(ranked, partial(kept_of, len(sizes)), operator.add, f"{label}: kept")
    kept = np.zeros_like(sizes) if kept is None else kept
    some = np.flatnonzero(sizes[:, 0])
    columns = [some, sizes[some, 0], sizes[some, 1], quotas[some], kept[some, 0], kept[some, 1]]
    table = pa.Table.from_arrays([pa.array(c) for c in columns], schema=CLUSTERS)
    shown = some[np.lexsort((some, -sizes[some, 0], -sizes[some, 1]))][:SHOWN]
    ordinals = 1 + max((d.ordinal for d in job.datasets), default=0)
    parts = engine.fold(ranked, partial(by_dataset, shown, ordinals), operator.add, f"{label}: datasets")
    parts = np.zeros((1, ordinals, 2), np.int64) if parts is None else parts
    samples = engine.collect(engine.map(ranked, partial(first_of, shown), ranked.schema, f"{label}: samples"))
    report = {
        **_totals(sizes, kept),
        "rule": job.config.rule,
        "amount": job.config.amount or "documents",
        "datasets": _counts(job, parts[-1]),
        "largest": [
            {
                "cluster": int(c),
                "docs": int(sizes[c, 0]),
                "kept_docs": int(kept[c, 0]),
                "amount": int(sizes[c, 1]),
                "quota": int(quotas[c]),
                "datasets": _counts(job, parts[i]),
                "samples": titles(job.datasets, samples.filter(pc.equal(samples.column("cluster"), int(c)))),
            }
            for i, c in enumerate(shown)
        ],
    }
    for name, content in (("clusters.parquet", table_digest(table)), ("report.json", digest(report))):
        outcome.outputs[f"relations/{label}/{name}"] = {"content": content, "rows": table.num_rows}
    job.root.write_table(f"relations/{label}/clusters.parquet", [table], CLUSTERS, {"unit": job.identity})
    job.root.write_json(f"relations/{label}/report.json", report)
    return report


def _totals(sizes: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Evenness is that of amounts."""
    return {
        "clusters": int((sizes[:, 0] > 0).sum()),
        "docs": int(sizes[:, 0].sum()),
        "kept_docs": int(kept[:, 0].sum()),
        "total_amount": int(sizes[:, 1].sum()),
        "kept_amount": int(kept[:, 1].sum()),
        "gini": round(gini(sizes[:, 1]), 6),
        "kept_gini": round(gini(kept[:, 1]), 6),
        "effective": round(effective(sizes[:, 1]), 3),
        "kept_effective": round(effective(kept[:, 1]), 3),
    }


def _counts(job: Job, part: np.ndarray) -> dict[str, dict[str, int]]:
    """Documents and kept documents by dataset, datasets without any left out."""
    found = ((d.name, part[d.ordinal].tolist()) for d in job.datasets)
    return {name: {"docs": docs, "kept_docs": kept} for name, (docs, kept) in found if docs}


def titles(datasets: tuple[Dataset, ...], samples: pa.Table) -> list[dict[str, Any]]:
    """doc_id, URL and title (or first words) of sampled rows, by rank; one row group of a shard is read for each."""
    by_ordinal = {d.ordinal: d for d in datasets}
    rows = samples.sort_by("rank_in_cluster").column("row").to_numpy()
    return [
        _title(by_ordinal[int(d)], int(s), int(r))
        for d, s, r in zip(dataset_of(rows), shard_of(rows), local_of(rows), strict=True)
    ]


def _title(dataset: Dataset, shard: int, row: int) -> dict[str, Any]:
    with dataset.root.parquet(dataset.documents_name(dataset.shards[shard])) as f:
        for group in range(f.num_row_groups):
            rows = f.metadata.row_group(group).num_rows
            if row < rows:
                table = f.read_row_group(group, columns=["doc_id", "url", "text", "metadata"], use_threads=False)
                found = table.slice(row, 1).to_pylist()[0]
                break
            row -= rows
    title = json.loads(found["metadata"]).get("title")
    words = " ".join((title if isinstance(title, str) and title.strip() else found["text"][:1000]).split())
    return {"doc_id": found["doc_id"], "url": found["url"], "title": words[:TITLE_CHARS]}
