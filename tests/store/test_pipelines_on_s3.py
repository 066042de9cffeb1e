"""One pipeline from crawl to evaluation on an S3 server: the manifests of a local root, and kills that lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.cache import CACHE_ENV
from core.hashing import digest
from core.storage import Root
from crawl.stage import run_crawl
from crawl.warc import warc_files
from pipelines.cli import app
from tests.bounds import BOUND_S
from tests.crawl.loopback import Loopback, page, responses
from tests.pipelines.small_pipeline import Ran, command, environment, pipelines, prose, write_config

WAIT_S = 120.0
PAGES = 24
CONFIG = """\
root: {root}
engine: {{workers: 1, memory_gb: 1}}
sources:
  web: {{kind: warc, path: {captures}}}
  live:
    kind: crawl
    seeds: ["http://a.test/1"]
    resolver: {{a.test: "127.0.0.1:{port}"}}
    allow_networks: [127.0.0.0/8]
    user_agent: stepwell-test/0.1 (+https://example.org/bot)
    warc_bytes: 6000
    delay_s: 0.02
    delay_factor: 0
    address_delay_s: 0
stages:
  crawl: {{}}
  extract: {{}}
  signals: {{datasets: [web]}}
  select@final: {{datasets: [web]}}
  split: {{datasets: [web], by: [url], held_out_fraction: 0.3}}
  tokenizer: {{datasets: [web], vocab_size: 300, sample_bytes: 100000}}
  tokenize: {{datasets: [web]}}
  mix:
    datasets: [web]
    held_out_docs: 10
    phases: {{pretrain: {{components: [{{dataset: web, weight: 1.0, max_epochs: 40}}]}}}}
  train: {{datasets: [web], phase: pretrain, preset: ci, steps: 60, rows: 2, threads: 1, checkpoint_steps: 3}}
  evaluate: {{datasets: [web], prompts: ["The miller"], max_tokens: 4}}
policy:
  final:
    - {{drop: signals.words < 20, reason: too_short}}
"""


def site() -> dict[str, bytes]:
    """A chain of pages, each with prose and a link to the next two."""

    def body(n: int) -> bytes:
        onward = "".join(f'<a href="/{m}">on</a>' for m in (n + 1, n + 2) if m <= PAGES)
        return page(f"<html><body><main><h1>Page {n}</h1><p>{prose(n)}</p></main>{onward}</body></html>")

    return {f"/{n}": body(n) for n in range(1, PAGES + 1)}


def state(root: Root) -> dict[str, str]:
    """One digest a manifest, of all that must not depend on where the root lies; a live crawl differs each time."""
    folders = ["manifests", *(f"datasets/{name}/manifests" for name in root.names("datasets") if name != "live")]
    names = [f"{folder}/{name}" for folder in folders for name in root.names(folder)]
    stored = {name: root.read_json(name) for name in names}
    return {
        name: digest([m[part] for part in ("identity", "outputs", "accounts", "units")]) for name, m in stored.items()
    }


def killed(config: Path, stage: str, ripe: Callable[[], bool]) -> None:
    """Start a stage and kill -9 it, workers and all, once `ripe`."""
    run = command("run", "stage", stage, "-c", config)
    process = subprocess.Popen(run, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + WAIT_S
    try:
        while not ripe():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def full_disk(*arguments: Any) -> Ran:
    """The command on a machine whose cache keeps no fetched file once another needs room."""
    start = "from core import cache; cache.KEPT_FREE_FRACTION = 1.0; from pipelines.cli import main; main()"
    run = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=BOUND_S)
    return Ran(done.returncode, done.stdout, done.stderr)


def checkpoint(root: Root) -> int:
    """Updates in the newest checkpoint in the store, -1 where there is none."""
    folders = [name for name in root.names("models") if name.startswith("pretrain-")]
    try:
        return int(root.read_bytes(f"models/{folders[0]}/latest")[5:])
    except (IndexError, FileNotFoundError):
        return -1


def said(*arguments: Any) -> str:
    """What a command says, run in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web():
    with Loopback(site()) as web:
        yield web


def test_a_root_on_s3_holds_what_a_local_root_holds_and_kills_lose_nothing(s3, cache, web, tmp_path):
    run_crawl(web.config("http://a.test/1"), tmp_path / "captures" / "web")
    values = {"captures": tmp_path / "captures" / "web", "port": web.port}
    local = write_config(tmp_path / "local.yaml", CONFIG, root=tmp_path / "root", **values)
    remote = write_config(tmp_path / "remote.yaml", CONFIG, root=s3.url, **values)
    ran = pipelines("run", "all", "-c", local)
    assert (ran.code, ran.err) == (0, "")
    root = Root(s3.url)

    before = len(web.requests)
    killed(
        remote,
        "crawl",
        lambda: len(web.requests) > before + PAGES // 2 and root.exists("captures/live/live-00001.warc.gz"),
    )
    shutil.rmtree(cache)
    ran = pipelines("run", "all", "-c", remote, "--until", "mix")
    assert (ran.code, ran.err) == (0, "")
    killed(remote, "train", lambda: checkpoint(root) >= 6)
    assert not root.exists("manifests/train.json")
    shutil.rmtree(cache)
    ran = full_disk("run", "all", "-c", remote)
    assert (ran.code, ran.err) == (0, "")
    trained = root.read_json("manifests/train.json")
    assert trained["observed"]["resumed_step"] >= 6
    assert state(root) == state(Root(str(tmp_path / "root")))
    check_capture(root, tmp_path / "fetched" / "live", cache)
    check_commands(remote, root)
    check_server(s3, trained["outputs"]["weights"]["folder"])


def check_capture(root: Root, folder: Path, cache: Path) -> None:
    """Every page is in the files exactly once, though half of them were fetched on a machine that is gone."""
    folder.mkdir(parents=True)
    crawled = root.read_json("datasets/live/manifests/crawl.json")
    for name in crawled["outputs"]:
        root.download(f"captures/live/{name}", folder / name)
    assert len(warc_files(folder, "live")) > 2
    assert set(responses(folder)) == {f"http://a.test/{n}" for n in range(1, PAGES + 1)}
    assert crawled["accounts"]["fetched"] == PAGES
    assert crawled["observed"]["warc_bytes"] == sum(path.stat().st_size for path, _ in warc_files(folder, "live"))
    documents = root.read_json("datasets/live/manifests/documents.json")
    assert documents["accounts"]["documents"] == PAGES
    assert list(cache.glob("*/captures/live/*-00000.warc.gz")) == []  # closed files have left this machine


def check_commands(config: Path, root: Root) -> None:
    """What reads a root reads one on S3."""
    assert "skip  train" in said("plan", "-c", config)
    assert json.loads(said("plan", "-c", config, "--json"))["steps"]
    assert "evaluate" in said("status", "-c", config)
    assert said("check", "-c", config, "--content").startswith("all good: ")
    assert said("report", "-c", config).strip() == f"report: {root.url}/report.html"
    assert b"Held-out bits per byte" in root.read_bytes("report.html")
    (shard,) = root.read_json("datasets/web/manifests/documents.json")["outputs"]
    doc_id = root.read_table(f"datasets/web/documents/{shard}.parquet", ["doc_id"]).column("doc_id")[0].as_py()
    assert "fate: kept" in said("explain", doc_id, "-c", config)
    assert f"web/{shard}: 1 documents" in said("forget", "-c", config, "--doc-id", doc_id)
    assert root.read_bytes("withdrawn.txt").decode().split() == [doc_id]


def check_server(s3: Any, model: str) -> None:
    """The store's own view: ordinary objects under their names, and nothing staged."""
    keys = s3.server.keys(s3.bucket)
    assert f"root/{model}/checkpoints/step-00000060/model.safetensors" in keys
    assert sum(key.startswith(f"root/{model}/evaluation-") for key in keys) == 1
    assert [key for key in keys if ".staged" in key or key.endswith((".lock", ".tmp", "-wal"))] == []
