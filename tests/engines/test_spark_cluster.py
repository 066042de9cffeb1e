"""A real standalone cluster of Spark on loopback: pipelines through the command line give what local gives, whoever dies."""

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engines.conftest import require
from tests.pipelines.small_pipeline import (
    command,
    environment,
    pipelines,
    state,
    texts,
    write_config,
    write_jsonl,
)

CONFIG = """\
root: {root}
engine: {{workers: 2, memory_gb: 1, partition_mb: 0.1, scratch: {scratch}{more}}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
  exact: {{}}
  minhash: {{}}
  select@final:
    duplicates: [exact, minhash]
    prefer: [-signals.chars]
policy:
  final:
    - {{drop: signals.words < 20, reason: too_short}}
"""
DOCS = 400
START_S = 120.0  # for a process of the cluster to say that it is up, on a machine that has much else to do
RUN_S = 400.0  # for a whole pipeline
CLUSTER = "--conf spark.executor.memory=512m --conf spark.executor.cores=2 pyspark-shell"

DEMANDS = """\
import sys
from core.engines.contract import Unit
from core.engines.spark import SparkEngine
from core.errors import ConfigError, StageError
from core.stage import Resources
from tests.core.kernels import squared
engine = SparkEngine(sys.argv[2], 1, 1.0, address=sys.argv[1])
units = [Unit(f"u{i}", i) for i in range(4)]
print([r.value for r in engine.run_units(squared, units, "two cores", resources=Resources(cpus=2))])
for needs in (Resources(cpus=3), Resources(gpus=1)):
    try:
        engine.run_units(squared, units, "more", resources=needs)
    except ConfigError as e:
        print(e)
engine._watch.patience_s = 2.0
print("ready", flush=True)
sys.stdin.readline()
try:
    engine.run_units(squared, units, "alone")
except StageError as e:
    print(e)
engine.close()
"""

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]


class Cluster:
    """A master and workers of two cores, each in a process group of its own."""

    def __init__(self, folder):
        import pyspark

        self.folder, self.home = folder, Path(pyspark.__file__).parent
        self.workers = []
        self.master = self._start("master", "deploy.master.Master", "--host", "127.0.0.1", "--port", str(free_port()))
        self.address = self._told("master", "Starting Spark master at ").split()[0]

    def add_workers(self, number):
        """They start at the same time."""
        names = [f"worker{i}" for i in range(number)]
        for name in names:
            more = ("--host", "127.0.0.1", "--cores", "2", "--memory", "600m", "--work-dir", str(self.folder / name))
            self.workers.append(self._start(name, "deploy.worker.Worker", *more, self.address))
        for name in names:
            self._told(name, "Successfully registered with master")

    def kill_worker(self, number):
        """SIGKILL to a worker and all that it started: executors, and their Python workers."""
        kill_tree(self.workers[number].pid)

    def close(self):
        for process in [*self.workers, self.master]:
            kill_tree(process.pid)
            process.wait()

    def _start(self, name, what, *arguments):
        env = environment({"SPARK_DAEMON_MEMORY": "256m", "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_NO_DAEMONIZE": "1"})
        env["SPARK_LOCAL_DIRS"] = str(self.folder / f"{name}-blocks")
        line = [str(self.home / "bin" / "spark-class"), f"org.apache.spark.{what}", "--webui-port", "0", *arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)

    def _told(self, name, words):
        """What follows these words in a log, once they are there."""
        log = self.folder / f"{name}.log"
        return until(lambda: log.read_text(errors="replace").partition(words)[2], f"{name} to say {words!r}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(found, what, seconds=START_S):
    """`found()` once it is true."""
    for _ in range(int(seconds / 0.05)):
        if value := found():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


def kill_tree(pid):
    """SIGKILL to a process and all below it."""
    try:
        top = psutil.Process(pid)
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder, texts(DOCS), files=4)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("local")
    config = configured(folder, source)
    done = pipelines("run", "all", "-c", config)
    assert (done.code, done.err) == (0, "")
    return state(folder / "root")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    require("spark")
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.add_workers(2)
        yield found
    finally:
        found.close()


def configured(folder, source, address=None):
    more = f", address: '{address}'" if address else ""
    values = {"root": folder / "root", "scratch": folder / "scratch", "source": source, "more": more}
    return write_config(folder / "p.yaml", CONFIG, **values)


def submitted(folder, master, *arguments):
    """The command of this project as an application of spark-submit, which takes a file of Python."""
    import pyspark

    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    conf = ["--conf", "spark.executor.memory=512m", "--conf", "spark.driver.host=127.0.0.1", "--driver-memory", "512m"]
    line = [submit, "--master", master, *conf, folder / "stepwell.py", *arguments]
    (folder / "stepwell.py").write_text("from pipelines.cli import main\n\nmain()\n")
    env = environment({"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"})
    return subprocess.run([str(x) for x in line], env=env, capture_output=True, text=True, timeout=RUN_S)


@pytest.mark.soak
def test_spark_submit_runs_the_command_on_a_cluster(cluster, source, expected, tmp_path, soak):
    if soak <= 1:
        pytest.skip("two minutes; `make soak` runs it, and the next test is the same on a local master")
    config = configured(tmp_path, source)
    done = submitted(tmp_path, cluster.address, "run", "all", "-c", config, "--engine", "spark")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()][-1] == "select@final"
    assert state(tmp_path / "root") == expected


def test_spark_submit_runs_the_command_on_this_machine(source, expected, tmp_path):
    require("spark")
    config = configured(tmp_path, source)
    done = submitted(tmp_path, "local[2]", "run", "stage", "extract", "-c", config, "--engine", "spark")
    assert done.returncode == 0, done.stderr[-2000:]
    found = state(tmp_path / "root")
    assert found
    assert found.items() <= expected.items()


def test_a_killed_worker_costs_time_and_no_bytes(cluster, source, expected, tmp_path):
    config = configured(tmp_path, source, cluster.address)
    arguments = ("run", "all", "-c", config, "--engine", "spark")
    variables = {"PYSPARK_SUBMIT_ARGS": CLUSTER, "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "run.log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            command(*arguments), env=environment(variables), stdout=out, stderr=out, start_new_session=True
        )
    try:
        until(lambda: b"\nexact:" in log.read_bytes() or run.poll() is not None, "`exact` to end", RUN_S)
        assert run.poll() is None, log.read_text()
        time.sleep(random.Random(20).uniform(0.2, 1.5))  # somewhere in the shuffles of `minhash`
        assert run.poll() is None, "nothing was disturbed"
        cluster.kill_worker(0)
        code = run.wait(RUN_S)
    finally:
        kill_tree(run.pid)
        run.wait()
    if code:  # it may give up, in one line, and the same command goes on
        assert log.read_text().splitlines()[-1].startswith("error: ")
        again = pipelines(*arguments, variables=variables)
        assert again.code == 0, again.err
    assert state(tmp_path / "root") == expected


def test_what_a_cluster_cannot_give_is_said(cluster, tmp_path):
    """After the last test: what is left of the cluster is taken away here."""
    env = environment({"PYSPARK_SUBMIT_ARGS": CLUSTER})
    line = [sys.executable, "-c", DEMANDS, cluster.address, str(tmp_path / "scratch")]
    run = subprocess.Popen(
        line, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    try:
        assert run.stdout is not None
        told = []
        while not told or told[-1] not in ("ready\n", ""):
            told.append(run.stdout.readline())
        assert told[0] == "[0, 1, 4, 9]\n"
        assert told[1].startswith("more: a unit needs 3 cores and 0 GPUs, the largest executor has 2 cores and 0 GPUs")
        assert told[2].startswith("more: a unit needs 1 cores and 1 GPUs")
        for number in range(len(cluster.workers)):
            cluster.kill_worker(number)
        out, _ = run.communicate("\n", RUN_S)
    finally:
        kill_tree(run.pid)
        run.wait()
    assert out.startswith(f"alone: no executor for 2 s; see that workers of {cluster.address} are up")
