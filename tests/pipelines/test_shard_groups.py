"""Steps in parts: which parts there are, who excludes whom, and that parts and a finish leave what one run would have left."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from core.stage import Reject
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.options import MOST_GROUPS
from pipelines.runner import Runner, RunOptions
from pipelines.scope import steps
from pipelines.shard_groups import check_options, parts_to_run, ranges, step_lock
from tests.bounds import BOUND_S
from tests.pipelines.small_pipeline import environment, manifests, pipelines, state, texts, write_config, write_jsonl

FILES = 6
CONFIG = """\
root: {root}
engine: {{workers: 1, memory_gb: 1}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
  exact: {{}}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    """A config over 60 documents in six shards, and nothing made of it."""
    write_jsonl(tmp_path / "notes", texts(60), FILES)
    return write_config(tmp_path / "p.yaml", CONFIG, root=tmp_path / "root", source=tmp_path / "notes")


def test_ranges_by_hand():
    assert ranges(7, 3) == ["0:2", "2:4", "4:7"]
    assert ranges(2, 200) == ["0:1", "1:2"]
    assert ranges(0, 5) == []


@given(st.integers(0, 5000), st.integers(1, MOST_GROUPS))
def test_ranges_cover_all_shards_once_and_evenly(shards, groups):
    found = [tuple(map(int, text.split(":"))) for text in ranges(shards, groups)]
    assert len(found) == min(shards, groups)
    assert [n for first, last in found for n in range(first, last)] == list(range(shards))
    sizes = sorted(last - first for first, last in found)
    assert all(b - a <= 1 for a, b in pairwise([*sizes[:1], *sizes[-1:]]))


@pytest.mark.parametrize(
    ("held", "asked", "goes"),
    [
        ((0, 2), (2, 4), True),  # side by side
        ((0, 2), (0, 2), False),
        ((0, 3), (2, 4), False),  # a shard in common
        ((2, 3), (0, 6), False),
        ((0, 2), None, False),
        (None, (0, 2), False),
        (None, None, False),
    ],
)
def test_parts_of_one_step_exclude_one_another_where_they_must(tmp_path, held, asked, goes):
    root = Root(str(tmp_path))
    with step_lock(root, "notes.signals", held, "one"):
        with step_lock(root, "notes.pii", asked, "other"):
            pass
        if goes:
            with step_lock(root, "notes.signals", asked, "other"):
                pass
        else:
            with pytest.raises(StageError, match="held by run one"), step_lock(root, "notes.signals", asked, "other"):
                pass
        with step_lock(root, "notes.signals", asked, "one"):  # the same run re-enters
            pass
    with step_lock(root, "notes.signals", asked, "other"):  # neither the first nor the refused one left anything behind
        pass


@pytest.mark.parametrize("left", ["notes.signals", "notes.signals.shards/1-3"])
def test_what_a_killed_run_left_excludes_nobody(tmp_path, left):
    root = Root(str(tmp_path))
    code = "import os, sys; from core.lock import held; from core.storage import Root\n"
    code += "with held(Root(sys.argv[1]), sys.argv[2], 'dead'): os.kill(os.getpid(), 9)"
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path), left], env=environment(), timeout=BOUND_S)
    assert dead.returncode == -9
    assert root.exists(f"locks/{left}.json")
    for shards in ((0, 2), None):
        with step_lock(root, "notes.signals", shards, "living"):
            pass
    assert not root.exists(f"locks/{left}.json")


def go(config: Path, stage: str, shards: tuple[int, int] | None = None, run_id: str = "test") -> list[str]:
    """What one stage's run says."""
    pipeline, said = load_pipeline(config), []
    chosen = [s for s in steps(pipeline) if s.entry.instance == stage]
    Runner(pipeline, RunOptions(run_id, "notes", shards), say=said.append).run(chosen)
    return said


def test_parts_and_a_finish_are_one_run(config, tmp_path):
    """Two parts of three are run, one twice; the finish computes the third. Manifests equal those of a run without parts."""
    finish = ("run", "stage", "signals", "-c", config, "--dataset", "notes", "--finish", "--up-to-date-code", 99)
    go(config, "extract")
    listed = pipelines("shards", "signals", "-c", config, "--dataset", "notes", "--groups", 3)
    assert json.loads(listed.out) == ["0:2", "2:4", "4:6"]
    part = "signals [notes]: 2 of 6 shards are committed; `--finish` writes the manifest"
    assert go(config, "signals", (0, 2)) == [part]
    assert go(config, "signals", (0, 2)) == [part.replace(";", ", 2 of them before;")]
    assert go(config, "signals", (4, 6)) == [part]
    assert "datasets/notes/manifests/signals.json" not in manifests(tmp_path / "root")
    finished = pipelines(*finish, "--run-id", "mine")
    assert (finished.code, "4 units were committed before" in finished.out) == (0, True)

    # A retry of the run that finished says that it was done, any other that nothing was to do.
    assert [pipelines(*finish, "--run-id", name).code for name in ("mine", "other")] == [0, 99]
    pipeline = load_pipeline(config)
    assert parts_to_run(pipeline, Root(pipeline.root), "signals", "notes", 3) == []

    whole = write_config(tmp_path / "q.yaml", CONFIG, root=tmp_path / "whole", source=tmp_path / "notes")
    for stage in ("extract", "signals"):
        go(whole, stage)
    assert state(tmp_path / "root") == state(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stage", "shards", "finish", "force", "message"),
    [
        ("exact", (0, 2), False, False, "exact: --shards and --finish are for annotate stages, got kind relate"),
        ("extract", None, True, False, "extract: --shards and --finish are for annotate stages, got kind ingest"),
        ("signals", (0, 2), True, False, "--finish collects every shard"),
        ("signals", (0, 2), False, True, "--force removes every shard"),
        ("signals", None, True, True, "--force removes every shard"),
    ],
)
def test_options_without_a_meaning_are_refused(config, stage, shards, finish, force, message):
    with pytest.raises(ConfigError, match=message):
        check_options(load_pipeline(config).entry(stage), shards, finish, force)


def test_a_part_begins_within_the_dataset_and_may_end_beyond_it(config):
    go(config, "extract")
    with pytest.raises(ConfigError, match=r"--shards: got 6:9, expected a range that begins below 6, the number of sh"):
        go(config, "signals", (6, 9))
    assert go(config, "signals", (5, 9)) == [
        "signals [notes]: 1 of 6 shards are committed; `--finish` writes the manifest"
    ]
    ran = pipelines("run", "stage", "signals", "-c", config, "--dataset", "notes", "--shards", "500:600")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_parts_that_cannot_be_listed_are_refused(config):
    pipeline = load_pipeline(config)
    for stage, message in (("exact", "works on whole datasets"), ("signals", "'notes' has no documents yet")):
        with pytest.raises(ConfigError, match=message):
            parts_to_run(pipeline, Root(pipeline.root), stage, "notes", 3)
    ran = pipelines("shards", "signals", "-c", config, "--dataset", "nots")
    assert (ran.code, "no source 'nots'" in ran.err) == (2, True)


def four_of_ten(state, batch):
    """Rejects the first four documents of what it is given."""
    rows = range(min(4, batch.num_rows))
    layer = pa.RecordBatch.from_arrays([pa.array([0] * batch.num_rows, pa.int64())], names=["length"])
    return layer, [Reject(row, "odd", "") for row in rows]


def test_parts_have_the_rejects_budget_of_the_whole(config, tmp_path):
    """24 of 60 rejected, 20 allowed: parts with 12 each pass, the finish and a part of everything fail."""
    go(config, "extract")
    pipeline = load_pipeline(config)
    _, entry, _ = pipeline.stages
    stage = replace(entry.stage, fn=four_of_ten, layer=pa.schema([("length", pa.int64())]), open=None)
    pipeline = replace(pipeline, stages=(replace(entry, stage=stage),))

    def run(shards):
        Runner(pipeline, RunOptions("test", "notes", shards)).run(steps(pipeline))

    layers = tmp_path / "root" / "datasets" / "notes" / "layers" / "signals"
    run((0, 3))
    run((3, 6))
    assert len(list(layers.glob("*.parquet"))) == FILES
    for shards in (None, (0, 6)):
        with pytest.raises(StageError, match="24 of 60 records of notes were rejected, expected at most 20"):
            run(shards)
        assert not list(layers.glob("*.parquet"))  # so that they are computed anew once the cause is mended
