"""Made datasets: a maker in the middle of a pipeline, what runs before and after it, and that its parents never change."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from core.dataset import Dataset
from core.engines.contract import Unit
from core.errors import ConfigError
from core.ingest import Reader, ingest
from core.records import Dropped, Found, Origin, Raw
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from crawl.sources import MadeSource
from pipelines.config import StageEntry, load_pipeline
from pipelines.inspect import check_root, explain_lines
from pipelines.plan import plan
from pipelines.runner import Runner, RunOptions
from pipelines.scope import absent_layers, between, dataset_at, present, steps
from tests.pipelines.small_pipeline import nearly, prose, write_jsonl

CONFIG = """\
root: {folder}/root
engine: {{name: local, workers: 0, memory_gb: 1}}
sources:
  notes: {{kind: jsonl, path: {folder}/notes}}
stages:
  extract: {{}}
  signals: {{}}
  pii: {{datasets: [notes]}}
  minhash: {{exact: null}}
  select@final: {{duplicates: [minhash]}}
  minhash@all: {{exact: null, where: fate@final or signals.words > 0}}
  select@all: {{after: fate@final, duplicates: [minhash@all]}}
policy:
  final:
    - {{drop: signals.words < 20, reason: too_short}}
"""


def _units(dataset: Dataset) -> list[Unit]:
    return [Unit(s.name, s) for s in dataset.shards]


def _records(dataset: Dataset, unit: Unit) -> Iterator[Raw]:
    for batch in dataset.read(unit.payload, ["doc_id", "text", "url"]):
        for row in batch.to_pylist():
            yield Raw(Origin(row["doc_id"]), row)


def _parse(raw: Raw) -> Found | Dropped:
    """A near copy of its parent, but for one: that is a near copy of a stranger."""
    number = int(raw.payload["url"].rpartition("/")[2])
    if number == 1:
        return Dropped(raw.origin, "refused")
    text = f"Once more. {prose(0)}" if number == 2 else nearly(raw.payload["text"])
    metadata = {"parents": [raw.payload["doc_id"]], "number": number}
    return Found(raw.origin, text, None, "other", metadata=metadata)


def _digest(dataset: Dataset, unit: Unit) -> str:
    return unit.payload.content


def _echo(job):
    (notes,) = job.datasets
    made = ingest(
        job, Reader(job.source_name, partial(_units, notes), partial(_records, notes), _parse, partial(_digest, notes))
    )
    return made


ECHO = Stage(name="echo", kind=Kind.MAKE, config=StageConfig, fn=_echo, reads=("text", "fate@final.keep"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Five notes of which one is too short, and a maker of echoes: ready to run."""
    folder = tmp_path_factory.mktemp("made")
    write_jsonl(folder / "notes", [prose(0), prose(1), prose(2), prose(3), "Too short."], 2)
    path = folder / "p.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return with_echo(path)


def with_echo(path):
    """The config with the maker of this file after its first select."""
    loaded = load_pipeline(path)
    place = loaded.stages.index(loaded.entry("select@final")) + 1
    stages = (*loaded.stages[:place], StageEntry("echo", ECHO, StageConfig()), *loaded.stages[place:])
    sources = {"echoes": MadeSource(stage="echo"), **loaded.sources}
    return replace(loaded, stages=stages, sources=sources, policy={**loaded.policy, "priority": ("notes", "echoes")})


@pytest.fixture(scope="module")
def root(pipeline):
    Runner(pipeline, RunOptions("test")).run()
    return Root(pipeline.root)


def test_what_was_listed_before_the_maker_runs_for_its_dataset_right_after_it(pipeline):
    names = [s.name for s in steps(pipeline)]
    expected = ["extract [notes]", "signals [notes]", "pii [notes]", "minhash", "select@final"]
    assert names == [*expected, "echo [echoes]", "signals [echoes]", "minhash@all", "select@all"]
    assert present(pipeline, pipeline.entry("minhash")) == ["notes"]
    assert present(pipeline, pipeline.entry("minhash@all")) == ["echoes", "notes"]
    assert [s.name for s in between(pipeline, "echo", "minhash@all")] == names[5:8]
    assert [s.name for s in between(pipeline, None, "select@final")] == names[:5]


def test_documents_of_the_next_generation_pass_the_same_stages_and_name_their_parents(pipeline, root):
    echoes = dataset_at(pipeline, root, "echoes")
    assert (echoes.generation, echoes.rows) == (1, 4)
    (shard, *_) = echoes.shards
    table = echoes.read_table(shard, ["metadata", "signals.words", "pii.spans", "pii.computed", "fate@final.keep"])
    assert table.column("signals.words").null_count == 0
    assert table.column("pii.spans").null_count == table.num_rows  # pii is for notes only
    assert not any(table.column("pii.computed").to_pylist())
    assert table.column("fate@final.keep").null_count == table.num_rows  # decided before the echoes were there
    assert {*absent_layers(pipeline, "echoes")} == {"pii", "minhash", "fate@final", "duplicates@final"}


def test_a_child_falls_to_a_stranger_and_never_to_its_parent(pipeline, root):
    fates = {}
    for name in ("notes", "echoes"):
        dataset = dataset_at(pipeline, root, name)
        for shard in dataset.shards:
            for row in dataset.read_table(shard, ["url", "metadata", "fate@all.keep", "fate@all.reason"]).to_pylist():
                number = json.loads(row["metadata"]).get("number", row["url"])
                fates[number] = row["fate@all.reason"]
    notes = {f"https://notes.example/{i}": None for i in range(4)} | {"https://notes.example/4": "too_short"}
    # Note 4's echo stays: no rule of select@all is about length, and it carries no fate of its parent's.
    assert fates == {**notes, 0: None, 2: "duplicate_minhash", 3: None, 4: None}


def test_a_second_run_does_nothing_and_the_accounts_add_up(pipeline, root):
    assert [p.step.name for p in plan(pipeline, root) if p.run] == []
    assert check_root(pipeline, root, content=True)[0] == []
    manifest = root.read_json("datasets/echoes/manifests/documents.json")
    assert manifest["accounts"] == {
        "records": 5,
        "drops": 1,
        "drops.refused": 1,
        "rejects": 0,
        "documents": 4,
        "generation": 1,
    }
    echo = dataset_at(pipeline, root, "echoes")
    doc_id = echo.read_table(echo.shards[0], ["doc_id"]).column("doc_id")[0].as_py()
    assert any("fate:" in line for line in explain_lines(pipeline, root, doc_id))


def test_a_made_dataset_without_a_maker_is_told_with_its_line(tmp_path):
    path = tmp_path / "p.yaml"
    made = "sources:\n  echoes: {kind: made, stage: echo}\n"
    path.write_text(CONFIG.format(folder=tmp_path).replace("sources:\n", made))
    with pytest.raises(ConfigError, match=r"p.yaml:4: sources.echoes.stage: no stage 'echo' makes documents here"):
        load_pipeline(path)


@pytest.mark.parametrize("instance", ["select", "signals@again", "minhash@a-b"])
def test_labels_stand_where_they_mean_something(tmp_path, instance):
    path = tmp_path / "p.yaml"
    path.write_text(CONFIG.format(folder=tmp_path).replace("minhash: {exact: null}", f"{instance}: {{}}"))
    with pytest.raises(ConfigError, match="label"):
        load_pipeline(path)
