"""The policy as something that can be applied to a shard: rules spelled out, takedowns, and the first reason for each document.

In: layers of one shard, an earlier fate. Out: a table of FATE (keep, reason, stage, detail) before duplicates, and how many
documents some rule could not judge because a value was not computed. Text is never read; doc_id and URL only for takedowns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from classifiers.rules import preset
from core.dataset import Dataset, Shard
from core.errors import ConfigError
from core.predicate import Predicate
from core.schema import FATE, TEXT
from core.stage import StageConfig
from core.storage import Root

EXACT, MINHASH = "exact", "minhash"  # the stages whose relations name duplicates
WITHDRAWN = "withdrawn.txt"  # in the root
_AUTHORITY = r"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?//(?P<authority>[^/?#]*)"  # RFC 3986, appendix B


class SelectConfig(StageConfig):
    """Knobs of one select; its rules stand in the config's `policy` under its label."""

    after: str | None = Field(default=None, description="an earlier fate that carries forward, such as fate@eligible")
    duplicates: tuple[str, ...] = Field(
        default=(),
        description="instances of exact and of minhash, at most one of each, through which duplicates fall",
        examples=[["exact", "minhash"]],
    )
    prefer: tuple[str, ...] = Field(
        default=(),
        description="columns that order duplicates after dataset priority, best first; '-signals.chars' means the longest wins",
    )

    @field_validator("duplicates")
    @classmethod
    def _one_of_each(cls, duplicates: tuple[str, ...]) -> tuple[str, ...]:
        stages = [d.partition("@")[0] for d in duplicates]
        if set(stages) - {EXACT, MINHASH} or len(set(stages)) < len(stages):
            raise ValueError("expected at most one instance of exact and one of minhash")
        return duplicates

    def through(self, stage: str) -> str | None:
        """The instance of exact or of minhash through which duplicates fall here."""
        return next((d for d in self.duplicates if d.partition("@")[0] == stage), None)


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
