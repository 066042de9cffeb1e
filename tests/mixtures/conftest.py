"""A small root made by hand: documents, layers and manifests as ingest and the judging stages leave them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core.dataset import Dataset, open_dataset
from core.engines.local import LocalEngine
from core.hashing import digest, document_id, table_digest
from core.job import Job, Outcome
from core.layer import write_layer
from core.manifest import Identity, Manifest, write_manifest
from core.schema import DOCUMENTS, FATE, TEXT
from core.stage import Kind, Stage
from core.storage import Root
from tests.builders import annotate_all

WORDS = ("water", "stone", "river", "bridge", "seven", "steps", "below", "ground", "where", "it", "is", "cool", "1847")
SPLIT = pa.schema([pa.field("split", TEXT)])


def sentence(seed: int, words: int) -> str:
    """Text that BPE can learn something from: the same words in another order."""
    return (
        f"page {seed} "
        + " ".join(WORDS[(seed * 7 + i * i * (seed % 5 + 1)) % len(WORDS)] for i in range(words))
        + ".\n"
    )


def documents(source: str, texts: Sequence[str], urls: Sequence[str | None] | None = None) -> pa.Table:
    """Rows of DOCUMENTS."""
    urls = urls or [f"https://{source}.example/{i}" for i in range(len(texts))]
    origin = {"path": "a.jsonl", "offset": 0, "length": 1}
    n = len(texts)
    columns: dict[str, Any] = {
        "doc_id": [document_id(source, u or "", t, i) for i, (u, t) in enumerate(zip(urls, texts, strict=True))],
        "text": list(texts),
        "url": list(urls),
        "source": [source] * n,
        "kind": ["web"] * n,
        "license": [None] * n,
        "fetched_at": [None] * n,
        "origin": [origin] * n,
        "metadata": [json.dumps({})] * n,
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in DOCUMENTS}, schema=DOCUMENTS)


@dataclass
class House:
    """A root under construction, and the stages run on it as the runner would run them."""

    root: Root
    scratch: Path
    names: list[str]

    def add(self, name: str, shards: Mapping[str, pa.Table]) -> Dataset:
        """Commit documents; a name that is there gets further shards or other ones."""
        if name not in self.names:
            self.names.append(name)
        outputs = {}
        for shard, table in shards.items():
            self.root.write_table(f"datasets/{name}/documents/{shard}.parquet", [table], DOCUMENTS)
            size = sum(len(t.encode()) for t in table.column("text").to_pylist())
            outputs[shard] = {"rows": table.num_rows, "text_bytes": size, "content": table_digest(table)}
        write_manifest(self.root, Manifest("documents", name, Identity("extract", 1, {}, {}), outputs))
        return self.dataset(name)

    def dataset(self, name: str) -> Dataset:
        found = open_dataset(self.root, name, self.names.index(name))
        assert found is not None
        return found

    def layer(self, name: str, layer: str, schema: pa.Schema, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Write a layer: `make` gives a document's own columns."""
        dataset = self.dataset(name)
        for shard in dataset.shards:
            table = self.root.read_table(dataset.documents_name(shard))
            rows = [{"computed": True, "error": None, **make(d)} for d in table.to_pylist()]
            full = pa.schema([pa.field("computed", pa.bool_()), pa.field("error", TEXT), *schema])
            write_layer(dataset, layer, shard, schema, [pa.Table.from_pylist(rows, full)], digest([layer, repr(rows)]))

    def judge(self, name: str, drop: Sequence[str] = (), held_out: Sequence[str] = ()) -> None:
        """fate@final and split: documents whose text holds one of the words fall, or are held out."""
        gone = {"keep": False, "reason": "rule", "stage": "signals", "detail": "1"}
        kept = {"keep": True, "reason": None, "stage": None, "detail": None}
        self.layer(name, "fate@final", FATE, lambda d: gone if any(w in d["text"] for w in drop) else kept)
        sides = ("train", "held_out")
        self.layer(name, "split", SPLIT, lambda d: {"split": sides[any(w in d["text"] for w in held_out)]})

    def run(self, stage: Stage, workers: int = 0, instance: str = "", **config: Any) -> Outcome:
        """Run a stage and commit its manifest."""
        instance, made = instance or stage.name, stage.config(**config)
        identity = Identity(stage.name, stage.version, made.model_dump(mode="json"), {})
        engine = LocalEngine(self.scratch / f"{instance}-{workers}", workers)
        datasets = tuple(self.dataset(n) for n in self.names)
        artifacts = stage.artifacts(made) if stage.artifacts else {}
        job = Job(stage, instance, made, self.root, engine, datasets, identity.digest(), artifacts=artifacts)
        try:
            outcome: Outcome = annotate_all(job) if stage.kind is Kind.ANNOTATE else stage.fn(job)
        finally:
            engine.clear()
            engine.close()
        if stage.kind is Kind.ANNOTATE:
            return outcome
        write_manifest(self.root, Manifest(instance, None, identity, outcome.outputs, outcome.accounts))
        return outcome


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(Root(str(tmp_path / "root")), tmp_path / "scratch", [])


@pytest.fixture
def make_house(tmp_path: Path) -> Callable[[str], House]:
    """Several roots in one test."""
    return lambda name: House(Root(str(tmp_path / name)), tmp_path / f"scratch-{name}", [])
