"""The decoder and its MTP heads written out from the specification, one head and one expert at a time.

What transformers' trunk lacks is held to this, and this to the trunk: MTP heads on the residual stream before the final
norm, chained, each with an output of its own. Takes tensors by hub names; float64 throughout but the rotary angles,
which the released code makes in float32. Frequency scaling is left to the trunk: the windowed layers of heads have none.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe.config import ModelConfig

Weights = Mapping[str, Tensor]


def trunk(w: Weights, c: ModelConfig, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
    """Residual stream [T, D] before the final norm, and logits [T, V], of one document."""
    x = w["model.embed_tokens.weight"][tokens_T]
    for i in range(c.layers):
        x = _block(w, c, i, x)
    return x, _norm(x, w["model.norm.weight"], c) @ w["lm_head.weight"].T


def heads(w: Weights, c: ModelConfig, x: Tensor, tokens_T: Tensor) -> list[Tensor]:
    """Logits of each MTP head: entry h, row t scores token t + 2 + h; rows whose input lies beyond the
    end are cut, and a head without rows is left out.
    """
    found = []
    for h in range(c.mtp_heads):
        p = f"model.layers.{c.layers + h}"
        ahead = tokens_T[1 + h :]
        if not len(ahead):
            break
        embedded = _norm(w["model.embed_tokens.weight"][ahead], w[f"{p}.enorm.weight"], c)
        previous = _norm(x[: len(ahead)], w[f"{p}.hnorm.weight"], c)
        x = _block(w, c, c.layers + h, torch.cat((embedded, previous), -1) @ w[f"{p}.eh_proj.weight"].T)
        y = _norm(x, w[f"{p}.transformer.shared_head.norm.weight"], c)
        found.append(y @ w[f"{p}.transformer.shared_head.output.weight"].T)
    return found


def _block(w: Weights, c: ModelConfig, i: int, x: Tensor) -> Tensor:
    p = f"model.layers.{i}"
    x = x + _attention(w, c, i, _norm(x, w[f"{p}.input_layernorm.weight"], c))
    y = _norm(x, w[f"{p}.post_attention_layernorm.weight"], c)
    if c.dense_layers <= i < c.layers:
        shared = _glu(y, w, f"{p}.share_expert", None, c.shared_limit(i))
        return x + shared + torch.stack([_routed(w, c, i, row) for row in y])
    return x + _glu(y, w, f"{p}.mlp", None, c.shared_limit(i) if i < c.layers else None)


def _attention(w: Weights, c: ModelConfig, i: int, x: Tensor) -> Tensor:
    p, heads_i = f"model.layers.{i}.self_attn", c.heads_of(i)
    q, k, v = (x @ w[f"{p}.{n}_proj.weight"].T for n in "qkv")
    outputs = []
    for h in range(heads_i):
        g = h // (heads_i // c.kv_heads)
        q_h, k_g, v_g = (m[:, n * c.head_dim : (n + 1) * c.head_dim] for m, n in ((q, h), (k, g), (v, g)))
        q_h = _rotate(_norm(q_h, w[f"{p}.q_norm.weight"], c), c, c.full(i))
        k_g = _rotate(_norm(k_g, w[f"{p}.k_norm.weight"], c), c, c.full(i))
        rows = []
        for t in range(len(x)):
            first = 0 if c.full(i) else max(0, t - c.window + 1)
            share = (k_g[first : t + 1] @ q_h[t] / math.sqrt(c.head_dim)).softmax(0)
            rows.append(share @ v_g[first : t + 1])
        y = torch.stack(rows)
        outputs.append(y * (x @ w[f"{p}.g_proj.weight"][h]).sigmoid()[:, None] if c.gate else y)
    return torch.cat(outputs, -1) @ w[f"{p}.o_proj.weight"].T


def _routed(w: Weights, c: ModelConfig, i: int, x_D: Tensor) -> Tensor:
    p = f"model.layers.{i}.moe"
    score = (w[f"{p}.gate.weight"] @ x_D).sigmoid()
    chosen = sorted(range(c.experts), key=lambda e: -float(score[e].detach() + w[f"{p}.router_bias"][e].detach()))[
        : c.top_k
    ]
    total = sum(score[e] for e in chosen)
    parts = [score[e] / total * _glu(x_D, w, p, e, c.routed_limit(i)) for e in chosen]
    return c.routed_scale * torch.stack(parts).sum(0)


def _glu(x: Tensor, w: Weights, prefix: str, expert: int | None, limit: float | None) -> Tensor:
    gate, up, down = (w[f"{prefix}.{n}_proj.weight"] for n in ("gate", "up", "down"))
    if expert is not None:
        gate, up, down = gate[expert], up[expert], down[expert]
    a, b = torch.nn.functional.silu(x @ gate.T), x @ up.T
    if limit is not None:
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return (a * b) @ down.T


def _rotate(x_TC: Tensor, c: ModelConfig, full: bool) -> Tensor:
    width = int(c.head_dim * (c.rotary_fraction if full else 1))
    theta, half = (c.rope_theta if full else c.swa_rope_theta), width // 2
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(len(x_TC), dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x_TC[:, :half], x_TC[:, half:width], x_TC[:, width:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _norm(x: Tensor, weight: Tensor, c: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * (1 + weight)
