"""A whole pipeline through the command line on two raylets, one of which is killed in the middle: the bytes of `local`.

The driver joins the head, where what it puts into the store itself lies; the other node is the one to be lost, and a new one
takes its place for the next round. Nodes listen on this machine's own address: Ray takes a loopback address for that one.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.engines.contract import Unit
from core.engines.environment import environment
from core.errors import ConfigError
from core.stage import Resources
from tests.engines.conftest import require
from tests.engines.tasks import squared
from tests.engines.test_sessions import REPO
from tests.pipelines import small_pipeline as small

CONFIG = small.JUDGED.replace("memory_gb: 1}}", "memory_gb: 1, partition_mb: 0.05}}")
DOCS, FILES = 1500, 12
ROUND_S = 240  # of one run with a lost node; Ray takes 3 s here to find out, 15 s as it is set

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass
class Cluster:
    """A head that stays and another node that is killed and replaced."""

    cluster: object
    other: object = None

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self):
        with environment(PYTHONPATH=str(REPO)):
            self.other = self.cluster.add_node(num_cpus=1, **NODE)

    def kill(self):
        os.kill(self.other.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.cluster.remove_node(self.other, allow_graceful=False)  # its other processes, which end by themselves
        self.other = None


NODE = {"object_store_memory": 100 << 20, "memory": 2 << 30}


@pytest.fixture(scope="module")
def nodes():
    require("ray")
    importlib.import_module("core.engines.ray_cluster")  # says how Ray is to be imported
    from ray.cluster_utils import Cluster as RayCluster

    config = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 1000}
    with environment(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(REPO)):
        cluster = RayCluster()
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False, _system_config=config, **NODE)
            made = Cluster(cluster)
            made.add()
            yield made
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    small.write_jsonl(folder, small.texts(DOCS), FILES)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    config = small.write_config(folder / "p.yaml", CONFIG, root=folder / "root", source=source, workers=1)
    ran = small.pipelines("run", "all", "-c", config)
    assert ran.code == 0, ran.err
    return small.state(folder / "root")


def run_and_kill(nodes: Cluster, config: Path, there: Callable[[], bool], pause_s: float) -> tuple[int, str, bool]:
    """(exit code, stderr, whether the run was still at work) of a run whose other node is killed once `there()` holds."""
    command = small.command("run", "all", "-c", config, "--engine", "ray")
    variables = small.environment({"RAY_ADDRESS": nodes.address})
    with open(config.parent / "stderr", "w+") as said:
        run = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=said)
        try:
            last = time.monotonic() + ROUND_S
            while not there() and run.poll() is None and time.monotonic() < last:
                time.sleep(0.01)
            time.sleep(pause_s)
            in_time = run.poll() is None
            nodes.kill()
            code = run.wait(ROUND_S)
        finally:
            with suppress(ProcessLookupError):
                run.kill()
            run.wait()
            if nodes.other is None:
                nodes.add()
        return code, Path(said.name).read_text(), in_time


def layers(root: Path, name: str) -> int:
    return len(list(root.glob(f"datasets/*/layers/{name}/*.parquet")))


def rounds(soak: float) -> int:
    return max(1, round(soak / 2))


def check_round(nodes, source, expected, folder, there, pause_s):
    root = folder / "root"
    config = small.write_config(folder / "p.yaml", CONFIG, root=root, source=source, workers=1)
    code, err, in_time = run_and_kill(nodes, config, lambda: there(root), pause_s)
    if code:  # what could not be mended is one line, and the same command goes on
        assert (code, len([line for line in err.splitlines() if line.startswith("error: ")])) == (1, 1), err
        ran = small.pipelines("run", "all", "-c", config, "--engine", "ray", variables={"RAY_ADDRESS": nodes.address})
        assert ran.code == 0, ran.err
    assert small.state(root) == expected
    return in_time


def test_a_node_lost_while_units_run_changes_nothing(nodes, source, expected, tmp_path, soak):
    moments = random.Random(3)
    in_time = 0
    for i in range(rounds(soak)):
        wanted = moments.randrange(1, FILES - 2)
        there = lambda root, wanted=wanted: layers(root, "signals") >= wanted  # noqa: E731
        in_time += check_round(nodes, source, expected, tmp_path / str(i), there, moments.uniform(0, 0.2))
    assert in_time


def test_a_node_lost_during_shuffles_changes_nothing(nodes, source, expected, tmp_path, soak):
    moments = random.Random(4)
    in_time = 0
    for i in range(rounds(soak)):
        there = lambda root: any("exact" in name for name in small.manifests(root))  # noqa: E731 - minhash is at work
        in_time += check_round(nodes, source, expected, tmp_path / str(i), there, moments.uniform(0.2, 2.5))
    assert in_time


def test_another_engine_finds_everything_done(nodes, source, expected, tmp_path):
    """What a cluster committed, `local` does not compute again; and a demand too big for any node is one line."""
    root = tmp_path / "root"
    config = small.write_config(tmp_path / "p.yaml", CONFIG, root=root, source=source, workers=1)
    on_cluster = small.pipelines(
        "run", "all", "-c", config, "--engine", "ray", variables={"RAY_ADDRESS": nodes.address}
    )
    assert (on_cluster.code, on_cluster.err) == (0, "")
    assert small.state(root) == expected
    used = {name: m["observed"]["engine"] for name, m in small.manifests(root).items()}
    assert set(used.values()) == {"ray"}
    here = small.pipelines("run", "all", "-c", config)
    assert all(line.endswith("up to date") for line in here.out.splitlines()), json.dumps(used)


def test_memory_is_reserved_on_a_cluster(nodes, tmp_path):
    require("ray")
    from core.engines.ray import RayEngine

    engine = RayEngine(tmp_path, 1, 1.0, address=nodes.address)
    try:
        fits = Resources(memory_gb=1.5, load_once=True)
        assert [r.value for r in engine.run_units(squared, [Unit("u", 3)], "small", 60, fits)] == [9]
        with pytest.raises(
            ConfigError, match=r"^raters: one worker needs 1 CPUs, 3 GB, got nodes with at most 1 CPUs, 2.1 "
        ):
            engine.run_units(squared, [Unit("u", 3)], "raters", 60, Resources(memory_gb=3.0))
    finally:
        engine.close()


def test_a_client_address_is_refused(tmp_path):
    require("ray")
    from core.engines.ray import RayEngine

    with pytest.raises(ConfigError, match=r"^ray: cannot reach a cluster at ray://h:1: this is a Ray Client address"):
        RayEngine(tmp_path, 1, 1.0, address="ray://h:1")
