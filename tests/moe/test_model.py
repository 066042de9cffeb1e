"""The decoder's laws: documents do not see each other, causality, cache, names, loss, and one batch learnt by heart."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from core.errors import ConfigError
from moe import optim
from moe.attention import KVCache
from moe.config import ModelConfig, OptimConfig, TrainConfig, differences, from_json, to_json
from moe.experts import halves
from moe.layers import RMSNorm, Rope, rotate
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


def test_no_token_sees_a_later_one(model_config: ModelConfig) -> None:
    model, tokens = Decoder(model_config).eval(), _tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = 63 - changed[0, 12]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-6, rtol=1e-6)
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", [(0, 20), (0, 7, 20), tuple(range(21))], ids=["at once", "two parts", "one by one"])
def test_cached_decode_equals_the_full_forward(model_config: ModelConfig, cuts: tuple[int, ...]) -> None:
    model, tokens, cache = Decoder(model_config).eval(), _tokens(2, 20), KVCache(model_config)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)
    assert cache.length == 20


def test_segments_and_cache_exclude_each_other(model_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="one document per row"):
        Decoder(model_config)(_tokens(1, 4), torch.zeros(1, 4, dtype=torch.int64), KVCache(model_config))


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
    # attention 4*4 + 2 * 4*2 + 4*2 + 4*4 + two norms of 2 = 60, two norms of 4; dense 3*4*6; MoE 4*4 + 4 * 36 + 60
    total = 2 * 10 * 4 + 4 + 2 * (60 + 8) + 72 + (16 + 4 * 36 + 60)
    assert Decoder(config).parameter_counts() == (total, total - 3 * 36 - 9 * 4)


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
