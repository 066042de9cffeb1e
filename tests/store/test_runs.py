"""Whole runs of the command with their root on S3: the same manifests as on a disk, through faults, kills and other engines."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from core.hashing import digest
from core.storage import Root
from tests.engines.conftest import require
from tests.pipelines.small_pipeline import (
    JUDGED,
    command,
    environment,
    pipelines,
    state,
    texts,
    write_config,
    write_jsonl,
)
from tests.store.proxy import Fault

DOCS, FILES = 200, 3
PARTS = ("identity", "outputs", "accounts", "units")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder, texts(DOCS), FILES)
    return folder


@pytest.fixture(scope="module")
def on_a_disk(source, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("disk")
    config = write_config(folder / "p.yaml", JUDGED, root=folder / "root", workers=2, source=source)
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    return state(folder / "root")


def state_on(url: str) -> dict[str, str]:
    """As `small_pipeline.state`, of a root anywhere."""
    root = Root(url)
    names = [f"manifests/{n}" for n in root.names("manifests")]
    names += [
        f"datasets/{d}/manifests/{n}" for d in root.names("datasets") for n in root.names(f"datasets/{d}/manifests")
    ]
    return {name: digest([root.read_json(name)[part] for part in PARTS]) for name in sorted(names)}


def leftovers_on(url: str) -> list[str]:
    root = Root(url)
    return [f"{f}/{n}" for f in ("exchange", "locks") for n in root.names(f) if root.exists(f"{f}/{n}")]


def empty(url: str) -> None:
    root = Root(url)
    for name in root.names(""):
        root.remove(name)


@pytest.fixture
def config(s3, source, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # spills and files on their way to the store
    return write_config(tmp_path / "p.yaml", JUDGED, root=s3.url, workers=2, source=source)


def held_to(config: Path, url: str, expected: dict[str, str]) -> None:
    assert state_on(url) == expected
    checked = pipelines("check", "--content", "-c", config)
    assert (checked.code, checked.err) == (0, "")
    assert leftovers_on(url) == []


def test_through_faults_a_run_gives_the_same_bytes(config, s3, proxy, on_a_disk, soak):
    for n in range(max(1, int(soak / 10))):
        empty(s3.url)
        proxy.seed = n
        proxy.faults = [
            *(Fault(kind, 0.015) for kind in ("slow_down", "error", "refused", "lost", "torn", "truncated")),
            Fault("stall", 0.01, times=3),
        ]
        ran = pipelines("run", "all", "-c", config)
        assert (ran.code, ran.err) == (0, "")
        proxy.faults = []
        assert sum(proxy.done.values()) >= 10
        held_to(config, s3.url, on_a_disk)
    again = pipelines("run", "all", "-c", config)
    assert again.out.count("up to date") == len(again.out.splitlines())
    assert s3.server.unfinished(s3.bucket) == []
    assert s3.secret not in "".join(s3.server.text(s3.bucket))


def test_a_killed_run_resumes(config, s3, on_a_disk, soak):
    for n in range(max(1, int(soak / 10))):
        empty(s3.url)
        for moment in (0.45, 0.75):
            run = subprocess.Popen(
                command("run", "all", "-c", config),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
            )
            until = time.monotonic() + 60
            wanted = int(len(on_a_disk) * (moment + 0.1 * (n % 3)))
            while run.poll() is None and len(state_on(s3.url)) < wanted and time.monotonic() < until:
                time.sleep(0.02)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        ran = pipelines("run", "all", "-c", config)
        assert (ran.code, ran.err) == (0, "")
        held_to(config, s3.url, on_a_disk)


@pytest.mark.parametrize(
    "engine", [pytest.param("ray", marks=pytest.mark.ray), pytest.param("spark", marks=pytest.mark.spark)]
)
def test_other_engines_write_the_same(config, s3, on_a_disk, engine, monkeypatch):
    require(engine)
    with tempfile.TemporaryDirectory(
        prefix="stepwell-", dir="/tmp"
    ) as short:  # paths of Ray's sockets end at 107 bytes
        monkeypatch.setenv("TMPDIR", short)
        ran = pipelines("run", "all", "-c", config, "--engine", engine)
    assert ran.code == 0, ran.err
    held_to(config, s3.url, on_a_disk)
