"""One engine of each kind for all tests of a process."""

import importlib.util
import os
import shutil

import pytest

MEMORY_GB = 1.0
NAMES = [
    "local-0",
    "local-1",
    "local-2",
    pytest.param("ray", marks=pytest.mark.ray),
    pytest.param("spark", marks=pytest.mark.spark),
]
NEEDS = {"ray": "ray", "spark": "pyspark"}


def missing(name):
    """What this machine lacks for an engine, or None."""
    package = NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package}"
    if name == "spark" and shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        return "Java 17 or newer"
    return None


def require(name):
    """Skip a test whose engine cannot run here; where everything should be there (CI=true) that is a failure."""
    if lacking := missing(name):
        message = f"engine {name} needs {lacking}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


def made(name, scratch, shared_spark):
    """An engine; of Spark one that works in the shared session."""
    kind, _, workers = name.partition("-")
    if kind == "local":
        from core.engines.local import LocalEngine

        return LocalEngine(scratch, int(workers), MEMORY_GB)
    if kind == "ray":
        from core.engines.ray import RayEngine

        return RayEngine(scratch, 2, MEMORY_GB)
    from core.engines.spark import SparkEngine

    shared_spark.start()
    return SparkEngine(scratch, 2, MEMORY_GB)


@pytest.fixture(scope="session", params=NAMES)
def engine(request, tmp_path_factory, shared_spark):
    require(request.param)
    engine = made(request.param, tmp_path_factory.mktemp(request.param), shared_spark)
    yield engine
    engine.close()
