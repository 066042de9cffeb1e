"""The decoder's blocks: zero-centred RMSNorm, rotary positions, gated grouped-query attention, and the pre-norm layer.

In: the residual stream [B, T, D], the rotary tables of both kinds of layer and a `Layout` (moe/attention.py) that knows
who sees whom. Out: the residual stream behind the layer. Shapes, names and order of operations are those of Step 3.5
Flash (arXiv 2602.10604, section 2, and its released modelling code). Norms, rotations and the softmax run in fp32 at
least; fp64 stays fp64, so that the model can be compared to 1e-10.

A `Layer` may be compiled (`fullgraph=True, dynamic=False`). Layers of one kind share the compiled code: nothing in
`forward` depends on the layer's number but its kind, feed-forward and bounds.

Legend: B rows, T positions, D model width, H query heads, G key/value heads, C head width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moe import kernels_heads
from moe.attention import Layout
from moe.config import ModelConfig, RopeScaling
from moe.experts import ExactBuffers, MoE, SwiGLU, fused, product, side_by_side, wide
from moe.kernels import at_home

Tables = tuple[Tensor, Tensor]  # cos and sin


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight).

    The stored weight is zero-centred, as in the released checkpoint, whose config decays it, which pulls the gain to 1.
    Here no gain is decayed (moe/optim.py).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_wide = wide(x)
        y = nn.functional.rms_norm(x_wide, (x.shape[-1],), eps=self.eps) * (1 + self.weight.to(x_wide.dtype))
        return y.to(x.dtype)


class Rope(ExactBuffers):
    """Rotary tables of one kind of layer: full ones rotate the first `rotary_fraction` of each head, windowed ones all.

    Angles are fp32 whatever the model's precision, as in the released code, whose logits are compared to 1e-10.
    """

    frequency: Tensor

    def __init__(self, config: ModelConfig, full: bool) -> None:
        super().__init__()
        width = int(config.head_dim * (config.rotary_fraction if full else 1))
        theta = config.rope_theta if full else config.swa_rope_theta
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        frequency = 1.0 / theta**exponent
        if full and config.rope_scaling is not None:
            frequency = scale_frequencies(frequency, config.rope_scaling)
        self.register_buffer("frequency", frequency.to(torch.get_default_device()), persistent=False)

    def forward(self, position_BT: Tensor) -> Tables:
        """cos and sin [B, T, 1, width / 2], fp32."""
        angle = position_BT[:, :, None, None].float() * self.frequency.float()
        return angle.cos(), angle.sin()


def scale_frequencies(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rule: long waves are stretched by `factor`, short ones kept, those between are interpolated.

    A wave is long if fewer than `low_frequency_factor` of it fit into the original context, short from
    `high_frequency_factor` on.
    """
    c, low, high = scaling, scaling.low_frequency_factor, scaling.high_frequency_factor
    wave = 2 * torch.pi / frequency
    share = (c.original_context / wave - low) / (high - low)
    between = (1 - share) * frequency / c.factor + share * frequency
    stretched = torch.where(wave > c.original_context / low, frequency / c.factor, frequency)
    middle = (wave >= c.original_context / high) & (wave <= c.original_context / low)
    return torch.where(middle, between, stretched)


def rotate(x_BTHC: Tensor, tables: Tables) -> Tensor:
    """Rotate-half RoPE of the first widths: of the 2n that the tables rotate, i is paired with i + n."""
    cos, sin = tables
    half = cos.shape[-1]
    x = wide(x_BTHC)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((*parts, rest) if rest.shape[-1] else parts, dim=-1).to(x_BTHC.dtype)


class Attention(nn.Module):
    """Grouped-query attention; each head's output is scaled by its own sigmoid gate, read from the block's input.

    With gate logit g the output sigmoid(g) * y is that of a softmax with one more key of value 0 and mass exp(-g) * Z,
    Z being the sum of the others (paper, equation 6).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, heads = config, config.heads_of(layer)
        self.layer, self.full, self.head_dim = layer, c.full(layer), c.head_dim
        self.q_proj = nn.Linear(c.dim, heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.g_proj = nn.Linear(c.dim, heads, bias=False) if c.gate else None
        self.o_proj = nn.Linear(heads * c.head_dim, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.kernels = at_home(self.q_proj.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        """Moves or casts the module, and asks anew whether kernels run where it is then; a forward has nothing to ask."""
        super()._apply(fn, recurse)
        self.kernels = at_home(self.q_proj.weight.device)
        return self

    def forward(self, x_BTD: Tensor, tables: Mapping[bool, Tables], layout: Layout) -> Tensor:
        q_BTHC, k_BTGC, v_BTGC, gate_BTH = self.heads(x_BTD, tables[self.full])
        q_BHTC, k_BGTC, v_BGTC = (h.transpose(1, 2) for h in (q_BTHC, k_BTGC, v_BTGC))
        y_BTHC = layout.attend(self.layer, self.full, q_BHTC, k_BGTC, v_BGTC).transpose(1, 2)
        if gate_BTH is not None:
            y_BTHC = y_BTHC * gate_BTH.sigmoid().unsqueeze(-1)
        return self.o_proj(y_BTHC.flatten(2))

    def heads(self, x_BTD: Tensor, turn: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Normed and rotated queries and keys, values [B, T, H or G, C], and the gates' logits [B, T, H]."""
        maps = [self.q_proj, self.k_proj, self.v_proj, *([] if self.g_proj is None else [self.g_proj])]
        if self.kernels and fused(x_BTD):
            heads, groups = (m.out_features // self.head_dim for m in maps[:2])
            gates = 0 if self.g_proj is None else self.g_proj.out_features
            q, k, v, gate_BTH = kernels_heads.heads(
                product(x_BTD, maps), self.q_norm.weight, self.k_norm.weight, *turn, (heads, groups, self.head_dim), gates,
                self.q_norm.eps,
            )  # fmt: skip
            return q, k, v, gate_BTH if gates else None
        q_BTX, k_BTX, v_BTX, *gate = side_by_side(x_BTD, *maps)
        q, k, v = (h.unflatten(-1, (-1, self.head_dim)) for h in (q_BTX, k_BTX, v_BTX))
        return rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn), v, gate[0] if gate else None


class Layer(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x)).

    Layers from `dense_layers` on are routed; an MTP head's, numbered from `layers`, is dense and unbounded.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.routed = c.dense_layers <= layer < c.layers
        limit = c.shared_limit(layer) if layer < c.layers else None
        if self.routed:
            self.moe, self.share_expert = MoE(c, layer), SwiGLU(c.dim, c.shared_dim, limit)
        else:
            self.mlp = SwiGLU(c.dim, c.dense_dim, limit)

    def forward(self, x_BTD: Tensor, tables: Mapping[bool, Tables], layout: Layout) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), tables, layout)
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + (self.moe(h_BTD) + self.share_expert(h_BTD) if self.routed else self.mlp(h_BTD))
