"""SIGTERM and Ctrl-C: units that run may end, locks and half-written files go, and the same command ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core import stopping
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.faults.strikes import different, family, tree
from tests.pipelines.small_pipeline import REPO, command, environment, pipelines

WAIT_S = 200.0  # for a state to be reached; none is timed

SLOW = """
import os, sys, time
from pathlib import Path
import core.stopping as stopping
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.faults.units import lingers
if __name__ == "__main__":
    stopping.GRACE_S = float(sys.argv[2])
    engine = LocalEngine(sys.argv[1], 2)
    try:
        with stopping.listening():
            try:
                engine.run_units(lingers, [Unit(str(i), sys.argv[1]) for i in range(6)], "linger")
            except stopping.Stopped as e:
                print(e)
                sys.exit(128 + stopping.asked())
    finally:
        engine.close()
"""


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def started(config: Path, place: Path, *more: str) -> subprocess.Popen[str]:
    """The run in a session of its own; all it starts is known by its environment."""
    place.mkdir()
    return subprocess.Popen(
        command("run", "all", "-c", config, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"STRIKE_FOLDER": str(place)}),
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("reached", "send", "code"),
    [
        ("exchange/ingest-notes", lambda process: os.killpg(process.pid, signal.SIGTERM), 143),  # as Airflow does
        ("locks/root.minhash.json", lambda process: process.send_signal(signal.SIGTERM), 143),  # as a container does
        ("locks/notes.signals.json", lambda process: os.killpg(process.pid, signal.SIGINT), 130),  # as a terminal does
    ],
    ids=["group", "driver", "ctrl-c"],
)
def test_a_stopped_run_says_how_far_it_was_and_goes_on(undisturbed, tmp_path, reached, send, code):
    config, root = undisturbed.config(tmp_path), tmp_path / "root"
    process = started(config, tmp_path / "place")
    until(lambda: process.poll() is not None or (root / reached).exists())
    send(process)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, err
    name = "Ctrl-C" if code == 130 else "SIGTERM"
    assert err.splitlines()[-1].startswith(f"stopped by {name}: "), err
    assert "of 10 steps are done, then came" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(root.rglob("*.tmp"))
    assert not list(root.rglob("locks/*.json"))
    until(lambda: not family(str(tmp_path / "place")))
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    assert different(tree(root), undisturbed.tree) == []


def lingering(folder: Path, grace_s: float) -> subprocess.Popen[str]:
    """A driver whose two workers have begun units that end once `go` is there."""
    (folder / "driver.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), str(folder), str(grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"STRIKE_FOLDER": str(folder), "PYTHONPATH": str(REPO)}),
        start_new_session=True,
    )
    until(lambda: len(list(folder.glob("*.tmp"))) == 2)
    return process


def test_running_units_end_and_no_other_begins(tmp_path):
    process = lingering(tmp_path, grace_s=WAIT_S)
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopping: running units (2) may end" in process.stderr.readline()
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (143, "linger: 2 of 6 units are committed\n")
    assert sorted(p.name for p in tmp_path.glob("*.done")) == ["0.done", "1.done"]


def test_units_that_take_too_long_are_let_go_of_without_a_trace(tmp_path):
    process = lingering(tmp_path, grace_s=0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (143, "linger: 0 of 6 units are committed\n")
    assert not list(tmp_path.glob("*.done"))
    assert not list(tmp_path.glob("*.tmp"))
    assert family(str(tmp_path)) == []


def test_a_second_signal_ends_at_once(tmp_path):
    process = lingering(tmp_path, grace_s=WAIT_S)
    process.send_signal(signal.SIGTERM)
    process.stderr.readline()
    time.sleep(stopping.SAME_S + 0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 143
    assert not list(tmp_path.glob("*.done"))
    until(lambda: not family(str(tmp_path)))


def signalled_while_idle() -> None:
    with stopping.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(WAIT_S)


def signalled_twice_while_patient() -> None:
    with stopping.listening(), stopping.patiently():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked() == signal.SIGTERM


@pytest.mark.parametrize("block", [signalled_while_idle, signalled_twice_while_patient])
def test_outside_of_units_a_signal_strikes_at_once_and_the_same_one_twice_is_one(block):
    with pytest.raises(stopping.Stopped):
        block()


def test_a_run_of_units_that_begins_after_the_request_begins_none(tmp_path):
    engine = LocalEngine(tmp_path, 1)
    from tests.faults.units import lingers

    with stopping.listening():
        assert stopping.request(signal.SIGTERM)
        with pytest.raises(stopping.Stopped, match="0 of 1 units"):
            engine.run_units(lingers, [Unit("0", str(tmp_path))], "late")
    assert not list(tmp_path.iterdir())
