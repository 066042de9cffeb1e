"""Locks: refusal, re-entry, takeover of the dead, heartbeats, torn files, races."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from core import lock
from core.errors import StageError
from core.lock import held
from core.storage import Root

NAME = "web.signals"
PATH = f"locks/{NAME}.json"


@pytest.fixture
def root(tmp_path):
    return Root(str(tmp_path))


def entry(**changes):
    mine = {"run_id": "other", "pid": os.getpid(), "host": socket.gethostname(), "beat": time.time()}
    mine = {**mine, **changes}
    return json.dumps({"started": lock._started(mine["pid"]), **mine}).encode()


def test_a_second_run_is_refused_and_the_first_is_named(root):
    with held(root, NAME, "run-a"):
        with (
            pytest.raises(StageError, match=rf"run run-a \(process {os.getpid()} on {socket.gethostname()}"),
            held(root, NAME, "run-b"),
        ):
            raise AssertionError("two runs hold one lock")
        with held(root, "web.pii", "run-b"):
            pass
        assert root.read_json(PATH)["run_id"] == "run-a"
    assert not root.exists(PATH)
    with held(root, NAME, "run-b"):
        pass


def test_an_exception_releases(root):
    with pytest.raises(ZeroDivisionError), held(root, NAME, "run-a"):
        raise ZeroDivisionError
    assert not root.exists(PATH)


def test_the_same_run_id_re_enters(root):
    root.write_bytes(PATH, entry(run_id="retry", host="elsewhere"))
    with held(root, NAME, "retry"):
        assert root.read_json(PATH)["host"] == socket.gethostname()


def test_a_lock_taken_over_is_not_released_by_its_first_owner(root):
    with held(root, NAME, "run-a"):
        root.write_bytes(PATH, entry(run_id="retry", host="elsewhere"))
    assert root.read_json(PATH)["host"] == "elsewhere"


def test_a_dead_owner_is_succeeded(root):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    root.write_bytes(PATH, entry(pid=dead.pid, started="1"))
    with held(root, NAME, "run-b"):
        assert root.read_json(PATH)["run_id"] == "run-b"


def test_a_process_number_in_use_again_is_not_the_owner(root):
    root.write_bytes(PATH, entry(started="12345"))
    with held(root, NAME, "run-b"):
        assert root.read_json(PATH)["run_id"] == "run-b"


def test_another_machine_is_believed_until_its_lease_ends(root):
    root.write_bytes(PATH, entry(host="elsewhere", beat=time.time() - lock.LEASE_S / 2))
    with pytest.raises(StageError, match="on elsewhere"), held(root, NAME, "run-b"):
        pass
    root.write_bytes(PATH, entry(host="elsewhere", beat=time.time() - lock.LEASE_S - 1))
    with held(root, NAME, "run-b"):
        assert root.read_json(PATH)["run_id"] == "run-b"


def test_a_torn_lock_is_named(root):
    root.write_bytes(PATH, b"{")
    with pytest.raises(StageError, match=rf"{PATH}: not a lock of ours; remove the file"), held(root, NAME, "run-b"):
        pass


def test_of_many_runs_one_succeeds_a_dead_owner(root):
    root.write_bytes(PATH, entry(started="12345"))
    won, lost, gate, done = [], [], threading.Barrier(6), threading.Event()

    def take(i):
        gate.wait()
        try:
            with held(root, NAME, f"run-{i}"):
                won.append(i)
                done.wait(30)
        except StageError:
            lost.append(i)
            if len(lost) == 5:
                done.set()

    threads = [threading.Thread(target=take, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1


def test_the_heart_beats(root, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with held(root, NAME, "run-a"):
        first = root.read_json(PATH)["beat"]
        while root.read_json(PATH)["beat"] == first:
            time.sleep(0.01)
    assert not root.exists(PATH)  # the release knew the version of the last renewal


def test_a_lost_lock_is_not_renewed(root, monkeypatch, caplog):
    with held(root, NAME, "run-a"):
        mine = root.versioned(PATH)[1]
        root.write_bytes(PATH, entry(host="elsewhere"))
        monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
        lock._Beat(root, PATH, "run-a", mine)._renew()  # ends by itself: the lock is lost
    assert root.read_json(PATH)["host"] == "elsewhere"
    assert "taken over" in caplog.text


def test_a_machine_of_the_same_name_is_another_machine(root):
    root.write_bytes(
        PATH, entry(pid=2**22 + 1, kernel="another boot/pid:[1]")
    )  # no such process here, which means nothing
    with pytest.raises(StageError, match="held by run other"), held(root, NAME, "run-b"):
        pass
