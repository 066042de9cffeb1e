"""The model's layers for few new tokens, by the kernels of moe/kernels_decode.py, kernels_attend.py and kernels_routed.py.

In: a decoder, a cache whose rows were prefilled by the model itself or by steps like these, and the next tokens. Out: the
residual stream and fp32 logits of each. The same function as `Decoder.states(tokens, cache=cache.feed(B, counts_B))` and
the LM head, but for rounding, at B * T <= 32 tokens a step: eight launches a layer. A step of T tokens gives the bits of T
steps of one, whatever the other rows are.

Weights are those of the model at construction, read where they lie; only q, k, v and gate are copied side by side, so that
one kernel reads them (preset `1b` in bf16: 66 MB more). Whoever changes weights makes a new one.

Legend: B rows, T new tokens of each, M = B * T, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from moe import kernels_attend, kernels_decode, kernels_rounds, kernels_routed
from moe.cache import Cache
from moe.layers import Layer, Tables
from moe.model import Decoder


class FusedDecoder:
    """`states` and `logits` of new tokens, and their parts; no method reads anything back from the device."""

    def __init__(self, model: Decoder, capacity: int, heads: int = 0) -> None:
        """`capacity`: that of the caches, which bounds the positions. `heads`: MTP heads that will draft."""
        self.config = model.config
        self.trunk: Any = model.model
        self.heads: Any = model.mtp[:heads]
        self.lm_head = model.lm_head
        parts: tuple[Any, ...] = self.trunk["layers"], self.heads
        self.joined = [_joined(layer) for part in parts for layer in part]
        place_1P = torch.arange(capacity, device=model.lm_head.weight.device)[None]
        self.tables: dict[bool, Tables] = {
            full: (cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous())
            for full, (cos, sin) in model.tables(place_1P).items()
        }

    @property
    def embedding(self) -> Tensor:
        """Rows of all tokens [V, D]."""
        return self.trunk["embed_tokens"].weight

    def states(self, tokens_BT: Tensor, cache: Cache, counts_B: Tensor | None = None) -> Tensor:
        """The residual stream [M, D] of the first B rows' new tokens, of which the cache then holds the first counts_B."""
        rows, tokens = tokens_BT.shape
        if rows * tokens > kernels_decode.TOKENS or tokens > cache.slack + 1:
            raise ConfigError(
                f"moe.fused: a step takes at most {kernels_decode.TOKENS} tokens and slack + 1 of a row, got {rows} x "
                f"{tokens} with slack {cache.slack}; feed them to Decoder.states"
            )
        if counts_B is None:
            counts_B = torch.full_like(cache.lengths_B[:rows], tokens)
        x_MD = torch.nn.functional.embedding(tokens_BT.flatten(), self.embedding)
        x_MD = self.layers(x_MD, cache, counts_B, extra=0)
        cache.lengths_B[:rows] += counts_B
        return x_MD

    def layers(self, x_MD: Tensor, cache: Cache, counts_B: Tensor, *, extra: int) -> Tensor:
        """The trunk over embeddings; `counts_B + extra` of each row's are kept, 0 where the count is 0.

        The cache's lengths are not moved on.
        """
        for index, layer in enumerate(self.trunk["layers"]):
            x_MD = self._layer(layer, index, x_MD, cache, counts_B, extra)
        return x_MD

    def logits(self, x_MD: Tensor) -> Tensor:
        """Scores [M, V] of the next token, fp32."""
        norm, head = self.trunk["norm"], self.lm_head
        return kernels_decode.linear(x_MD, head.weight, gain_D=norm.weight, eps=norm.eps, dtype=torch.float32)

    def draft_states(
        self,
        head: int,
        state_MD: Tensor,
        carry_BD: Tensor,
        verified: tuple[Tensor, Tensor],
        drafts_BK: Tensor,
        cache: Cache,
    ) -> Tensor:
        """A head's stream [B * (T + head), D] as `Drafter.draft` has it; arguments are those of `kernels_rounds.feed`.

        `cache` holds the head's layer. Of a row that has kept any tokens, kept + head are; lengths are not moved on.
        """
        module = self.heads[head]
        gains = module.enorm.weight, module.hnorm.weight
        merged_MX = kernels_rounds.feed(
            head, state_MD, carry_BD, verified, drafts_BK, self.embedding, gains, module.enorm.eps
        )
        x_MD = kernels_decode.linear(merged_MX, module.eh_proj.weight)
        return self._layer(module, self.config.layers + head, x_MD, cache, verified[1], head)

    def draft_logits(self, head: int, state_MD: Tensor, kept_B: Tensor) -> Tensor:
        """Scores [B, V] behind each row's last token, fp32."""
        norm, output = self.heads[head].shared_head_norm, self.heads[head].output
        return kernels_decode.linear(
            state_MD, output.weight, gain_D=norm.weight, eps=norm.eps, last=(kept_B, head), dtype=torch.float32
        )

    def _layer(self, layer: Layer, index: int, x_MD: Tensor, cache: Cache, counts_B: Tensor, extra: int) -> Tensor:
        attention, norm = layer.self_attn, layer.input_layernorm
        y_MX = kernels_attend.attend(
            kernels_decode.linear(x_MD, self.joined[index], gain_D=norm.weight, eps=norm.eps),
            (attention.q_norm.weight, attention.k_norm.weight),
            self.tables[attention.full],
            cache.buffers[index],
            cache.lengths_B,
            cache.starts_B,
            counts_B,
            extra=extra,
            tokens=len(x_MD) // len(counts_B),
            heads=attention.q_proj.out_features // attention.head_dim,
            window=None if attention.full else self.config.window,
            eps=attention.q_norm.eps,
        )
        x_MD = kernels_decode.linear(y_MX, attention.o_proj.weight, add_MN=x_MD)
        return _routed(layer, x_MD) if layer.routed else _dense(layer, x_MD)


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
    h_MD, chosen_MK, weight_MK = kernels_routed.route(
        x_MD,
        moe.gate.weight,
        moe.router_bias,
        moe.top_k,
        gain_D=norm.weight,
        eps=norm.eps,
        routed_scale=moe.routed_scale,
    )
    return kernels_routed.experts(
        h_MD,
        chosen_MK,
        weight_MK,
        (moe.gate_up_proj.weight, moe.down_proj.weight),
        (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
        x_MD,
        limit=moe.limit,
        shared_limit=shared.limit,
    )
