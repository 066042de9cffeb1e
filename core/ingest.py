"""Ingest: records become documents shards, drops and rejects; each unit of input commits by itself.

Phase one (`IngestUnits`, one call a unit, on workers): records are parsed, written to staged shards of at most 256 MB of text
or a million rows, and a unit file is committed last. Phase two (`number`): a shuffle over doc_id finds captures of equal URL and
text in different units and numbers them in shard order. Phase three: staged shards move to `documents/`, those with renumbered
rows are rewritten. Units whose input and code are unchanged keep the shards they have.

The ids that a renumbered shard's rows had first lie beside it (`renumbered/`), so numbering starts from the same ids however
often it runs.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import DOCUMENTS_INSTANCE
from core.engines.columns import key_starts
from core.engines.contract import Note, Report, Unit
from core.errors import RetryableError, StageError
from core.hashing import TableHash, digest, document_id, numbered_id
from core.job import Job, Outcome, total
from core.manifest import read_manifest
from core.records import Dropped, Failed, Found, Origin, Raw
from core.rows import local_of, pack, shard_of
from core.schema import DOCUMENTS, DROPS, REJECTS
from core.storage import ROW_GROUP_BYTES, Root

SHARD_TEXT_BYTES = 256 << 20
SHARD_ROWS = 1_000_000
DETAIL_CHARS = 300
REJECT_FLOOR = 20  # rejects a dataset may always have
REJECT_FRACTION = 0.001  # and this share of its records, before the stage fails


@dataclass(frozen=True)
class Reader:
    """A source as ingest sees it: four picklable functions (see `core.records`)."""

    name: str
    units: Callable[[], list[Unit]]
    records: Callable[[Unit], Iterator[Raw | Dropped | Failed]]
    parse: Callable[[Raw], Found | Dropped]
    input_digest: Callable[[Unit], str]


@dataclass(frozen=True)
class IngestUnits:
    """The function the engine runs on each unit of input."""

    root: Root
    reader: Reader
    code: str
    staged: str  # folder below the root
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # unit -> what the last manifest says of it

    def __call__(self, unit: Unit, note: Note) -> Report:
        identity = digest([self.code, self.reader.input_digest(unit)])
        done = self.known.get(unit.name)
        if done is not None and done["unit"] == identity:
            return Report(unit.name, docs=_rows(done), resumed=True, value=done)
        commit = f"{self.staged}/{unit.name}.json"
        if self.root.exists(commit):
            done = self.root.read_json(commit)
            if done["unit"] == identity:
                return Report(unit.name, docs=_rows(done), resumed=True, value=done)
        done = self._read(unit, identity, note)
        self.root.write_json(commit, done)
        return Report(unit.name, docs=_rows(done), bytes=unit.bytes, value=done)

    def _read(self, unit: Unit, identity: str, note: Note) -> dict[str, Any]:
        drops: list[Dropped] = []
        rejects: list[Failed] = []
        writer = _ShardWriter(self.root, self.staged, unit.name)
        seen: dict[str, int] = {}
        surrogates = 0
        for i, raw in enumerate(self.reader.records(unit)):
            if not isinstance(raw, Raw):
                (drops if isinstance(raw, Dropped) else rejects).append(raw)  # type: ignore[arg-type]
                continue
            if unit.cautious:
                note(row=i)
            found = self._parse(raw, i in unit.poison)
            if isinstance(found, Dropped):
                drops.append(found)
            elif isinstance(found, Failed):
                rejects.append(found)
            else:
                row, replaced = document_row(self.reader.name, found, seen)
                surrogates += replaced
                size = writer.add(row)
                note(docs=1, bytes=size)
        shards = writer.close()
        self._write_side("drops", unit.name, _drops_table(drops), DROPS)
        self._write_side("rejects", unit.name, _rejects_table(rejects), REJECTS)
        counts: dict[str, int] = {}
        for d in drops:
            counts[d.reason] = counts.get(d.reason, 0) + 1
        return {
            "unit": identity,
            "shards": shards,
            "drops": counts,
            "rejects": len(rejects),
            "surrogates": surrogates,
        }

    def _parse(self, raw: Raw, poisoned: bool) -> Found | Dropped | Failed:
        if poisoned:
            return Failed(raw.origin, "worker_lost", "the worker died or hung on this record")
        try:
            return self.reader.parse(raw)
        except (MemoryError, RetryableError):
            raise
        except Exception as e:  # noqa: BLE001 - whatever one record does, it costs that record only
            return Failed(raw.origin, type(e).__name__, str(e)[:DETAIL_CHARS])

    def _write_side(self, folder: str, unit: str, table: pa.Table, schema: pa.Schema) -> None:
        name = side_name(folder, self.reader.name, unit)
        if table.num_rows:
            self.root.write_table(name, [table], schema)
        elif self.root.exists(name):
            self.root.remove(name)


def side_name(folder: str, dataset: str, unit: str) -> str:
    """Where the drops or rejects of one ingest unit lie."""
    return f"datasets/{dataset}/{folder}/documents/{unit}.parquet"


def ingest(job: Job, reader: Reader, code: str) -> Outcome:
    """Run all three phases for one source; the outcome becomes the documents manifest."""
    staged = staging(reader.name)
    before = read_manifest(job.root, DOCUMENTS_INSTANCE, reader.name)
    known = before.units if before else {}
    units = reader.units()
    work = IngestUnits(job.root, reader, code, staged, known)
    reports = job.engine.run_units(work, units, f"{reader.name}: {job.instance}")
    made = {u.name: r.value for u, r in zip(units, reports, strict=True)}
    _forget_stale(job.root, staged, known, made)
    check_budget(job.instance, reader.name, sum(m["rejects"] for m in made.values()), _records(made))
    renumbered = number(job, made)
    outputs = _publish(job, made, renumbered)
    drops: dict[str, int] = {}
    for m in made.values():
        for reason, n in m["drops"].items():
            drops[reason] = drops.get(reason, 0) + n
    accounts = {
        "records": _records(made),
        "drops": sum(drops.values()),
        "rejects": sum(m["rejects"] for m in made.values()),
        "documents": sum(out["rows"] for out in outputs.values()),
        **{f"drops.{reason}": n for reason, n in sorted(drops.items())},
    }
    observed = {
        **total(reports),
        "surrogates_replaced": sum(m["surrogates"] for m in made.values()),
        "renumbered_docs": sum(map(len, renumbered.values())),
    }
    return Outcome(
        outputs=outputs,
        accounts=accounts,
        observed=observed,
        units=made,
        cleanup=[staged, *_old_names(reader.name, known, made, outputs)],
    )


def check_budget(instance: str, dataset: str, rejects: int, records: int) -> None:
    """Stop the stage when it rejected more than max(20, 0.1%) of its records: that is a fault, not bad luck."""
    budget = max(REJECT_FLOOR, int(records * REJECT_FRACTION))
    if rejects > budget:
        raise StageError(
            f"{instance}: {rejects:,} of {records:,} records of {dataset} were rejected, expected at most {budget:,}; "
            f"read datasets/{dataset}/rejects/ for the reasons, mend the cause and run again"
        )


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


def _publish(job: Job, made: dict[str, Any], renumbered: dict[str, dict[int, str]]) -> dict[str, dict[str, Any]]:
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

    # Written before the shard changes: a run killed between the two still knows the first ids.
    with root.parquet(source) as f:
        ids = f.read(columns=["doc_id"]).column("doc_id").to_pylist()
    keep = {str(row): given.get(row, ids[row]) for row in {*given, *wanted}}
    root.write_json(_ids_name(dataset, shard), {"ingested": ingested, "ids": keep})
    root.write_table(final, batches(), DOCUMENTS, {})
    if source != final:
        root.remove(source)
    return {"rows": rows, "text_bytes": text_bytes, "content": running.hexdigest()}


def _first_ids(root: Root, dataset: str, shard: str, ingested: str) -> dict[int, str]:
    """row -> first id, for rows of this very shard (as ingested, not of an earlier one of that name) that were renumbered."""
    try:
        kept = root.read_json(_ids_name(dataset, shard))
    except FileNotFoundError:
        return {}
    return {int(row): old for row, old in kept["ids"].items()} if kept["ingested"] == ingested else {}


def _ids_name(dataset: str, shard: str) -> str:
    return f"datasets/{dataset}/renumbered/{shard}.json"


def _place(root: Root, dataset: str, shard: str) -> str:
    """Where a shard lies now: staged, or (also after a kill in the middle of publishing) already published."""
    staged = f"{staging(dataset)}/{shard}.parquet"
    return staged if root.exists(staged) else f"datasets/{dataset}/documents/{shard}.parquet"


def staging(dataset: str) -> str:
    return f"exchange/ingest-{dataset}"


def _forget_stale(root: Root, staged: str, known: dict[str, Any], made: dict[str, Any]) -> None:
    """Remove what an aborted run on other input staged for units that now keep their published shards."""
    for unit, m in made.items():
        if m == known.get(unit):
            for shard in m["shards"]:
                root.remove(f"{staged}/{shard}.parquet")


def _old_names(dataset: str, known: dict[str, Any], made: dict[str, Any], outputs: dict[str, Any]) -> list[str]:
    """Shards and side files of inputs that are gone or were read anew under other names; removed once the manifest is."""
    names = []
    for unit, old in known.items():
        for shard in old["shards"]:
            if shard not in outputs:
                names += [f"datasets/{dataset}/documents/{shard}.parquet", _ids_name(dataset, shard)]
        if unit not in made:
            names += [side_name(folder, dataset, unit) for folder in ("drops", "rejects")]
    return names


def document_row(source: str, found: Found, seen: dict[str, int]) -> tuple[dict[str, Any], int]:
    """A row of `DOCUMENTS` and the number of lone surrogates replaced. `seen` counts equal captures within the unit."""
    text, replaced = well_formed(found.text)
    url = well_formed(found.url)[0] if found.url is not None else None
    base = document_id(source, url if url is not None else found.origin.path, text)
    ordinal = seen.get(base, 0)
    seen[base] = ordinal + 1
    metadata = json.dumps(found.metadata, sort_keys=True, ensure_ascii=False, default=str)
    row = {
        "doc_id": numbered_id(base, ordinal),
        "text": text,
        "url": url,
        "source": source,
        "kind": found.kind,
        "license": found.license,
        "fetched_at": found.fetched_at,
        "origin": _origin(found.origin),
        "metadata": well_formed(metadata)[0],
    }
    return row, replaced


def well_formed(text: str) -> tuple[str, int]:
    """`text` with lone surrogates as U+FFFD, and how many there were: Arrow and every tokenizer refuse them."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        count = sum("\ud800" <= c <= "\udfff" for c in text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), count


class _ShardWriter:
    """Rolls shards at 256 MB of text or a million rows; row groups at 16 MB of text."""

    def __init__(self, root: Root, folder: str, unit: str) -> None:
        self.root, self.folder, self.unit = root, folder, unit
        self.shards: dict[str, dict[str, Any]] = {}
        self._groups: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = self._shard_bytes = self._shard_rows = 0

    def add(self, row: dict[str, Any]) -> int:
        size = len(row["text"].encode())
        if self._shard_rows and (self._shard_bytes + size > SHARD_TEXT_BYTES or self._shard_rows >= SHARD_ROWS):
            self._roll()
        self._rows.append(row)
        self._group_bytes += size
        self._shard_bytes += size
        self._shard_rows += 1
        if self._group_bytes >= ROW_GROUP_BYTES:
            self._flush()
        return size

    def close(self) -> dict[str, dict[str, Any]]:
        if self._shard_rows:
            self._roll()
        return self.shards

    def _flush(self) -> None:
        if self._rows:
            self._groups.append(pa.Table.from_pylist(self._rows, schema=DOCUMENTS))
        self._rows, self._group_bytes = [], 0

    def _roll(self) -> None:
        self._flush()
        name = f"{self.unit}-{len(self.shards):05d}"
        running = TableHash(DOCUMENTS)
        for table in self._groups:
            running.update(table)
        self.root.write_table(f"{self.folder}/{name}.parquet", self._groups, DOCUMENTS, {})
        content = running.hexdigest()
        self.shards[name] = {
            "rows": self._shard_rows,
            "text_bytes": self._shard_bytes,
            "content": content,
            "ingested": content,
        }
        self._groups, self._shard_bytes, self._shard_rows = [], 0, 0


def _origin(origin: Origin) -> dict[str, Any]:
    return {"path": well_formed(origin.path)[0], "offset": origin.offset, "length": origin.length}


def _drops_table(drops: Iterable[Dropped]) -> pa.Table:
    rows = [{"origin": _origin(d.origin), "url": d.url, "reason": d.reason, "detail": d.detail} for d in drops]
    return pa.Table.from_pylist(rows, schema=DROPS)


def _rejects_table(rejects: Iterable[Failed]) -> pa.Table:
    rows = [{"doc_id": None, "origin": _origin(r.origin), "reason": r.reason, "detail": r.detail} for r in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def _text_bytes(table: pa.Table) -> int:
    return int(pc.sum(pc.binary_length(table.column("text"))).as_py() or 0)


def _rows(done: dict[str, Any]) -> int:
    return sum(s["rows"] for s in done["shards"].values())


def _records(made: dict[str, dict[str, Any]]) -> int:
    return sum(_rows(m) + m["rejects"] + sum(m["drops"].values()) for m in made.values())
