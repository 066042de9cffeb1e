"""One suite for every stage: the same pipeline, arranged in ways that must not matter, leaves the same content in its root.

The reference is `local` with one worker. Captures of a web and a model on loopback are made by it alone; the
others read what it captured, as determinism starts there.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config import load_pipeline
from pipelines.runner import RunOptions
from pipelines.stages import STAGES
from tests.conformance.arrangements import ARRANGEMENTS, REFERENCE, SETTINGS, Arranged, Arrangement, promised
from tests.conformance.compare import differences, files_of, stage_of
from tests.conformance.corpus import World, make_inputs, make_repositories, served
from tests.conformance.rows import ROWS
from tests.conftest import SPARK_WORKERS
from tests.engines.conftest import require
from tests.pipelines.small_pipeline import leftovers

CAPTURED = ("captures/web", "captures/answers")
MARKS = {"ray": [pytest.mark.ray], "spark": [pytest.mark.spark], "local": []}

# Spark: 90 s on two idle cores, twice that on busy ones.
pytestmark = [pytest.mark.filterwarnings("ignore:PySpark does not yet"), pytest.mark.timeout(1200)]


def run(folder: Path, world: World, how: Arrangement) -> dict[str, int]:
    """The whole pipeline, so arranged, in `folder/root`. Partitions of its shuffles, by label, where the engine tells."""
    inputs = folder / "inputs"
    make_inputs(inputs, how.order)
    config = world.config(
        folder / "pipeline.yaml",
        inputs,
        engine=how.engine,
        workers=how.workers,
        partition_mb=how.partition_mb,
        batch_mb=how.batch_mb,
    )
    runner = Arranged(load_pipeline(config), RunOptions("test"))
    runner.order = how.order
    runner.run()
    return dict(runner.engine.partitions)


def manifests(root: Path) -> dict[str, dict]:
    found = [*root.glob("manifests/*.json"), *root.glob("datasets/*/manifests/*.json")]
    return {p.relative_to(root).as_posix(): json.loads(p.read_text("utf-8")) for p in found}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of the reference, with the repositories beside its root."""
    folder = tmp_path_factory.mktemp("reference")
    make_repositories(folder / "captured")
    with served(folder / "captured") as world:
        run(folder, world, REFERENCE)
    return folder


def test_every_stage_has_a_row():
    assert sorted(ROWS) == sorted(line.name for line in STAGES)


@pytest.mark.parametrize("stage", ROWS)
def test_the_pipeline_of_a_row_runs_its_stage_on_something(stage, reference):
    root, row = reference / "root", ROWS[stage]
    manifest = json.loads((root / row.manifest).read_text("utf-8"))
    assert manifest["identity"]["stage"] == stage
    assert {name: manifest["accounts"].get(name, 0) for name in row.found if not manifest["accounts"].get(name)} == {}
    compared = {*files_of(root)}
    for glob in row.compared:
        files = [p.relative_to(root).as_posix() for p in root.glob(glob)]
        assert files, glob
        assert {*files} <= compared, glob
        assert {stage_of(name).partition("@")[0] for name in files} == {stage}, glob


def test_duplicates_cross_files_and_datasets(reference):
    """Or equality of dedup would be about nothing."""
    root = reference / "root"
    edges = pq.read_table(root / "relations/minhash/edges")
    assert edges.num_rows > 15
    assert sum(len(m["outputs"]) > 2 for name, m in manifests(root).items() if name.endswith("/documents.json")) >= 2


def test_every_two_settings_meet_and_every_value_is_in_the_quick_part():
    assert promised() == set().union(*(a.pairs() for a in ARRANGEMENTS))
    quick = [a for a in ARRANGEMENTS if not a.soak]
    for setting, values in SETTINGS.items():
        assert {getattr(a, setting) for a in quick} == {*values}, setting
    assert len({a.name for a in ARRANGEMENTS}) == len(ARRANGEMENTS)
    assert max(Counter(a.engine for a in quick if a is not REFERENCE).values()) <= 2


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(a, id=a.name, marks=[*MARKS[a.engine], *([pytest.mark.soak] if a.soak else [])])
        for a in ARRANGEMENTS
        if a is not REFERENCE
    ],
)
def test_every_stage_leaves_the_same_however_it_is_arranged(how, reference, tmp_path, shared_spark):
    require(how.engine)
    if how.soak and "STEPWELL_SOAK" not in os.environ:
        pytest.skip("set STEPWELL_SOAK to run it: two minutes or more")
    if how.engine == "spark":
        shared_spark.start() if how.workers == SPARK_WORKERS else shared_spark.stop()
    for name in CAPTURED:
        shutil.copytree(reference / "root" / name, tmp_path / "root" / name)
    partitions = run(tmp_path, World(reference / "captured"), how)
    found = differences(reference / "root", tmp_path / "root")
    assert not found, "\n".join(str(d) for d in found[:20])
    ran = {name: m["observed"]["engine"] for name, m in manifests(tmp_path / "root").items()}
    assert {*ran.values()} == {how.engine}
    assert {row.manifest for row in ROWS.values()} <= {*ran}
    assert leftovers(tmp_path / "root") == []
    if partitions:
        most = {128.0: (1, 1), 0.02: (3, 20), 0.002: (20, 200)}[how.partition_mb]
        assert most[0] <= max(partitions.values()) <= most[1]
