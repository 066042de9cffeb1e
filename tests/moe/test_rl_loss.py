"""MIS-PO by hand: masks, means, advantages; gradients of a whole update against a loop over tokens."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from moe.config import ModelConfig, OptimConfig
from moe.model import Decoder
from moe.optim import build
from moe.rl.config import OPTIM, RLConfig
from moe.rl.loss import CHUNK, Policy, masks, policy_loss, token_logprobs, token_weights
from moe.rl.rollouts import Trajectory, advantages
from moe.rl.tasks import read_rl
from moe.rl.update import PolicyUpdater, padded

WIDE = RLConfig(samples=2, prompts=2, trajectory_ratio=(0.5, 2.0))
LOGP = [[-1.0, -2.0, -3.0], [-0.5, -1.5]]


def policy(ratios: list[list[float]], values: list[float], config: RLConfig, logp: list[list[float]] = LOGP) -> Policy:
    """A policy whose snapshot gives `logp`, and whose sampler gave them over `ratios`."""
    old, real = padded(logp, torch.float64)
    ratio, _ = padded([[math.log(x) for x in row] for row in ratios], torch.float64)
    lengths = torch.tensor([len(row) for row in logp])
    return Policy(
        old, old - ratio, real, torch.tensor(values, dtype=torch.float64), token_weights(lengths, real, config)
    )


def test_tokens_outside_their_bounds_and_trajectories_outside_theirs() -> None:
    """Ratios 1, 1.9, 2.1 have the geometric mean 1.586; 0.4 and 1 have 0.632."""
    given = policy([[1, 1.9, 2.1], [0.4, 1]], [2.0, -1.0], WIDE)
    found = masks(given.old, given, WIDE)
    assert found.token.tolist() == [[True, True, False], [False, True, False]]
    assert found.trajectory_ratio.tolist() == pytest.approx([(1.9 * 2.1) ** (1 / 3), math.sqrt(0.4)])
    loss, _ = policy_loss(given.old, given, WIDE)
    # -(2 * (-1) + 2 * (-2) - 1 * (-1.5)) over all five tokens, the two masked ones too
    assert loss.item() == pytest.approx(4.5 / 5, rel=1e-6)
    each = replace(WIDE, mean_over="trajectories")
    loss, _ = policy_loss(given.old, policy([[1, 1.9, 2.1], [0.4, 1]], [2.0, -1.0], each), each)
    assert loss.item() == pytest.approx(6 / 6 - 1.5 / 4, rel=1e-6)
    paper = replace(WIDE, trajectory_ratio=(0.996, 1.001))
    loss, found = policy_loss(given.old, given, paper)
    assert loss.item() == 0
    assert found.trajectory.tolist() == [False, False]
    assert not found.kept.any()


def test_bounds_are_included_and_no_number_is_outside() -> None:
    given = policy([[1.25, 0.8, 1], [0.9, 1.2]], [1.0, 1.0], WIDE)
    ratio = masks(given.old, given, WIDE).ratio
    exact = replace(WIDE, token_ratio=(ratio[0, 1].item(), ratio[0, 0].item()))
    assert masks(given.old, given, exact).token[0].tolist() == [True, True, True]
    assert masks(given.old + 1e-9, given, exact).token[0].tolist() == [False, True, True]
    assert masks(given.old - 1e-9, given, exact).token[0].tolist() == [True, False, True]
    broken = masks(given.old + torch.tensor([[0, math.nan, 0], [0, 0, math.nan]]), given, WIDE)
    assert broken.token.tolist() == [[True, False, True], [True, True, False]]
    assert broken.trajectory.tolist() == [False, True], "of the second, only padding is no number"


def test_masks_are_constants_of_the_snapshot_or_of_the_policy_now() -> None:
    given = policy([[1, 1, 1], [1, 1]], [2.0, -1.0], WIDE)
    moved = (given.old + torch.tensor([[1.0, 0, 0], [0, 0, 0]])).requires_grad_()  # pi is e times pi_old at one token
    expected = -given.weight * given.advantage[:, None]
    for config, first in ((WIDE, 1.0), (replace(WIDE, ratio_of="current"), 0.0)):
        loss, found = policy_loss(moved, given, config)
        (gradient,) = torch.autograd.grad(loss, moved)
        wanted = expected.clone()
        wanted[0, 0] *= first
        assert torch.equal(gradient, wanted)
        assert found.ratio[0, 0].item() == pytest.approx(math.e if not first else 1)


def test_ppo_clips_and_reinforce_keeps_all() -> None:
    given = policy([[5, 5, 5], [5, 5]], [1.0, -1.0], WIDE)
    factors = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]], dtype=torch.float64)
    logp = (given.old + factors.log()).requires_grad_()
    loss, _ = policy_loss(logp, given, replace(WIDE, loss="ppo"))
    # gains: min(1.5, 1.2), min(0.5, 0.8), 1; and of the negative advantage -1.5 and min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 + 1 - 1.5 - 0.8) / 5, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist() == [pytest.approx([0, -0.1, -0.2]), pytest.approx([0.3, 0, 0])]
    loss, found = policy_loss(given.old, given, replace(WIDE, loss="reinforce"))
    assert loss.item() == pytest.approx(-(-6 + 2) / 5, rel=1e-6)
    assert not found.kept.any(), "told, though not applied"


def answers(rewards: list[float | None], cut: tuple[int, ...] = ()) -> list[Trajectory]:
    return [Trajectory(0, i, (1,), (0.0,), "", i in cut, r) for i, r in enumerate(rewards)]


def test_advantages_by_hand() -> None:
    config = RLConfig(samples=4)
    found = advantages(answers([1, 0, 0, 1, 3, 3, 3, 3, 1, None, None, 0]), config)
    assert found.values.tolist() == pytest.approx([1, -1, -1, 1] + [0] * 8, abs=1e-5)
    assert found.used.tolist() == [True] * 4 + [False] * 8
    assert (found.equal_groups, found.rejected_groups) == (1, 1)
    kept = advantages(answers([1, 0, 0, 1, 3, 3, 3, 3]), replace(config, equal_groups="keep", advantage_scale="none"))
    assert kept.values.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert kept.used.all()


def test_an_answer_that_was_cut_is_worth_the_baseline() -> None:
    config = RLConfig(samples=4, advantage_scale="none")
    assert advantages(answers([1, 0, 0, 0], cut=(3,)), config).values.tolist() == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3, 0]
    )
    as_judged = advantages(answers([1, 0, 0, 0], cut=(3,)), replace(config, truncated="reward"))
    assert as_judged.values.tolist() == [0.75, -0.25, -0.25, -0.25]
    alone = advantages(answers([1, 0, 0, 0], cut=(1, 2, 3)), config)
    assert not alone.values.any()
    assert alone.equal_groups == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_those_of_all_logits_at_once(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHUNK + 7, 8, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 8, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(11, (len(x),), generator=generator)
    weight = torch.randn(len(x), generator=generator, dtype=torch.float64)
    logp, entropy = token_logprobs(x, head, target, temperature)
    whole = ((x @ head.T) / temperature).log_softmax(-1)
    assert torch.allclose(logp, whole[torch.arange(len(x)), target], atol=1e-13)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=whole).entropy(), atol=1e-12)
    assert not entropy.requires_grad
    got = torch.autograd.grad((logp * weight).sum(), (x, head))
    wanted = torch.autograd.grad((whole[torch.arange(len(x)), target] * weight).sum(), (x, head))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))


PROMPTS = [(5, 6, 7), (8,), (9, 10)]


def trained_on(model: Decoder) -> tuple[list[Trajectory], np.ndarray]:
    """Answers whose sampler was off by some, so that masks of both kinds bite."""
    rng = np.random.default_rng(3)
    out = []
    for i in range(6):
        tokens = tuple(int(t) for t in rng.integers(1, 64, rng.integers(1, 6)))
        old = tuple(float(x) for x in -rng.random(len(tokens)) - 1)
        sampler = tuple(x - float(d) for x, d in zip(old, rng.normal(0, 0.6, len(tokens)), strict=True))
        out.append(Trajectory(i // 2, i % 2, tokens, sampler, "", False, 0.0, old))
    return out, rng.normal(size=6)


def plain_loss(model: Decoder, made: list[Trajectory], values: np.ndarray, config: RLConfig) -> Tensor:
    """The formula, token by token."""
    total, count = torch.zeros((), dtype=torch.float64), sum(len(t.tokens) for t in made)
    for one, advantage in zip(made, values, strict=True):
        assert one.old_logprobs is not None
        ratios = [math.exp(o - s) for o, s in zip(one.old_logprobs, one.logprobs, strict=True)]
        if not config.trajectory_ratio[0] <= math.prod(ratios) ** (1 / len(ratios)) <= config.trajectory_ratio[1]:
            continue
        prompt = PROMPTS[one.task]
        log_p = model(torch.tensor([[0, *prompt, *one.tokens]]))[0].log_softmax(-1)
        for j, (token, ratio) in enumerate(zip(one.tokens, ratios, strict=True)):
            if config.token_ratio[0] <= ratio <= config.token_ratio[1]:
                total = total - log_p[len(prompt) + j, token] * advantage / count
    return total


@pytest.mark.parametrize("micro_rows", [None, 1, 4])
def test_gradients_of_an_update_are_those_of_the_formula(model_config: ModelConfig, micro_rows: int | None) -> None:
    model = Decoder(model_config, 1).double().train()
    config = RLConfig(samples=2, trajectory_ratio=(0.8, 1.25), micro_rows=micro_rows, optim=OPTIM)
    made, values = trained_on(model)
    loss = plain_loss(model, made, values, config)
    optimizer = build(model, config.optim)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    seen = PolicyUpdater(config, model, optimizer, PROMPTS).backward(made, values)
    row = seen.row()
    assert seen.loss == pytest.approx(loss.item(), abs=1e-7)
    assert 0 < row["masked_token_fraction"] < 1
    assert 0 < row["masked_trajectory_fraction"] < 1
    for (name, p), gradient in zip(trained.items(), wanted, strict=True):
        if gradient is not None:
            assert p.grad is not None, name
            assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-9), name
    assert "model.layers.1.moe.gate.weight" not in trained, "the router is frozen"


def test_a_wrong_config_is_told_whole() -> None:
    with pytest.raises(ConfigError) as error:
        RLConfig(
            samples=1, prompts=6, minibatches=4, temperature=0.0, staleness=-1, token_ratio=(1.5, 2.0), micro_rows=0,
            ppo_clip=2.0, stop=("",), optim=OptimConfig(z_loss=0.1),
        )  # fmt: skip
    assert [p.split(":")[0] for p in error.value.problems] == [
        "rl.micro_rows", "rl.samples", "rl.staleness", "rl.minibatches", "rl.temperature", "rl.ppo_clip", "rl.stop",
        "rl.token_ratio", "rl.optim", "rl.optim",
    ]  # fmt: skip


def test_a_run_file_keeps_what_it_does_not_name(tmp_path: Any) -> None:
    path = tmp_path / "rl.json"
    path.write_text('{"folder": "a", "start": "b", "optim": {"lr": 0.01}, "samples": 4, "alarms": {"spike_nats": 2}}')
    file = read_rl(path, ["token_ratio=[0.1, 10]"])
    assert file.config == RLConfig(samples=4, token_ratio=(0.1, 10), optim=replace(OPTIM, lr=0.01))
    assert (file.folder, file.start, file.tasks) == (tmp_path / "a", tmp_path / "b", None)
    assert (file.limits.spike_nats, file.limits.stop) == (2, ("expert_blow_up",))
    path.write_text('{"folder": 3, "samples": "many"}')
    with pytest.raises(ConfigError, match=r"start: missing\n.*folder: must be a text, got 3"):
        read_rl(path)
    path.write_text('{"folder": "a", "start": "b", "samples": "many", "lr": 1}')
    with pytest.raises(ConfigError, match=r"rl.lr: unknown key.*\nrl.samples: must be a whole number, got 'many'"):
        read_rl(path)
