"""A driver that is killed on another machine: its lock stands for the lease, then the next run takes it over."""

import json
import subprocess
import sys
import time

from core.lock import LEASE_S
from tests.faults.strikes import different, tree
from tests.pipelines.small_pipeline import environment, pipelines

WAIT_S = 200.0


def test_a_driver_killed_elsewhere_is_succeeded_after_its_lease(undisturbed, tmp_path):
    config, lock = undisturbed.config(tmp_path), tmp_path / "root/locks/root.minhash.json"
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.elsewhere", "run", "all", "-c", str(config), "--run-id", "theirs"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    try:
        end = time.monotonic() + WAIT_S
        while not lock.exists():
            assert other.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        other.kill()
        other.wait()
    ran = pipelines("run", "all", "-c", config)
    assert ran.code == 1
    assert f"held by run theirs (process {other.pid} on elsewhere" in ran.err

    entry = json.loads(lock.read_text())
    lock.write_text(json.dumps({**entry, "beat": entry["beat"] - LEASE_S - 1}))  # the lease, without waiting for it
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    assert different(tree(tmp_path / "root"), undisturbed.tree) == []
