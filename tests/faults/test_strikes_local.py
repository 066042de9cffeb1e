"""kill -9 of driver, worker or both at drawn moments of a run on `local`: the same bytes in the end, nobody is left."""

import pytest

from tests.faults.rounds import fought
from tests.faults.strikes import counted

VICTIMS = {"local": ("driver", "worker", "self", "all")}
ROUNDS = 2
ALL_STEPS = 100  # rounds after which every step should have been met
OFTEN = 4  # events of a step that is no passing moment between two locks


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_struck_runs_end_with_the_same_bytes(undisturbed, tmp_path, soak):
    rounds = max(1, int(ROUNDS * soak))
    met = []
    for seed in range(rounds):
        runs = fought(undisturbed, tmp_path / f"{seed}", seed, ["local"], VICTIMS)
        met += [run.met for run in runs if run.met is not None]
    print(counted(met))
    assert any(victim != "nobody" for victim, _, _ in met)
    if rounds >= ALL_STEPS:
        assert {step for _, step, _ in met} >= {step for step, events in undisturbed.events.items() if events >= OFTEN}
