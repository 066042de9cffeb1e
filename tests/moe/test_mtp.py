"""MTP heads: which tokens and states they read, by hand-made indices; what they must not depend on."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moe import attention
from moe.config import ModelConfig
from moe.model import Decoder
from moe.mtp import shifted


@pytest.fixture
def config(model_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model_config, mtp_heads=3, window=6)


def _model(config: ModelConfig) -> Decoder:
    """In float64, with gains that are not all one."""
    model, generator = Decoder(config).double().eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0, 0.3, generator=generator)
    return model


def _tokens(rows: int, positions: int) -> Tensor:
    return torch.randint(1, 64, (rows, positions), generator=torch.Generator().manual_seed(1))


def test_shifted_by_hand() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    assert shifted(tokens, None, 2, 7).tolist() == [[12, 13, 14, 7, 7]]
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    assert shifted(tokens, segments, 1, 7).tolist() == [[11, 12, 7, 14, 7]]
    assert shifted(tokens, segments, 2, 7).tolist() == [[12, 7, 7, 7, 7]]
    assert shifted(tokens, segments, 9, 7).tolist() == [[7] * 5]


@pytest.mark.parametrize("packed", [False, True])
def test_heads_by_hand_made_indices(config: ModelConfig, packed: bool) -> None:
    model, tokens = _model(config), _tokens(2, 17)
    segments = torch.tensor([[0] * 4 + [1] * 13, [0] * 16 + [1]]) if packed else None
    x = model.states(tokens, segments)
    states = model.mtp_states(x, tokens, segments)
    embedding = model.model["embed_tokens"].weight
    layout = attention.layout(config, segments, (2, 17), x.device, x.dtype)
    previous = x
    for h, head in enumerate(model.mtp):
        merged = torch.zeros_like(x)
        for b in range(2):
            for t in range(17):
                ahead = t + 1 + h
                inside = ahead < 17 and (segments is None or segments[b, ahead] == segments[b, t])
                e, p = embedding[tokens[b, ahead] if inside else config.eos], previous[b, t]
                e = e / (e.square().mean() + config.norm_eps).sqrt() * (1 + head.enorm.weight)
                p = p / (p.square().mean() + config.norm_eps).sqrt() * (1 + head.hnorm.weight)
                merged[b, t] = head.eh_proj.weight[:, : config.dim] @ e + head.eh_proj.weight[:, config.dim :] @ p
        tables = model.tables(layout.position_BT)
        merged = merged + head.self_attn(head.input_layernorm(merged), tables, layout)
        previous = merged + head.mlp(head.post_attention_layernorm(merged))
        torch.testing.assert_close(states[h], previous, atol=1e-11, rtol=1e-11)
    z = states[1]
    normed = z / (z.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    expected = normed * (1 + model.mtp[1].shared_head_norm.weight) @ model.mtp[1].output.weight.T
    torch.testing.assert_close(model.mtp[1].logits(z), expected, atol=1e-11, rtol=1e-11)


def test_heads_are_windowed_layers_with_dense_feed_forward(config: ModelConfig) -> None:
    model = Decoder(config)
    for h, head in enumerate(model.mtp):
        assert head.self_attn.layer == config.layers + h
        assert not head.self_attn.full
        assert head.self_attn.q_proj.weight.shape == (config.swa_heads * config.head_dim, config.dim)
        assert head.mlp.up_proj.weight.shape == (config.dense_dim, config.dim)
        assert head.output.weight.shape == (config.vocab_size, config.dim)
    assert model.mtp[0].output.weight is not model.lm_head.weight


def test_heads_read_the_stream_before_the_final_norm(config: ModelConfig) -> None:
    model, tokens = _model(config), _tokens(1, 9)
    before = model.mtp_states(model.states(tokens), tokens)
    with torch.no_grad():
        model.model["norm"].weight.fill_(3.0)
        model.mtp[0].shared_head_norm.weight.fill_(-3.0)
    for a, b in zip(before, model.mtp_states(model.states(tokens), tokens), strict=True):
        assert torch.equal(a, b)


def test_heads_see_no_token_of_another_segment(config: ModelConfig) -> None:
    model, tokens = _model(config), _tokens(1, 20)
    segments = torch.tensor([[0] * 9 + [1] * 11])
    embedded: list[Tensor] = []
    hook = model.model["embed_tokens"].register_forward_hook(lambda _m, _i, out: embedded.append(out) or out)
    embedded.clear()
    states = model.mtp_states(model.states(tokens, segments), tokens, segments)
    hook.remove()
    for state in states:
        first = torch.autograd.grad(state[:, :9].sum(), embedded[0], retain_graph=True)[0]
        second = torch.autograd.grad(state[:, 9:].sum(), embedded[0], retain_graph=True)[0]
        assert first[:, 9:].abs().max() == 0 < first[:, :9].abs().max()
        assert second[:, :9].abs().max() == 0 < second[:, 9:].abs().max()
    changed = tokens.clone()
    changed[:, 9:] = 63 - changed[:, 9:]
    after = model.mtp_states(model.states(changed, segments), changed, segments)
    for a, b in zip(states, after, strict=True):
        torch.testing.assert_close(a[:, :9], b[:, :9], atol=1e-13, rtol=1e-13)
        assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-3


def test_a_head_sees_the_token_before_its_own_and_none_later(config: ModelConfig) -> None:
    model, tokens = _model(config), _tokens(1, 14)
    states = model.mtp_states(model.states(tokens), tokens)
    for place in (5, 9):
        changed = tokens.clone()
        changed[0, place] = 63 - changed[0, place]
        after = model.mtp_states(model.states(changed), changed)
        for h, (a, b) in enumerate(zip(states, after, strict=True)):
            moved = (a - b).abs().amax(-1)[0] > 1e-6
            # Head h at t reads up to token t + 1 + h.
            assert moved.tolist()[: place - h] == [False] * (place - 1 - h) + [True]


def test_the_trunk_does_not_depend_on_the_number_of_heads(config: ModelConfig) -> None:
    alone = Decoder(dataclasses.replace(config, mtp_heads=0), seed=3)
    state = Decoder(config, seed=3).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in alone.state_dict().items())
    assert alone.mtp_states(torch.zeros(1, 2, config.dim), _tokens(1, 2)) == []
