"""Rates by hand."""

import pytest

from moe.config import OptimConfig
from moe.schedule import bias_rate, learning_rate, momentum


def test_cosine_by_hand() -> None:
    config = OptimConfig(lr=1.0, min_lr_fraction=0.2, warmup_steps=4)
    rates = [learning_rate(step, 9, config) for step in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_wsd_by_hand() -> None:
    config = OptimConfig(lr=2.0, min_lr_fraction=0.0, warmup_steps=2, schedule="wsd", decay_fraction=0.4)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    whole = OptimConfig(lr=1.0, min_lr_fraction=0.5, warmup_steps=0, schedule="wsd", decay_fraction=1.0)
    assert [learning_rate(step, 4, whole) for step in range(4)] == pytest.approx([0.875, 0.75, 0.625, 0.5])
    none = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=0.0)
    assert [learning_rate(step, 3, none) for step in range(3)] == [1.0, 1.0, 1.0]


def test_constant_after_warm_up() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_or_of_one_step_has_rates(schedule: str) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=5, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(step, 3, config) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    no_warmup = OptimConfig(lr=1.0, warmup_steps=0, schedule=schedule)  # type: ignore[arg-type]
    assert 0 < learning_rate(0, 1, no_warmup) <= 1


def test_bias_rate_stops_for_the_last_updates_and_when_frozen() -> None:
    config = OptimConfig(bias_rate=0.5, bias_stop_fraction=0.3)
    assert [bias_rate(step, 10, config) for step in range(10)] == [0.5] * 7 + [0.0] * 3
    assert bias_rate(9, 10, OptimConfig(bias_rate=0.5, bias_stop_fraction=0.0)) == 0.5
    assert bias_rate(0, 10, OptimConfig(freeze_router=True)) == 0.0


def test_momentum_rises_once() -> None:
    config = OptimConfig(momentum=0.95)
    assert [momentum(update, config) for update in (0, 150, 300, 9000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum(7, OptimConfig(momentum=0.5)) == 0.5
