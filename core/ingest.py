"""Ingest: records become documents shards, drops and rejects; each unit of input commits by itself.

Phase one (`IngestUnits`, one call a unit, on workers): records are parsed, written to staged shards of at most 256 MB of text
or a million rows, and a unit file is committed last. Phase two (`number`): a shuffle over doc_id finds captures of equal URL and
text in different units and numbers them in shard order. Phase three: staged shards move to `documents/`, those with renumbered
rows are rewritten. Units whose input and code are unchanged keep the shards they have.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pyarrow as pa

from core.captures import ids_name, number, publish, staging
from core.dataset import DOCUMENTS_INSTANCE
from core.engines.contract import NO_ROW, Note, Report, Unit
from core.errors import ConfigError, RetryableError, StageError
from core.hashing import TableHash, digest, document_id, numbered_id
from core.job import Job, Outcome, total
from core.manifest import read_manifest
from core.records import Dropped, Failed, Found, Origin, Raw, well_formed
from core.schema import DOCUMENTS, DROPS, REJECTS
from core.storage import ROW_GROUP_BYTES, Root

SHARD_TEXT_BYTES = 256 << 20
SHARD_ROWS = 1_000_000
ROW_GROUP_ROWS = 65_536  # rows wait as Python objects until their group is full: at most about 100 MB of short ones
DETAIL_CHARS = 300
REJECT_FLOOR = 20  # rejects a dataset may always have
REJECT_FRACTION = 0.001  # and this share of its records, before the stage fails

log = logging.getLogger("stepwell")


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
        if done is not None and done["unit"] == identity and self._published(done):
            for shard in done["shards"]:
                self.root.remove(f"{self.staged}/{shard}.parquet")  # from an aborted run on other input
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
            if unit.poison and i == unit.poison[-1]:  # those that killed before it were named before
                where = f"{raw.origin.path}, byte {raw.origin.offset}"
                log.warning("%s: record at %s (%s) ended its worker and is rejected", self.reader.name, where, raw.url)
            found = self._parse(raw, i in unit.poison, seen)
            if unit.cautious:
                note(row=NO_ROW)  # a death while the next record is read is not this one's fault
            if isinstance(found, Dropped):
                drops.append(found)
                note()
            elif isinstance(found, Failed):
                rejects.append(found)
                note()
            else:
                row, replaced = found
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

    def _published(self, done: dict[str, Any]) -> bool:
        """Whether the files are those the manifest means: a run on other input may have been killed while it published."""
        dataset = self.reader.name
        notes = {shard: self.root.note(f"datasets/{dataset}/documents/{shard}.parquet") for shard in done["shards"]}
        return all(note and note["ingested"] == done["shards"][shard]["ingested"] for shard, note in notes.items())

    def _parse(self, raw: Raw, poisoned: bool, seen: dict[str, int]) -> tuple[dict[str, Any], int] | Dropped | Failed:
        """A row of `DOCUMENTS` and the lone surrogates replaced in it, or why there is none."""
        if poisoned:
            return Failed(raw.origin, "worker_lost", "the worker died or hung on this record")
        try:
            found = self.reader.parse(raw)
            return document_row(self.reader.name, found, seen) if isinstance(found, Found) else found
        except (MemoryError, ConfigError, StageError, RetryableError):
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


def ingest(job: Job, reader: Reader) -> Outcome:
    """Run all three phases for one source; the outcome becomes the documents manifest."""
    staged = staging(reader.name)
    before = read_manifest(job.root, DOCUMENTS_INSTANCE, reader.name)
    known = before.units if before else {}
    units = reader.units()
    work = IngestUnits(job.root, reader, job.code, staged, known)
    reports = job.engine.run_units(work, units, f"{reader.name}: {job.instance}", job.stall_s)
    made = {u.name: r.value for u, r in zip(units, reports, strict=True)}
    try:
        check_budget(job.instance, reader.name, sum(m["rejects"] for m in made.values()), _records(made))
    except StageError:
        _forget_rejecting(job.root, staged, made)
        raise
    renumbered = number(job, made)
    outputs = publish(job, made, renumbered)
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


def _forget_rejecting(root: Root, staged: str, made: dict[str, Any]) -> None:
    """Units with rejects are read anew by the next run: the cause may be mended outside of anything an identity knows."""
    for unit, m in made.items():
        if m["rejects"]:
            root.remove(f"{staged}/{unit}.json")


def _old_names(dataset: str, known: dict[str, Any], made: dict[str, Any], outputs: dict[str, Any]) -> list[str]:
    """Shards and side files of inputs that are gone or were read anew under other names; removed once the manifest is."""
    names = []
    for unit, old in known.items():
        for shard in old["shards"]:
            if shard not in outputs:
                names += [f"datasets/{dataset}/documents/{shard}.parquet", ids_name(dataset, shard)]
        if unit not in made:
            names += [side_name(folder, dataset, unit) for folder in ("drops", "rejects")]
    return names


def document_row(source: str, found: Found, seen: dict[str, int]) -> tuple[dict[str, Any], int]:
    """A row of `DOCUMENTS` and the number of lone surrogates replaced. `seen` counts equal captures within the unit."""
    text, replaced = well_formed(found.text)
    url = well_formed(found.url)[0] if found.url is not None else None
    base = document_id(source, url if url is not None else found.origin.path, text)
    metadata = json.dumps(found.metadata, sort_keys=True, ensure_ascii=False, default=_as_json)
    ordinal = seen.get(base, 0)
    seen[base] = ordinal + 1
    row = {
        "doc_id": numbered_id(base, ordinal),
        "text": text,
        "url": url,
        "source": source,
        "kind": found.kind,
        "license": _clean(found.license),
        "fetched_at": found.fetched_at,
        "origin": _origin(found.origin),
        "metadata": well_formed(metadata)[0],
    }
    return row, replaced


def _as_json(value: Any) -> str:
    """Dates as text. Anything else is refused: `str` of a set or an object differs from run to run."""
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"metadata may hold JSON values and dates only, got {type(value).__name__}")


def _clean(text: str | None) -> str | None:
    return None if text is None else well_formed(text)[0]


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
        self._group_bytes += size + len(row["metadata"])
        self._shard_bytes += size
        self._shard_rows += 1
        if self._group_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_ROWS:
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
        content = running.hexdigest()
        note = {"content": content, "ingested": content}
        self.root.write_table(f"{self.folder}/{name}.parquet", self._groups, DOCUMENTS, note)
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
    rows = [
        {"origin": _origin(d.origin), "url": _clean(d.url), "reason": _clean(d.reason), "detail": _clean(d.detail)}
        for d in drops
    ]
    return pa.Table.from_pylist(rows, schema=DROPS)


def _rejects_table(rejects: Iterable[Failed]) -> pa.Table:
    rows = [
        {"doc_id": None, "origin": _origin(r.origin), "reason": _clean(r.reason), "detail": _clean(r.detail)}
        for r in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def _rows(done: dict[str, Any]) -> int:
    return sum(s["rows"] for s in done["shards"].values())


def _records(made: dict[str, dict[str, Any]]) -> int:
    return sum(_rows(m) + m["rejects"] + sum(m["drops"].values()) for m in made.values())
