"""One round: a run is struck, goes on elsewhere, is struck again, and at last ends with the bytes of an undisturbed run."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.hashing import seeded
from tests.faults.conftest import Undisturbed
from tests.faults.strikes import BETWEEN, Struck, different, drawn_blow, struck_run, tree


def fought(
    undisturbed: Undisturbed,
    folder: Path,
    seed: int,
    engines: Sequence[str],
    victims: dict[str, Sequence[str]],
    events: Mapping[str, int] | None = None,
    blows: int = 2,
) -> list[Struck]:
    """`blows` struck runs and one that is left alone, each on an engine and with a number of workers drawn by the seed (the
    first on engines[0]); AssertionError where bytes differ."""
    runs: list[Struck] = []
    after = BETWEEN
    for number in range(blows + 1):
        engine = engines[0] if number == 0 else engines[int(len(engines) * seeded(seed, f"engine {number}"))]
        workers = 1 + int(3 * seeded(seed, f"workers {number}"))
        blow = None
        if number < blows:
            blow = drawn_blow(seed, str(number), events or undisturbed.events, victims[engine], after)
        config = undisturbed.config(folder, engine, workers, f"{number}")
        ran = struck_run(folder / "runs", folder / "root", ["run", "all", "-c", config], blow)
        if blow is None or ran.met is None or ran.met[0] == "nobody":
            assert ran.code == 0, f"round {seed}, run {number} on {engine}, {blow}: {ran.err}"
        elif ran.code != 0 and ran.met[1] != BETWEEN:
            after = ran.met[1]
        runs.append(ran)
    assert different(tree(folder / "root"), undisturbed.tree) == [], f"round {seed}: {[r.met for r in runs]}"
    shutil.rmtree(folder)
    return runs
