"""What a manifest observes of a step is that step's own."""

from pathlib import Path

from core.manifest import read_manifest
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions
from pipelines.scope import steps
from tests.pipelines.small_pipeline import JUDGED, texts, write_config, write_jsonl

MUCH = 1 << 50


def test_the_peak_of_one_step_is_not_told_of_the_next(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "notes", texts(12), files=1)
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=1, source=tmp_path / "notes")
    pipeline = load_pipeline(config)
    root = Root(pipeline.root)
    for instance in ("extract", "signals", "exact"):
        runner = Runner(pipeline, RunOptions("test"))
        runner.engine.peak_memory_bytes = MUCH  # type: ignore[attr-defined] # what a step before may have left
        runner.run([s for s in steps(pipeline) if s.entry.instance == instance])
        name, dataset = ("documents" if instance == "extract" else instance), (None if instance == "exact" else "notes")
        manifest = read_manifest(root, name, dataset)
        assert manifest is not None
        assert 1 << 20 < manifest.observed["peak_memory_bytes"] < MUCH
