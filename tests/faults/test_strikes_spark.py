"""kill -9 of Spark's driver, Java, Python daemon, Python workers, and of all at once; the run goes on, on Spark or `local`."""

import shutil

import pytest

from tests.faults.rounds import fought
from tests.faults.strikes import counted

pytestmark = [pytest.mark.spark, pytest.mark.soak, pytest.mark.timeout(0)]

VICTIMS = {"spark": ("java", "driver", "forked", "daemon", "all"), "local": ("driver", "worker", "self", "all")}
ROUNDS = 0.15  # times the soak, at least one
MORE = 2  # rounds where no blow met: moments are drawn from a run on `local`, and other engines have fewer


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_struck_runs_on_spark_end_with_the_same_bytes(undisturbed, tmp_path, soak):
    met: list[object] = []
    rounds = max(1, int(ROUNDS * soak))
    for seed in range(rounds + MORE):
        if seed >= rounds and met:
            break
        runs = fought(undisturbed, tmp_path / f"{seed}", seed, ["spark", "local", "local"], VICTIMS, blows=1 + seed % 2)
        met += [run.met for run in runs if run.met is not None]
    print(counted(met))
    assert met
