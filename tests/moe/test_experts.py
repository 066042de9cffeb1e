"""Router, losses and statistics against numbers worked out by hand; experts against the plain definition."""

import copy
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch.nn import functional

from moe import kernels
from moe.balance import activity_stats, group_loss
from moe.config import ModelConfig
from moe.experts import PLAIN, MoE, SwiGLU, _Combine, _Dispatch, halves, pieces, sort_by_expert


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


def _route(moe: MoE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return moe.choose(moe.logits(x).sigmoid())


def test_routing_by_hand(config: ModelConfig) -> None:
    # sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4, so the weights are 3 * 3/4 and 3 * 1/4 of a sum of 1.
    ln3 = float(torch.tensor(3.0).log())
    chosen, weight = _route(_identity_router(config), torch.tensor([[-9.0, ln3, -9.0, -ln3]]))
    assert chosen.tolist() == [[1, 3]]
    assert weight[0].tolist() == pytest.approx([2.25, 0.75], abs=1e-6)


def test_bias_selects_but_does_not_weigh(config: ModelConfig) -> None:
    moe = _identity_router(config)
    moe.router_bias.copy_(torch.tensor([5.0, 0, 0, 0]))
    ln3 = float(torch.tensor(3.0).log())
    chosen, weight = _route(moe, torch.tensor([[-ln3, ln3, 0.0, -9.0]]))
    assert chosen.tolist() == [[0, 1]]
    assert weight[0].tolist() == pytest.approx([0.75, 2.25], abs=1e-6)


def test_ties_go_to_the_lower_expert(config: ModelConfig) -> None:
    chosen, weight = _route(_identity_router(config), torch.zeros(3, 4))
    assert chosen.tolist() == [[0, 1]] * 3
    assert weight.tolist() == [[1.5, 1.5]] * 3


def test_weights_stay_finite_when_all_scores_underflow(config: ModelConfig) -> None:
    _, weight = _route(_identity_router(config), torch.full((1, 4), -300.0))
    assert weight.isfinite().all()


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_output_is_the_weighted_sum_of_experts(config: ModelConfig, backend: Literal["grouped", "loop"]) -> None:
    moe = _moe(dataclasses.replace(config, experts_backend=backend))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    chosen, weight = _route(moe, x.flatten(0, 1))
    for s, row in enumerate(x.flatten(0, 1)):
        expected = torch.zeros(4)
        for k in range(2):
            e = int(chosen[s, k])
            gate, up = halves("moe.gate_up_proj.weight", moe.gate_up_proj.weight).values()
            hidden = functional.silu(gate[e] @ row) * (up[e] @ row)
            expected += weight[s, k] * (moe.down_proj.weight[e] @ hidden)
        torch.testing.assert_close(moe(x).flatten(0, 1)[s], expected, atol=1e-6, rtol=1e-5)


Backend = Literal["grouped", "loop", "triton"]
ROUTINGS = {  # router biases
    "spread": [0.0, 0.0, 0.0, 0.0],
    "experts without tokens": [0.0, 9.0, 0.0, 9.0],
}


def _results(config: ModelConfig, backend: Backend, bias: list[float], x: torch.Tensor) -> list[torch.Tensor]:
    moe = _moe(dataclasses.replace(config, experts_backend=backend))
    moe.router_bias.copy_(torch.tensor(bias))
    x = x.clone().requires_grad_()
    y = moe(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(3, 50), (1, 1)], ids=["many", "one token"])
def test_loop_and_grouped_give_the_same_bits(
    config: ModelConfig, routing: str, shape: tuple[int, int], top_k: int
) -> None:
    config = dataclasses.replace(config, top_k=top_k, routed_clip=(0.0, 0.5, 0.0))
    x = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(2))
    results = [_results(config, backend, ROUTINGS[routing], x) for backend in ("grouped", "loop")]
    assert len(results[0]) == 5
    for grouped, loop in zip(*results, strict=True):
        assert torch.equal(grouped, loop)


@pytest.mark.skipif(importlib.util.find_spec("moe.kernels") is None, reason="the fused operators are not installed")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fused_operators_give_the_same_numbers(config: ModelConfig, routing: str) -> None:
    x = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(2))
    config = dataclasses.replace(config, routed_clip=(0.0, 0.5, 0.0))
    fused, plain = (_results(config, backend, ROUTINGS[routing], x) for backend in ("triton", "grouped"))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "count", "triton", "fused"),
    [
        ("auto", "cuda", torch.bfloat16, 32, True, True),
        ("auto", "cuda", torch.bfloat16, 64, True, True),
        ("auto", "cuda", torch.bfloat16, 65, True, False),
        ("auto", "cuda", torch.bfloat16, 32, False, False),
        ("auto", "cuda", torch.float64, 32, True, False),
        ("auto", "cuda", torch.float32, 32, True, False),
        ("auto", "cpu", torch.bfloat16, 32, True, False),
        ("grouped", "cuda", torch.bfloat16, 32, True, False),
        ("loop", "cuda", torch.bfloat16, 32, True, False),
        ("triton", "cpu", torch.float32, 288, False, True),
    ],
)
def test_auto_takes_the_fused_pieces_where_they_fit(
    backend: str, device: str, dtype: torch.dtype, count: int, triton: bool, fused: bool
) -> None:
    found = pieces(backend, torch.device(device), dtype, count, triton)
    assert (found != PLAIN) == fused
    assert found.top.__module__ == ("moe.kernels" if fused else "moe.experts")


def test_pieces_are_chosen_anew_with_every_move(config: ModelConfig) -> None:
    """As `placed` moves a model that was made on the CPU. No GPU here has to be, so a stand-in is taken away."""
    moe = _moe(config)
    assert moe.pieces == PLAIN
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.cpu(), lambda m: m.double()):
        moe.pieces = PLAIN._replace(top=lambda score, k: score.argsort(-1)[:, :k])
        assert move(moe).pieces == PLAIN
    assert not kernels.at_home(torch.device("cpu"))


def test_float64_stays_float64(config: ModelConfig) -> None:
    moe = _moe(config).double()
    x = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen, weight = _route(moe, x[0])
    logits = x[0] @ moe.gate.weight.T
    scores = (1 / (1 + (-logits).exp())).gather(1, chosen)
    torch.testing.assert_close(weight, scores / scores.sum(1, keepdim=True) * 3, atol=1e-14, rtol=1e-14)
    gate, up = halves("moe.gate_up_proj.weight", moe.gate_up_proj.weight).values()
    expected = sum(
        weight[s, k] * (moe.down_proj.weight[e] @ (functional.silu(gate[e] @ x[0, s]) * (up[e] @ x[0, s])))
        for s, k, e in [(7, k, chosen[7, k]) for k in range(2)]
    )
    torch.testing.assert_close(moe(x)[0, 7], expected, atol=1e-13, rtol=1e-13)


def test_bounds_lie_behind_the_silu() -> None:
    mlp = SwiGLU(1, 1, limit=2.0).double()
    with torch.no_grad():
        for p in mlp.parameters():
            p.fill_(1.0)
    # silu(2.1) = 1.871 is below the bound although 2.1 is not; silu(-3) = -0.142 has no lower bound, up = -3 has.
    for x, expected in ((2.1, 2.1 / (1 + math.exp(-2.1)) * 2), (5.0, 2 * 2), (-3.0, -3 / (1 + math.exp(3)) * -2)):
        assert mlp(torch.tensor([[x]], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_routed_bounds_are_those_of_the_layer(config: ModelConfig) -> None:
    config = dataclasses.replace(config, routed_clip=(0.0, 0.0, 0.25))
    x = 3 * torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(1))
    free, bounded = MoE(config, 1), MoE(config, 2)
    with torch.no_grad():
        for p, q in zip(free.parameters(), bounded.parameters(), strict=True):
            q.copy_(p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel())))
    assert (free.limit, bounded.limit) == (None, 0.25)
    difference = (free(x) - bounded(x)).abs().max()
    with torch.no_grad():
        bounded.down_proj.weight.fill_(1.0)
    assert difference > 0.1
    assert bounded(x).abs().max() <= 3 * 8 * 0.25**2 + 1e-5  # scale, width and the greatest product of both factors


def test_order_by_expert_and_its_inverse() -> None:
    order, inverse, ends = sort_by_expert(torch.tensor([2, 0, 3, 2, 0, 2]), 5)
    assert order.tolist() == [1, 4, 0, 3, 5, 2]
    assert inverse.tolist() == [2, 0, 5, 3, 1, 4]
    assert ends.tolist() == [2, 2, 5, 6, 6]


def test_gather_and_sum_are_each_others_gradient() -> None:
    x, y = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 6))
    order, inverse, _ = sort_by_expert(torch.tensor([2, 0, 3, 2, 0, 2]), 5)
    assert _Dispatch.apply(x, order, inverse, 2).tolist() == [x[i // 2].tolist() for i in order]
    assert torch.autograd.gradcheck(lambda a: _Dispatch.apply(a, order, inverse, 2), (x,))
    assert torch.autograd.gradcheck(lambda a: _Combine.apply(a, order, inverse, 2), (y,))


def test_an_exchange_stands_around_the_products(config: ModelConfig) -> None:
    x = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(1))
    plain, carried = _moe(config), _moe(config)
    seen: list[list[int]] = []

    def exchange(x_RD: torch.Tensor, load_E: torch.Tensor, experts: Callable[..., torch.Tensor]) -> torch.Tensor:
        seen.append(load_E.tolist())
        return experts(x_RD, load_E)

    carried.exchange = exchange
    torch.testing.assert_close(carried(x), plain(x), atol=1e-6, rtol=1e-5)
    assert seen == [plain.load.tolist()]
    for name, value in plain.stats().items():
        torch.testing.assert_close(carried.stats()[name], value, atol=1e-5, rtol=1e-5)


def test_group_loss_by_hand() -> None:
    # Two tokens, two groups of two: probabilities (.4 .2 .2 .2) and (.25 .25 .25 .25), so .55 and .45 a group.
    scores = torch.tensor([[0.8, 0.4, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5]])
    assert group_loss(scores, torch.tensor([3, 0, 1, 0]), 2).item() == pytest.approx(2 * (0.75 * 0.55 + 0.25 * 0.45))
    balanced = group_loss(torch.full((5, 4), 0.3), torch.tensor([5, 5, 5, 5]), 4)
    assert balanced.item() == pytest.approx(1.0)
    assert group_loss(scores, torch.tensor([4, 0, 0, 0]), 1).item() == 1.0


@pytest.mark.parametrize("groups", [1, 2])
def test_tokens_that_do_not_count_leave_no_trace(config: ModelConfig, groups: int) -> None:
    """As if they were not there, but for their own outputs."""
    x = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(1))
    counted = torch.arange(40) % 3 > 0
    fewer, more = _moe(config), _moe(config)
    fewer.expert_groups = more.expert_groups = groups
    more.counted = counted
    y = more(x)
    torch.testing.assert_close(y[:, counted], fewer(x[:, counted]), atol=1e-6, rtol=1e-5)
    assert y[:, ~counted].abs().amax(-1).min() > 0
    assert more.load.tolist() == fewer.load.tolist()
    assert fewer.group_loss is not None
    torch.testing.assert_close(more.group_loss, fewer.group_loss)
    for name in ("confidence", "router_logit_std", "router_logit_max", "load_entropy"):
        torch.testing.assert_close(more.stats()[name], fewer.stats()[name], msg=name)
    more.counted = torch.zeros(40, dtype=torch.bool)
    more.load.zero_()
    more(x)
    assert not more.load.any()
    assert all(value.isfinite() for value in more.stats().values())


def test_group_loss_moves_the_router_only(config: ModelConfig) -> None:
    moe = _moe(config)
    moe.expert_groups = 2
    moe.router_bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))  # all tokens go to the first group
    moe(torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)))
    assert moe.group_loss is not None
    before = moe.group_loss.item()
    moe.group_loss.backward()
    assert [name for name, p in moe.named_parameters() if p.grad is not None] == ["gate.weight"]
    with torch.no_grad():
        assert moe.gate.weight.grad is not None
        moe.gate.weight -= moe.gate.weight.grad
    moe(torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)))
    assert moe.group_loss.item() < before


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_statistics_by_hand(config: ModelConfig, backend: Backend) -> None:
    moe = _moe(dataclasses.replace(config, experts_backend=backend, top_k=1))
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(4))
        gate, up = halves("moe.gate_up_proj.weight", moe.gate_up_proj.weight).values()
        gate.zero_()
        gate[:, :, 0] = 20.0  # silu(20) = 20
        up.zero_()
        up[:, :, 0] = torch.tensor([0.05, 0.05, 0.2, 7.0])[:, None]  # RMS 1, 1 and 4; nothing reaches the last
    x = torch.zeros(1, 6, 4)
    x[0, :, 0] = 1.0
    for t, e in enumerate([0, 0, 1, 2, 2, 2]):
        x[0, t, e] += 2.0
    x[0, :2, 0] = 1.0
    moe.router_bias[3] = -9.0
    moe.router_bias[0] = 0.0
    moe(x)
    stats = {name: value.item() for name, value in moe.stats().items()}
    scores = (x[0].sigmoid()).sort(-1, descending=True).values
    assert moe.load.tolist() == [2, 1, 3, 0]
    assert stats["rms_min_median"] == 0.0, "an expert without rows is the deadest of all"
    assert stats["rms_max_median"] == pytest.approx(4.0, rel=1e-3)
    assert stats["dead_fraction"] == 0.25
    assert stats["confidence"] == pytest.approx((scores[:, 0] / scores.sum(-1)).mean().item(), rel=1e-5)
    assert stats["router_logit_max"] == 2.0
    assert stats["router_logit_std"] == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    shares = [2 / 6, 1 / 6, 3 / 6]
    assert stats["load_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(4), rel=1e-5)


def test_activity_by_hand() -> None:
    """RMS 1, 2 and 8 of those with rows: the median is 2."""
    stats = activity_stats(torch.tensor([[5.0, 5.0], [64 * 3.0, 3.0], [8.0, 2.0], [0.0, 0.0]]))
    assert [stats[n].item() for n in ("rms_min_median", "rms_max_median", "dead_fraction")] == [0.0, 4.0, 0.25]
    busy = activity_stats(torch.tensor([[5.0, 5.0], [64 * 3.0, 3.0], [8.0, 2.0]]))
    assert busy["rms_min_median"].item() == 0.5
    assert [v.item() for v in activity_stats(torch.zeros(3, 2)).values()] == [0.0, 0.0, 1.0]


def test_statistics_are_of_the_last_forward_in_training(config: ModelConfig) -> None:
    moe = _moe(config).eval()
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))
    moe(x)
    assert moe.stats() == {}
    moe.train()
    moe.watch = False
    moe(x)
    assert moe.stats() == {}
    moe.watch = True
    moe(x)
    first = moe.stats()
    moe(5 * x)
    assert moe.stats()["router_logit_max"].item() == pytest.approx(5 * first["router_logit_max"].item())
    assert moe.load.sum() == 3 * 9 * 2


def test_a_cast_leaves_the_bias_exact(config: ModelConfig) -> None:
    moe = _moe(config)
    bias = torch.tensor([0.1, 1e-3, 1 / 3, -0.7])
    moe.router_bias.copy_(bias)
    half = copy.deepcopy(moe).to(torch.bfloat16)
    assert half.gate.weight.dtype == torch.bfloat16
    assert torch.equal(half.router_bias, bias)
    y = half(torch.randn(1, 5, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)))
    assert y.dtype == torch.bfloat16
    assert copy.deepcopy(moe).double().router_bias.dtype == torch.float64


def test_the_router_in_half_precision_is_a_switch(config: ModelConfig) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    exact, rounded = _moe(config), _moe(dataclasses.replace(config, router_dtype="bfloat16"))
    difference = (exact.logits(x) - rounded.logits(x)).abs().max()
    assert rounded.logits(x).dtype == torch.float32
    assert 1e-4 < difference < 0.1


def test_halves_are_views_by_released_names(config: ModelConfig) -> None:
    moe = _moe(config)
    parts = halves("model.layers.4.moe.gate_up_proj.weight", moe.gate_up_proj.weight)
    assert list(parts) == ["model.layers.4.moe.gate_proj.weight", "model.layers.4.moe.up_proj.weight"]
    assert all(part.shape == (4, 8, 4) for part in parts.values())
    assert torch.equal(torch.cat(tuple(parts.values()), 1), moe.gate_up_proj.weight)
    with torch.no_grad():
        parts["model.layers.4.moe.up_proj.weight"].fill_(5.0)
    assert (moe.gate_up_proj.weight[:, 8:] == 5).all()
    assert list(halves("model.layers.0.mlp.gate_proj.weight", torch.zeros(1))) == [
        "model.layers.0.mlp.gate_proj.weight"
    ]


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
    violation = moe.rebalance(0.25)
    assert (violation.shape, violation.item()) == ((), 1.5)  # 10 tokens over a mean of 4, minus 1
    assert moe.router_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert moe.load.tolist() == [0, 0, 0, 0]


def test_balancing_lowers_the_violation(config: ModelConfig) -> None:
    moe = _moe(config, seed=3)
    x = torch.randn(8, 64, 4, generator=torch.Generator().manual_seed(4)) + torch.tensor([2.0, 0, 0, -1.0])
    violations = []
    for _ in range(150):
        moe(x)
        violations.append(moe.rebalance(0.01).item())
    assert violations[0] > 0.4
    assert max(violations[-10:]) < 0.1
