"""The demo's pairs of releases, from packages made here, and the report's panel on changes."""

import json
import tarfile

from pipelines.config import load_pipeline
from pipelines.demo import download, releases
from pipelines.demo.sites import Package
from pipelines.report.page import render
from pipelines.runner import Runner, RunOptions
from tests.crawl.test_harvest_inputs import as_sdist, package

CONFIG = """\
root: {folder}/root
engine: {{workers: 1, memory_gb: 1}}
sources:
  changes: {{kind: harvest, release_list: {folder}/releases.json, rules: {{unwanted_files: leave_out}}}}
  dialogues: {{kind: made, stage: dialogues}}
stages:
  harvest: {{}}
  extract: {{}}
  dialogues: {{}}
"""
SMALL = releases.Pair(Package("pip", "small", "1.0.9", 1), Package("pip", "small", "1.1.0", 1))
NOWHERE = releases.Pair(Package("pip", "nowhere", "1", 1), Package("pip", "nowhere", "2", 1))


def test_every_pair_is_pinned_and_small():
    packages = [p for pair in releases.PAIRS for p in pair]
    assert all("--hash=sha256:" in download.pinned(p) for p in packages)
    assert sum(p.download_bytes for p in packages) < 10_000_000
    assert all(pair.base.name == pair.head.name and pair.base.version != pair.head.version for pair in releases.PAIRS)


def test_a_pair_that_cannot_be_had_is_named_and_left_out(tmp_path):
    """`nowhere` has no pinned hash, so no registry is asked; `small` lies there already."""
    for p, main in zip(SMALL, (1, 2), strict=True):
        folder = tmp_path / "unpacked" / p.key
        as_sdist(tmp_path / "x.tar.gz", package(p.version, main))
        with tarfile.open(tmp_path / "x.tar.gz") as archive:
            archive.extractall(tmp_path / "out")
        folder.parent.mkdir(exist_ok=True)
        (tmp_path / "out" / "small-1").rename(folder)
    said: list[str] = []
    manifest = releases.build(tmp_path, said.append, (SMALL, NOWHERE))
    assert manifest["licenses"] == {"small": "MIT"}
    assert sorted(manifest["absent"]) == ["pip-nowhere-1", "pip-nowhere-2"]
    assert any("pip-nowhere-1" in line for line in said)
    (row,) = json.loads((tmp_path / "releases.json").read_text())
    assert (row["name"], row["version"], row["license"]) == ("small", "1.1.0", "MIT")
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest

    path = tmp_path / "p.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    pipeline = load_pipeline(path)
    runner = Runner(pipeline, RunOptions("test"))
    runner.run()
    page = render(pipeline, runner.root)
    panel = page[page.index('id="changes"') :]
    assert "1 records, 1 of them kept" in panel
    assert "release_pair" in panel
    assert "100.0 % of 1 answers" in panel
