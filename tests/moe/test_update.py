"""One update against sums worked out token by token: masks, MTP heads, micro-batches, side losses, precision."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from moe import attention
from moe.config import ModelConfig, OptimConfig, TrainConfig
from moe.data import Batch
from moe.model import Decoder
from moe.optim import build
from moe.parallel import Team, World
from moe.update import Rows, Updater, attention_logit_bounds, placed

DOMAINS = ("a", "b")


@pytest.fixture
def config(model_config: ModelConfig) -> TrainConfig:
    model = dataclasses.replace(model_config, mtp_heads=2, context=24)
    optim = OptimConfig(z_loss=1e-3, group_loss=0.5, expert_groups=2, mtp_loss=0.3, mtp_decay=0.5, warmup_steps=0)
    return TrainConfig(model=model, optim=optim, steps=10, rows=4, threads=1)


def _batch(rows: int = 4, places: int = 24, seed: int = 0) -> Batch:
    """Rows of three documents, of which the middle one is masked in half its places and the last is padding."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, 64, (2, rows, places))
    segments = np.repeat([[0] * 9 + [1] * 12 + [2] * 3], rows, 0)
    domains = np.repeat([[0] * 9 + [1] * 15], rows, 0)
    mask = np.ones((rows, places), bool)
    mask[:, 9:21:2] = False
    mask[:, 21:] = False
    return Batch(inputs, targets, segments.astype(np.int64), domains.astype(np.int64), mask)


def _updated(config: TrainConfig, batch: Batch) -> tuple[Decoder, dict[str, Any]]:
    model = Decoder(config.model, config.seed).train()
    for layer in model.routed:
        layer.expert_groups = config.optim.expert_groups
    updater = Updater(config, model, build(model, config.optim), World.alone(), DOMAINS)
    return model, updater.run(batch, 0, watch=True).read()


def test_targets_ahead_stay_in_their_document() -> None:
    batch = _batch(1)
    rows = Rows.of(batch, torch.device("cpu"))
    for head in (0, 1, 2):
        targets, counts = rows.ahead(head)
        for t in range(24):
            ahead = t + 1 + head
            inside = ahead < 24 and batch.segments[0, ahead] == batch.segments[0, t] and bool(batch.mask[0, ahead])
            assert bool(counts[0, t]) == inside
            if inside:
                assert int(targets[0, t]) == batch.targets[0, ahead]


def test_losses_are_plain_means_over_counted_targets(config: TrainConfig) -> None:
    batch = _batch()
    _, row = _updated(config, batch)
    model = Decoder(config.model, config.seed)
    tokens, segments = torch.from_numpy(batch.inputs), torch.from_numpy(batch.segments)
    with torch.no_grad():
        stream = model.states(tokens, segments)
        logits = [model.lm_head(model.norm(stream))]
        logits += [
            head.logits(x) for head, x in zip(model.mtp, model.mtp_states(stream, tokens, segments), strict=True)
        ]
    sums: dict[Any, list[float]] = {}
    for h, scores in enumerate(logits):
        log_p = scores.double().log_softmax(-1)
        for b in range(4):
            for t in range(24 - h):
                if batch.mask[b, t + h] and batch.segments[b, t + h] == batch.segments[b, t]:
                    nll = -float(log_p[b, t, batch.targets[b, t + h]])
                    sums.setdefault(h, []).append(nll)
                    if h == 0:
                        sums.setdefault(DOMAINS[batch.domains[b, t]], []).append(nll)
    means = {key: math.fsum(values) / len(values) for key, values in sums.items()}
    assert row["loss"] == pytest.approx(means[0], rel=1e-5)
    assert row["mtp_loss"] == pytest.approx([means[1], means[2]], rel=1e-5)
    assert row["domain_loss"] == pytest.approx({d: means[d] for d in DOMAINS}, rel=1e-5)
    assert row["targets"] == len(sums[0]) == 4 * (9 + 6)


def test_gradients_are_those_of_the_written_loss(config: TrainConfig) -> None:
    """The loss of the module's docstring, by autograd over full logits."""
    batch = _batch()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, grad_clip=1e9))
    model = Decoder(config.model, config.seed).train()
    for layer in model.routed:
        layer.expert_groups = 2
    tokens, segments, targets, mask = (
        torch.from_numpy(a) for a in (batch.inputs, batch.segments, batch.targets, batch.mask)
    )
    stream = model.states(tokens, segments)
    logits = model.lm_head(model.norm(stream))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    loss = (nll + 1e-3 * logits.logsumexp(-1).square())[mask].mean()
    for h, (head, state) in enumerate(zip(model.mtp, model.mtp_states(stream, tokens, segments), strict=True)):
        places = 1 + h
        ahead = torch.nn.functional.cross_entropy(
            head.logits(state)[:, :-places].flatten(0, 1), targets[:, places:].flatten(), reduction="none"
        )
        counts = (mask[:, places:] & (segments[:, places:] == segments[:, :-places])).flatten()
        loss = loss + 0.3 * (1 / 1.5, 0.5 / 1.5)[h] * ahead[counts].mean()
    groups = [layer.group_loss for layer in model.routed if layer.group_loss is not None]
    loss = loss + 0.5 * torch.stack(groups).sum()
    loss.backward()
    wanted = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    _, row = _updated(config, batch)
    assert row["grad_norm"] == pytest.approx(float(wanted), rel=1e-4)
    assert row["group_loss"] == pytest.approx(float(torch.stack(groups).sum().detach()), rel=1e-5)


def test_heads_without_a_loss_stay_as_they_are(config: TrainConfig) -> None:
    idle = dataclasses.replace(config, optim=dataclasses.replace(config.optim, mtp_loss=0.0, weight_decay=0.5))
    model, row = _updated(idle, _batch())
    assert "mtp_loss" not in row
    before = dict(Decoder(idle.model, idle.seed).named_parameters())
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("mtp.")}


def test_padding_steers_no_router(config: TrainConfig) -> None:
    """The loads are those of the 21 places that hold text, in all four rows, for both chosen experts."""
    batch = _batch()
    batch.inputs[:, 21:] = batch.targets[:, 21:] = config.model.eos
    model = Decoder(config.model).train()
    updater = Updater(config, model, build(model, config.optim), World.alone(), DOMAINS)
    seen: list[list[int]] = []
    for layer in model.routed:
        layer.register_forward_hook(lambda moe, _in, _out: seen.append(moe.load.tolist()))
    updater.run(batch, 0, watch=True)
    assert len(seen) == len(model.routed)
    masked = batch.mask | (batch.inputs != 0) | (batch.targets != 0)
    assert [sum(load) for load in seen] == [int(masked.sum()) * config.model.top_k] * len(seen)
    assert masked.sum() == 4 * 21


def test_one_group_has_no_loss_to_show(config: TrainConfig) -> None:
    plain = dataclasses.replace(config, optim=dataclasses.replace(config.optim, expert_groups=1, group_loss=0.0))
    _, row = _updated(plain, _batch())
    assert "load_violation" in row
    assert "group_loss" not in row


def test_layers_with_split_experts_are_not_compiled(config: TrainConfig) -> None:
    """Two ranks' rows never have the same shape twice."""
    split = World(torch.device("cpu"), Team(0, 2), Team(0, 2), Team())
    for world, routed in ((World.alone(), True), (split, False)):
        model = placed(Decoder(config.model), dataclasses.replace(config, compile=True), world)
        compiled = [block._compiled_call_impl is not None for block in (*model.model["layers"], *model.mtp)]
        assert compiled == [True, routed, routed, True, True]


@pytest.mark.parametrize("micro_rows", [1, 3])
def test_micro_batches_change_nothing_beyond_rounding(config: TrainConfig, micro_rows: int) -> None:
    """But for the group loss, which is one over the tokens of a micro-batch."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, group_loss=0.0))
    whole, row = _updated(config, _batch())
    parts, same = _updated(dataclasses.replace(config, micro_rows=micro_rows), _batch())
    assert same["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert same["load_violation"] == row["load_violation"]
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


def test_a_batch_without_a_counted_target_is_no_division_by_zero(config: TrainConfig) -> None:
    batch = _batch()
    empty = dataclasses.replace(batch, mask=np.zeros_like(batch.mask))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, group_loss=0.0))
    _, row = _updated(config, empty)
    assert (row["loss"], row["mtp_loss"], row["domain_loss"], row["grad_norm"]) == (0.0, [0.0, 0.0], {}, 0.0)


def test_readings_of_the_experts(config: TrainConfig) -> None:
    model, row = _updated(config, _batch())
    layers = len(model.routed)
    assert {"rms_min_median", "rms_max_median", "confidence", "load"} <= row["experts"].keys()
    assert all(len(values) == layers for values in row["experts"].values())
    assert [sum(shares) for shares in row["experts"]["load"]] == pytest.approx([1.0] * layers, abs=1e-4)
    worst = [max(shares) * len(shares) - 1 for shares in row["experts"]["load"]]
    assert row["load_violation"] == pytest.approx(worst, abs=1e-3)


def test_trunk_and_heads_share_one_layout(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where layouts and rotary tables are made: once a micro-batch, two heads or not. The bits stay."""
    batch = _batch()
    made: list[str] = []
    model = Decoder(config.model, config.seed).train()
    tokens, segments = torch.from_numpy(batch.inputs), torch.from_numpy(batch.segments)
    stream = model.states(tokens, segments)
    apart = [stream, *model.mtp_states(stream, tokens, segments)]
    plain = attention.layout
    monkeypatch.setattr(attention, "layout", lambda *arguments: made.append("layout") or plain(*arguments))
    for name in ("full_rope", "window_rope"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: made.append(name))
    stream, states = model.all_states(tokens, segments)
    assert all(torch.equal(a, b) for a, b in zip(apart, (stream, *states), strict=True))
    assert len(states) == 2
    assert sorted(made) == ["full_rope", "layout", "window_rope"]
    made.clear()
    config = dataclasses.replace(config, micro_rows=2)
    Updater(config, model, build(model, config.optim), World.alone(), DOMAINS).run(batch, 0, watch=False)
    assert sorted(made) == ["full_rope"] * 2 + ["layout"] * 2 + ["window_rope"] * 2


def test_micro_batches_of_bfloat16_add_up_in_float32(config: TrainConfig) -> None:
    """Sixteen of them, read back from AdamW's first moment, beside the sum in fp64 of each one's own gradients."""
    optim = OptimConfig(optimizer="adamw", grad_clip=1e9, warmup_steps=0, beta1=0.5)
    config = dataclasses.replace(config, optim=optim, rows=16, precision="bfloat16", micro_rows=1)
    batch = _batch(rows=16)
    model, alone = (Decoder(config.model, config.seed).to(torch.bfloat16).train() for _ in range(2))
    optimizer = build(model, optim)
    Updater(config, model, optimizer, World.alone(), DOMAINS).run(batch, 0, watch=False)
    moments = optimizer.state_tensors()
    one = Updater(config, alone, build(alone, optim), World.alone(), DOMAINS)
    rows = Rows.of(batch, torch.device("cpu"))
    counted, parts = one._counted(rows), []
    for low in range(16):
        alone.zero_grad()
        one._losses(rows.part(low, 1), counted, 1 / 16)[0].backward()
        parts.append({name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None})
    errors: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for name in parts[0]:
        exact = torch.stack([part[name].double() for part in parts]).sum(0)
        rounded = functools.reduce(torch.add, [part[name] for part in parts])
        for kind, got in (("float32", 2 * moments[f"{name}.exp_avg"]), ("bfloat16", rounded)):
            errors[kind].append(float((got.double() - exact).norm() / exact.norm()))
    assert max(errors["float32"]) < 3e-6
    assert min(errors["bfloat16"]) > 1e-4, "what adding in the gradients' own type costs"


def test_a_single_micro_batch_keeps_no_second_gradient(config: TrainConfig) -> None:
    """Its gradients stay where they are, in the weights' type; several leave sums instead, and float32 never does."""
    held = {}
    for precision, micro_rows in (("bfloat16", None), ("bfloat16", 2), ("float32", 2)):
        here = dataclasses.replace(config, precision=precision, micro_rows=micro_rows)
        model = placed(Decoder(here.model), here, World.alone())
        optimizer = build(model, here.optim)
        Updater(here, model, optimizer, World.alone(), DOMAINS).run(_batch(), 0, watch=False)
        grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
        held[precision, micro_rows] = grads, {g.dtype for g in (optimizer._sums or {}).values()}
    assert held == {
        ("bfloat16", None): ({torch.bfloat16}, set()),
        ("bfloat16", 2): (set(), {torch.float32}),
        ("float32", 2): ({torch.float32}, set()),
    }


def test_no_attention_logit_exceeds_its_bound(model_config: ModelConfig) -> None:
    """By hand: gains 3 and 2 at width 16 allow 4 * 6 = 24; equal vectors along one axis reach it."""
    model = Decoder(model_config)
    attention = model.model["layers"][1].self_attn
    assert attention_logit_bounds(model).tolist() == pytest.approx([4.0] * 3)
    with torch.no_grad():
        attention.q_norm.weight[5], attention.k_norm.weight[5] = 2.0, -3.0
    assert attention_logit_bounds(model).tolist() == pytest.approx([4.0, 24.0, 4.0])
    axis = torch.zeros(16)
    axis[5] = 1.0
    logit = (attention.q_norm(axis) * attention.k_norm(axis)).sum() / 16**0.5
    assert abs(float(logit.detach())) == pytest.approx(24.0, rel=1e-3)


def test_bfloat16_keeps_exact_weights_with_the_optimiser(config: TrainConfig) -> None:
    """Updates far below a bfloat16 step still add up."""
    config = dataclasses.replace(config, precision="bfloat16", optim=OptimConfig(lr=1e-5, warmup_steps=0))
    model = Decoder(config.model, config.seed).to(torch.bfloat16).train()
    optimizer = build(model, config.optim)
    updater = Updater(config, model, optimizer, World.alone(), DOMAINS)
    name = "model.layers.1.self_attn.o_proj.weight"
    before = dict(model.named_parameters())[name].detach().float().clone()
    for step in range(3):
        row = updater.run(_batch(), step, watch=False).read()
    assert math.isfinite(row["loss"])
    master = optimizer.state_tensors()[f"{name}.master"]
    moved = (master - before).abs().max()
    assert 0 < moved < 1e-3
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), dict(model.named_parameters())[name].detach())
