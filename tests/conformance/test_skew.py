"""Three rows in ten have one key: memory stays bounded where `combine`, a cap or a join allows it, and else the key is named."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.bounds import BOUND_S
from tests.conformance.heavy_keys import BATCHES, HOT, HOT_FRACTION, ROWS, WIDTH
from tests.core.test_spill_memory import BASE_BYTES, REPO

UNITS, MEMORY_GB = 14, 0.2  # 459 MB of rows, 138 MB of one key, 100 MB a worker
SHARE_BYTES = MEMORY_GB * 1e9 / 2  # of one of the two workers


def hot_numbers(units=UNITS):
    """`n` of every row with the hot key, as `heavy_keys.heavy` draws them."""
    found = []
    for seed in range(units):
        rng = np.random.default_rng(seed)
        for b in range(BATCHES):
            is_hot = rng.random(ROWS) < HOT_FRACTION
            rng.integers(1000, 1 << 40, ROWS)
            rng.bytes(ROWS * WIDTH)
            found.append((seed * BATCHES + b) * ROWS + np.flatnonzero(is_hot))
    return np.concatenate(found)


@pytest.fixture(scope="module")
def hot():
    return hot_numbers()


def ran(tmp_path, case):
    """What a case printed and what it warned of; in a process of its own, whose workers have loaded nothing else."""
    arguments = [str(tmp_path / "scratch"), str(UNITS), str(MEMORY_GB), case]
    out = subprocess.run(
        [sys.executable, "-m", "tests.conformance.heavy_keys", *arguments],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=BOUND_S,
    )
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert HOT_FRACTION * UNITS * BATCHES * ROWS * WIDTH > SHARE_BYTES  # or nothing would be proved
    return found, out.stderr


def test_a_cap_bounds_what_is_held_and_counts_the_rest(tmp_path, hot):
    found, warned = ran(tmp_path, "capped")
    assert found["hot"] == 100
    assert found["cut"] == {"heavy": len(hot) - 100}
    assert (found["skew"], warned) == ({}, "")
    assert found["peak"] < BASE_BYTES + SHARE_BYTES


def test_combine_bounds_what_is_held(tmp_path, hot):
    found, warned = ran(tmp_path, "combined")
    assert found["hot"] == int(hot.sum())
    assert (found["cut"], found["skew"], warned) == ({}, {}, "")
    assert found["peak"] < BASE_BYTES + SHARE_BYTES


def test_the_left_side_of_a_join_passes_by(tmp_path, hot):
    found, warned = ran(tmp_path, "joined")
    assert (found["rows"], found["hot"]) == (len(hot), 70 * len(hot))
    assert (found["skew"], warned) == ({}, "")
    assert found["peak"] < BASE_BYTES + SHARE_BYTES


def test_a_key_that_must_be_held_whole_is_named(tmp_path, hot):
    found, warned = ran(tmp_path, "whole")
    assert found["hot"] == len(hot)
    skew = found["skew"]["heavy"]
    assert (skew["key"], skew["rows"]) == ([HOT], len(hot))
    assert len(hot) * 1000 < skew["bytes"] < len(hot) * 1100
    assert f"heavy: one key, [{HOT}], has {len(hot):,} rows of {skew['bytes'] / 1e6:.1f} MB" in warned
    assert warned.count("\n") == 1
