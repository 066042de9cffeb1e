"""The optimiser on one rank: AdamW against torch's, who gets Muon, clipping, bf16 weights, state by name, exact resume."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from core.errors import StageError
from moe import muon, optim, slab
from moe.config import ModelConfig, OptimConfig
from moe.loss import next_token_loss
from moe.model import Decoder


def _gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def _bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far below one parameter's size, so that parameters lie in several slabs."""
    monkeypatch.setattr(slab, "SLAB_ELEMENTS", 1000)


def test_adamw_equals_torchs(model_config: ModelConfig) -> None:
    ours, theirs = Decoder(model_config), Decoder(model_config)
    optimizer = optim.build(ours, OptimConfig(optimizer="adamw", grad_clip=1e9))
    plain = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "embed" in n]
    decayed = [p for n, p in theirs.named_parameters() if not (p.ndim < 2 or "embed" in n)]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    for step, lr in enumerate((1e-2, 2e-3, 5e-3)):
        for group in reference.param_groups:
            group["lr"] = lr
        for model in (ours, theirs):
            _gradients(model, step)
        optimizer.step(lr)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_muon_takes_matrices_and_adamw_the_rest(model_config: ModelConfig) -> None:
    """Against `muon.update` on each matrix of each parameter by itself, and AdamW's first step, which is lr * sign."""
    model = Decoder(model_config)
    before = _bits(model)
    _gradients(model, 0)
    optim.build(model, OptimConfig(grad_clip=1e9, weight_decay=0.5)).step(0.01)
    rates = torch.tensor([0.01, 0.95], dtype=torch.float64)
    for name, p in model.named_parameters():
        shapes = muon.matrices(name, p)
        if shapes:
            weight, grad = before[name].view(-1, *shapes[0]).clone(), p.grad.view(-1, *shapes[0])
            muon.update(weight, torch.zeros_like(weight), grad, *rates, 0.5)
            torch.testing.assert_close(p.detach(), weight.view_as(p), atol=1e-6, rtol=1e-5)
        else:
            decay = 1 - 0.01 * 0.5 if name == "lm_head.weight" else 1.0
            expected = before[name] * decay - 0.01 * p.grad.sign()
            torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-5)


def test_gate_and_up_halves_are_separate_matrices(model_config: ModelConfig) -> None:
    """One half's gradient does not change the other's update, as it would in a common polar factor."""
    halves = []
    for scale in (1.0, 100.0):
        model = Decoder(model_config)
        _gradients(model, 0)
        fused = model.routed[0].gate_up_proj.weight
        fused.grad[:, : model_config.expert_dim] *= scale
        optim.build(model, OptimConfig(grad_clip=1e9)).step(0.01)
        halves.append(fused.detach()[:, model_config.expert_dim :])
    torch.testing.assert_close(*halves, atol=1e-7, rtol=0)
    both = [muon.polar(torch.cat((s * torch.eye(4, 8), torch.ones(4, 8)))[None])[0, 4:] for s in (1.0, 100.0)]
    assert (both[0] - both[1]).abs().max() > 0.01, "the test would notice a fused update"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_norm_and_clipping_are_torchs(model_config: ModelConfig, optimizer: str) -> None:
    config = OptimConfig(optimizer=optimizer, grad_clip=0.5)  # type: ignore[arg-type]
    clipped, scaled = Decoder(model_config), Decoder(model_config)
    ours, theirs = optim.build(clipped, config), optim.build(scaled, config)
    for step in range(2):
        for model in (clipped, scaled):
            _gradients(model, step, scale=10.0**-step * 0.01)
        norm = torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        assert norm.item() > 0.5 or step == 1
        torch.testing.assert_close(ours.reduce(), norm)
        ours.step(0.01)
        theirs.step(0.01)
    for a, b in zip(clipped.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_frozen_router_stays_and_missing_gradients_are_zeros(model_config: ModelConfig) -> None:
    model = Decoder(model_config)
    optimizer = optim.build(model, OptimConfig(freeze_router=True, weight_decay=0.5))
    before = _bits(model)
    _gradients(model, 0)
    model.lm_head.weight.grad = None
    optimizer.step(0.1)
    after = _bits(model)
    still = {name for name in after if torch.equal(before[name], after[name])}
    assert still == {name for name in after if name.endswith("moe.gate.weight")}
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] * 0.95)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resume_is_bit_exact_and_state_has_the_parameters_shapes(model_config: ModelConfig, dtype: torch.dtype) -> None:
    model = Decoder(model_config).to(dtype)
    optimizer = optim.build(model, OptimConfig())
    assert optimizer.state_tensors() == {}
    for step in range(2):
        _gradients(model, step)
        optimizer.step(0.01)
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_tensors()
    for step in range(2, 4):
        _gradients(model, step)
        optimizer.step(0.01)
    resumed = Decoder(model_config, seed=5).to(dtype)
    resumed.load_state_dict(weights)
    again = optim.build(resumed, OptimConfig())
    again.load_state_tensors(state)
    assert _equal(again.state_tensors(), state)
    for step in range(2, 4):
        _gradients(resumed, step)
        again.step(0.01)
    assert _equal(_bits(model), _bits(resumed))
    assert _equal(optimizer.state_tensors(), again.state_tensors())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    keys = {"momentum", "exp_avg", "exp_avg_sq", "master"} - (set() if dtype == torch.bfloat16 else {"master"})
    assert {name.rpartition(".")[2] for name in state} == keys | {"updates"}
    assert state["updates"].item() == 2
    for name, value in state.items():
        if name != "updates":
            assert value.shape == shapes[name.rpartition(".")[0]]
            assert value.dtype == torch.promote_types(dtype, torch.float32)


def test_low_precision_weights_collect_small_updates_in_their_masters(model_config: ModelConfig) -> None:
    """Each update is a fortieth of bf16's step at 1: without an fp32 original no weight would ever move."""
    model = Decoder(model_config).to(torch.bfloat16)
    gain = model.model["norm"].weight
    gain.data.fill_(1.0)
    optimizer = optim.build(model, OptimConfig(grad_clip=1e9))
    for _ in range(60):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-4)
    torch.testing.assert_close(
        gain.detach().float(), torch.full_like(gain, 1 - 60e-4, dtype=torch.float32), atol=4e-3, rtol=0
    )
    assert (gain < 1).all()


def _drop(state: dict[str, torch.Tensor]) -> None:
    del state["model.norm.weight.exp_avg"]


def _reshape(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight.exp_avg"] = torch.zeros(3)


def _add(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight.master"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "got no values of model.norm.weight.exp_avg and 0 more such, expected 32"),
        (_reshape, "got 3 values of lm_head.weight.exp_avg and 0 more such, expected 2048"),
        (_add, "got 32 values of model.norm.weight.master and 0 more such, expected none"),
    ],
)
def test_another_optimisers_state_is_refused(
    model_config: ModelConfig, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    model = Decoder(model_config)
    optimizer = optim.build(model, OptimConfig())
    _gradients(model, 0)
    optimizer.step(0.01)
    state = optimizer.state_tensors()
    before = optimizer.state_tensors()
    change(state)
    with pytest.raises(StageError, match=message):
        optimizer.load_state_tensors(state)
    assert _equal(optimizer.state_tensors(), before)


def test_an_empty_state_starts_again(model_config: ModelConfig) -> None:
    model = Decoder(model_config)
    optimizer = optim.build(model, OptimConfig())
    _gradients(model, 0)
    optimizer.step(0.01)
    optimizer.load_state_tensors({})
    assert optimizer.state_tensors() == {}
    assert optimizer.state_bytes == 0


def test_adamw_learns_one_batch_by_heart(model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon does in test_model.py."""
    monkeypatch.setattr(slab, "SLAB_ELEMENTS", 2**20)
    model = Decoder(model_config).train()
    tokens = torch.randint(1, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    trainer = optim.build(model, OptimConfig(optimizer="adamw", weight_decay=0.0))
    for step in range(80):
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss, _ = next_token_loss(hidden, model.lm_head.weight, tokens[:, 1:].flatten())
        trainer.zero_grad()
        loss.backward()
        trainer.step(1e-2 * min(1.0, (80 - step) / 30))
    assert loss.item() < 0.1


def test_compiled_updates_equal_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, once a shape and not again for another rate; a real compiler would take a minute here."""
    traced, compile_ = [], torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        traced.append([tuple(x.shape) for x in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile_(fn, backend=backend, **options))
    models = [nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 9), nn.Linear(9, 6)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = optim.build(model, OptimConfig(), compiled=compiled)
        for step in range(3):
            _gradients(model, step)
            optimizer.step(0.01 * (step + 1))
    assert _equal(_bits(models[0]), _bits(models[1]))
    assert len(traced) == 2


def test_momentum_follows_the_schedule_unless_given() -> None:
    """A gradient that turns by a right angle: the second update's angle tells the momentum."""
    found = []
    for given in (None, 0.85 + 0.1 / 300, 0.2):
        model = nn.Linear(3, 2, bias=False)
        model.weight.data.zero_()
        optimizer = optim.build(model, OptimConfig(weight_decay=0.0))
        for step in range(2):
            model.weight.grad = (
                torch.tensor([[1.0, 0, 0], [0, 1, 0]]) if step == 0 else torch.tensor([[0, 1.0, 0], [-1, 0, 0]])
            )
            optimizer.step(0.01, given if step else None)
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=0)
    assert (found[0] - found[2]).abs().max() > 1e-4
