"""select: the one policy that decides. Reads layers only, never text; runs as often as the pipeline names it.

In: the layers that the rules read, an earlier fate (`after`), and the duplicate relations (`duplicates`). Out: for each dataset a
layer `fate@LABEL` (keep, reason, stage, detail); with duplicates also `duplicates@LABEL` (survivor, through).

A document falls for the first of: an earlier fate, a takedown, a stage that rejected it, the first rule that holds, a verified
duplicate that stays. Survivors are elected among the documents that passed everything else, in the order of the policy's dataset
priority, `prefer`, date and doc_id: a document falls only through an edge to one that stays, so a chain A~B~C with A and C
unlike keeps both A and C. A document and its parent never fall to each other through such an edge. Rules over values that were
not computed do not hold; they are counted as unjudged.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import Dataset, Shard
from core.engines.contract import Frame, Note, Report, Unit
from core.hashing import digest
from core.job import Job, Outcome, total
from core.layer import committed, layer_output, layer_schema, write_layer
from core.manifest import read_manifest
from core.rows import of_dataset
from core.schema import FATE, TEXT
from core.stage import Kind, Stage
from mixtures.elect import CANDIDATES, LOSERS, candidates, edges_frame, elect
from mixtures.policy import EXACT, MINHASH, Judge, SelectConfig, read_withdrawn, rules_of

SURVIVORS = pa.schema([("survivor", TEXT), ("through", TEXT)])


@dataclass(frozen=True)
class FateUnits:
    """Writes one shard of `fate@LABEL`."""

    judge: Judge
    dataset: Dataset

    def __call__(self, unit: Unit, note: Note) -> Report:
        shard: Shard = unit.payload
        layer = fate_layer(self.judge.instance)
        done = committed(self.dataset, layer, shard, self.judge.unit)
        if done is not None:
            return Report(
                unit.name, docs=shard.rows, resumed=True, value=(layer_output(done), done["reasons"], done["unjudged"])
            )
        fate, _, unjudged = self.judge.judge(self.dataset, shard)
        if self.judge.config.duplicates:
            fate = _with_duplicates(fate, self.dataset.read_layer(duplicates_layer(self.judge.instance), shard))
        head = [pa.array(np.ones(shard.rows, dtype=bool)), pa.nulls(shard.rows, TEXT)]
        table = pa.Table.from_arrays([*head, *fate.columns], schema=layer_schema(FATE))
        reasons = {
            str(v["values"]): v["counts"] for v in pc.value_counts(fate.column("reason").drop_null()).to_pylist()
        }
        extra = {"reasons": dict(sorted(reasons.items())), "unjudged": unjudged}
        made = write_layer(self.dataset, layer, shard, FATE, [table], self.judge.unit, extra)
        return Report(unit.name, docs=shard.rows, value=(layer_output(made), extra["reasons"], unjudged))


def select(job: Job) -> Outcome:
    """Decide for every document of every dataset."""
    policy = job.policy
    rules = tuple(rules_of(policy.get(job.instance.partition("@")[2]) or ()))
    priority = tuple(policy.get("priority") or ())
    judge = Judge(
        job.instance,
        job.config,
        rules,
        priority,
        read_withdrawn(job.root, policy.get("withdrawn")),
        digest([job.identity, "fate"]),
    )
    outcome = Outcome()
    if job.config.duplicates:
        _write_duplicates(job, judge, outcome)
    reports: list[Report] = []
    reasons: dict[str, int] = {}
    for dataset in job.datasets:
        units = [Unit(s.name, s, 0) for s in dataset.shards]
        made = job.engine.run_units(FateUnits(judge, dataset), units, f"{job.instance}: {dataset.name}")
        reports += made
        outcome.layers[dataset.name, fate_layer(job.instance)] = {r.unit: r.value[0] for r in made}
        for r in made:
            for reason, n in r.value[1].items():
                reasons[reason] = reasons.get(reason, 0) + n
                key = f"dropped.{dataset.name}.{reason}"
                outcome.accounts[key] = outcome.accounts.get(key, 0) + n
    documents = sum(d.rows for d in job.datasets)
    dropped = sum(reasons.values())
    outcome.accounts.update(documents=documents, kept=documents - dropped, dropped=dropped)
    outcome.accounts.update({f"dropped.{reason}": n for reason, n in sorted(reasons.items())})
    outcome.observed = {**total(reports), "unjudged_docs": sum(r.value[2] for r in reports)}
    for (name, layer), outputs in outcome.layers.items():
        outcome.outputs[f"{name}/{layer}"] = {"content": digest({s: o["content"] for s, o in outputs.items()})}
    return outcome


def _write_duplicates(job: Job, judge: Judge, outcome: Outcome) -> None:
    """Elect survivors and align the losers with their documents."""
    datasets = {d.ordinal: d for d in job.datasets}
    units = [Unit(f"{d.name}/{s.name}", (d.ordinal, i)) for d in job.datasets for i, s in enumerate(d.shards)]
    rows = job.engine.scan(partial(candidates, judge, datasets), units, CANDIDATES, f"{job.instance}: candidates")
    frames: list[Frame] = [rows]
    if job.config.through(MINHASH):
        frames.append(edges_frame(job))
    decide = partial(elect, threshold=_threshold(job))
    losers = job.engine.persist(
        job.engine.shuffle(
            frames, ["group"], decide, LOSERS, order=["node", "other", "doc_id"], label=f"{job.instance}: elect"
        )
    )
    layer = duplicates_layer(job.instance)
    for dataset in job.datasets:
        mine = job.engine.map(losers, partial(of_dataset, dataset.ordinal), LOSERS, f"{job.instance}: {dataset.name}")
        outcome.layers[dataset.name, layer] = job.align(mine, dataset, layer, SURVIVORS)


def _threshold(job: Job) -> float:
    """The least Jaccard of the edges that `minhash` left."""
    instance = job.config.through(MINHASH)
    manifest = read_manifest(job.root, instance, None) if instance else None
    return float(manifest.identity.config["jaccard"]) if manifest else 1.0


def fate_layer(instance: str) -> str:
    return f"fate@{instance.partition('@')[2]}"


def duplicates_layer(instance: str) -> str:
    return f"duplicates@{instance.partition('@')[2]}"


def _with_duplicates(fate: pa.Table, duplicates: pa.Table) -> pa.Table:
    survivor = duplicates.column("survivor").combine_chunks()
    lost = pc.and_(fate.column("keep").combine_chunks(), pc.is_valid(survivor))
    new = {
        "keep": pa.array([False] * fate.num_rows),
        "reason": pc.binary_join_element_wise(
            pa.scalar("duplicate", TEXT), duplicates.column("through"), pa.scalar("_", TEXT)
        ).combine_chunks(),
        "stage": duplicates.column("through").combine_chunks(),
        "detail": survivor,
    }
    columns = [pc.if_else(lost, new[c].cast(FATE.field(c).type), fate.column(c).combine_chunks()) for c in FATE.names]
    return pa.Table.from_arrays(columns, schema=FATE)


def _reads(config: SelectConfig) -> tuple[str, ...]:
    """What a select reads besides the columns of its rules (the planner adds those)."""
    out = ["doc_id", "fetched_at", *(p.lstrip("-") for p in config.prefer)]
    if config.after:
        out.append(f"{config.after}.keep")
    if exact := config.through(EXACT):
        out.append(f"{exact}.clique")
    if minhash := config.through(MINHASH):
        out += [f"{minhash}.component", f"@{minhash}"]
    return tuple(out)


STAGE = Stage(
    name="select",
    kind=Kind.DECIDE,
    config=SelectConfig,
    fn=select,
    where=False,
    version=1,
    reads=_reads,
    libraries=("pyarrow",),
)
