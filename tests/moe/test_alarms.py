"""Alarms over rows written by hand, and over runs into whose weights a fault was put."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from core.errors import ConfigError, StageError
from moe import checkpoint
from moe.alarms import KNOWN_UPDATES, Alarms, Limits
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.metrics import read_metrics
from moe.trainer import train

Row = dict[str, Any]


def _row(loss: float = 3.0, **fields: Any) -> Row:
    return {"loss": loss, "domain_loss": {"all": loss}, **fields}


def _raised(alarms: Alarms, rows: list[Row]) -> list[list[str]]:
    return [[alarm.name for alarm in alarms.see(row)] for row in rows]


def _experts(low: float, high: float) -> Row:
    return _row(experts={"rms_min_median": [0.9, low], "rms_max_median": [high, 1.2]})


def test_a_healthy_run_raises_nothing() -> None:
    alarms = Alarms(Limits(), 3.0)
    rng = np.random.default_rng(0)
    rows = [
        _row(8 * 0.98**i + 2 + float(rng.normal(0, 0.1)), load_violation=[0.4, 0.2], **_experts(0.7, 1.6)["experts"])
        for i in range(400)
    ]
    assert _raised(alarms, rows) == [[]] * 400
    assert alarms.calm


def test_a_spike_that_does_not_go_back() -> None:
    alarms = Alarms(Limits(spike_nats=0.5, spike_updates=4), 3.0)
    assert _raised(alarms, [_row()] * 30) == [[]] * 30
    assert _raised(alarms, [_row(3.6)] * 3) == [[]] * 3
    assert not alarms.calm, "no checkpoint of this state"
    assert _raised(alarms, [_row(3.1)]) == [[]]
    assert alarms.calm
    assert _raised(alarms, [_row(3.7)] * 5) == [[], [], [], ["loss_spike"], ["loss_spike"]]
    assert alarms.see(_row(3.7))[0].found == "a loss 0.697 nats above its running mean (6 readings in a row)"


def test_hard_domains_after_easy_ones_are_no_spike() -> None:
    """A mixture in its own order: the loss jumps by two nats where no domain's own loss moves."""
    alarms = Alarms(Limits(spike_updates=1), 3.0)
    easy, hard = ({"loss": v, "domain_loss": {name: v}} for name, v in (("code", 1.0), ("web", 3.0)))
    assert _raised(alarms, ([hard] * 30 + [easy] * 30) * 3) == [[]] * 180
    assert _raised(alarms, [{"loss": 2.1, "domain_loss": {"code": 2.1}}]) == [["loss_spike"]]


def test_a_domain_that_is_hardly_known_has_no_level() -> None:
    alarms = Alarms(Limits(spike_updates=1), 3.0)
    rows = [_row(1.0 if i % 2 else 9.0) for i in range(KNOWN_UPDATES)]
    assert _raised(alarms, rows) == [[]] * KNOWN_UPDATES


def test_experts_need_several_readings_and_only_rows_with_readings_count() -> None:
    alarms = Alarms(Limits(readings=2), 3.0)
    assert _raised(alarms, [_experts(0.9, 40.0), _row(), _experts(0.9, 41.0)]) == [[], [], ["expert_blow_up"]]
    assert _raised(alarms, [_experts(0.9, 1.0), _experts(0.001, 1.0), _experts(0.01, 1.0)]) == [[], [], ["dead_expert"]]
    found = alarms.see(_experts(0.01, 1.0))[0]
    assert str(found).startswith(
        "alarm dead_expert, got rms_min_median 0.01 in entry 1 (3 readings in a row), expected"
    )


@pytest.mark.parametrize(
    ("row", "limits", "name"),
    [
        (_row(load_violation=[0.1, 2.9]), Limits(collapse_updates=1), "load_collapse"),
        (_row(attention_logit_bound=[11.0, 130.0]), Limits(), "attention_logit"),
        (_experts(0.9, float("inf")), Limits(readings=1), "expert_blow_up"),
    ],
)
def test_each_rule(row: Row, limits: Limits, name: str) -> None:
    alarms = Alarms(limits, 3.0)
    assert [a.name for a in alarms.see(row)] == [name]
    assert alarms.calm == (name not in limits.stop)


def test_an_experts_all_chosen_model_cannot_collapse() -> None:
    assert Alarms(Limits(collapse_updates=1), 0.0).see(_row(load_violation=[0.0])) == []


def test_replayed_rows_leave_the_state_of_an_undisturbed_run() -> None:
    limits = Limits(spike_nats=0.5, spike_updates=6)
    rows = [_row(3.0 + 0.01 * (i % 7)) for i in range(40)] + [_row(4.0)] * 10
    whole, resumed = Alarms(limits, 3.0), Alarms(limits, 3.0)
    expected = _raised(whole, rows)
    resumed.replay(rows[:43])
    assert _raised(resumed, rows[43:]) == expected[43:]
    assert ["loss_spike"] in expected[43:]


def test_wrong_limits_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        Limits(stop=("loss_spik",), readings=0)
    assert [p.split(":")[0] for p in error.value.problems] == ["alarms.stop", "alarms.readings"]


Fault = Callable[[dict[str, Tensor]], None]


def _blow_up(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.moe.gate_up_proj.weight"][2] *= 30


def _kill(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.moe.gate_up_proj.weight"][1] *= 1e-3


@pytest.fixture
def faulty(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> Callable[[Fault], TrainConfig]:
    """Trains, puts a fault into the newest checkpoint, and gives the config of a run that starts from it."""

    def make(fault: Fault) -> TrainConfig:
        config = dataclasses.replace(train_config, steps=4, optim=OptimConfig(lr=1e-4, warmup_steps=1))
        folder = tmp_path / "sound"
        train(config, source, folder)
        path = checkpoint.find(folder)
        _, state = checkpoint.read(path)
        weights, moments = checkpoint.load_tensors(path)
        fault(weights)
        checkpoint.save(
            folder, step=4, weights=weights, moments=moments, config=config, mixture=state.mixture, tokenizer=None
        )
        return dataclasses.replace(
            config, steps=12, checkpoint_steps=2, init=checkpoint.weights_digest(folder), repeat=True
        )

    return make


def test_a_blown_up_expert_stops_the_run_before_its_weights_are_kept(
    faulty: Callable[[Fault], TrainConfig], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, folder = faulty(_blow_up), tmp_path / "run"
    with pytest.raises(StageError) as error:
        train(config, source, folder, start=tmp_path / "sound", limits=Limits(readings=2, blow_up_ratio=10))
    said = str(error.value)
    assert "update 10: alarm expert_blow_up, got rms_max_median" in said
    assert "expected at most 10; set model.routed_clip" in said
    assert (
        "in a new folder that starts from step-00000000, which stands, or go on here with expert_blow_up left" in said
    )
    rows = read_metrics(folder)
    assert [alarm["name"] for alarm in rows[-1]["alarms"]] == ["expert_blow_up"]
    assert rows[-1]["loss"] < rows[0]["loss"] + 1, "the loss does not show it"
    assert [p.name for p in (folder / checkpoint.CHECKPOINTS).iterdir()] == ["step-00000000"]
    going_on = Limits(readings=2, blow_up_ratio=10, stop=("loss_spike",))
    assert train(config, source, folder, start=tmp_path / "sound", limits=going_on).steps == 12


def test_a_dead_expert_warns(faulty: Callable[[Fault], TrainConfig], source: ArrayTokenSource, tmp_path: Path) -> None:
    config, folder = faulty(_kill), tmp_path / "run"
    summary = train(config, source, folder, start=tmp_path / "sound", limits=Limits(readings=2, dead_ratio=0.1))
    assert summary.alarms == ("dead_expert",)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "alarms" in row] == [10, 12]
    assert [p.name for p in sorted((folder / checkpoint.CHECKPOINTS).iterdir())] == ["step-00000010", "step-00000012"]
    with pytest.raises(StageError, match="alarm dead_expert, got rms_min_median"):
        train(
            config, source, tmp_path / "stopped", start=tmp_path / "sound",
            limits=Limits(readings=2, dead_ratio=0.1, stop=("dead_expert",)),
        )  # fmt: skip


def test_a_replay_names_what_was_raised_and_reads_nulls() -> None:
    """A null was not finite: beyond every limit where too much alarms, no reading where too little does."""
    rows = [_experts(0.01, 1.5)] * 3 + [_row(experts={"rms_min_median": [None], "rms_max_median": [1.0, None]})] * 3
    assert Alarms(Limits(readings=3), 3.0).replay(rows) == {"dead_expert", "expert_blow_up"}
    assert Alarms(Limits(readings=4), 3.0).replay(rows) == set()
