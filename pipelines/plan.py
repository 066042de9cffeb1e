"""What would run, what is skipped, and why: each stage's identity against the manifest that is there.

A stage's identity is known once everything it reads is committed. Where something it reads will itself run, the plan says so and
the runner decides again when it gets there.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from core.dataset import DOCUMENTS_INSTANCE
from core.errors import ConfigError
from core.hashing import digest, file_digest
from core.manifest import Identity, Manifest, read_manifest
from core.predicate import Predicate
from core.schema import DOCUMENTS
from core.stage import ROOT, Artifacts, Kind, identity_fields
from core.storage import Root
from pipelines.config import Pipeline, StageEntry
from pipelines.scope import DOCUMENT_KINDS, Step, absent_layers, present, steps

STAND_INS = {"fasttext": ("fasttext-wheel",)}  # the same library as a binary, for machines without a compiler


@dataclass
class Planned:
    """A step with what the plan found. `why` holds the reasons to run, empty when skipped."""

    step: Step
    run: bool
    why: list[str] = field(default_factory=list)
    identity: Identity | None = None  # None: not known before something it reads has run


def plan(pipeline: Pipeline, root: Root, chosen: Iterable[Step] | None = None) -> list[Planned]:
    """The plan for `chosen` steps (default all)."""
    running: set[tuple[str | None, str]] = set()
    out = []
    for step in steps(pipeline) if chosen is None else chosen:
        planned = plan_step(pipeline, root, step, running)
        if planned.run:
            running.add((step.dataset, step.manifest))
            if step.dataset is None:
                running.update(
                    (name, layer) for name in pipeline.sources for layer in (step.entry.instance, _layer_of(step))
                )
        out.append(planned)
    return out


def plan_step(pipeline: Pipeline, root: Root, step: Step, running: Collection[tuple[str | None, str]] = ()) -> Planned:
    """Compare one step's identity with its manifest. `running`: what steps before it will write anew."""
    waits = [name for where, name in _inputs(pipeline, step) if (where, name) in running]
    before = read_manifest(root, step.manifest, step.dataset)
    if waits:
        return Planned(step, True, [f"{', '.join(dict.fromkeys(waits))} will run first"])
    identity = identity_of(pipeline, root, step)
    if before is None:
        return Planned(step, True, ["never run here"], identity)
    if before.identity.digest() == identity.digest():
        return Planned(step, False, [], identity)
    return Planned(step, True, before.identity.differences(identity), identity)


def identity_of(pipeline: Pipeline, root: Root, step: Step, with_inputs: bool = True) -> Identity:
    """What the step's output is a function of. Without inputs: the part that holds for every shard, known before they are."""
    entry = step.entry
    config = identity_fields(entry.config)
    if entry.stage.kind is Kind.DECIDE:
        config["policy"] = policy_identity(pipeline, root, entry.instance)
    inputs: dict[str, str] = {}
    if step.dataset and entry.stage.kind is not Kind.ANNOTATE:
        config["source"] = identity_fields(pipeline.sources[step.dataset])
    seeds_file = getattr(pipeline.sources.get(step.dataset or ""), "seeds_file", None)
    if entry.stage.kind is Kind.CAPTURE and seeds_file:
        inputs["seeds_file"] = _seeds_digest(seeds_file)
    if entry.stage.kind is Kind.INGEST and with_inputs:
        inputs = source_inputs(pipeline, root, step.dataset or "")
    for where, name in _inputs(pipeline, step) if with_inputs else ():
        label = f"{where}/{name}" if where else name
        inputs[label] = _content(root, where, name, step)
    artifacts = {name: file_digest(path) for name, path in artifacts_of(entry).items()}
    if entry.stage.kind is Kind.ANNOTATE:  # another model means other values in every shard
        artifacts |= {name: _content(root, None, name[1:], step) for name in models_of(entry)}
    libraries = {name: library_version(name) for name in entry.stage.libraries}
    return Identity(entry.stage.name, entry.stage.version, config, inputs, artifacts, libraries)


def _seeds_digest(path: str) -> str:
    try:
        return file_digest(path)
    except OSError as e:
        raise ConfigError(f"crawl: seeds_file cannot be read, got {e}; expected UTF-8 text, one URL a line") from e


def code_of(identity: Identity) -> str:
    """The part of an identity that holds for every shard: all but the inputs."""
    return digest([identity.stage, identity.version, identity.config, identity.artifacts, identity.libraries])


def artifacts_of(entry: StageEntry) -> Artifacts:
    return entry.stage.artifacts(entry.config) if entry.stage.artifacts else {}


def models_of(entry: StageEntry) -> list[str]:
    """What a stage reads of other stages' outputs, as `@instance`."""
    return [c for c in entry.stage.columns(entry.config) if c.startswith("@")]


def opened_with(entry: StageEntry, root: Root) -> Artifacts:
    """What an annotate stage is opened with: its artifacts, and the URL of the root where it reads other stages' outputs."""
    return {**artifacts_of(entry), **({ROOT: root.url} if models_of(entry) else {})}


def library_version(name: str) -> str:
    """The installed version of a distribution, or of the one that stands in for it."""
    for candidate in (name, *STAND_INS.get(name, ())):
        try:
            return f"{candidate} {version(candidate)}" if candidate != name else version(candidate)
        except PackageNotFoundError:
            continue
    return "absent"


def policy_identity(pipeline: Pipeline, root: Root, instance: str) -> dict[str, Any]:
    """The part of the policy that a select reads, as JSON-like values."""
    from mixtures.policy import read_withdrawn

    rules = pipeline.policy.get(instance.partition("@")[2]) or ()
    return {
        "rules": [r.model_dump(mode="json") for r in rules],
        "priority": list(pipeline.policy["priority"] or ()),
        "withdrawn": digest(sorted(read_withdrawn(root, pipeline.policy.get("withdrawn")))),
    }


def source_inputs(pipeline: Pipeline, root: Root, name: str) -> dict[str, str]:
    """One digest a unit of input: content, never a modification time."""
    from crawl.ingest import reader

    source = reader(pipeline.sources[name], name, root)
    units = source.units()
    return {"source": digest({u.name: source.input_digest(u) for u in units}), "units": str(len(units))}


def plan_json(pipeline: Pipeline, planned: Iterable[Planned]) -> dict[str, Any]:
    """The plan for schedulers: each step with the command that runs it, the steps it must wait for, what it makes that others
    may wait for, and for a step that can be cut into parts the command that says which."""
    planned, config = list(planned), ["-c", str(pipeline.path.resolve())]
    out = []
    for i, p in enumerate(planned):
        reads = set(_inputs(pipeline, p.step))
        before = [q.step for q in planned[:i] if _makes(pipeline, q.step) & reads]
        annotates = p.step.entry.stage.kind is Kind.ANNOTATE
        words = [p.step.entry.instance, *config, *(["--dataset", p.step.dataset] if p.step.dataset else [])]
        out.append(
            {
                "name": p.step.name,
                "stage": p.step.entry.instance,
                "kind": p.step.entry.stage.kind.value,
                "dataset": p.step.dataset,
                "run": p.run,
                "why": p.why,
                "after": [s.name for s in before],
                "makes": _made_names(p.step),
                "command": ["pipelines", "run", "stage", *words],
                "parts": ["pipelines", "shards", *words] if annotates else None,
            }
        )
    report = ["pipelines", "report", *config]
    return {"root": pipeline.root, "engine": pipeline.engine.name, "report": report, "steps": out}


def _made_names(step: Step) -> list[str]:
    """Below the root: the documents, token shards, mixtures, models and records that a step makes. Layers and relations are
    between stages of one pipeline and not named."""
    entry = step.entry
    config: Any = entry.config
    if entry.stage.kind in DOCUMENT_KINDS:
        return [f"datasets/{step.dataset}/documents"]
    if entry.stage.kind is not Kind.EXPORT:
        return []
    name = entry.stage.name
    if name == "mix":
        from mixtures.mix import phase_path
        from mixtures.phases import HELD_OUT

        phases = [*config.phases, *([HELD_OUT] if config.held_out else [])]
        return [f"mixtures/{phase_path(entry.instance, phase)}" for phase in phases]
    if name == "tokenize":
        return [f"tokens/{config.tokenizer}"]
    return [entry.instance if name in ("sft", "rl") else f"models/{entry.instance}"]


def _makes(pipeline: Pipeline, step: Step) -> set[tuple[str | None, str]]:
    """(dataset or None, manifest name) of everything a step writes."""
    out: set[tuple[str | None, str]] = {(step.dataset, step.manifest)}
    if step.dataset is None:
        out |= {(name, _layer_of(step)) for name in pipeline.sources}
    return out


def _inputs(pipeline: Pipeline, step: Step) -> list[tuple[str | None, str]]:
    """(dataset or None, manifest name) of everything a step reads."""
    entry = step.entry
    kind = entry.stage.kind
    if kind is Kind.CAPTURE and step.dataset:
        return []
    if kind is Kind.INGEST:
        captured = pipeline.sources[step.dataset or ""].kind
        captures = [e.instance for e in pipeline.stages if e.stage.kind is Kind.CAPTURE]
        return [(step.dataset, captured)] if captured in captures else []
    columns = list(entry.stage.columns(entry.config))
    if kind is Kind.DECIDE:
        columns += policy_columns(pipeline, entry.instance)
    if entry.config.where:
        columns += Predicate(entry.config.where).columns
    judged = entry.stage.kind is Kind.ANNOTATE
    names = [step.dataset] if judged and step.dataset else present(pipeline, entry)
    absent = {name: absent_layers(pipeline, name) for name in names}
    out: list[tuple[str | None, str]] = []
    for column in dict.fromkeys(columns):
        if column.startswith("@"):
            out.append((None, column[1:]))
            continue
        layer = column.rpartition(".")[0]
        name = layer if layer and column not in DOCUMENTS.names else DOCUMENTS_INSTANCE
        out += [(n, name) for n in names if name not in absent[n]]
    out += [(n, DOCUMENTS_INSTANCE) for n in names]
    return list(dict.fromkeys(out))


def policy_columns(pipeline: Pipeline, instance: str) -> list[str]:
    """Columns that the rules of one select read."""
    from mixtures.policy import rules_of

    return sorted(
        {c for rule in rules_of(pipeline.policy.get(instance.partition("@")[2]) or ()) for c in rule.predicate.columns}
    )


def _content(root: Root, where: str | None, name: str, step: Step) -> str:
    manifest: Manifest | None = read_manifest(root, name, where)
    if manifest is None:
        what = f"{name} of dataset {where}" if where else name
        raise ConfigError(f"{step.name}: reads {what}, which is not there; run that stage first or add it to `stages`")
    return manifest.content()


def _layer_of(step: Step) -> str:
    """The layer a root-wide step writes for each dataset: a select's is its fate."""
    name, _, label = step.entry.instance.partition("@")
    return f"fate@{label}" if name == "select" else name
