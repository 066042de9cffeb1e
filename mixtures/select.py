"""select: the one policy that decides. Reads layers only, never text; runs as often as the pipeline names it.

In: the layers that the rules read, an earlier fate (`after`), and the duplicate relations (`duplicates`). Out: for each dataset a
layer `fate@LABEL` (keep, reason, stage, detail); with duplicates also `duplicates@LABEL` (survivor, through).

A document falls for the first of: an earlier fate, a takedown, a stage that rejected it, the first rule that holds, a verified
duplicate that stays. Survivors are elected among the documents that passed everything else, in the order of the policy's dataset
priority, `prefer`, date and doc_id: a document falls only through an edge to one that stays, so a chain A~B~C with A and C
unlike keeps both A and C. Rules over values that were not computed do not hold; they are counted as unjudged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from classifiers.rules import preset
from core.dataset import Dataset, Shard
from core.engines.contract import Frame, Note, Report, Unit
from core.errors import ConfigError
from core.hashing import digest
from core.job import Job, Outcome, total
from core.layer import committed, layer_output, layer_schema, write_layer
from core.manifest import read_manifest
from core.predicate import Predicate
from core.rows import dataset_of, pack
from core.schema import FATE, TEXT
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from mixtures.elect import CANDIDATES, LOSERS, edges_frame, elect

WITHDRAWN = "withdrawn.txt"  # in the root
_AUTHORITY = r"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?P<authority>[^/?#]*)"  # RFC 3986, appendix B
SURVIVORS = pa.schema([("survivor", TEXT), ("through", TEXT)])


class SelectConfig(StageConfig):
    """Knobs of one select; its rules stand in the config's `policy` under its label."""

    after: str | None = Field(default=None, description="an earlier fate that carries forward, such as fate@eligible")
    duplicates: tuple[Literal["exact", "minhash"], ...] = Field(
        default=(),
        description="relations through which duplicates fall: exact, minhash, or both",
        examples=[["exact", "minhash"]],
    )
    prefer: tuple[str, ...] = Field(
        default=(),
        description="columns that order duplicates after dataset priority, best first; '-signals.chars' means the longest wins",
    )


@dataclass(frozen=True)
class CompiledRule:
    """One predicate of the policy with the reason it gives."""

    reason: str
    predicate: Predicate
    datasets: tuple[str, ...] | None = None

    @property
    def stage(self) -> str:
        return self.predicate.layers[0] if self.predicate.layers else "policy"


def rules_of(policy: Sequence[Any]) -> list[CompiledRule]:
    """The policy's rules with presets spelled out, in order."""
    out = []
    for rule in policy:
        if rule.use is not None:
            made = [CompiledRule(r.reason, Predicate(r.when), rule.datasets) for r in preset(rule.use, rule.thresholds)]
            out += made
        else:
            out.append(CompiledRule(rule.reason, Predicate(rule.drop), rule.datasets))
    return out


@dataclass(frozen=True)
class Judge:
    """The policy over one shard. Picklable; everything it needs is in it."""

    instance: str
    config: SelectConfig
    rules: tuple[CompiledRule, ...]
    priority: tuple[str, ...]
    withdrawn: frozenset[str] = frozenset()
    unit: str = ""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        wanted = {c for r in self.rules for c in r.predicate.columns}
        wanted |= {f"{layer}.{c}" for layer in self.layers for c in ("computed", "error")}
        if self.config.after:
            wanted |= {f"{self.config.after}.{c}" for c in FATE.names}
        if self.withdrawn:
            wanted |= {"doc_id", "url"}
        return tuple(sorted(wanted))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        return tuple(sorted({layer for r in self.rules for layer in r.predicate.layers}))

    def judge(self, dataset: Dataset, shard: Shard, columns: Sequence[str] = ()) -> tuple[pa.Table, pa.Table, int]:
        """(fate before duplicates, the columns read with `columns` among them, unjudged documents) for one shard."""
        table = dataset.read_table(shard, tuple(dict.fromkeys([*self.columns, *columns])))
        n = shard.rows
        verdict = _Verdict(n)
        if self.config.after:
            a = self.config.after
            fell = np.asarray(pc.invert(pc.fill_null(table.column(f"{a}.keep"), True)))
            verdict.fall(
                fell, lambda rows: [table.column(f"{a}.{c}").take(rows) for c in ("reason", "stage", "detail")]
            )
        if self.withdrawn:
            listed = pa.array(sorted(self.withdrawn), TEXT)
            verdict.fall(
                withdrawn_rows(table, listed), lambda rows: _said("withdrawn", "policy", pa.nulls(len(rows), TEXT))
            )
        for layer in self.layers:
            error = table.column(f"{layer}.error")
            verdict.fall(np.asarray(pc.is_valid(error)), partial(_rejected, layer, error))
        unjudged = np.zeros(n, dtype=bool)
        for rule in self.rules:
            if rule.datasets is not None and dataset.name not in rule.datasets:
                continue
            value = rule.predicate.evaluate({c: table.column(c) for c in rule.predicate.columns})
            unjudged |= np.asarray(pc.is_null(value)) & verdict.open
            hit = np.asarray(pc.fill_null(value, False))
            verdict.fall(hit, partial(_ruled, rule, table))
        return verdict.table(), table, int((unjudged & verdict.open).sum())

    def candidates(self, datasets: dict[int, Dataset], unit: Unit) -> Iterator[pa.RecordBatch]:
        """Rows of one shard that passed everything else and have a possible duplicate (see `mixtures.elect`)."""
        ordinal, number = unit.payload
        dataset = datasets[ordinal]
        shard = dataset.shards[number]
        orders = [p.lstrip("-") for p in self.config.prefer]
        groups = [
            c for c, on in (("exact.clique", "exact"), ("minhash.component", "minhash")) if on in self.config.duplicates
        ]
        fate, table, _ = self.judge(dataset, shard, [*groups, *orders, "doc_id", "fetched_at"])
        doc_id = table.column("doc_id").combine_chunks()
        nothing = pa.nulls(shard.rows, TEXT)
        clique = table.column("exact.clique").combine_chunks() if "exact" in self.config.duplicates else nothing
        component = (
            table.column("minhash.component").combine_chunks() if "minhash" in self.config.duplicates else nothing
        )
        group = pc.coalesce(component, clique)
        live = np.asarray(fate.column("keep")) & np.asarray(pc.is_valid(group))
        rank = self.priority.index(dataset.name) if dataset.name in self.priority else len(self.priority)
        order = [np.full(shard.rows, rank, dtype=np.float64)]
        for name, given in zip(orders, self.config.prefer, strict=True):
            values = np.asarray(pc.fill_null(table.column(name).cast(pa.float64()), np.nan))
            order.append(-values if given.startswith("-") else values)
        dates = table.column("fetched_at").cast(pa.int64()).cast(pa.float64(), safe=False)
        order.append(np.asarray(pc.fill_null(dates, np.inf)))
        arrays = [
            group,
            pc.coalesce(clique, doc_id),
            doc_id,
            pa.array(pack(ordinal, number, shard.rows)),
            pa.FixedSizeListArray.from_arrays(pa.array(np.column_stack(order).ravel()), len(order)).cast(
                pa.list_(pa.float64())
            ),
            nothing,
            pa.nulls(shard.rows, pa.float32()),
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=CANDIDATES).filter(pa.array(live))


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
    policy = job.options["policy"]
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
    rows = job.engine.scan(partial(judge.candidates, datasets), units, CANDIDATES, f"{job.instance}: candidates")
    frames: list[Frame] = [rows]
    if "minhash" in job.config.duplicates:
        frames.append(edges_frame(job))
    decide = partial(elect, threshold=_threshold(job))
    losers = job.engine.persist(
        job.engine.shuffle(
            frames, ["group"], decide, LOSERS, order=["node", "other", "doc_id"], label=f"{job.instance}: elect"
        )
    )
    layer = duplicates_layer(job.instance)
    for dataset in job.datasets:
        mine = job.engine.map(losers, partial(_of_dataset, dataset.ordinal), LOSERS, f"{job.instance}: {dataset.name}")
        outcome.layers[dataset.name, layer] = job.align(mine, dataset, layer, SURVIVORS)


def _threshold(job: Job) -> float:
    """The least Jaccard of the edges that `minhash` left."""
    manifest = read_manifest(job.root, "minhash", None) if "minhash" in job.config.duplicates else None
    return float(manifest.identity.config["jaccard"]) if manifest else 1.0


def _of_dataset(ordinal: int, table: pa.Table) -> pa.Table:
    return table.filter(pa.array(dataset_of(table.column("row").to_numpy()) == ordinal))


def fate_layer(instance: str) -> str:
    return f"fate@{instance.partition('@')[2]}"


def duplicates_layer(instance: str) -> str:
    return f"duplicates@{instance.partition('@')[2]}"


def withdrawn_rows(table: pa.Table, listed: pa.Array) -> np.ndarray:
    """bool [n]: rows whose doc_id, URL or host is listed."""
    hosts = _hosts(table.column("url"))
    found = [pc.is_in(c, value_set=listed) for c in (table.column("doc_id"), table.column("url"), hosts)]
    return np.logical_or.reduce([np.asarray(f) for f in found])


def _hosts(urls: pa.ChunkedArray) -> pa.Array:
    """Host names of URLs, null where there is none. Each distinct authority is parsed once: a crawl has few of them."""
    authority = pc.struct_field(pc.extract_regex(_one_array(urls), _AUTHORITY), "authority").dictionary_encode()
    names = pa.array([_host(a) for a in authority.dictionary.to_pylist()], TEXT)
    return names.take(authority.indices)


def _host(authority: str) -> str | None:
    try:
        return urlsplit(f"//{authority}").hostname
    except ValueError:  # such as an unclosed bracket; the page is still found by its doc_id or whole URL
        return None


def read_withdrawn(root: Root, path: str | None) -> frozenset[str]:
    """doc_ids, URLs and hosts that were taken down: the policy's file and what `pipelines forget` recorded in the root."""
    try:
        lines = Path(path).read_text("utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"policy.withdrawn: {path} cannot be read: {e}; correct the path, or remove the line") from e
    if root.exists(WITHDRAWN):
        lines += root.read_bytes(WITHDRAWN).decode().splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


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


class _Verdict:
    """Collects the first reason for each row. Text is made for the rows that fall, not for all that a rule could hit."""

    def __init__(self, rows: int) -> None:
        self.open = np.ones(rows, dtype=bool)  # not fallen yet
        self._rows: list[np.ndarray] = []
        self._said: list[list[pa.Array]] = []

    def fall(self, hit: np.ndarray, say: Callable[[pa.Array], list[Any]]) -> None:
        """Rows of `hit` that are still open fall; `say(rows)` gives their reason, stage and detail."""
        rows = np.flatnonzero(hit & self.open)
        if not len(rows):
            return
        self.open[rows] = False
        self._rows.append(rows)
        self._said.append([_one_array(c) for c in say(pa.array(rows))])

    def table(self) -> pa.Table:
        place = np.full(len(self.open), -1, dtype=np.int64)
        fallen = np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=np.int64)
        place[fallen] = np.arange(len(fallen))
        index = pa.array(place, mask=place < 0)
        columns = [pa.concat_arrays([said[i] for said in self._said] or [pa.nulls(0, TEXT)]) for i in range(3)]
        return pa.Table.from_arrays([pa.array(self.open), *(c.take(index) for c in columns)], schema=FATE)


def _said(reason: str, stage: str, detail: Any) -> list[Any]:
    """One reason and stage for every row of `detail`."""
    n = len(detail)
    return [pa.repeat(pa.scalar(reason, TEXT), n), pa.repeat(pa.scalar(stage, TEXT), n), detail]


def _rejected(layer: str, error: Any, rows: pa.Array) -> list[Any]:
    return _said("rejected", layer, error.take(rows))


def _ruled(rule: CompiledRule, table: pa.Table, rows: pa.Array) -> list[Any]:
    columns = rule.predicate.columns
    return _said(rule.reason, rule.stage, _measured(table.select(columns).take(rows), columns))


def _measured(table: pa.Table, columns: Sequence[str]) -> Any:
    """`name=value` of every column a rule read, as one string column."""
    parts: list[Any] = []
    for name in columns:
        text = pc.fill_null(table.column(name).cast(TEXT), "null")
        short = name.rpartition(".")[2]
        parts.append(pc.binary_join_element_wise(pa.scalar(f"{short}=", TEXT), text, pa.scalar("", TEXT)))
    return pc.binary_join_element_wise(*parts, pa.scalar(" ", TEXT)) if len(parts) > 1 else parts[0]


def _one_array(column: Any) -> pa.Array:
    """A string column as one array of TEXT."""
    return (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).cast(TEXT)


def _reads(config: SelectConfig) -> tuple[str, ...]:
    """What a select reads besides the columns of its rules (the planner adds those)."""
    out = ["doc_id", "fetched_at", *(p.lstrip("-") for p in config.prefer)]
    if config.after:
        out.append(f"{config.after}.keep")
    if "exact" in config.duplicates:
        out.append("exact.clique")
    if "minhash" in config.duplicates:
        out += ["minhash.component", "@minhash"]
    return tuple(out)


STAGE = Stage(
    name="select", kind=Kind.DECIDE, config=SelectConfig, fn=select, version=1, reads=_reads, libraries=("pyarrow",)
)
