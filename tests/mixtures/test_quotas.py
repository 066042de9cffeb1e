"""Quotas and measures of evenness, by hand and by law."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtures.quotas import effective, gini, power_law, water_fill

sizes_of = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(np.array)


def test_water_fill_by_hand():
    sizes = np.array([10, 3, 1, 6])
    assert water_fill(sizes, 12).tolist() == [4, 3, 1, 4]
    assert water_fill(sizes, 20).tolist() == [10, 3, 1, 6]
    assert water_fill(sizes, 99).tolist() == [10, 3, 1, 6]
    assert water_fill(sizes, 0).tolist() == [0, 0, 0, 0]
    eleven = water_fill(sizes, 11).tolist()
    assert eleven in ([4, 3, 1, 3], [3, 3, 1, 4])


def test_the_spare_goes_where_the_seed_says():
    sizes = np.full(50, 7)
    drawn = {tuple(water_fill(sizes, 60, seed).tolist()) for seed in range(3)}
    assert len(drawn) == 3
    assert all(sum(q) == 60 and set(q) == {1, 2} for q in drawn)


def test_power_law_by_hand():
    sizes = np.array([16, 4, 1])
    assert power_law(sizes, 7, 0.5).tolist() == [4, 2, 1]
    assert power_law(sizes, 6, 0.5).tolist() == [3, 1, 0]
    assert power_law(sizes, 8, 0.5, floor=2).tolist() == [5, 2, 1]
    assert power_law(sizes, 3, 0.5, floor=2).tolist() == [1, 1, 1]  # too little for the floor: filled like water
    assert power_law(sizes, 21, 0.5).tolist() == [16, 4, 1]
    assert power_law(np.array([100, 10]), 11, 1.0).tolist() == [10, 1]


@given(sizes_of, st.integers(0, 400), st.integers(0, 3))
def test_water_reaches_the_target_with_one_cap(sizes, target, seed):
    quotas = water_fill(sizes, target, seed)
    assert quotas.sum() == min(target, sizes.sum())
    assert np.all(quotas <= sizes)
    cut = quotas[quotas < sizes]
    if len(cut):
        assert quotas.max() - cut.min() <= 1  # no cluster has two more than one that was cut


@given(sizes_of, st.integers(0, 400), st.floats(0.05, 1), st.integers(0, 9))
def test_power_law_comes_near_the_target(sizes, target, alpha, floor):
    quotas = power_law(sizes, target, alpha, floor)
    assert np.all(quotas <= sizes)
    wanted = min(target, int(sizes.sum()))
    assert quotas.sum() <= wanted
    if np.minimum(sizes, floor).sum() <= target:
        assert np.all(quotas >= np.minimum(sizes, floor))
        ties = len(sizes)  # clusters of equal size step up together
        assert quotas.sum() > wanted - ties or quotas.sum() == wanted


@given(sizes_of, st.integers(0, 300), st.integers(0, 60), st.floats(0.05, 1), st.integers(0, 5))
def test_more_never_takes_away(sizes, target, more, alpha, floor):
    assert np.all(water_fill(sizes, target) <= water_fill(sizes, target + more))
    assert np.all(power_law(sizes, target, alpha, floor) <= power_law(sizes, target + more, alpha, floor))


def test_gini_by_hand():
    assert gini(np.array([5, 5, 5, 0])) == 0
    assert gini(np.array([1, 3])) == 0.25
    assert gini(np.array([0, 0])) == 0
    assert gini(np.array([1] * 99 + [9901])) == pytest.approx(0.9801)


def test_effective_by_hand():
    assert effective(np.array([2, 2, 2, 2, 0])) == pytest.approx(4)
    assert effective(np.array([3, 1])) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective(np.zeros(3)) == 0
