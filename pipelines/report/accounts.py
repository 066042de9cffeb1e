"""What the manifests of a root say: counts, the funnel, the sums that must hold. No document is read here.

A layer counts as there only while it was made from the documents that are there now; others are named in `stale` and left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from core.dataset import DOCUMENTS_INSTANCE, Dataset
from core.manifest import Manifest, read_manifest
from core.stage import Kind
from core.storage import Root
from mixtures.policy import CompiledRule, read_withdrawn, rules_of
from mixtures.select import fate_layer
from pipelines.config import Pipeline
from pipelines.inspect import layer_manifests
from pipelines.report.svg import Level
from pipelines.scope import Step, dataset_at, steps

DUPLICATE = "duplicate_"  # reasons of documents that fell to a duplicate begin so (mixtures.select)
REJECTED = "rejected"

Counts = dict[str, int]  # by dataset
ByReason = dict[str, Counts]


@dataclass(frozen=True)
class Done:
    """A step that has happened."""

    step: Step
    manifest: Manifest

    @property
    def instance(self) -> str:
        return self.step.entry.instance

    @property
    def config(self) -> Any:
        return self.step.entry.config


@dataclass(frozen=True)
class Check:
    """A sum that must hold: `name`, what stands on both sides, and whether they are equal."""

    name: str
    left: int
    right: int
    spelled: str  # the right side as a sum

    @property
    def holds(self) -> bool:
        return self.left == self.right


@dataclass(frozen=True)
class Facts:
    """Everything committed."""

    pipeline: Pipeline
    root: Root
    done: tuple[Done, ...]
    datasets: tuple[Dataset, ...]
    layers: dict[str, dict[str, Manifest]]  # dataset -> layer -> manifest, in the order of the pipeline
    stale: tuple[str, ...]

    @cached_property
    def names(self) -> list[str]:
        """All datasets of the config, with or without documents: they keep their colours."""
        return list(self.pipeline.sources)

    def of(self, stage: str) -> Done | None:
        """The committed run of a root-wide stage that stands once in a pipeline."""
        return next((d for d in self.done if d.step.entry.stage.name == stage), None)

    def documents(self, dataset: str) -> Manifest | None:
        """The manifest of the dataset's documents."""
        made = (d.manifest for d in self.done if d.manifest.instance == DOCUMENTS_INSTANCE)
        return next((m for m in made if m.dataset == dataset), None)

    @cached_property
    def selects(self) -> tuple[Done, ...]:
        """The last select that ran and those whose fate it carries forward, first to last."""
        by_fate = {fate_layer(d.instance): d for d in self.done if d.step.entry.stage.kind is Kind.DECIDE}
        chain: list[Done] = []
        last = next(reversed(by_fate.values()), None)
        while last is not None and last not in chain:
            chain.insert(0, last)
            last = by_fate.get(last.config.after or "")
        return tuple(chain)

    @property
    def fate(self) -> str | None:
        """The layer that holds every document's final fate."""
        return fate_layer(self.selects[-1].instance) if self.selects else None

    @cached_property
    def rules(self) -> dict[str, CompiledRule]:
        """Reason -> the rule that gives it."""
        found: dict[str, CompiledRule] = {}
        for done in self.selects:
            for rule in rules_of(self.pipeline.policy.get(done.instance.partition("@")[2]) or ()):
                found.setdefault(rule.reason, rule)
        return found

    @cached_property
    def judged(self) -> list[str]:
        """Datasets that the last select decides on."""
        only = self.selects[-1].config.datasets if self.selects else ()
        return [d.name for d in self.datasets if only is None or d.name in only]

    @cached_property
    def withdrawn(self) -> frozenset[str]:
        """doc_ids, URLs and hosts that were taken down."""
        return read_withdrawn(self.root, self.pipeline.policy.get("withdrawn"))

    @cached_property
    def rows(self) -> Counts:
        return {d.name: d.rows for d in self.datasets}


def gather(pipeline: Pipeline, root: Root) -> Facts:
    """Read every manifest of the pipeline."""
    found = ((step, read_manifest(root, step.manifest, step.dataset)) for step in steps(pipeline))
    done = tuple(Done(step, manifest) for step, manifest in found if manifest is not None)
    opened = (dataset_at(pipeline, root, name) for name in pipeline.sources)
    datasets = tuple(d for d in opened if d is not None)
    layers: dict[str, dict[str, Manifest]] = {d.name: {} for d in datasets}
    stale = []
    for dataset in datasets:
        for layer, manifest in layer_manifests(pipeline, root, dataset.name):
            made_from = {shard: out.get("documents") for shard, out in manifest.outputs.items()}
            if made_from == {shard.name: shard.content for shard in dataset.shards}:
                layers[dataset.name][layer] = manifest
            else:
                stale.append(f"{layer} of {dataset.name}")
    return Facts(pipeline, root, done, datasets, layers, tuple(stale))


def drops(facts: Facts) -> ByReason:
    """Records that became no document, by reason; failures of the reader count as `rejected`."""
    found: ByReason = {}
    for name in facts.names:
        manifest = facts.documents(name)
        for key, n in (manifest.accounts if manifest else {}).items():
            if key.startswith("drops."):
                found.setdefault(key.removeprefix("drops."), {})[name] = n
            elif key == "rejects" and n:
                found.setdefault(REJECTED, {})[name] = n
    return found


def dropped(done: Done, datasets: list[str]) -> ByReason:
    """Documents that one select drops, by reason, those carried from an earlier select among them."""
    found: ByReason = {}
    for key, n in done.manifest.accounts.items():
        for name in datasets:
            if key.startswith(f"dropped.{name}."):
                found.setdefault(key.removeprefix(f"dropped.{name}."), {})[name] = n
    return found


def tokens(facts: Facts) -> dict[str, Counts]:
    """`docs` and `tokens` of the token shards, by dataset; empty before tokenize."""
    done = facts.of("tokenize")
    found: dict[str, Counts] = {"docs": {}, "tokens": {}}
    for name, out in done.manifest.outputs.items() if done else ():
        dataset = name.partition("/")[0]
        for key, stored in (("docs", "rows"), ("tokens", "tokens")):
            found[key][dataset] = found[key].get(dataset, 0) + out[stored]
    return found if done else {}


def levels(facts: Facts) -> list[Level]:
    """The funnel from records to tokenised documents, as far as the pipeline has come."""
    manifests = {name: m for name in facts.names if (m := facts.documents(name))}
    if not manifests:
        return []
    left: Counts = {name: m.accounts["documents"] for name, m in manifests.items()}
    out = [
        Level("records", {name: m.accounts["records"] for name, m in manifests.items()}),
        Level("documents", dict(left), _totals(drops(facts)), "at ingest"),
    ]
    before: ByReason = {}
    for done in facts.selects:
        now = dropped(done, facts.names)
        fresh = _minus(now, before)
        copies = {r: n for r, n in fresh.items() if r.startswith(DUPLICATE)}
        ruled = {r: n for r, n in fresh.items() if r not in copies}
        label = done.instance.partition("@")[2]
        last = done is facts.selects[-1]
        for lost, name, verb in ((ruled, label, "by rules"), (copies, "unique", "duplicates")):
            if not lost and (last or copies or name != label):
                continue
            left = {d: n - sum(by.get(d, 0) for by in lost.values()) for d, n in left.items()}
            out.append(Level(name, dict(left), _totals(lost), verb))
        before = now
    if facts.selects:
        out[-1] = Level("kept", out[-1].left, out[-1].lost, out[-1].verb)
    if shards := tokens(facts):
        docs = {name: shards["docs"].get(name, 0) for name in manifests}
        meant = _meant_for_tokens(facts)
        lost_docs = {
            "in datasets not tokenised": sum(n for name, n in left.items() if name not in meant),
            "not in token shards": sum(n - docs[name] for name, n in left.items() if name in meant),
        }
        total = f"{sum(shards['tokens'].values()):,} tokens"
        out.append(Level("tokenised", docs, {reason: n for reason, n in lost_docs.items() if n}, note=total))
    return out


def checks(facts: Facts) -> Iterator[Check]:
    """Every sum that must hold."""
    for name in facts.names:
        if (m := facts.documents(name)) is not None:
            a = m.accounts
            parts = [a["drops"], a["rejects"], a["documents"]]
            spelled = f"{parts[0]:,} drops + {parts[1]:,} rejects + {parts[2]:,} documents"
            yield Check(f"{name}: records", a["records"], sum(parts), spelled)
    for done in facts.selects:
        a = done.manifest.accounts
        by_reason = sum(sum(by.values()) for by in dropped(done, facts.names).values())
        spelled = f"{a['kept']:,} kept + {by_reason:,} dropped, summed over reasons and datasets"
        yield Check(f"{done.instance}: documents", a["documents"], a["kept"] + by_reason, spelled)
    if facts.selects:
        total = facts.selects[-1].manifest.accounts["documents"]
        held = [facts.rows[name] for name in facts.judged]
        spelled = " + ".join(f"{n:,} in {name}" for n, name in zip(held, facts.judged, strict=True))
        yield Check(f"{facts.selects[-1].instance}: judged", total, sum(held), spelled)
    done_tokens = facts.of("tokenize")
    if done_tokens and facts.selects and done_tokens.config.where == facts.fate:
        made = sum(tokens(facts)["docs"].values())
        last, meant = facts.selects[-1], _meant_for_tokens(facts)
        fell = sum(n for by in dropped(last, meant).values() for n in by.values())
        kept = sum(facts.rows[name] for name in meant) - fell
        left_out = done_tokens.manifest.accounts.get("contaminated_docs", 0)
        spelled = f"{kept:,} kept by {last.instance}" + (f" - {left_out:,} contaminated" if left_out else "")
        yield Check("tokenize: documents", made, kept - left_out, spelled)


def _meant_for_tokens(facts: Facts) -> list[str]:
    """The datasets with documents that `tokenize` works on."""
    done = facts.of("tokenize")
    wanted = done.config.datasets if done else None
    return [name for name in facts.rows if wanted is None or name in wanted]


def _totals(by: ByReason) -> Counts:
    return {reason: sum(counts.values()) for reason, counts in by.items()}


def _minus(now: ByReason, before: ByReason) -> ByReason:
    """What fell for the first time."""
    out: ByReason = {}
    for reason, counts in now.items():
        fresh = {d: n - before.get(reason, {}).get(d, 0) for d, n in counts.items()}
        if any(fresh.values()):
            out[reason] = {d: n for d, n in fresh.items() if n}
    return out
