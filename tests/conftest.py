"""What every room's tests share: where the real data lies, one Spark a process, and which tests go to one worker together."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from core.engines.contract import Engine

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:  # `tests.builders` is found here and in the processes that a pool spawns
    sys.path.insert(0, str(REPO))

# Shared machines are slow at times; no test here is about elapsed time.
settings.register_profile("stepwell", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stepwell")

SOAK = float(os.environ.get("STEPWELL_SOAK", "1"))  # scales the kill and fuzz rounds
# Tests that work in the Spark of their own process: two files whole, and of the others what has that engine.
IN_SPARK = re.compile(
    r"conformance/test_stages\.py|engines/test_spark_units\.py|/test_(laws|verbs|distributed_components)\.py::.*\[.*spark"
)
SPARK_WORKERS, SPARK_GB = 2, 2.0  # of memory half is Java's, which remembers what all tests did


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: files stay on one worker, for what their fixtures hold, and the tests in Spark on one as well. A
    scheduler of our own, as `--dist loadgroup` of xdist 3.8 finds no node ids to change in pytest 9.2."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndSpark(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "spark" if IN_SPARK.search(nodeid) else str(super()._split_scope(nodeid))

    return ByFileAndSpark(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test whose rounds `soak` scales is one that `make soak` runs, and with more rounds its limit of time is none."""
    for item in items:
        if "soak" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.soak)
            if SOAK > 1:
                item.add_marker(pytest.mark.timeout(0), append=False)


class SharedSpark:
    """The Spark of all tests of this process that work in one: it takes 15 s to start. An engine that finds a
    session works in it and leaves it running."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine: Engine | None = None

    def start(self) -> None:
        test = os.environ["PYTEST_CURRENT_TEST"]
        assert IN_SPARK.search(test), f"IN_SPARK does not know {test}: it may start a Spark on every worker"
        if self._engine is None:
            from core.engines.spark import SparkEngine

            self._engine = SparkEngine(self._folder, SPARK_WORKERS, SPARK_GB)

    def stop(self) -> None:
        """For a test that needs another; engines made before are of no use then."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


@pytest.fixture(scope="session")
def shared_spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedSpark]:
    """Not started yet."""
    spark = SharedSpark(tmp_path_factory.mktemp("spark"))
    yield spark
    spark.stop()


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
