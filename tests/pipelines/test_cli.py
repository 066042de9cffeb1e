"""The command line: exit codes, one line an error, tracebacks only on request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
CONFIG = """\
root: ./root
engine: {workers: 1, memory_gb: 1}
sources:
  web: {kind: files, path: ./pages}
stages:
  extract: {}
  signals: {}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.txt").write_text("A page with several words on it, written for other people.")
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


def test_run_plan_and_run_again(config):
    code, out, err = pipelines("run", "all", "-c", config, "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["run", "extract"], ["run", "signals"]]
    assert pipelines("check", "-c", config)[:2] == (0, f"nothing has run in {config.parent / 'root'} yet\n")
    assert not (config.parent / "root").exists()

    code, out, err = pipelines("run", "all", "-c", config)
    assert (code, err) == (0, "")
    assert out.startswith("extract [web]: records 1")
    assert "documents 1" in out

    code, out, _ = pipelines("run", "stage", "signals", "-c", config, "--workers", "1")
    assert (code, out) == (0, "signals [web]: up to date\n")

    code, out, _ = pipelines("plan", "-c", config, "--json")
    assert code == 0
    assert [s["run"] for s in json.loads(out)["steps"]] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "stage", "signal"], "no stage 'signal' in this pipeline, did you mean 'signals'?"),
        (["run", "all", "--engine", "sparc"], "--engine: got 'sparc', expected local, ray or spark"),
        (["run", "all", "--from", "signals", "--until", "extract"], "--from signals stands after --until extract"),
        (["run", "stage", "signals", "--dataset", "wob"], "--dataset: no source 'wob'; the config has web"),
        (["run", "stage", "signals", "--shards", "3:1"], "--shards: got '3:1', expected A:B with A < B"),
        (["run", "stage", "signals"], "web"),
    ],
)
def test_usage_is_exit_2_and_one_line(config, arguments, said):
    code, out, err = pipelines(*arguments, "-c", config)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err


def test_every_problem_of_a_config_is_a_line(config):
    config.write_text(CONFIG.replace("root:", "rot:").replace("signals", "signls"))
    code, _, err = pipelines("run", "all", "-c", config)
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: {config}:") for line in lines)


def test_a_traceback_only_with_debug(config):
    config.write_text(CONFIG.replace("root:", "rot:"))
    assert "Traceback" not in pipelines("plan", "-c", config)[2]
    code, _, err = pipelines("--debug", "plan", "-c", config)
    assert code != 0
    assert "Traceback" in err


def test_a_root_that_cannot_be_written_is_exit_2(config):
    (config.parent / "root").write_text("a file")
    code, _, err = pipelines("run", "all", "-c", config)
    assert code == 2
    assert "cannot write below" in err
    assert "Traceback" not in err


def test_stages_are_listed_in_order():
    code, out, _ = pipelines("stages")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0
    assert names.index("extract") < names.index("signals") < names.index("minhash") < names.index("select")
