"""Captures of equal URL and text in different units of a source: found by one shuffle over doc_id, numbered, published.

`number` sees the ids as first given and numbers later captures in the order of (shard, row). `publish` moves staged shards to
`documents/` and rewrites those with renumbered rows. The ids that a renumbered shard's rows had first lie beside it
(`renumbered/`), so numbering starts from the same ids however often it runs.

Cost: one shuffle of (doc_id, row), 48 bytes a document; the later captures themselves pass through the driver.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.engines.columns import key_starts
from core.engines.contract import Unit
from core.hashing import TableHash, numbered_id
from core.job import Job
from core.rows import local_of, pack, shard_of
from core.schema import DOCUMENTS
from core.storage import Root

NUMBERS = pa.schema([("doc_id", pa.large_string()), ("row", pa.int64()), ("new_id", pa.large_string())])


def number(job: Job, made: dict[str, dict[str, Any]]) -> dict[str, dict[int, str]]:
    """shard -> {row: new doc_id} for captures whose URL and text came before in another unit's shard."""
    names = sorted(shard for m in made.values() for shard in m["shards"])
    ingested = {shard: out["ingested"] for m in made.values() for shard, out in m["shards"].items()}
    units = [Unit(name, (i, name, ingested[name])) for i, name in enumerate(names)]
    if not units:
        return {}
    scan = partial(_scan_ids, job.root, job.source_name)
    frame = job.engine.scan(scan, units, NUMBERS, f"{job.source_name}: ids")
    renamed = job.engine.shuffle(
        frame, ["doc_id"], _later_captures, NUMBERS, order=["row"], label=f"{job.source_name}: number"
    )
    table = job.engine.collect(renamed)
    out: dict[str, dict[int, str]] = {}
    rows = table.column("row").to_numpy()
    for shard, local, new in zip(shard_of(rows), local_of(rows), table.column("new_id").to_pylist(), strict=True):
        out.setdefault(names[int(shard)], {})[int(local)] = new
    return out


def _scan_ids(root: Root, dataset: str, unit: Unit) -> Iterator[pa.RecordBatch]:
    """The ids as first given, before any renumbering."""
    ordinal, shard, ingested = unit.payload
    ids = root.read_table(_place(root, dataset, shard), ["doc_id"]).column("doc_id").combine_chunks()
    changed = _first_ids(root, dataset, shard, ingested)
    if changed:
        values = ids.to_pylist()
        for row, old in changed.items():
            values[row] = old
        ids = pa.array(values, pa.large_string())
    nothing = pa.nulls(len(ids), pa.large_string())
    yield pa.record_batch([ids, pa.array(pack(0, ordinal, len(ids))), nothing], schema=NUMBERS)


def _later_captures(table: pa.Table) -> pa.Table:
    """Of rows sorted by (doc_id, row): all but the first of each id, with their new ids."""
    starts = key_starts(table, ["doc_id"])
    first = np.flatnonzero(starts)
    rank = np.arange(len(starts)) - np.repeat(first, np.diff(np.append(first, len(starts))))
    later = table.filter(pa.array(rank > 0))
    new = [
        numbered_id(f"{i}+", int(n)) for i, n in zip(later.column("doc_id").to_pylist(), rank[rank > 0], strict=True)
    ]
    return later.set_column(2, "new_id", pa.array(new, pa.large_string()))


def publish(job: Job, made: dict[str, Any], renumbered: dict[str, dict[int, str]]) -> dict[str, dict[str, Any]]:
    """Give every shard its place and its ids; outputs for the manifest, by shard."""
    outputs: dict[str, dict[str, Any]] = {}
    root, dataset = job.root, job.source_name
    for m in made.values():
        for shard, out in m["shards"].items():
            final, wanted = f"datasets/{dataset}/documents/{shard}.parquet", renumbered.get(shard, {})
            given = _first_ids(root, dataset, shard, out["ingested"])
            source = _place(root, dataset, shard)
            if wanted or given:
                out = {**out, **_rewrite(root, dataset, shard, out["ingested"], given, wanted)}
            elif source != final:
                root.rename(source, final)
            outputs[shard] = out
            m["shards"][shard] = out
    return dict(sorted(outputs.items()))


def _rewrite(
    root: Root, dataset: str, shard: str, ingested: str, given: dict[int, str], wanted: dict[int, str]
) -> dict[str, Any]:
    """Copy a shard with the ids that `wanted` names; `given` maps rows renumbered earlier to the ids they had first."""
    source, final = _place(root, dataset, shard), f"datasets/{dataset}/documents/{shard}.parquet"
    at, rows, text_bytes = 0, 0, 0
    running = TableHash(DOCUMENTS)
    note = {"ingested": ingested}

    def batches() -> Iterator[pa.Table]:
        nonlocal at, rows, text_bytes
        with root.parquet(source) as f:
            for group in range(f.num_row_groups):
                table = f.read_row_group(group)
                ids = table.column("doc_id").to_pylist()
                for i in range(len(ids)):
                    row = at + i
                    ids[i] = wanted.get(row, given.get(row, ids[i]))
                at += len(ids)
                table = table.set_column(0, DOCUMENTS.field("doc_id"), pa.array(ids, pa.large_string()))
                rows, text_bytes = rows + table.num_rows, text_bytes + _text_bytes(table)
                running.update(table)
                yield table
        note["content"] = running.hexdigest()

    # Written before the shard changes: a run killed between the two still knows the first ids.
    with root.parquet(source) as f:
        ids = f.read(columns=["doc_id"]).column("doc_id").to_pylist()
    keep = {str(row): given.get(row, ids[row]) for row in {*given, *wanted}}
    root.write_json(ids_name(dataset, shard), {"ingested": ingested, "ids": keep})
    root.write_table(final, batches(), DOCUMENTS, note)
    if source != final:
        root.remove(source)
    return {"rows": rows, "text_bytes": text_bytes, "content": running.hexdigest()}


def _first_ids(root: Root, dataset: str, shard: str, ingested: str) -> dict[int, str]:
    """row -> first id, for rows of this very shard (as ingested, not of an earlier one of that name) that were renumbered."""
    try:
        kept = root.read_json(ids_name(dataset, shard))
    except FileNotFoundError:
        return {}
    return {int(row): old for row, old in kept["ids"].items()} if kept["ingested"] == ingested else {}


def ids_name(dataset: str, shard: str) -> str:
    return f"datasets/{dataset}/renumbered/{shard}.json"


def _place(root: Root, dataset: str, shard: str) -> str:
    """Where a shard lies now: staged, or (also after a kill in the middle of publishing) already published."""
    staged = f"{staging(dataset)}/{shard}.parquet"
    return staged if root.exists(staged) else f"datasets/{dataset}/documents/{shard}.parquet"


def staging(dataset: str) -> str:
    return f"exchange/ingest-{dataset}"


def _text_bytes(table: pa.Table) -> int:
    return int(pc.sum(pc.binary_length(table.column("text"))).as_py() or 0)
