"""Mixtures: for each phase an index of token shards, and what was asked for beside what is there.

In: `.docs.parquet` of the token shards, predicate columns. Out, for each phase and for `held_out`, below `mixtures/<phase>/`:
`index.parquet` (see `mixtures.index_file`) and `report.json`. No token is copied, so a new mixture costs minutes.

A component is a dataset, a predicate, a weight and its most epochs. Documents that two components of a phase both claim are an
error: their share would be nobody's. Order is by seeded hash of `doc_id#epoch`, ties by doc_id, so that neither shards nor
workers move a document, and a longer phase with the same seed keeps every document of a shorter one.

Cost: predicates and doc_ids are read once by the workers; the driver holds all index rows, about 250 bytes an entry, and hashes
1 M entries a second. That is meant for up to some 10^8 entries; beyond, cut a phase into several with their own seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset, Shard
from core.engines.contract import Unit
from core.errors import ConfigError, StageError
from core.hashing import seeded_column
from core.job import Job, Outcome
from core.manifest import read_manifest
from core.predicate import Predicate
from core.schema import TEXT
from core.stage import Kind, Resources, Stage
from mixtures.encoder import TokenizerInfo, read_info
from mixtures.index_file import Entries, write_index
from mixtures.phases import HELD_OUT, Component, Group, MixConfig, Phase, groups, reads
from mixtures.shares import Share, epochs, shares
from mixtures.token_files import docs_name

CANDIDATES = pa.schema(
    [
        pa.field("group", pa.int32()),  # ordinal in `groups`
        pa.field("doc_id", TEXT),
        pa.field("shard", pa.int32()),  # ordinal in the dataset
        pa.field("document", pa.int32()),
        pa.field("tokens", pa.int32()),
        pa.field("bytes", pa.int64()),
    ]
)


def mix(job: Job) -> Outcome:
    """Write every phase's index and report, and the held-out index."""
    config: MixConfig = job.config
    names = [d.name for d in job.datasets]
    wanted = {c.dataset for phase in config.phases.values() for c in phase.components}
    if unknown := sorted(wanted - set(names)):
        raise ConfigError(f"{job.instance}: no dataset {unknown[0]!r}, expected one of {names}; correct the component")
    info = read_info(job.root, config.tokenizer)
    about = {"tokenizer": info.fingerprint, "tokenizer_name": info.name, "eos": info.eos, "vocab_size": info.vocab_size}
    parts = groups(config, names)
    found = _candidates(job, parts, info)
    contents = _shard_contents(job)
    outputs, reports = {}, {}
    for phase in [*config.phases, *([HELD_OUT] if config.held_out else [])]:
        mine = [(g, table) for g, table in zip(parts, found, strict=True) if g.phase == phase]
        chosen, seed, report = (
            _held_out(config, mine) if phase == HELD_OUT else _phase(phase, config.phases[phase], mine)
        )
        entries = _ordered(job, mine, chosen, seed)
        outputs[phase] = write_index(job.root, phase, entries, about, contents)
        reports[phase] = {"phase": phase, "seed": seed, **about, **outputs[phase], **report}
        job.root.write_json(f"mixtures/{phase}/report.json", reports[phase])
    accounts = {
        f"{phase}_{key}": out[name]
        for phase, out in outputs.items()
        for key, name in (("docs", "rows"), ("tokens", "tokens"))
    }
    return Outcome(outputs, accounts=accounts, observed={"phases": reports})


def _candidates(job: Job, parts: list[Group], info: TokenizerInfo) -> list[pa.Table]:
    """For each group its documents, sorted by doc_id."""
    tables = []
    for dataset in job.datasets:
        mine = tuple((i, g) for i, g in enumerate(parts) if g.dataset == dataset.name)
        if mine and dataset.shards:
            units = [Unit(s.name, (i, s), s.rows) for i, s in enumerate(dataset.shards)]
            frame = job.engine.scan(
                CandidateUnits(dataset, mine, info), units, CANDIDATES, f"{job.instance}: {dataset.name}"
            )
            tables.append(job.engine.collect(frame))
    table = pa.concat_tables(tables) if tables else CANDIDATES.empty_table()
    group = table.column("group").to_numpy()
    return [table.filter(pa.array(group == i)).sort_by("doc_id").combine_chunks() for i in range(len(parts))]


def _shard_contents(job: Job) -> dict[str, str]:
    """`dataset/shard` -> content hash of its tokens, as committed by tokenize."""
    manifest = read_manifest(job.root, job.config.tokenize, None)
    if manifest is None:
        raise StageError(f"mix: no token shards in {job.root.url}; run stage {job.config.tokenize} first")
    return {name: out["content"] for name, out in manifest.outputs.items()}


@dataclass(frozen=True)
class CandidateUnits:
    """Yields the rows of CANDIDATES of one shard of documents."""

    dataset: Dataset
    parts: tuple[tuple[int, Group], ...]
    info: TokenizerInfo

    def __call__(self, unit: Unit) -> Iterator[pa.RecordBatch]:
        ordinal, shard = unit.payload
        docs = self._docs(shard)
        if not docs.num_rows:
            return
        at = docs.column("row").to_numpy()
        masks = self._masks(shard, at)
        self._check_overlap(masks)
        for (i, _), mask in zip(self.parts, masks, strict=True):
            chosen = np.flatnonzero(mask)
            taken = docs.take(pa.array(chosen))
            columns = [
                pa.array(np.full(len(chosen), i, np.int32)),
                taken.column("doc_id"),
                pa.array(np.full(len(chosen), ordinal, np.int32)),
                pa.array(chosen.astype(np.int32)),
                taken.column("tokens"),
                taken.column("bytes"),
            ]
            yield from pa.Table.from_arrays(columns, schema=CANDIDATES).combine_chunks().to_batches()

    def _docs(self, shard: Shard) -> pa.Table:
        """What is tokenised of a shard. Tokens of other documents or of another tokenizer are a StageError."""
        root, name = self.dataset.root, docs_name(self.info.name, self.dataset.name, shard.name)
        note = root.note(name)
        if note is None or note["documents"] != shard.content or note["tokenizer"] != self.info.fingerprint:
            what = "is missing" if note is None else "was made from other documents or by another tokenizer"
            raise StageError(f"mix: {name} {what}; run tokenize first")
        return root.read_table(name, ["doc_id", "row", "tokens", "bytes"])

    def _masks(self, shard: Shard, at: np.ndarray) -> list[np.ndarray]:
        """For each group, which of the tokenised documents (rows `at` of the shard) belong to it."""
        predicates = {text: Predicate(text) for _, g in self.parts for text in g.where}
        columns = sorted({c for p in predicates.values() for c in p.columns})
        table = self.dataset.read_table(shard, columns) if columns else None
        holds = {text: p.holds(table)[at] for text, p in predicates.items() if table is not None}
        return [np.logical_and.reduce([np.ones(len(at), bool), *(holds[w] for w in g.where)]) for _, g in self.parts]

    def _check_overlap(self, masks: list[np.ndarray]) -> None:
        for phase in dict.fromkeys(g.phase for _, g in self.parts):
            claims = [(g, mask) for (_, g), mask in zip(self.parts, masks, strict=True) if g.phase == phase]
            shared = int((np.sum([mask for _, mask in claims], axis=0) > 1).sum())
            if shared:
                names = [g.domain for g, _ in claims]
                raise StageError(
                    f"mix: components {names} of phase {phase!r} share documents of dataset {self.dataset.name}, "
                    f"got {shared} in one shard, expected none; make their predicates exclude each other"
                )


Chosen = tuple[np.ndarray, np.ndarray]  # rows of a group's candidates (int64) and the epoch of each (int32)


def _phase(name: str, phase: Phase, mine: list[tuple[Group, pa.Table]]) -> tuple[list[Chosen], int, dict[str, Any]]:
    """(choice of each component, seed, report) of one phase."""
    components = phase.components
    available = [_tokens(table) for _, table in mine]
    try:
        granted = shares(phase.tokens, [c.weight for c in components], available, [c.max_epochs for c in components])
    except StageError as e:
        listed = ", ".join(f"{c.domain} {n}" for c, n in zip(components, available, strict=True))
        raise StageError(f"mix: phase {name!r} has {e}; tokens available: {listed}") from e
    chosen = [_take_share(table, share, phase.seed) for (_, table), share in zip(mine, granted, strict=True)]
    rows = [_component_row(c, *x) for c, x in zip(components, zip(granted, mine, chosen, strict=True), strict=True)]
    actual = sum(row["actual_tokens"] for row in rows)
    for row in rows:
        row["actual_fraction"] = row["actual_tokens"] / actual if actual else 0.0
    requested = sum(share.wanted for share in granted)
    return chosen, phase.seed, {"requested_tokens": requested, "actual_tokens": actual, "components": rows}


def _component_row(component: Component, share: Share, mine: tuple[Group, pa.Table], chosen: Chosen) -> dict[str, Any]:
    """Requested beside actual, for one component."""
    rows, _ = chosen
    table = mine[1]
    actual = int(table.column("tokens").to_numpy()[rows].sum(dtype=np.int64))
    used = len(np.unique(rows))
    return {
        "name": component.domain,
        "dataset": component.dataset,
        "where": component.where,
        "requested_fraction": component.weight,
        "requested_tokens": share.wanted,
        "actual_tokens": actual,
        "shortfall_tokens": share.shortfall,
        "max_epochs": component.max_epochs,
        "epochs": actual / share.available if share.available else 0.0,
        "available_tokens": share.available,
        "available_docs": table.num_rows,
        "used_docs": used,
        "unused_docs": table.num_rows - used,
        "entries": len(rows),
    }


def _held_out(config: MixConfig, mine: list[tuple[Group, pa.Table]]) -> tuple[list[Chosen], int, dict[str, Any]]:
    """(choice of each dataset, seed, report) of the held-out index."""
    chosen, rows = [], []
    for group, table in mine:
        first = _hash_order(table, 0)[: config.held_out_docs]
        chosen.append((first, np.zeros(len(first), np.int32)))
        tokens = int(table.column("tokens").to_numpy()[first].sum(dtype=np.int64))
        rows.append(
            {"name": group.dataset, "actual_tokens": tokens, "used_docs": len(first), "available_docs": table.num_rows}
        )
    return chosen, 0, {"components": rows}


def _tokens(table: pa.Table) -> int:
    return int(table.column("tokens").to_numpy().sum(dtype=np.int64))


def _hash_order(table: pa.Table, seed: int) -> np.ndarray:
    """Row numbers in order of the seeded hash of doc_id; rows come sorted by doc_id, which settles ties."""
    return np.argsort(seeded_column(seed, table.column("doc_id")), kind="stable")


def _take_share(table: pa.Table, share: Share, seed: int) -> Chosen:
    """Whole epochs, then the documents of the partial one."""
    whole, rest = epochs(table.column("tokens").to_numpy(), _hash_order(table, seed), share.granted)
    rows = np.concatenate([np.tile(np.arange(table.num_rows), whole), rest])
    epoch = np.concatenate([np.repeat(np.arange(whole), table.num_rows), np.full(len(rest), whole)])
    return rows, epoch.astype(np.int32)


def _ordered(job: Job, mine: list[tuple[Group, pa.Table]], chosen: list[Chosen], seed: int) -> Entries:
    """All entries of a phase in order of the seeded hash of `doc_id#epoch`."""
    first: dict[str, int] = {}
    shards: list[tuple[str, str]] = []
    for d in job.datasets:
        first[d.name] = len(shards)
        shards += [(d.name, s.name) for s in d.shards]
    taken = pa.concat_tables(
        [table.take(pa.array(rows, pa.int64())) for (_, table), (rows, _) in zip(mine, chosen, strict=True)]
    )
    counts = [len(rows) for rows, _ in chosen]
    epoch = np.concatenate([epoch for _, epoch in chosen])
    keys = pc.binary_join_element_wise(taken.column("doc_id"), pa.array(epoch).cast(TEXT), pa.scalar("#", TEXT))
    sortable = pa.table({"hash": seeded_column(seed, keys), "doc_id": taken.column("doc_id"), "epoch": epoch})
    order = pc.sort_indices(sortable, sort_keys=[(c, "ascending") for c in sortable.column_names]).to_numpy()
    shard = taken.column("shard").to_numpy() + np.repeat([first[g.dataset] for g, _ in mine], counts)
    return Entries(
        shards,
        [g.domain for g, _ in mine],
        shard[order].astype(np.int32),
        np.repeat(np.arange(len(mine), dtype=np.int32), counts)[order],
        taken.column("document").to_numpy()[order],
        epoch[order],
        taken.column("tokens").to_numpy()[order],
        taken.column("bytes").to_numpy()[order],
    )


STAGE = Stage(name="mix", kind=Kind.EXPORT, config=MixConfig, fn=mix, reads=reads, resources=Resources(memory_gb=4.0))
