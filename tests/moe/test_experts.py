"""Router against numbers worked out by hand; experts against the plain definition."""

import dataclasses
from typing import Literal

import pytest
import torch
from torch.nn import functional

from moe.config import ModelConfig
from moe.experts import MoE, halves


@pytest.fixture
def config(model_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model_config, dim=4, experts=4, top_k=2, expert_dim=8, routed_scale=3.0)


def _moe(config: ModelConfig, seed: int = 0) -> MoE:
    moe = MoE(config, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.5, generator=generator)
    return moe


def _identity_router(config: ModelConfig) -> MoE:
    """Expert e's score is sigmoid(x[e])."""
    moe = _moe(config)
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(4))
    return moe


def test_routing_by_hand(config: ModelConfig) -> None:
    # sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4, so the weights are 3 * 3/4 and 3 * 1/4 of a sum of 1.
    ln3 = float(torch.tensor(3.0).log())
    chosen, weight = _identity_router(config).route(torch.tensor([[-9.0, ln3, -9.0, -ln3]]))
    assert chosen.tolist() == [[1, 3]]
    assert weight[0].tolist() == pytest.approx([2.25, 0.75], abs=1e-6)


def test_bias_selects_but_does_not_weigh(config: ModelConfig) -> None:
    moe = _identity_router(config)
    moe.router_bias.copy_(torch.tensor([5.0, 0, 0, 0]))
    ln3 = float(torch.tensor(3.0).log())
    chosen, weight = moe.route(torch.tensor([[-ln3, ln3, 0.0, -9.0]]))
    assert chosen.tolist() == [[0, 1]]
    assert weight[0].tolist() == pytest.approx([0.75, 2.25], abs=1e-6)


def test_ties_go_to_the_lower_expert(config: ModelConfig) -> None:
    chosen, weight = _identity_router(config).route(torch.zeros(3, 4))
    assert chosen.tolist() == [[0, 1]] * 3
    assert weight.tolist() == [[1.5, 1.5]] * 3


def test_weights_stay_finite_when_all_scores_underflow(config: ModelConfig) -> None:
    _, weight = _identity_router(config).route(torch.full((1, 4), -300.0))
    assert weight.isfinite().all()


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_output_is_the_weighted_sum_of_experts(config: ModelConfig, backend: Literal["grouped", "loop"]) -> None:
    moe = _moe(dataclasses.replace(config, experts_backend=backend))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    chosen, weight = moe.route(x.flatten(0, 1))
    for s, row in enumerate(x.flatten(0, 1)):
        expected = torch.zeros(4)
        for k in range(2):
            e = int(chosen[s, k])
            gate, up = halves("moe.gate_up_proj.weight", moe.gate_up_proj.weight).values()
            hidden = functional.silu(gate[e] @ row) * (up[e] @ row)
            expected += weight[s, k] * (moe.down_proj.weight[e] @ hidden)
        torch.testing.assert_close(moe(x).flatten(0, 1)[s], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "experts without tokens"])
def test_loop_and_grouped_give_the_same_bits(config: ModelConfig, crowded: bool) -> None:
    x = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(2))
    backends: tuple[Literal["grouped", "loop"], ...] = ("grouped", "loop")
    results = []
    for backend in backends:
        moe = _moe(dataclasses.replace(config, experts_backend=backend))
        if crowded:
            moe.router_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
        y = moe(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for grouped, loop in zip(*results, strict=True):
        assert torch.equal(grouped, loop)


def test_no_token_is_dropped_and_loads_are_counted_in_training_only(config: ModelConfig) -> None:
    moe = _moe(config)
    moe.router_bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    moe(torch.randn(2, 50, 4))
    assert moe.load.tolist() == [100, 100, 0, 0]
    moe.eval()
    moe(torch.randn(2, 50, 4))
    assert moe.load.sum() == 200


def test_rebalance_by_hand(config: ModelConfig) -> None:
    moe = _moe(config)
    moe.load.copy_(torch.tensor([10, 2, 4, 0]))
    assert moe.rebalance(0.25) == 1.5  # 10 tokens over a mean of 4, minus 1
    assert moe.router_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert moe.load.tolist() == [0, 0, 0, 0]


def test_balancing_lowers_the_violation(config: ModelConfig) -> None:
    moe = _moe(config, seed=3)
    x = torch.randn(8, 64, 4, generator=torch.Generator().manual_seed(4)) + torch.tensor([2.0, 0, 0, -1.0])
    violations = []
    for _ in range(150):
        moe(x)
        violations.append(moe.rebalance(0.01))
    assert violations[0] > 0.4
    assert max(violations[-10:]) < 0.1
