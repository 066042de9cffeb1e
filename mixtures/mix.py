"""Mixtures: for each phase an index of token shards, and what was asked for beside what is there.

In: `.docs.parquet` of the token shards, predicate columns. Out, for each phase and for `held_out`, below `mixtures/<phase>/`
(of an instance `mix@LABEL` below `mixtures/LABEL/<phase>/`): `index.parquet` (see `mixtures.index_file`) and `report.json`. No
token is copied, so a new mixture costs minutes.

A component is a dataset, a predicate, a weight and its most epochs (`mixtures.phases`). Documents that two components of a phase
both claim are an error: their share would be nobody's. Order is by seeded hash of `doc_id#epoch`, ties by doc_id, so that neither
shards nor workers move a document.

Cost: predicates and doc_ids are read once by the workers; the driver holds all index rows, about 250 bytes an entry, and hashes
1 M entries a second. That is meant for up to some 10^8 entries; beyond, cut a phase into several with their own seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError, StageError
from core.hashing import seeded_column
from core.job import Job, Outcome
from core.manifest import read_manifest
from core.stage import Kind, Resources, Stage
from mixtures.candidates import Found, find
from mixtures.draw import Part, draw_held_out, draw_phase, entry_keys
from mixtures.encoder import read_info
from mixtures.index_file import Entries, write_index
from mixtures.phases import HELD_OUT, MixConfig, groups, reads


def mix(job: Job) -> Outcome:
    """Write every phase's index and report, and the held-out index."""
    config: MixConfig = job.config
    names = [d.name for d in job.datasets]
    wanted = {c.dataset for phase in config.phases.values() for c in phase.components}
    if unknown := sorted(wanted - set(names)):
        raise ConfigError(f"{job.instance}: no dataset {unknown[0]!r}, expected one of {names}; correct the component")
    info = read_info(job.root, config.tokenizer)
    about = {"tokenizer": info.fingerprint, "tokenizer_name": info.name, "eos": info.eos, "vocab_size": info.vocab_size}
    drawn = _drawn(config, find(job, groups(config, names), info))
    contents = _shard_contents(job)
    _check_levels(job)
    outputs, reports = {}, {}
    for phase, (parts, seed, report) in drawn.items():
        folder = phase_path(job.instance, phase)
        learn = config.phases[phase].learn if phase in config.phases else "all"
        entries = _ordered(job, parts, seed)
        outputs[phase] = write_index(job.root, folder, entries, {**about, "learn": learn}, contents)
        rows = [part.report for part in parts]
        reports[phase] = {
            "phase": phase,
            "seed": seed,
            "learn": learn,
            **about,
            **outputs[phase],
            **report,
            "components": rows,
        }
        job.root.write_json(f"mixtures/{folder}/report.json", reports[phase])
    accounts = {
        f"{phase}_{key}": out[name]
        for phase, out in outputs.items()
        for key, name in (("docs", "rows"), ("tokens", "tokens"))
    }
    return Outcome(outputs, accounts=accounts, observed={"phases": reports})


def phase_path(instance: str, phase: str) -> str:
    """Where below `mixtures/` an instance of the stage writes a phase; also the name under which a reader opens it."""
    label = instance.partition("@")[2]
    return f"{label}/{phase}" if label else phase


def _drawn(config: MixConfig, found: Sequence[Found]) -> dict[str, tuple[list[Part], int, dict[str, Any]]]:
    """(parts, seed of the order, account) of each phase and of the held-out index."""
    out: dict[str, tuple[list[Part], int, dict[str, Any]]] = {}
    for name, phase in config.phases.items():
        mine = [f for f in found if f.group.phase == name]
        earlier = out[phase.replay.phase][0] if phase.replay else []
        parts, requested = draw_phase(name, phase, mine, earlier)
        actual = sum(part.tokens for part in parts)
        out[name] = parts, phase.seed, {"requested_tokens": requested, "actual_tokens": actual}
    if config.held_out:
        kept = [draw_held_out(f, config.held_out_docs) for f in found if f.group.phase == HELD_OUT]
        out[HELD_OUT] = kept, 0, {}
    return out


def _shard_contents(job: Job) -> dict[str, str]:
    """`dataset/shard` -> content hash of its tokens, as committed by tokenize."""
    manifest = read_manifest(job.root, job.config.tokenize, None)
    if manifest is None:
        raise StageError(f"mix: no token shards in {job.root.url}; run stage {job.config.tokenize} first")
    return {name: out["content"] for name, out in manifest.outputs.items()}


def _check_levels(job: Job) -> None:
    """A phase that learns a part only needs token shards that know which; a mask of nothing would be noticed by nobody."""
    manifest = read_manifest(job.root, job.config.tokenize, None)
    known = manifest is not None and any(out.get("levels") for out in manifest.outputs.values())
    partial = [name for name, phase in job.config.phases.items() if phase.learn != "all"]
    if partial and not known:
        raise StageError(
            f"mix: phase {partial[0]!r} learns {job.config.phases[partial[0]].learn} only, got no token shard with levels, "
            "expected dialogues or conversations among them; set `levels` of tokenize, or `learn: all`"
        )


def _ordered(job: Job, parts: Sequence[Part], seed: int) -> Entries:
    """All entries of a phase in order of the seeded hash of `doc_id#epoch`."""
    taken = pa.concat_tables([part.entries for part in parts])
    hashes = seeded_column(seed, entry_keys(taken))
    sortable = pa.table({"hash": hashes, "doc_id": taken.column("doc_id"), "epoch": taken.column("epoch")})
    order = pc.sort_indices(sortable, sort_keys=[(c, "ascending") for c in sortable.column_names]).to_numpy()
    column = {c: taken.column(c).to_numpy()[order] for c in ("shard", "document", "epoch", "tokens", "bytes")}
    domain = np.repeat(np.arange(len(parts), dtype=np.int32), [part.entries.num_rows for part in parts])[order]
    shards = [(d.name, s.name) for d in job.datasets for s in d.shards]
    return Entries(shards, [part.domain for part in parts], domain=domain, **column)


STAGE = Stage(
    name="mix",
    kind=Kind.EXPORT,
    config=MixConfig,
    fn=mix,
    version=3,  # 2: documents may be held for a phase, a phase may replay another; 3: `learn` in the index
    reads=reads,
    resources=Resources(memory_gb=4.0),
)
