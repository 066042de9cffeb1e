"""Ctrl-C at drawn instructions of the driver: it ends, every time, and so do its workers. Nothing here is timed but by a bound
that only a hang meets."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import stopping
from core.engines import processes
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from core.hashing import seeded
from tests.core.kernels import tell_pid
from tests.faults.interrupted import UNTIL_THEY_HANG
from tests.faults.strikes import BOUND_S, GONE_S, end, ended, stacks
from tests.pipelines.small_pipeline import REPO, environment

ROUNDS, SOAK_ROUNDS = 3, 2  # the second times the soak
SOON = 2_000  # instructions between two strikes, so that the second meets what the first has begun


def drawn_gaps(seed: int) -> list[int]:
    """One strike, in every third round another soon after it, in every ninth a third one."""
    more = (seed % 3 == 2) + (seed % 9 == 8)
    first = 1 + int(UNTIL_THEY_HANG * seeded(seed, "first"))
    return [first, *(1 + int(SOON * seeded(seed, f"gap {i}")) for i in range(more))]


def driven(place: Path, *command: object) -> tuple[int, str]:
    """Exit code and stderr of a driver; AssertionError with the stacks of all its processes where one of them stays."""
    place.mkdir()
    with (place / "out").open("w") as out, (place / "err").open("w") as err:
        variables = environment({"STRIKE_FOLDER": str(place), "PYTHONPATH": str(REPO)})
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=out, stderr=err, env=variables, start_new_session=True
        )
        try:
            code = process.wait(BOUND_S)
            assert ended(place, GONE_S) is None, f"{command} leaves workers\n{stacks(place)}"
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command} hangs\n{stacks(place)}") from None
        finally:
            end(place)
            process.wait()
    return code, (place / "err").read_text()


def struck(place: Path, seed: int) -> None:
    gaps = ",".join(str(gap) for gap in drawn_gaps(seed))
    code, said = driven(place, REPO / "tests/faults/interrupted.py", place, gaps)
    assert "struck in" in said, f"round {seed}: {said}"
    assert code == -signal.SIGINT, f"round {seed}: {code}, {said}"


@pytest.mark.timeout(0)
def test_struck_drivers_end(tmp_path):
    for seed in range(ROUNDS):
        struck(tmp_path / f"{seed}", seed)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_struck_drivers_end(tmp_path, soak):
    for seed in range(ROUNDS, ROUNDS + int(SOAK_ROUNDS * soak)):
        struck(tmp_path / f"{seed}", seed)


FORGETFUL = """
import sys
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.faults.units import turns_deaf
if __name__ == "__main__":
    engine = LocalEngine(sys.argv[1], 1)
    engine.run_units(turns_deaf, [Unit("0")], "deaf")
"""


def test_a_worker_that_neither_leaves_nor_hears_sigterm_does_not_keep_a_driver_that_forgot_it(tmp_path):
    (tmp_path / "driver.py").write_text(FORGETFUL)
    assert driven(tmp_path / "place", tmp_path / "driver.py", tmp_path)[0] == 0


def test_a_frozen_worker_does_not_keep_the_driver_in_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MESSAGE_S", 1)
    engine = LocalEngine(tmp_path, 1)
    try:
        frozen = engine.run_units(tell_pid, [Unit("0")], "before")[0].value
        os.kill(frozen, signal.SIGSTOP)
        big = Unit("1", bytes(8 << 20))  # more than the kernel holds for a pipe
        assert engine.run_units(tell_pid, [big], "after")[0].value != frozen
    finally:
        engine.close()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own reaction to Ctrl-C, whatever this process was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def struck_while_patient(came: list[str]) -> None:
    with stopping.patiently():
        with stopping.patiently():
            os.kill(os.getpid(), signal.SIGINT)
            came.append("inner")
        came.append("outer")


def struck_and_failing() -> None:
    with stopping.patiently():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("at the same time")


def test_ctrl_c_waits_for_the_end_of_what_is_patient(ctrl_c):
    came: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        struck_while_patient(came)
    assert came == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_raised_once_where_it_is_asked_for(ctrl_c):
    came = []
    with stopping.patiently():
        stopping.interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        try:
            stopping.interrupt()
        except KeyboardInterrupt:
            came.append("interrupt")
    assert came == ["interrupt"]


def test_ctrl_c_is_not_lost_to_another_exception(ctrl_c):
    with pytest.raises(KeyboardInterrupt) as caught:
        struck_and_failing()
    assert isinstance(caught.value.__context__, ValueError)


def test_who_ignores_ctrl_c_goes_on_ignoring_it(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.patiently():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
