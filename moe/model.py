"""The decoder: pre-norm blocks of gated grouped-query attention and SwiGLU or routed experts.

In: token ids [B, T], int64, each row starting with EOS, and segment ids [B, T] where a row holds several documents.
Out: logits [B, T, V]. Positions restart with each segment and attention stays within it. Zero-centred RMSNorm, q/k
norm, rotate-half RoPE and the head-wise sigmoid gate follow Step 3.5 Flash (arXiv 2602.10604, section 2), and
parameters carry the released checkpoint's names. All layers see the whole context here; sliding windows and MTP heads
are not part of this model.

Legend: B rows, T positions, P = positions in the cache and x, D model width, V vocabulary, H query heads, G key/value
heads, C head width.
"""

import math

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.experts import ExpertLinear, MoE, SwiGLU

EMBEDDING_STD = 0.02  # GPT-2's; the paper does not publish its initialisation


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in fp32.

    The stored weight is zero-centred, so that weight decay pulls the gain to 1.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps) * (1 + self.weight.float())).to(x.dtype)


class KVCache:
    """Keys and values of every layer for the positions seen so far, [B, G, P, C] each, of one document per row."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new positions and returns all of the layer's."""
        if layer in self.layers:
            k_old, v_old = self.layers[layer]
            k_BGTC, v_BGTC = torch.cat((k_old, k_BGTC), 2), torch.cat((v_old, v_BGTC), 2)
        self.layers[layer] = k_BGTC, v_BGTC
        return k_BGTC, v_BGTC


class Attention(nn.Module):
    """Grouped-query attention; each head's output is scaled by its own sigmoid gate, read from the block's input."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.q_proj = nn.Linear(c.dim, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.g_proj = nn.Linear(c.dim, c.heads, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.head_dim, self.copies = c.head_dim, c.heads // c.kv_heads

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None) -> Tensor:
        q_BHTC, k_BGTC, v_BGTC = (
            proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTC, k_BGTC = rotate(self.q_norm(q_BHTC), *rope), rotate(self.k_norm(k_BGTC), *rope)
        if cache is not None:
            k_BGTC, v_BGTC = cache.extend(self.layer, k_BGTC, v_BGTC)
        k_BHPC, v_BHPC = (kv.repeat_interleave(self.copies, dim=1) for kv in (k_BGTC, v_BGTC))
        y_BHTC = nn.functional.scaled_dot_product_attention(q_BHTC, k_BHPC, v_BHPC, attn_mask=mask)
        y_BTHC = y_BHTC.transpose(1, 2) * self.g_proj(x_BTD).sigmoid().unsqueeze(-1)
        return self.o_proj(y_BTHC.flatten(2))


class Layer(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.routed = layer >= c.dense_layers
        if self.routed:
            self.moe, self.share_expert = MoE(c), SwiGLU(c.dim, c.shared_dim)
        else:
            self.mlp = SwiGLU(c.dim, c.dense_dim)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + (self.moe(h_BTD) + self.share_expert(h_BTD) if self.routed else self.mlp(h_BTD))


class Decoder(nn.Module):
    """`hidden` gives the normed states, for a loss that never holds all logits; calling the model gives the logits."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
                "layers": nn.ModuleList(Layer(config, i) for i in range(config.layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return self.lm_head(self.hidden(tokens_BT, segments_BT, cache))

    def hidden(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """States [B, T, D] behind the final norm.

        With a cache the tokens go on where it ends; segments are then not allowed.
        """
        if cache is not None and segments_BT is not None:
            raise ValueError("moe: a cache holds one document per row, got segments; pass one of them")
        seen = cache.length if cache is not None else 0
        position_BT, mask = _layout(tokens_BT, segments_BT, seen)
        rope = rope_tables(position_BT, self.config.head_dim, self.config.rope_theta)
        x_BTD = self.model["embed_tokens"](tokens_BT)
        for layer in self.model["layers"].children():
            x_BTD = layer(x_BTD, rope, mask, cache)
        return self.model["norm"](x_BTD)

    @property
    def routed(self) -> list[MoE]:
        """The MoE modules in layer order."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that one token passes through (embedding rows other than its own not counted)."""
        c, total = self.config, sum(p.numel() for p in self.parameters())
        idle = (c.layers - c.dense_layers) * (c.experts - c.top_k) * 3 * c.dim * c.expert_dim
        return total, total - idle - (c.vocab_size - 1) * c.dim

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Matrices N(0, 1/fan_in); those that write to the residual stream smaller by sqrt(2 * layers), as in GPT-2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or module is self.lm_head:
                module.weight.normal_(0, EMBEDDING_STD, generator=generator)
            elif isinstance(module, nn.Linear | ExpertLinear):
                std = module.weight.shape[-1] ** -0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * self.config.layers)
                module.weight.normal_(0, std, generator=generator)


def _layout(tokens_BT: Tensor, segments_BT: Tensor | None, seen: int) -> tuple[Tensor, Tensor]:
    """Positions [B, T] within each segment, and the mask of keys [B or 1, 1, T, P] that a query may see."""
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    causal_TP = torch.arange(seen + len(index_T), device=index_T.device) <= (index_T + seen)[:, None]
    if segments_BT is None:
        return (index_T + seen).expand_as(tokens_BT), causal_TP[None, None]
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    position_BT = index_T - (starts_BT * index_T).cummax(1).values
    same_BTP = segments_BT[:, :, None] == segments_BT[:, None, :]
    return position_BT, (same_BTP & causal_TP)[:, None]


def rope_tables(position_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, C / 2] in fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_BT.device) / head_dim
    angle = position_BT[:, None, :, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE: dimension i is paired with i + C / 2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
