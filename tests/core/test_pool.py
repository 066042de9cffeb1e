"""Workers that raise, die, hang or lose their driver: nothing hangs, nothing is lost in silence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.engines.contract import Unit
from core.engines.local import LocalEngine
from core.errors import ConfigError, StageError
from tests.bounds import BOUND_S
from tests.core.kernels import faulty, killer_rows, squared, tell_pid

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    engine = LocalEngine(tmp_path_factory.mktemp("scratch"), 2)
    yield engine
    engine.close()


@pytest.fixture(params=["here", "pool"])
def engine(request, tmp_path):
    return request.getfixturevalue("pool") if request.param == "pool" else LocalEngine(tmp_path, 0)


def units(tmp_path, *faults):
    return [Unit(f"u{i}", {"folder": str(tmp_path), **fault}) for i, fault in enumerate(faults)]


def finished(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".tries")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true, what):
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError(what)


def test_reports_come_in_the_order_of_units(engine):
    reports = engine.run_units(squared, [Unit(f"u{i}", i, 10) for i in range(25)], "square")
    assert [r.value for r in reports] == [i * i for i in range(25)]
    assert all(r.seconds > 0 and r.peak_memory_bytes > 1 << 20 for r in reports)
    assert engine.run_units(squared, [], "nothing") == []


def test_an_exception_names_its_unit_and_the_others_finish(engine, tmp_path):
    with pytest.raises(StageError) as caught:
        engine.run_units(faulty, units(tmp_path, {"fault": "slow"}, {"fault": "raise"}), "signals", 60)
    assert str(caught.value) == "signals: unit u1 failed: ValueError: a bad shard"
    assert "in faulty" in caught.value.__notes__[0]
    assert finished(tmp_path) == ["u0"]
    assert engine.run_units(squared, [Unit("u", 3)], "after")[0].value == 9


def test_nothing_new_begins_after_a_failure(pool, tmp_path):
    with pytest.raises(StageError):
        pool.run_units(faulty, units(tmp_path, {"fault": "raise"}, {"fault": "slow"}, *[{}] * 20), "signals", 60)
    assert len(finished(tmp_path)) < 20


@pytest.mark.parametrize(("fault", "kind"), [("config", ConfigError), ("stage", StageError)])
def test_our_own_errors_pass_through_unchanged(engine, tmp_path, fault, kind):
    with pytest.raises(kind, match=r"^stage: (a bad knob|it must stop)$"):
        engine.run_units(faulty, units(tmp_path, {"fault": fault}), "signals", 60)


def test_a_passing_fault_is_tried_again_and_not_for_ever(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("core.engines.pool.FIRST_WAIT_S", 0.01)
    reports = engine.run_units(faulty, units(tmp_path, {}, {"fault": "retry", "times": 3}), "crawl", 60)
    assert [r.value for r in reports] == [0, 3]
    (tmp_path / "u0.tries").unlink()
    with pytest.raises(StageError, match="unit u0 failed: RetryableError: the store is busy"):
        engine.run_units(faulty, units(tmp_path, {"fault": "retry", "times": 99}), "crawl", 60)
    assert len((tmp_path / "u0.tries").read_text()) == 4


def test_a_report_that_cannot_travel_is_the_units_error(pool, tmp_path):
    with pytest.raises(StageError, match="unit u0 failed"):
        pool.run_units(faulty, units(tmp_path, {"fault": "unpicklable"}), "signals", 60)


@pytest.mark.parametrize("fault", ["die", "exit"])
def test_a_worker_that_dies_is_replaced_and_its_unit_tried_again(pool, tmp_path, fault):
    reports = pool.run_units(faulty, units(tmp_path, {}, {"fault": fault, "times": 2}, {}, {}), "signals", 60)
    assert [r.unit for r in reports] == ["u0", "u1", "u2", "u3"]
    assert reports[1].value == 2


def test_deaths_that_name_no_row_are_limited(pool, tmp_path):
    with pytest.raises(
        StageError, match=r"worker was killed by SIGKILL \(out of memory\?\) before it named a row of unit u0, 3 d"
    ):
        pool.run_units(faulty, units(tmp_path, {"fault": "die", "times": 99}), "signals", 60)
    assert len((tmp_path / "u0.tries").read_text()) == 3


def test_rows_that_kill_are_found_one_by_one(pool):
    plain = [Unit("u0", {}), Unit("u1", {"kills": [3, 7]}), Unit("u2", {})]
    reports = pool.run_units(killer_rows, plain, "pii", 60)
    every = list(range(10))
    assert [r.value for r in reports] == [every, [r for r in every if r not in (3, 7)], every]


def test_a_row_that_hangs_is_found(pool):
    reports = pool.run_units(killer_rows, [Unit("u0", {"hangs": [5]}), Unit("u1", {})], "pii", 1.5)
    assert reports[0].value == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert reports[1].value == list(range(10))


def test_a_death_after_the_last_row_blames_no_row(pool):
    with pytest.raises(StageError, match="before it named a row of unit u0, 3 deaths"):
        pool.run_units(killer_rows, [Unit("u0", {"dies_after": True})], "pii", 60)


def test_a_unit_of_killers_is_given_up(pool, monkeypatch):
    monkeypatch.setattr("core.engines.pool.POISON_LIMIT", 3)
    with pytest.raises(StageError, match=r"at row 3 of unit u0, 5 deaths in this unit"):
        pool.run_units(killer_rows, [Unit("u0", {"kills": list(range(10))})], "pii", 60)


def test_a_worker_killed_between_two_runs_costs_nothing(pool):
    pids = {r.value for r in pool.run_units(tell_pid, [Unit(str(i)) for i in range(8)], "pids")}
    assert os.getpid() not in pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(p) for p in pids), "killed workers are still there")
    reports = pool.run_units(killer_rows, [Unit("u0", {}), Unit("u1", {})], "after")
    assert [r.value for r in reports] == [list(range(10))] * 2


DRIVER = """
import json, signal, sys
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.core.kernels import faulty, tell_pid

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup pytest &` has it ignored, and we inherit that
    folder = sys.argv[1]
    engine = LocalEngine(folder, 2)
    pids = set()
    while len(pids) < 2:
        pids |= {r.value for r in engine.run_units(tell_pid, [Unit(str(i)) for i in range(4)], "pids")}
    print(json.dumps(sorted(pids)), flush=True)
    hang = {"folder": folder, "fault": "hang", "times": 99}
    engine.run_units(faulty, [Unit("a", hang), Unit("b", hang)], "hang")
"""


def start_driver(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        start_new_session=True,
    )
    pids = json.loads(driver.stdout.readline())
    wait_until(lambda: (tmp_path / "a.tries").exists() and (tmp_path / "b.tries").exists(), "the units did not begin")
    return driver, pids


def test_a_driver_that_is_killed_leaves_no_orphans(tmp_path):
    driver, pids = start_driver(tmp_path)
    assert all(alive(p) for p in pids)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(alive(p) for p in pids), "workers outlive their driver")


def test_ctrl_c_ends_everything_at_once(tmp_path):
    driver, pids = start_driver(tmp_path)
    os.killpg(driver.pid, signal.SIGINT)
    try:
        _, said = driver.communicate(timeout=BOUND_S)
    finally:
        driver.kill()
    assert driver.returncode == -signal.SIGINT
    assert said.splitlines().count("KeyboardInterrupt") == 1  # the driver's own, none from workers
    wait_until(lambda: not any(alive(p) for p in pids), "workers outlive their driver")
