"""Locks and connections on S3 among processes: one winner, and no connection on two sides of a fork."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from core import lock
from core.errors import StageError
from core.lock import held
from core.storage import Root
from tests.pipelines.small_pipeline import environment

NAME = "web.signals"
PATH = f"locks/{NAME}.json"
CONTENDERS = 5

CONTENDER = """
import sys
from core.errors import StageError
from core.lock import held
from core.storage import Root
root = Root(sys.argv[1])
root.exists("warm")
print("ready", flush=True)
sys.stdin.readline()
try:
    with held(root, "web.signals", sys.argv[2]):
        print("won", flush=True)
        sys.stdin.readline()
except StageError as e:
    print("lost", e, flush=True)
"""


@pytest.fixture
def root(s3):
    return Root(s3.url)


def entry(**changes):
    given = {"run_id": "other", "pid": 1, "host": "elsewhere", "started": "1", "beat": time.time()}
    return json.dumps({**given, **changes}).encode()


@pytest.mark.parametrize("stored", [None, "stale"])
def test_of_several_processes_one_wins(root, s3, stored):
    """For a free lock, and for one whose owner on another machine has been silent for longer than its lease."""
    if stored:
        root.write_bytes(PATH, entry(beat=time.time() - lock.LEASE_S - 1))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, s3.url, f"run-{i}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for i in range(CONTENDERS)
    ]
    try:
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * CONTENDERS
        for p in processes:
            p.stdin.write("go\n")
            p.stdin.flush()
        said = [p.stdout.readline() for p in processes]
        assert sorted(line.split()[0] for line in said) == ["lost"] * (CONTENDERS - 1) + ["won"]
        winner = next(i for i, line in enumerate(said) if line == "won\n")
        assert root.read_json(PATH)["run_id"] == f"run-{winner}"
    finally:
        for p in processes:
            p.stdin.close()
            assert p.wait(60) == 0
    assert not root.exists(PATH)


def test_a_living_owner_elsewhere_is_believed(root):
    root.write_bytes(PATH, entry())
    with pytest.raises(StageError, match=r"held by run other .* on elsewhere"), held(root, NAME, "mine"):
        pass
    assert root.read_json(PATH)["run_id"] == "other"


def test_a_lock_that_was_taken_over_is_left_alone(root, monkeypatch, caplog):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with held(root, NAME, "mine"):
        root.write_bytes(PATH, entry())
        until = time.monotonic() + 30
        while "taken over" not in caplog.text and time.monotonic() < until:
            time.sleep(0.05)
    assert "taken over" in caplog.text
    assert root.read_json(PATH)["run_id"] == "other"


def test_renewals_keep_the_lock_releasable(root, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.02)
    with held(root, NAME, "mine"):
        first = root.read_json(PATH)["beat"]
        until = time.monotonic() + 30
        while root.read_json(PATH)["beat"] == first and time.monotonic() < until:
            time.sleep(0.02)
        assert root.read_json(PATH)["beat"] > first
    assert not root.exists(PATH)


def test_a_fork_opens_its_own_connections(root):
    """Parent and children read at the same time, each its own object; on a shared connection answers would change hands."""
    names = [str(i) for i in range(4)]
    for name in names:
        root.write_bytes(name, name.encode() * 1000)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_often, args=(root, name)) for name in names[1:]]
    for child in children:
        child.start()
    _read_often(root, names[0])
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]


def _read_often(root, name):
    for _ in range(100):
        if root.read_bytes(name) != name.encode() * 1000:
            os._exit(3)
