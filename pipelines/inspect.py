"""Commands that look: status, check, explain, extract, forget. They compute nothing and change nothing but `withdrawn.txt`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from core.dataset import DOCUMENTS_INSTANCE, Dataset, Shard, open_dataset
from core.errors import ConfigError
from core.hashing import table_digest
from core.manifest import Manifest, read_manifest
from core.predicate import Predicate
from core.records import Origin, Raw
from core.stage import Kind
from core.storage import Root
from mixtures.policy import WITHDRAWN, rules_of, withdrawn_rows
from mixtures.select import fate_layer
from pipelines.config import Pipeline
from pipelines.scope import DOCUMENT_KINDS, Step, layers_of, steps

TEXT_PREVIEW = 400  # characters of a document's text in `explain`


def status_lines(pipeline: Pipeline, root: Root) -> Iterator[str]:
    """One line a step: what is committed, or that nothing is."""
    for step in steps(pipeline):
        manifest = read_manifest(root, step.manifest, step.dataset)
        if manifest is None:
            yield f"{step.name:<28}not run"
            continue
        o = manifest.observed
        counts = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in manifest.accounts.items() if "." not in k)
        speed = (
            f"{o.get('docs_per_s', 0):,.0f} docs/s, {o.get('mb_per_s', 0):,.1f} MB/s, " if o.get("docs_per_s") else ""
        )
        memory = f"{o.get('peak_memory_bytes', 0) / 1e6:,.0f} MB, " if o.get("peak_memory_bytes") else ""
        yield f"{step.name:<28}{counts + '; ' if counts else ''}{speed}{memory}{o.get('seconds', 0):.1f} s, run {o.get('run_id')}"


def check_root(pipeline: Pipeline, root: Root, content: bool) -> tuple[list[str], str]:
    """(problems, what to say where there are none). `content`: shards of documents and layers are read, hashes compared."""
    problems: list[str] = []
    files = manifests = 0
    for step in steps(pipeline):
        manifest = read_manifest(root, step.manifest, step.dataset)
        if manifest is None:
            continue
        manifests += 1
        problems += [f"{step.name}: {p}" for p in account_problems(step, manifest)]
    for ordinal, name in enumerate(pipeline.sources):
        dataset = open_dataset(root, name, ordinal)
        if dataset is None:
            continue
        wanted = {DOCUMENTS_INSTANCE: None, **dict(layer_manifests(pipeline, root, name))}
        for layer, layer_manifest in wanted.items():
            for shard in dataset.shards:
                files += 1
                problems += _shard_problems(dataset, shard, layer, layer_manifest, content)
    if not manifests:
        return problems, f"nothing has run in {root.url} yet"
    found = "all hashes equal" if content else "accounts add up"
    return problems, f"all good: {manifests} manifests, {files} files, {found}"


def account_problems(step: Step, manifest: Manifest) -> list[str]:
    """Counts that do not add up."""
    a = manifest.accounts
    if step.entry.stage.kind in DOCUMENT_KINDS and a["records"] != a["drops"] + a["rejects"] + a["documents"]:
        return [
            f"records {a['records']:,} != drops {a['drops']:,} + rejects {a['rejects']:,} + documents {a['documents']:,}"
        ]
    if step.entry.stage.kind is Kind.DECIDE:
        reasons = sum(n for k, n in a.items() if k.startswith("dropped.") and k.count(".") == 1)
        if a["documents"] != a["kept"] + a["dropped"] or reasons != a["dropped"]:
            return [
                f"documents {a['documents']:,} != kept {a['kept']:,} + dropped {a['dropped']:,} (by reason {reasons:,})"
            ]
    return []


def layer_manifests(pipeline: Pipeline, root: Root, dataset: str) -> Iterator[tuple[str, Manifest]]:
    """Every committed layer of a dataset, in the order of the pipeline."""
    for entry in pipeline.stages:
        for name, _ in layers_of(entry):
            manifest = read_manifest(root, name, dataset)
            if manifest is not None:
                yield name, manifest


def _shard_problems(dataset: Dataset, shard: Shard, layer: str, manifest: Manifest | None, content: bool) -> list[str]:
    name = dataset.documents_name(shard) if manifest is None else dataset.layer_name(layer, shard)
    if not dataset.root.exists(name):
        return [f"{name}: named by a manifest and not there; `pipelines run stage {layer} --force`"]
    if manifest is not None:
        note = dataset.root.note(name)
        if note is None or note["documents"] != shard.content:
            return [f"{name}: made from other documents; `pipelines run stage {layer} --force`"]
    if not content:
        return []
    expected = shard.content if manifest is None else manifest.outputs[shard.name]["content"]
    found = table_digest(dataset.root.read_table(name))
    if found == expected:
        return []
    return [
        f"{name}: content {found[:12]}, expected {expected[:12]}: it was changed; `pipelines run stage {layer} --force`"
    ]


def explain_lines(pipeline: Pipeline, root: Root, doc_id: str) -> Iterator[str]:
    """One document: where it is from, every layer's values, each rule with its outcome, and its fate."""
    dataset, shard, row = find_document(pipeline, root, doc_id)
    about = _row(dataset.root.read_table(dataset.documents_name(shard)), row)
    yield f"doc_id    {about['doc_id']}"
    yield f"dataset   {dataset.name}, shard {shard.name}, row {row}"
    for key in ("url", "kind", "license", "fetched_at", "origin", "metadata"):
        yield f"{key:<10}{about[key]}"
    yield f"text      {len(about['text']):,} characters: {' '.join(about['text'][:TEXT_PREVIEW].split())}"
    values: dict[str, Any] = {c: about[c] for c in about}
    for layer, _ in layer_manifests(pipeline, root, dataset.name):
        yield f"\n{layer}"
        for name, value in _row(dataset.read_layer(layer, shard), row).items():
            values[f"{layer}.{name}"] = value
            shown = round(value, 5) if isinstance(value, float) else value
            yield f"  {name:<36}{shown if not isinstance(shown, list) else json.dumps(shown)[:200]}"
    for entry in pipeline.stages:
        if entry.stage.kind is Kind.DECIDE:
            yield from _explain_select(pipeline, dataset, entry.instance, values)


def _explain_select(pipeline: Pipeline, dataset: Dataset, instance: str, values: dict[str, Any]) -> Iterator[str]:
    yield f"\n{instance}: rules in order"
    for rule in rules_of(pipeline.policy.get(instance.partition("@")[2]) or ()):
        if rule.datasets is not None and dataset.name not in rule.datasets:
            yield f"  not for {dataset.name:<10} {rule.reason}"
            continue
        columns = rule.predicate.columns
        if any(c not in values for c in columns):
            yield f"  not computed         {rule.reason}"
            continue
        holds = _holds(rule.predicate, values)
        read = ", ".join(f"{c} = {values[c]}" for c in columns)
        verdict = {True: "FALLS", False: "passes", None: "unknown"}[holds]
        yield f"  {verdict:<12}{rule.reason:<32}{rule.predicate.text}   ({read})"
    layer = fate_layer(instance)
    if f"{layer}.keep" in values:
        kept = values[f"{layer}.keep"]
        detail = f" ({values[f'{layer}.detail']})" if values[f"{layer}.detail"] else ""
        yield f"  fate: {'kept' if kept else 'dropped: ' + str(values[f'{layer}.reason']) + detail}"


def _holds(predicate: Predicate, values: dict[str, Any]) -> bool | None:
    holds: bool | None = predicate.evaluate({c: pa.array([values[c]]) for c in predicate.columns})[0].as_py()
    return holds


def find_document(pipeline: Pipeline, root: Root, doc_id: str) -> tuple[Dataset, Shard, int]:
    """The one document whose id begins with `doc_id`."""
    found: list[tuple[Dataset, Shard, int]] = []
    ids: set[str] = set()
    for ordinal, name in enumerate(pipeline.sources):
        dataset = open_dataset(root, name, ordinal)
        for shard in dataset.shards if dataset else ():
            assert dataset is not None
            column = root.read_table(dataset.documents_name(shard), ["doc_id"]).column("doc_id")
            for row in pc.indices_nonzero(pc.starts_with(column, doc_id)).to_pylist():
                found.append((dataset, shard, row))
                ids.add(column[row].as_py())
    if not found:
        raise ConfigError(f"explain: no document {doc_id!r} in {root.url}; ids stand in the report and in fate layers")
    if len(found) > 1:
        raise ConfigError(
            f"explain: {doc_id!r} begins {len(found)} ids ({', '.join(sorted(ids)[:3])} ...); give more digits"
        )
    return found[0]


def extract_lines(paths: Sequence[Path]) -> Iterator[str]:
    """What each file (or record of a WARC) would become, one JSON object a line."""
    from core.engines.contract import Unit
    from crawl.sources import parse, records, units
    from crawl.sources.config import FilesSource, WarcSource

    for path in paths:
        if not path.exists():
            raise ConfigError(f"extract: {path}: no such file")
        is_warc = any(part in (".warc", ".arc", ".wet") for part in path.suffixes)
        source = WarcSource(path=str(path)) if is_warc else FilesSource(path=str(path))
        work: list[Unit] = units(source)
        for unit in work:
            for raw in records(source, unit):
                out = parse(source, raw) if isinstance(raw, Raw) else raw
                yield json.dumps({"file": str(path), **_plain(out)}, ensure_ascii=False, default=str)


def _plain(value: Any) -> dict[str, Any]:
    out = {"outcome": type(value).__name__.lower(), **vars(value)}
    origin: Origin = out.pop("origin")
    return {**out, "offset": origin.offset}


def forget_lines(pipeline: Pipeline, root: Root, wanted: Sequence[str], dry_run: bool) -> Iterator[str]:
    """Record takedowns and say which shards and mixtures hold the documents now."""

    listed = pa.array(sorted(set(wanted)), pa.large_string())
    affected: set[tuple[str, str]] = set()
    for ordinal, name in enumerate(pipeline.sources):
        dataset = open_dataset(root, name, ordinal)
        for shard in dataset.shards if dataset else ():
            assert dataset is not None
            table = dataset.read_table(shard, ["doc_id", "url"])
            count = int(withdrawn_rows(table, listed).sum())
            if count:
                affected.add((name, shard.name))
                yield f"{name}/{shard.name}: {count:,} documents"
    if not affected:
        yield "no document in this root matches; the takedown still holds for documents to come"
    yield from _affected_mixtures(root, affected)
    if dry_run:
        yield "dry run: nothing recorded"
        return
    before = root.read_bytes(WITHDRAWN).decode().splitlines() if root.exists(WITHDRAWN) else []
    root.write_bytes(WITHDRAWN, ("\n".join(sorted({*before, *wanted})) + "\n").encode())
    yield "recorded in withdrawn.txt: `pipelines run all` now drops them from every fate, token shard index and mixture"


def _affected_mixtures(root: Root, affected: set[tuple[str, str]]) -> Iterator[str]:
    top = root.names("mixtures")
    for phase in [*top, *(f"{label}/{name}" for label in top for name in root.names(f"mixtures/{label}"))]:
        name = f"mixtures/{phase}/index.parquet"
        if not root.exists(name):
            continue
        pairs = _pairs(root, name)
        if pairs & affected:
            yield f"mixture {phase}: reads {len(pairs & affected)} of these shards"


def _pairs(root: Root, name: str) -> set[tuple[str, str]]:
    table = root.read_table(name, ["dataset", "shard"]).group_by(["dataset", "shard"]).aggregate([])
    return set(
        zip(map(str, table.column("dataset").to_pylist()), map(str, table.column("shard").to_pylist()), strict=True)
    )


def _row(table: pa.Table, row: int) -> dict[str, Any]:
    values: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    return values
