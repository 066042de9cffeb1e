"""What every room's tests share: where the real data lies, and datasets made from a few lines of text."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:  # `tests.builders` is found here and in the processes that a pool spawns
    sys.path.insert(0, str(REPO))

# Shared machines are slow at times; no test here is about elapsed time.
settings.register_profile("stepwell", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stepwell")

SOAK = float(os.environ.get("STEPWELL_SOAK", "1"))  # scales the kill and fuzz rounds


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pages, WARCs and books; the test is skipped where it is absent."""
    folder = Path(os.environ.get("STEPWELL_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; name it in STEPWELL_DATA")
    return folder


@pytest.fixture
def soak() -> float:
    """How many times the usual number of rounds to run (STEPWELL_SOAK, default 1)."""
    return SOAK
