"""Units on workers that belong to another engine: a row that kills is named there too, and silence ends the worker."""

import subprocess
import sys

import pytest

from core.engines.contract import Unit
from core.engines.guard import alone, watched
from core.errors import StageError
from tests.core.kernels import killer_rows
from tests.core.test_pool import REPO

HANGS = """
from core.engines.contract import Unit
from core.engines.guard import watched
from tests.core.kernels import killer_rows
watched(killer_rows, Unit("u", {"hangs": [3]}), 1.0)
"""
HOLDS = """
import ctypes
from core.engines.contract import Report, Unit
from core.engines.guard import watched
def holds(unit, note):
    ctypes.PyDLL(None).sleep(60)  # a C function that keeps the GIL
    return Report(unit.name)
watched(holds, Unit("u"), 1.0)
"""


def test_alone_rejects_the_row_that_kills_and_the_row_that_hangs():
    report = alone(killer_rows, Unit("u", {"kills": [4], "hangs": [7]}), "work", 1.0)
    assert report.value == [0, 1, 2, 3, 5, 6, 8, 9]


def test_alone_gives_up_on_a_unit_that_dies_after_its_rows():
    with pytest.raises(StageError, match=r"work: worker was killed by SIGKILL .* unit u, 3 deaths"):
        alone(killer_rows, Unit("u", {"dies_after": True}), "work", 60.0)


def test_watched_gives_the_report():
    assert watched(killer_rows, Unit("u", {}), 60.0).docs == 10


@pytest.mark.parametrize("code", [HANGS, HOLDS], ids=["hangs", "holds the GIL"])
def test_watched_ends_its_process_when_a_unit_is_silent(code):
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=50)
    assert ran.returncode == 1
    assert "Timeout" in ran.stderr
