"""A Ray to work on: joined or started here, what its nodes offer, and what one worker is to have of it.

A Ray started here is this machine's and nobody else's: only CPUs and GPUs are set aside, for `memory_gb` bounds its object store
and the blocks of a task already, and a laptop that runs a stage on `local` must run it here too. On a cluster that was joined
others work as well, so memory is reserved there, and a demand that no node can meet is refused: Ray would queue it for ever.
"""

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from core.engines.environment import environment
from core.engines.spills import Spills
from core.errors import ConfigError, RetryableError, StageError
from core.stage import Resources

# Ray reads these once, when it is imported.
os.environ.setdefault("RAY_task_oom_retries", "3")  # of a task that is too big; left alone Ray tries it for ever
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the new behaviour, without its warning
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # what raylets say of dead workers would go to our stdout

try:
    import ray
except ImportError as e:
    raise ConfigError(
        f"ray: cannot be imported here ({e}); install this project with the extra `ray`, or use --engine local"
    ) from e

STORE_SHARE = 0.3  # of memory_gb for the object store, Ray's own default share
STORE_BYTES = 80 << 20  # Ray refuses a store below 75 MB
KNOCK_S = 10.0  # for a cluster's head to take a connection: chosen, untested
MEMORY_SHARE = 6  # a task holds this many times a block: as `local` had it before its blocks were held once; chosen
LEAST_BLOCK, LARGEST_BLOCK = 1 << 20, 512 << 20  # smaller is all overhead, larger only crowds the object store
LOOK_S = 5.0  # between two looks at the nodes: chosen, untested
LOST_S = 120.0  # for a node that a run cannot do without to come back: chosen, untested


@dataclass(frozen=True)
class Place:
    """What Ray sets aside for one worker."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0

    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory_bytes or None}

    def wanted(self) -> dict[str, float]:
        every = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        return {name: amount for name, amount in every.items() if amount}

    def fits(self, offered: Mapping[str, float]) -> int:
        """How many such workers a node can have at once."""
        return min((int(offered.get(name, 0.0) / amount + 1e-9) for name, amount in self.wanted().items()), default=1)

    def nearness(self, offered: Mapping[str, float]) -> float:
        """How much of what is wanted a node has: the higher the closer."""
        return sum(min(1.0, offered.get(name, 0.0) / amount) for name, amount in self.wanted().items())


def place_for(resources: Resources | None, ours: bool, workers: int) -> Place:
    """The place that a stage's worker gets. Ray takes parts of a CPU or GPU, or whole ones."""
    needs = resources or Resources(memory_gb=0.0)
    cpus, gpus = (n if n <= 1 else float(math.ceil(n)) for n in (needs.cpus, needs.gpus))
    if ours:
        return Place(min(cpus, float(workers)), gpus)
    return Place(cpus, gpus, int(needs.memory_gb * 1e9))


def offers() -> list[dict[str, float]]:
    """What each living node has in all, whoever uses it now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def places(place: Place) -> int:
    return sum(place.fits(node) for node in offers())


def check(place: Place, label: str) -> None:
    """ConfigError if no node is big enough for one worker."""
    nodes = offers()
    if not any(place.fits(node) for node in nodes):
        closest = max(nodes, key=place.nearness, default={})
        raise ConfigError(
            f"{label}: one worker needs {_spoken(place.wanted(), place)}, got nodes with at most {_spoken(closest, place)}; "
            "add a node that has them, or run this stage with --engine local"
        )


def _spoken(amounts: Mapping[str, float], place: Place) -> str:
    said = [f"{amounts.get(name, 0.0):g} {name}s" for name in place.wanted() if name != "memory"]
    if place.memory_bytes:
        said.append(f"{math.floor(amounts.get('memory', 0.0) / 1e8) / 10:g} GB")
    return ", ".join(said)


class Room:
    """How many workers of one size the cluster has room for, looked up now and then: nodes come and go."""

    def __init__(self, place: Place, label: str, lost_s: float = LOST_S) -> None:
        self.place, self.label, self.lost_s = place, label, lost_s
        self._count = places(place)
        self._looked = self._some = time.monotonic()

    def count(self) -> int:
        """StageError if there has been no room at all for `lost_s`: Ray would wait for ever."""
        now = time.monotonic()
        if now - self._looked > LOOK_S:
            self._count, self._looked = places(self.place), now
        if self._count:
            self._some = now
        elif now - self._some > self.lost_s:
            raise StageError(
                f"{self.label}: the nodes with {_spoken(self.place.wanted(), self.place)} for a worker are gone for "
                f"{self.lost_s:.0f} s; bring them back and run again"
            )
        return self._count


def block_bytes(ours: bool, workers: int, memory_gb: float) -> int:
    """The largest block a task should hold: its share of `memory_gb`, or of the smallest node that was joined."""
    if ours:
        share = memory_gb * 1e9 * (1 - STORE_SHARE) / workers
    else:
        share = min((node.get("memory", 0.0) / node["CPU"] for node in offers() if node.get("CPU")), default=0.0)
    return min(LARGEST_BLOCK, max(LEAST_BLOCK, int(share / MEMORY_SHARE)))


def start(address: str | None, spills: Spills | None, workers: int, memory_gb: float) -> None:
    """Join the cluster at `address`, or start a Ray on this machine, with a folder of its own. ConfigError where that fails,
    RetryableError where nobody answers at `address`."""
    quiet_logs: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    paths = os.pathsep.join(p for p in sys.path if p)  # workers import what this process can
    try:
        with _same_signals():
            if address:
                _knock(address)
                ray.init(address=address, **quiet_logs)
                return
            assert spills is not None
            with environment(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=paths):  # no network access that nobody asked for
                ray.init(
                    address="local",  # left alone it would join what `ray start` has left a note of, alive or dead
                    num_cpus=workers,
                    object_store_memory=max(STORE_BYTES, int(memory_gb * 1e9 * STORE_SHARE)),
                    object_spilling_directory=str(spills.path.resolve()),
                    include_dashboard=False,
                    **quiet_logs,
                )
    except (ConnectionError, ValueError, RuntimeError, OSError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        # A cluster that does not answer may be starting: exit code 1, which schedulers try again, and not 2.
        kind = RetryableError if address and isinstance(e, OSError) else ConfigError
        raise kind(
            f"ray: cannot reach a cluster at {address or 'this machine'}: {reason}; check `engine.address` and RAY_ADDRESS"
        ) from e


@contextmanager
def _same_signals() -> Iterator[None]:
    """Ray sets a handler of its own for SIGTERM when it starts; what a signal does is the command's to say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """OSError if nobody listens at HOST:PORT: Ray would go on trying for minutes."""
    if address.startswith("ray://"):
        raise ValueError(
            "this is a Ray Client address, which cannot stream results; run the command on a node of the cluster with "
            "HOST:6379 of its head, or through `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if host in ("localhost", "127.0.0.1"):  # which Ray reads as this machine's own address
        host = ray.util.get_node_ip_address()
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_S).close()
