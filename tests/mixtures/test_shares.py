"""The arithmetic of a phase, by hand and as laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from mixtures.shares import Share, check_weights, epochs, longest, shares


def test_shares_by_hand() -> None:
    made = shares(1000, [0.5, 0.3, 0.2], [2000, 100, 40], [1.0, 4.0, 2.0])
    assert made == [Share(500, 500, 2000), Share(300, 300, 100), Share(200, 80, 40)]
    assert [s.shortfall for s in made] == [0, 0, 120]


def test_longest_phase_by_hand() -> None:
    assert longest([0.75, 0.25], [300, 50]) == 200
    assert shares(None, [0.75, 0.25], [300, 25], [1.0, 2.0]) == [Share(150, 150, 300), Share(50, 50, 25)]
    with pytest.raises(StageError, match="no tokens"):
        longest([0.5, 0.5], [300, 0])


def test_epochs_by_hand() -> None:
    tokens, order = np.array([5, 3, 4]), np.array([2, 0, 1])
    assert [(whole, rest.tolist()) for whole, rest in (epochs(tokens, order, n) for n in (0, 3, 4, 8, 9, 12, 28, 29))] == [
        (0, []), (0, []), (0, [2]), (0, [2]), (0, [2, 0]), (1, []), (2, [2]), (2, [2]),
    ]  # fmt: skip
    assert epochs(np.zeros(0, np.int32), np.zeros(0, np.int64), 9)[0] == 0


@pytest.mark.parametrize("weights", [[0.5, 0.4], [0.5, 0.6], [1.0 - 2e-6]])
def test_weights_that_do_not_sum_to_one(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=rf"phase 'p' must sum to 1, got {sum(weights):.9g}"):
        check_weights("p", [f"c{i}" for i in range(len(weights))], weights)


def test_decimal_weights_sum_to_one() -> None:
    check_weights("p", list("abc"), [0.1, 0.2, 0.7])
    check_weights("p", list("abc"), [1 / 3] * 3)


components = st.lists(
    st.tuples(st.integers(1, 100), st.integers(0, 10**6), st.floats(0.1, 8.0)), min_size=1, max_size=6
)


@given(components, st.integers(1, 10**9))
def test_no_component_passes_its_share_or_its_epochs(parts: list[tuple[int, int, float]], tokens: int) -> None:
    total = sum(w for w, _, _ in parts)
    weights = [w / total for w, _, _ in parts]
    made = shares(tokens, weights, [n for _, n, _ in parts], [e for _, _, e in parts])
    assert abs(sum(s.wanted for s in made) - tokens) <= len(parts)
    for share, (_, available, most) in zip(made, parts, strict=True):
        assert 0 <= share.granted <= share.wanted
        assert share.granted <= most * available
        assert share.shortfall == 0 or share.granted > most * available - 1


@given(components)
def test_longest_phase_is_full_and_cannot_grow(parts: list[tuple[int, int, float]]) -> None:
    total = sum(w for w, _, _ in parts)
    weights = [w / total for w, _, _ in parts]
    limits = [int(n * e) for _, n, e in parts]
    try:
        tokens = longest(weights, limits)
    except StageError:
        assert min(limit / w for limit, w in zip(limits, weights, strict=True)) < 2
        return
    assert all(round(w * tokens) <= limit for w, limit in zip(weights, limits, strict=True))
    longer = tokens + 2 * total  # beyond rounding for the smallest weight
    assert any(w * longer > limit for w, limit in zip(weights, limits, strict=True))


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(0, 200_000), st.randoms(use_true_random=False)
)
def test_epochs_within_one_document(sizes: list[int], granted: int, random: "np.random.Generator") -> None:
    tokens = np.array(sizes)
    order = np.array(random.sample(range(len(sizes)), len(sizes)))  # type: ignore[attr-defined]
    whole, rest = epochs(tokens, order, granted)
    actual = whole * tokens.sum() + tokens[rest].sum()
    assert granted - tokens.max() < actual <= granted
    assert len(set(rest.tolist())) == len(rest) < len(sizes)
