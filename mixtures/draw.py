"""What each part of a phase puts into it: documents, how often, and the account of what was asked for beside what is there.

In: candidates (`mixtures.candidates`), a phase's weights. Out: `Part`s, whose entries are documents with an epoch. Documents of
a partial epoch are the first by seeded hash of doc_id, so neither shards nor workers move one, and a longer phase with the same
seed keeps every document of a shorter one. A replay draws entries (document and epoch) of the earlier phase by a hash of its own:
each is as likely as any other, so the parts of that phase keep their proportions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StageError
from core.hashing import seeded_column
from core.schema import TEXT
from mixtures.candidates import Found
from mixtures.phases import Component, Phase, Replay
from mixtures.shares import Share, epochs, shares


@dataclass(frozen=True)
class Part:
    """The entries of one component, replay or held-out dataset: the candidates' columns and `epoch`; and its account."""

    domain: str
    entries: pa.Table
    report: dict[str, Any]

    @property
    def tokens(self) -> int:
        return _tokens(self.entries)


def draw_phase(name: str, phase: Phase, found: Sequence[Found], earlier: Sequence[Part]) -> tuple[list[Part], int]:
    """(parts, requested tokens) of one phase. `earlier`: the parts of the phase that it replays."""
    tables = [f.table for f in found]
    if phase.replay:
        tables.append(_replayable(phase.replay, earlier, tables, phase.seed))
    granted = _granted(name, phase, [_tokens(table) for table in tables])
    parts = [
        _component_part(c, f, share, phase.seed)
        for c, f, share in zip(phase.components, found, granted[: len(found)], strict=True)
    ]
    if phase.replay:
        parts.append(_replay_part(phase.replay, tables[-1], granted[-1]))
    actual = sum(part.tokens for part in parts)
    for part in parts:
        part.report["actual_fraction"] = part.tokens / actual if actual else 0.0
    return parts, sum(share.wanted for share in granted)


def draw_held_out(found: Found, most_docs: int) -> Part:
    """The first documents of a dataset in hash order."""
    first = _hash_order(found.table.column("doc_id"), 0)[:most_docs]
    entries = _with_epoch(found.table.take(pa.array(first)), np.zeros(len(first), np.int32))
    report = {
        "name": found.group.dataset,
        "actual_tokens": _tokens(entries),
        "used_docs": len(first),
        "available_docs": found.table.num_rows,
    }
    return Part(found.group.dataset, entries, report)


def _granted(name: str, phase: Phase, available: Sequence[int]) -> list[Share]:
    """Each part's share. One that cannot be held is a StageError that says what would hold."""
    parts = phase.parts
    most = [part.max_epochs if isinstance(part, Component) else 1.0 for part in parts]
    listed = ", ".join(f"{part.domain} {n}" for part, n in zip(parts, available, strict=True))
    try:
        granted = shares(phase.tokens, [part.weight for part in parts], available, most)
    except StageError as e:
        raise StageError(f"mix: phase {name!r} has {e}; tokens available: {listed}") from e
    for part, share in zip(parts, granted, strict=True):
        if share.shortfall > phase.max_shortfall_fraction * share.wanted:
            raise StageError(
                f"mix: {part.domain} of phase {name!r} cannot hold its weight {part.weight:g}, got {share.granted} tokens, "
                f"expected {share.wanted} with max_shortfall_fraction {phase.max_shortfall_fraction:g}; lower its weight "
                f"or `tokens`, or raise max_epochs (it has {share.available} tokens: {_epochs_needed(share)})"
            )
    return granted


def _epochs_needed(share: Share) -> str:
    return f"{share.wanted / share.available:.3g} epochs would do" if share.available else "its `where` finds nothing"


def _component_part(component: Component, found: Found, share: Share, seed: int) -> Part:
    """Whole epochs, then the documents of the partial one."""
    table = found.table
    order = _hash_order(table.column("doc_id"), seed)
    whole, rest = epochs(table.column("tokens").to_numpy(), order, share.granted)
    rows = np.concatenate([np.tile(np.arange(table.num_rows), whole), rest])
    epoch = np.concatenate([np.repeat(np.arange(whole), table.num_rows), np.full(len(rest), whole)])
    entries = _with_epoch(table.take(pa.array(rows, pa.int64())), epoch.astype(np.int32))
    report = {
        **_account(component, share, entries, table.num_rows, len(np.unique(rows))),
        "dataset": component.dataset,
        "where": component.where,
        "max_epochs": component.max_epochs,
        "hold": component.hold,
        "held_docs": found.held_docs,  # kept for a later phase
        "held_tokens": found.held_tokens,
    }
    return Part(component.domain, entries, report)


def _replayable(replay: Replay, earlier: Sequence[Part], own: Sequence[pa.Table], seed: int) -> pa.Table:
    """Entries of the earlier phase that no component of this one claims, in the order in which they are drawn."""
    entries = pa.concat_tables([part.entries for part in earlier])
    claimed = pa.chunked_array([table.column("doc_id").combine_chunks() for table in own], TEXT).combine_chunks()
    free = entries.filter(pc.invert(pc.is_in(entries.column("doc_id"), value_set=claimed))).sort_by(
        [("doc_id", "ascending"), ("epoch", "ascending")]
    )
    keys = pc.binary_join_element_wise(
        pa.scalar(f"replay {replay.phase}", TEXT), entry_keys(free), pa.scalar(" ", TEXT)
    )
    return free.take(pa.array(_hash_order(keys, seed))).combine_chunks()


def _replay_part(replay: Replay, table: pa.Table, share: Share) -> Part:
    fitting = np.searchsorted(np.cumsum(table.column("tokens").to_numpy(), dtype=np.int64), share.granted, side="right")
    entries = table.slice(0, int(fitting))
    docs = pc.count_distinct(table.column("doc_id")).as_py()
    used = pc.count_distinct(entries.column("doc_id")).as_py()
    report = {**_account(replay, share, entries, docs, used), "replay": replay.phase, "max_epochs": 1.0}
    return Part(replay.domain, entries, report)


def _account(part: Component | Replay, share: Share, entries: pa.Table, docs: int, used_docs: int) -> dict[str, Any]:
    """Requested beside actual."""
    actual = _tokens(entries)
    return {
        "name": part.domain,
        "requested_fraction": part.weight,
        "requested_tokens": share.wanted,
        "actual_tokens": actual,
        "shortfall_tokens": share.shortfall,
        "epochs": actual / share.available if share.available else 0.0,
        "available_tokens": share.available,
        "available_docs": docs,
        "used_docs": used_docs,
        "unused_docs": docs - used_docs,
        "entries": entries.num_rows,
    }


def entry_keys(entries: pa.Table) -> pa.ChunkedArray:
    """`doc_id#epoch` of each entry: what orders a phase."""
    return pc.binary_join_element_wise(
        entries.column("doc_id"), entries.column("epoch").cast(TEXT), pa.scalar("#", TEXT)
    )


def _with_epoch(table: pa.Table, epoch: np.ndarray) -> pa.Table:
    return table.append_column("epoch", pa.array(epoch, pa.int32()))


def _tokens(table: pa.Table) -> int:
    return int(table.column("tokens").to_numpy().sum(dtype=np.int64))


def _hash_order(keys: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Row numbers in order of the seeded hash of `keys`, which come sorted by doc_id: that settles ties."""
    return np.argsort(seeded_column(seed, keys), kind="stable")
