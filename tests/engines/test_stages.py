"""Whole stages through the runner, as `--engine` chooses it: the same layers, relations and fates on every engine."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import EngineConfig, load_pipeline
from pipelines.runner import Runner, RunOptions
from tests.builders import tree_digest
from tests.engines.conftest import require

CONFIG = """\
root: ./root
sources:
  web: {kind: jsonl, path: ./web}
  books: {kind: jsonl, path: ./books}
stages:
  extract: {}
  exact: {}
  minhash: {}
  embedder: {kind: hashed, dims: 32}
  embed: {}
  cluster: {clusters: 9, points: 16}
  rebalance: {keep_fraction: 0.5, block_docs: 40}
  select@final: {}
policy:
  priority: [books, web]
  final:
    - {drop: rebalance.within_quota == false, reason: over_quota}
"""
DOCS = 600

# Spark: 138 s on two busy cores, most of it starting workers.
pytestmark = [pytest.mark.filterwarnings("ignore:PySpark does not yet"), pytest.mark.timeout(900)]


def texts(seed):
    """DOCS texts: unlike ones, near-copies with two words changed, and copies."""
    rng = random.Random(seed)
    out = []
    for _ in range(DOCS):
        fate = rng.random()
        if out and fate < 0.2:
            out.append(rng.choice(out))
        elif out and fate < 0.45:
            words = rng.choice(out).split()
            for _ in range(2):
                words[rng.randrange(len(words))] = f"x{rng.randrange(1 << 30):x}"
            out.append(" ".join(words))
        else:
            out.append(" ".join(f"w{rng.randrange(1 << 30):x}" for _ in range(rng.randrange(60, 160))))
    return out


def write_sources(folder):
    """Both sources in several files, so that datasets have several shards and copies cross them."""
    everything = texts(7)
    for name, mine in (("web", everything[: DOCS * 3 // 4]), ("books", everything[DOCS * 3 // 4 :])):
        (folder / name).mkdir()
        for i in range(4):
            lines = [json.dumps({"text": t, "url": f"http://{name}.example/{i}/{j}"}) for j, t in enumerate(mine[i::4])]
            (folder / name / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "p.yaml").write_text(CONFIG)


def outcome(folder, name, workers):
    """Content of every Parquet file, and what manifests compare, after a run on one engine."""
    pipeline = load_pipeline(folder / "p.yaml")
    engine = EngineConfig(name=name, workers=workers, memory_gb=1, scratch=str(folder / f"scratch-{name}"))
    pipeline = replace(pipeline, engine=engine)
    runner = Runner(pipeline, RunOptions("test"))
    runner.run()
    manifests = {}
    for path in sorted(Path(pipeline.root).rglob("*.json")):
        manifest = json.loads(path.read_text())
        if observed := manifest.pop("observed", None):
            assert observed["engine"] == name
            manifests[str(path.relative_to(pipeline.root))] = manifest
    return tree_digest(runner.root, ""), manifests


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write_sources(folder)
    return outcome(folder, "local", 1)


def test_the_corpus_has_something_to_find(expected):
    _, manifests = expected
    fates = [m for name, m in manifests.items() if "final" in name]
    edges = [o["rows"] for m in manifests.values() for n, o in m.get("outputs", {}).items() if "/edges/" in n]
    assert edges[0] > 50
    assert fates
    assert len([m for m in manifests.values() if m.get("dataset") == "web"]) >= 3


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("local", 2),
        pytest.param("ray", 2, marks=pytest.mark.ray),
        pytest.param("spark", 2, marks=pytest.mark.spark),
    ],
)
def test_dedup_clusters_and_select_are_the_same_on_every_engine(name, workers, expected, tmp_path):
    require(name)
    write_sources(tmp_path)
    files, manifests = outcome(tmp_path, name, workers)
    assert files == expected[0]
    assert manifests == expected[1]
