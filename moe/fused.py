"""Decode steps of few tokens by the kernels of moe/kernels_decode.py, captured in a CUDA graph.

In: a decoder, a cache whose rows were prefilled by the model itself, and the next tokens. Out: the residual stream and
fp32 logits of each. The same function as `Decoder.states(tokens, cache=cache.feed(B))` and the LM head, at B * T <= 16
tokens a step: eight launches a layer, no host work between them. A step of T tokens gives the bits of T steps of one.

Weights are those of the model at construction; q, k, v and gate are copied side by side so that one kernel reads them.

Legend: B rows, T new tokens of each, M = B * T, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from moe import kernels_attend, kernels_decode
from moe.cache import Cache
from moe.layers import Layer, Tables
from moe.model import Decoder

WARM_STEPS = 2  # compile and load the kernels before the capture


class FusedDecoder:
    """`states` and `logits` of new tokens; `replay` runs both as one graph."""

    def __init__(self, model: Decoder, cache: Cache) -> None:
        """The cache's capacity bounds the positions; it may hold the layers of MTP heads too."""
        self.config, self.capacity = model.config, cache.capacity
        self.trunk: Any = model.model
        self.heads: Any = model.mtp
        self.lm_head = model.lm_head
        parts: tuple[Any, ...] = self.trunk["layers"], self.heads
        self.joined = [_joined(layer) for part in parts for layer in part]
        place_1P = torch.arange(cache.capacity, device=cache.lengths_B.device)[None]
        self.tables: dict[bool, Tables] = {
            full: (cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous())
            for full, (cos, sin) in model.tables(place_1P).items()
        }

    def states(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """The residual stream [M, D] of new tokens of the first B rows, which the cache then holds."""
        rows, tokens = self._checked(tokens_BT, cache)
        x_MD = self.trunk["embed_tokens"].weight[tokens_BT.flatten()]
        for index, layer in enumerate(self.trunk["layers"]):
            x_MD = self.layer(layer, index, x_MD, cache, tokens)
        cache.lengths_B[:rows] += tokens
        return x_MD

    def logits(self, x_MD: Tensor) -> Tensor:
        """Scores [M, V] of the next token, fp32."""
        norm, head = self.trunk["norm"], self.lm_head
        return kernels_decode.linear(x_MD, head.weight, gain_D=norm.weight, eps=norm.eps, dtype=torch.float32)

    def draft_states(self, head: int, tokens_BT: Tensor, x_MD: Tensor, cache: Cache) -> Tensor:
        """An MTP head's stream [M, D] from the tokens it reads and the stream before it; `cache` holds its layer."""
        rows, tokens = self._checked(tokens_BT, cache)
        module, width = self.heads[head], self.config.dim
        embedded_MD = self.trunk["embed_tokens"].weight[tokens_BT.flatten()]
        e, h, weight = module.enorm, module.hnorm, module.eh_proj.weight
        merged_MD = kernels_decode.linear(embedded_MD, weight[:, :width], gain_D=e.weight, eps=e.eps)
        merged_MD = kernels_decode.linear(x_MD, weight[:, width:], gain_D=h.weight, eps=h.eps, add_MN=merged_MD)
        x_MD = self.layer(module, self.config.layers + head, merged_MD, cache, tokens)
        cache.lengths_B[:rows] += tokens
        return x_MD

    def draft_logits(self, head: int, x_MD: Tensor) -> Tensor:
        """Scores [M, V] of an MTP head, fp32."""
        norm, output = self.heads[head].shared_head_norm, self.heads[head].output
        return kernels_decode.linear(x_MD, output.weight, gain_D=norm.weight, eps=norm.eps, dtype=torch.float32)

    def layer(self, layer: Layer, index: int, x_MD: Tensor, cache: Cache, tokens: int) -> Tensor:
        """One layer; the cache's lengths are not moved on."""
        attention, norm = layer.self_attn, layer.input_layernorm
        y_MX = kernels_attend.attend(
            kernels_decode.linear(x_MD, self.joined[index], gain_D=norm.weight, eps=norm.eps),
            (attention.q_norm.weight, attention.k_norm.weight),
            self.tables[attention.full],
            cache.buffers[index],
            cache.lengths_B,
            cache.starts_B,
            tokens=tokens,
            heads=attention.q_proj.out_features // attention.head_dim,
            window=None if attention.full else self.config.window,
            eps=attention.q_norm.eps,
        )
        x_MD = kernels_decode.linear(y_MX, attention.o_proj.weight, add_MN=x_MD)
        return _routed(layer, x_MD) if layer.routed else _dense(layer, x_MD)

    def _checked(self, tokens_BT: Tensor, cache: Cache) -> tuple[int, int]:
        rows, tokens = tokens_BT.shape
        if rows * tokens > kernels_decode.TOKENS or tokens > cache.slack + 1:
            raise ConfigError(
                f"moe.fused: a step takes at most {kernels_decode.TOKENS} tokens and slack + 1 of a row, got {rows} x "
                f"{tokens} with slack {cache.slack}; feed them to Decoder.states"
            )
        return rows, tokens


class Replay:
    """A captured step: feed tokens, get logits in a buffer that the next replay overwrites."""

    def __init__(self, fused: FusedDecoder, cache: Cache, rows: int, tokens: int, *, greedy: bool = False) -> None:
        """`greedy`: of one token a row; the next replay reads the likeliest tokens by itself, from `tokens_BT`."""
        self.tokens_BT = torch.zeros(rows, tokens, dtype=torch.int64, device=cache.lengths_B.device)
        lengths_B = cache.lengths_B.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._run(fused, cache, greedy)
                cache.lengths_B.copy_(lengths_B)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.x_MD, self.logits_MV = self._run(fused, cache, greedy)
        cache.lengths_B.copy_(lengths_B)

    def _run(self, fused: FusedDecoder, cache: Cache, greedy: bool) -> tuple[Tensor, Tensor]:
        x_MD = fused.states(self.tokens_BT, cache)
        logits_MV = fused.logits(x_MD)
        if greedy:
            self.tokens_BT.copy_(kernels_decode.greedy(logits_MV).unsqueeze(1))
        return x_MD, logits_MV

    def __call__(self, tokens_BT: Tensor | None = None) -> Tensor:
        """Logits [M, V] of the step; None: of the tokens that the last greedy replay chose."""
        if tokens_BT is not None:
            self.tokens_BT.copy_(tokens_BT)
        self.graph.replay()
        return self.logits_MV


def _joined(layer: Layer) -> Tensor:
    a = layer.self_attn
    return torch.cat([p.weight.detach() for p in (a.q_proj, a.k_proj, a.v_proj, a.g_proj) if isinstance(p, nn.Linear)])


def _dense(layer: Layer, x_MD: Tensor) -> Tensor:
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    a_MF = kernels_decode.swiglu_linear(
        x_MD, mlp.gate_proj.weight, mlp.up_proj.weight, gain_D=norm.weight, eps=norm.eps, limit=mlp.limit
    )
    return kernels_decode.linear(a_MF, mlp.down_proj.weight, add_MN=x_MD)


def _routed(layer: Layer, x_MD: Tensor) -> Tensor:
    norm, moe, shared = layer.post_attention_layernorm, layer.moe, layer.share_expert
    h_MD, chosen_MK, weight_MK = kernels_decode.route(
        x_MD,
        moe.gate.weight,
        moe.router_bias,
        moe.top_k,
        gain_D=norm.weight,
        eps=norm.eps,
        routed_scale=moe.routed_scale,
    )
    return kernels_decode.experts(
        h_MD,
        chosen_MK,
        weight_MK,
        (moe.gate_up_proj.weight, moe.down_proj.weight),
        (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
        x_MD,
        limit=moe.limit,
        shared_limit=shared.limit,
    )
