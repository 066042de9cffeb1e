"""The decoder's laws: documents do not see each other, causality, cache, names, loss, and one batch learnt by heart."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from core.errors import ConfigError
from moe import attention, flops, kernels, optim
from moe.cache import Cache
from moe.config import ModelConfig, OptimConfig, RopeScaling, TrainConfig, differences, from_json, to_json
from moe.experts import halves
from moe.layers import RMSNorm, Rope, rotate, scale_frequencies
from moe.loss import next_token_loss
from moe.model import Decoder
from moe.presets import preset


def _tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_packed_documents_do_not_see_each_other(model_config: ModelConfig) -> None:
    model = Decoder(model_config).eval()
    first, second = _tokens(2, 9, seed=1), _tokens(2, 14, seed=2)
    segments = torch.tensor([[0] * 9 + [1] * 14] * 2)
    packed = model(torch.cat((first, second), 1), segments)
    torch.testing.assert_close(packed[:, 9:], model(second), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, :9], model(first), atol=1e-5, rtol=1e-5)
    unmasked = model(torch.cat((first, second), 1))
    assert (unmasked[:, 9:] - packed[:, 9:]).abs().max() > 1e-2, "the test would notice a missing mask"


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_no_gradient_crosses_a_border(model_config: ModelConfig, backend: Literal["math", "sdpa"]) -> None:
    config = dataclasses.replace(model_config, attention_backend=backend, window=6)
    model, tokens = Decoder(config).eval(), _tokens(1, 30)
    segments = torch.tensor([[0] * 11 + [1] * 12 + [2] * 7])
    x = model.model["embed_tokens"](tokens).detach().requires_grad_()
    hook = model.model["embed_tokens"].register_forward_hook(lambda _module, _inputs, _output: x)
    states = model.hidden(tokens, segments)
    hook.remove()
    for low, high in ((0, 11), (11, 23), (23, 30)):
        (gradient,) = torch.autograd.grad(states[:, low:high].square().sum(), x, retain_graph=True)
        inside = torch.zeros(30, dtype=torch.bool)
        inside[low:high] = True
        assert gradient[0, ~inside].abs().max() == 0
        assert (gradient[0, inside].abs().amax(-1) > 0).all()


def test_without_experts_other_documents_leave_every_bit(model_config: ModelConfig) -> None:
    # With experts the height of their matrix products, and so the last bit, depends on the whole batch.
    model, tokens = Decoder(dataclasses.replace(model_config, dense_layers=3, window=6)).eval(), _tokens(2, 30)
    segments, changed = torch.tensor([[0] * 11 + [1] * 12 + [2] * 7] * 2), tokens.clone()
    changed[:, 11:23] = 63 - changed[:, 11:23]
    before, after = model(tokens, segments), model(changed, segments)
    assert torch.equal(before[:, :11], after[:, :11])
    assert torch.equal(before[:, 23:], after[:, 23:])
    assert (before[:, 11:23] - after[:, 11:23]).abs().amax(-1).min() > 1e-4


def test_layers_follow_the_pattern_and_see_what_their_kind_sees(model_config: ModelConfig) -> None:
    config = dataclasses.replace(model_config, layers=10, full_every=4, window=3)
    model = Decoder(config)
    full = [layer.self_attn.full for layer in model.model["layers"]]
    assert full == [True, False, False, False, True, False, False, False, True, False]
    heads = [layer.self_attn.q_proj.weight.shape[0] // config.head_dim for layer in model.model["layers"]]
    assert heads == [config.heads if f else config.swa_heads for f in full]
    tokens = _tokens(1, 9)
    layout = attention.layout(config, None, (1, 9), tokens.device, torch.float32)
    x = torch.randn(1, 9, config.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for i, first in ((0, 0), (1, 6)):
        y = model.model["layers"][i](x, model.tables(layout.position_BT), layout)
        (gradient,) = torch.autograd.grad(y[0, 8].sum(), x)
        assert [t for t in range(9) if gradient[0, t].abs().max() > 0] == list(range(first, 9))


def test_no_token_sees_a_later_one(model_config: ModelConfig) -> None:
    model, tokens = Decoder(model_config).eval(), _tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = 63 - changed[0, 12]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-6, rtol=1e-6)
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3


def test_segments_and_cache_exclude_each_other(model_config: ModelConfig) -> None:
    cache = Cache(model_config, range(3), rows=1, capacity=8)
    with pytest.raises(ValueError, match="one document per row"):
        Decoder(model_config)(_tokens(1, 4), torch.zeros(1, 4, dtype=torch.int64), cache)


def test_norm_and_rope_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    assert norm(torch.tensor([3.0, 3.0])).tolist() == pytest.approx([1, 1])
    with torch.no_grad():
        norm.weight.fill_(1.0)  # zero-centred: a stored 1 is a gain of 2
    assert norm(torch.tensor([3.0, 3.0])).tolist() == pytest.approx([2, 2])
    config = ModelConfig(vocab_size=2, eos=0, head_dim=2, rotary_fraction=1.0)
    tables = Rope(config, full=True)(torch.tensor([[0, 1, 2]]))
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2), tables)[0, :, 0]
    for t in range(3):
        assert turned[t].tolist() == pytest.approx([math.cos(t), math.sin(t)], abs=1e-6)


def test_full_layers_rotate_the_first_widths_and_windowed_ones_all(model_config: ModelConfig) -> None:
    config = dataclasses.replace(model_config, head_dim=8, rotary_fraction=0.5, rope_theta=100.0, swa_rope_theta=16.0)
    x = torch.arange(1.0, 9.0).expand(1, 1, 1, 8)
    for full, width, theta in ((True, 4, 100.0), (False, 8, 16.0)):
        turned = rotate(x, Rope(config, full)(torch.tensor([[3]])))[0, 0, 0].tolist()
        expected = list(range(1, 9))
        for i in range(width // 2):
            angle, a, b = 3 * theta ** (-2 * i / width), i + 1, i + width // 2 + 1
            expected[i] = a * math.cos(angle) - b * math.sin(angle)
            expected[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        assert turned == pytest.approx(expected, abs=1e-5)


def test_scaled_frequencies_by_hand() -> None:
    # Waves of 10, 40 and 1000 in a context of 100: ten, 2.5 and 0.1 of them fit. Short, between 2 and 4, and long.
    waves = torch.tensor([10.0, 40.0, 1000.0])
    scaling = RopeScaling(factor=8.0, original_context=100, low_frequency_factor=2.0, high_frequency_factor=4.0)
    stretched = 2 * math.pi / scale_frequencies(2 * math.pi / waves, scaling)
    assert stretched.tolist() == pytest.approx([10.0, 40 / (0.75 / 8 + 0.25), 8000.0], rel=1e-5)


def test_scaling_is_of_full_layers_only(model_config: ModelConfig) -> None:
    scaled = dataclasses.replace(model_config, rope_scaling=RopeScaling(factor=2.0, original_context=8))
    assert not torch.equal(Rope(scaled, True).frequency, Rope(model_config, True).frequency)
    assert torch.equal(Rope(scaled, False).frequency, Rope(model_config, False).frequency)


def test_float64_stays_float64_and_casts_keep_the_frequencies(model_config: ModelConfig) -> None:
    model, tokens = Decoder(model_config).eval(), _tokens(1, 12)
    exact = copy.deepcopy(model).double()(tokens)
    assert exact.dtype == torch.float64
    assert 0 < (exact - model(tokens)).abs().max() < 1e-5
    norm, x = RMSNorm(5, 1e-5).double(), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / (x.square().mean() + 1e-5).sqrt(), atol=1e-15, rtol=1e-15)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(half.full_rope.frequency, model.full_rope.frequency)
    assert half(tokens).dtype == torch.bfloat16
    assert (half(tokens).float() - model(tokens)).abs().max() < 0.05


def test_weights_do_not_depend_on_the_default_device_or_dtype(model_config: ModelConfig) -> None:
    expected = Decoder(model_config, seed=4).state_dict()
    assert not torch.equal(Decoder(model_config, seed=5).lm_head.weight, expected["lm_head.weight"])
    torch.set_default_dtype(torch.float64)
    try:
        wide = Decoder(model_config, seed=4).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(wide[name].float(), t) for name, t in expected.items())
    with torch.device("meta"):
        assert Decoder(model_config).lm_head.weight.is_meta


def test_without_a_gate_heads_pass_as_they_are(model_config: ModelConfig) -> None:
    gated, plain = Decoder(model_config).eval(), Decoder(dataclasses.replace(model_config, gate=False)).eval()
    assert not any("g_proj" in name for name in plain.state_dict())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(gated.state_dict()[name])
        for layer in gated.model["layers"]:
            layer.self_attn.g_proj.weight.zero_()  # every gate 1/2
            layer.self_attn.o_proj.weight.mul_(2)
    tokens = _tokens(1, 12)
    torch.testing.assert_close(gated(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_compile_whole_and_once_a_kind(model_config: ModelConfig, packed: bool) -> None:
    """Grouped products compile in bfloat16 only."""
    config = dataclasses.replace(model_config, layers=9, full_every=4, window=6, mtp_heads=2, experts_backend="grouped")
    plain, compiled = (Decoder(config).to(torch.bfloat16).train() for _ in range(2))
    graphs = CompileCounter()
    for layer in (*compiled.model["layers"], *compiled.mtp):
        layer.compile(fullgraph=True, dynamic=False, backend=graphs)
    for step in range(3):
        tokens = _tokens(2, 16, seed=step)
        segments = (_tokens(2, 16, seed=10 + step) < 12).cumsum(1) if packed else None
        results = []
        for model in (plain, compiled):
            for moe in model.routed:
                moe.counted = (tokens % 3 > 0).flatten()
            x = model.states(tokens, segments)
            loss = (model.norm(x).square().mean() + model.mtp_states(x, tokens, segments)[1].square().mean()).float()
            model.zero_grad()
            loss.backward()
            loads = [moe.load.tolist() for moe in model.routed]
            results.append((x, [p.grad for p in model.parameters() if p.grad is not None], loads))
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
        assert results[0][2] == results[1][2]
        assert compiled.routed[0].stats().keys() == plain.routed[0].stats().keys()
    assert graphs.frame_count == 4  # a dense full layer, windowed and full routed ones, an MTP head


def test_names_are_those_of_the_released_checkpoint(model_config: ModelConfig) -> None:
    state = Decoder(model_config).state_dict()
    shapes = {part: tuple(t.shape) for n, whole in state.items() for part, t in halves(n, whole).items()}
    c = model_config
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (c.vocab_size, c.dim)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (c.dim, c.dense_dim)
    assert shapes["model.layers.1.self_attn.g_proj.weight"] == (c.swa_heads, c.dim)
    assert shapes["model.layers.2.self_attn.g_proj.weight"] == (c.heads, c.dim)
    assert shapes["model.layers.1.self_attn.q_norm.weight"] == (c.head_dim,)
    assert shapes["model.layers.1.moe.gate.weight"] == (c.experts, c.dim)
    assert shapes["model.layers.1.moe.router_bias"] == (c.experts,)
    assert shapes["model.layers.1.moe.up_proj.weight"] == (c.experts, c.expert_dim, c.dim)
    assert shapes["model.layers.1.share_expert.gate_proj.weight"] == (c.shared_dim, c.dim)
    assert {n.split(".")[-2] for n in shapes if n.startswith("model.layers.1.")} == {
        *("input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
        *("q_norm", "k_norm", "gate", "gate_proj", "up_proj", "down_proj", "moe"),
    }


def test_parameter_counts_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, eos=0, dim=4, layers=2, heads=2, swa_heads=2, kv_heads=1, head_dim=2, rotary_fraction=1.0,
        dense_dim=6, experts=4, top_k=1, expert_dim=3, shared_dim=5,
    )  # fmt: skip
    assert Decoder(config).flops_per_token(64) == flops.training_flops(config, 64, mtp=False)
    # attention 4*4 + 2 * 4*2 + 4*2 + 4*4 + two norms of 2 = 60, two norms of 4; dense 3*4*6; MoE 4*4 + 4 * 36 + 60
    total = 2 * 10 * 4 + 4 + 2 * (60 + 8) + 72 + (16 + 4 * 36 + 60)
    assert Decoder(config).parameter_counts() == (total, total - 3 * 36 - 9 * 4)
    with_heads = Decoder(dataclasses.replace(config, mtp_heads=2)).parameter_counts()
    # a head: two norms and an output norm of 4, 2*4 to 4, attention 60, two norms of 4, dense 3*4*6, output 10*4
    assert with_heads == (total + 2 * (12 + 32 + 60 + 8 + 72 + 40), total - 3 * 36 - 9 * 4)


def test_one_batch_is_learnt_by_heart(model_config: ModelConfig) -> None:
    model, tokens = Decoder(model_config).train(), _tokens(4, 33)
    optimizer = optim.build(model, OptimConfig(weight_decay=0.0))
    losses = []
    for _ in range(150):
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss, _ = next_token_loss(hidden, model.lm_head.weight, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(1e-2)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(64), abs=0.2)
    assert losses[-1] < 0.02


def test_config_round_trip_and_differences(train_config: TrainConfig) -> None:
    assert from_json(to_json(train_config)) == train_config
    changed = dataclasses.replace(
        train_config, seed=5, threads=7, model=dataclasses.replace(train_config.model, dim=48, experts_backend="loop")
    )
    assert differences(train_config, changed) == [
        "model.dim: the checkpoint has 32, this run 48",
        "seed: the checkpoint has 0, this run 5",
    ]


def test_config_errors_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(vocab_size=8, eos=8, heads=3, kv_heads=2, head_dim=5, experts=1, dense_layers=9)
    assert [p.split(":")[0] for p in error.value.problems] == [
        *("moe.eos", "moe.heads", "moe.swa_heads", "moe.head_dim", "moe.top_k", "moe.dense_layers"),
    ]
    with pytest.raises(ConfigError, match=r"(?s)optim.lr.*optim.warmup_steps.*optim.beta2"):
        OptimConfig(lr=0, warmup_steps=-1, beta2=2)
    with pytest.raises(ConfigError, match=r"(?s)train.steps.*train.threads"):
        TrainConfig(model=preset("ci", vocab_size=8, eos=0), steps=0, threads=0)
    values = to_json(TrainConfig(model=preset("ci", vocab_size=8, eos=0)))
    del values["model"]["eos"]
    values["model"]["depth"] = 3
    with pytest.raises(ConfigError, match=r"(?s)model.depth: unknown key.*model.eos: missing"):
        from_json(values)


def test_attention_asks_anew_with_every_move_whether_kernels_run(model_config: ModelConfig) -> None:
    """No GPU here has to be, so a stand-in is taken away."""
    attention = Decoder(model_config).model["layers"].get_submodule("0").self_attn
    assert not attention.kernels
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.cpu(), lambda m: m.double()):
        attention.kernels = True
        assert not move(attention).kernels


def test_one_place_knows_where_triton_runs() -> None:
    folder = Path(kernels.__file__).parent
    asking = ('find_spec("triton")', "get_device_capability")
    assert [p.name for p in folder.rglob("*.py") if any(a in p.read_text() for a in asking)] == ["kernels.py"]
