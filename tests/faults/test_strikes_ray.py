"""kill -9 of Ray's driver, raylet, head and workers, and of all at once; the run goes on, on Ray or on `local`."""

import pytest

from tests.faults.rounds import fought
from tests.faults.strikes import counted

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(0)]

VICTIMS = {"ray": ("raylet", "driver", "gcs", "ray worker", "all"), "local": ("driver", "worker", "self", "all")}
ROUNDS = 0.3  # times the soak, at least one
MORE = 2  # rounds where no blow met: moments are drawn from a run on `local`, and other engines have fewer


def test_struck_runs_on_ray_end_with_the_same_bytes(undisturbed, tmp_path, soak):
    pytest.importorskip("ray")
    met: list[object] = []
    rounds = max(1, int(ROUNDS * soak))
    for seed in range(rounds + MORE):
        if seed >= rounds and met:
            break
        runs = fought(undisturbed, tmp_path / f"{seed}", seed, ["ray", "local", "local"], VICTIMS, blows=1 + seed % 2)
        met += [run.met for run in runs if run.met is not None]
    print(counted(met))
    assert met
