"""Folders for what other programs spill: whoever made one is gone, then so is it, and no other."""

import gc
import os
import signal
import subprocess
import sys

import pytest

from core.engines.spills import HELD, Spills
from core.errors import ConfigError
from tests.engines.test_sessions import REPO

HOLDS = """
import sys
from pathlib import Path
from core.engines.spills import Spills
spills = Spills(Path(sys.argv[1]), "spark")
(spills.path / "blocks").mkdir()
print(spills.path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_spilled_goes_when_the_next_one_starts(tmp_path):
    line = [sys.executable, "-c", HOLDS, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        try:
            assert other.stdout is not None
            name = other.stdout.readline().strip().rpartition("/")[2]
            first = Spills(tmp_path, "spark")
            assert (tmp_path / name / "blocks").exists(), "it lives still"
        finally:
            other.send_signal(signal.SIGKILL)
    stage = tmp_path / "spark-a-stage"
    stage.mkdir()
    second = Spills(tmp_path, "spark")
    assert {p.name for p in tmp_path.iterdir()} == {stage.name, first.path.name, second.path.name}
    first.remove()
    assert [p.name for p in sorted(tmp_path.iterdir())] == sorted([stage.name, second.path.name])
    assert (second.path / HELD).exists()
    del second
    gc.collect()
    assert list(tmp_path.iterdir()) == [stage]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"^ray: cannot write \S+/file/x: .*; name another folder in `engine.scratch`$"
    ):
        Spills(tmp_path / "file" / "x", "ray")
