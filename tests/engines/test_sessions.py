"""The command line on an engine that starts processes of its own: a clean terminal, and nothing left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.bounds import BOUND_S
from tests.engines.conftest import require

REPO = Path(__file__).resolve().parents[2]
CONFIG = """\
root: ./root
engine: {workers: 1, memory_gb: 1}
sources:
  web: {kind: files, path: ./pages}
stages:
  extract: {}
  exact: {}
"""
ENGINES = [pytest.param("ray", marks=pytest.mark.ray), pytest.param("spark", marks=pytest.mark.spark)]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pages").mkdir()
    for name in "ab":
        (tmp_path / "pages" / f"{name}.txt").write_text("The same page twice, with several words for other people.")
    (tmp_path / "p.yaml").write_text(CONFIG)
    return tmp_path / "p.yaml"


def pipelines(*arguments, **variables):
    """(exit code, stdout, stderr) of the command."""
    env = {**os.environ, "PYTHONPATH": str(REPO), **variables}
    out = subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        timeout=BOUND_S,
    )
    return out.returncode, out.stdout, out.stderr


def marked(mark):
    """Processes that inherited a variable of the environment from the command."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STEPWELL_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline()[:3])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_says_what_local_says_and_leaves_nothing(name, config):
    require(name)
    mark = f"{name}-{os.getpid()}"
    code, out, err = pipelines("run", "all", "-c", config, "--engine", name, STEPWELL_TEST_MARK=mark)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["extract [web]", "exact"]
    assert {path.name for path in (config.parent / "root" / "exchange").glob("*")} <= {"spark.log"}
    waited = 0
    while (left := marked(mark)) and waited < 100:  # what was told to stop may need a moment
        time.sleep(0.1)
        waited += 1
    assert left == []


@pytest.mark.parametrize("name", ENGINES)
def test_without_its_package_an_engine_says_what_to_install(name, config, tmp_path):
    package = {"ray": "ray", "spark": "pyspark"}[name]
    (tmp_path / "hidden" / package).mkdir(parents=True)
    (tmp_path / "hidden" / package / "__init__.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}')"
    )
    path = os.pathsep.join([str(tmp_path / "hidden"), str(REPO)])
    code, out, err = pipelines("run", "all", "-c", config, "--engine", name, PYTHONPATH=path)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"error: {name}: cannot be imported here (No module named {package}); install this project with the extra "
        f"`{name}`, or use --engine local"
    ]


@pytest.mark.spark
def test_without_java_spark_says_what_to_install(config, tmp_path):
    pytest.importorskip("pyspark")
    without = {name: "" for name in ("JAVA_HOME",) if name in os.environ}
    env = {k: v for k, v in os.environ.items() if k not in without}
    out = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", "all", "-c", str(config), "--engine", "spark"],
        capture_output=True,
        text=True,
        env={**env, "PYTHONPATH": str(REPO), "PATH": str(tmp_path)},
        timeout=BOUND_S,
    )
    assert out.returncode == 2
    assert out.stderr.splitlines() == [
        "error: spark: no Java found, expected 17 or newer; install a JRE (Debian: openjdk-17-jre-headless)"
    ]


NOBODY = {  # address where nobody listens -> the engine and what the line begins with
    "127.0.0.1:1": ("ray", "ray: cannot reach a cluster at 127.0.0.1:1: "),
    "spark://127.0.0.1:1": ("spark", "spark: cannot reach a master at spark://127.0.0.1:1 (127.0.0.1:1: "),
    "spark://127.0.0.1:high": ("spark", "spark: cannot reach a master at spark://127.0.0.1:high (127.0.0.1:high: "),
}


@pytest.mark.parametrize(
    ("address", "code"),
    [
        pytest.param("127.0.0.1:1", 1, marks=pytest.mark.ray),
        pytest.param("spark://127.0.0.1:1", 1, marks=pytest.mark.spark),
        pytest.param("spark://127.0.0.1:high", 2, marks=pytest.mark.spark),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line_and_may_be_tried_again(address, code, config):
    """A scheduler does not try exit code 2 again: that is for an address that never can be one."""
    name, begins = NOBODY[address]
    require(name)
    config.write_text(CONFIG.replace("workers: 1", f"workers: 1, address: '{address}'"))
    ended, out, err = pipelines("run", "all", "-c", config, "--engine", name)
    assert (ended, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {begins}")
