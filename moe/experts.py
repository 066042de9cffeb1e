"""Feed-forward layers: SwiGLU, and the routed experts with loss-free balancing.

In: x [B, T, D]. Out: the same shape. No token is dropped: experts take what the router sends them, however uneven. The
router works in fp32: sigmoid scores, selection by score + bias, weights from the unbiased scores renormalised over the
chosen and times `routed_scale` (Step 3.5 Flash, section 2; the bias after DeepSeek-V3, arXiv 2408.15664). Parameter
names and shapes are the released checkpoint's.

Legend: B rows, T positions, S = B * T tokens, D model width, F expert width, E experts, K chosen of them, R = S * K
routed copies of tokens.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moe.config import ModelConfig

WEIGHT_SUM_EPS = 1e-20  # released modelling code: keeps the renormalisation finite when all chosen scores underflow


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertLinear(nn.Module):
    """One weight [out, in] per expert, applied to tokens sorted by expert."""

    def __init__(self, experts: int, out_dim: int, in_dim: int, backend: Literal["grouped", "loop"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))
        self.backend = backend

    def forward(self, x_RI: Tensor, load_E: Tensor) -> Tensor:
        """`load_E` tokens of x for each expert in turn.

        Both backends give the same bits on CPU (tests hold them to it).
        """
        if self.backend == "grouped":
            return nn.functional.grouped_mm(x_RI, self.weight.transpose(-2, -1), offs=load_E.cumsum(0).to(torch.int32))
        # One unbind: indexing the weight E times would write E full-sized gradients (5x slower for 16 experts).
        parts = zip(x_RI.split(load_E.tolist()), self.weight.unbind(0), strict=True)
        return torch.cat([nn.functional.linear(x, w) for x, w in parts])


class MoE(nn.Module):
    """Router and routed experts.

    The layer adds the shared expert. `load` [E] counts tokens since the last `rebalance`.
    """

    router_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.top_k, self.routed_scale = c.top_k, c.routed_scale
        self.gate = nn.Linear(c.dim, c.experts, bias=False)
        self.gate_proj = ExpertLinear(c.experts, c.expert_dim, c.dim, c.experts_backend)
        self.up_proj = ExpertLinear(c.experts, c.expert_dim, c.dim, c.experts_backend)
        self.down_proj = ExpertLinear(c.experts, c.dim, c.expert_dim, c.experts_backend)
        self.register_buffer("router_bias", torch.zeros(c.experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(c.experts, dtype=torch.int64), persistent=False)

    def route(self, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [S, K], int64, and their fp32 weights [S, K]. Equal scores: the lower expert wins."""
        score_SE = nn.functional.linear(x_SD.float(), self.gate.weight.float()).sigmoid()
        # A stable sort, not topk: topk breaks ties differently on different devices.
        chosen_SK = (score_SE + self.router_bias).argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
        weight_SK = score_SE.gather(1, chosen_SK)
        return chosen_SK, weight_SK / (weight_SK.sum(-1, keepdim=True) + WEIGHT_SUM_EPS) * self.routed_scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        chosen_SK, weight_SK = self.route(x_SD)
        chosen_R = chosen_SK.flatten()
        load_E = torch.bincount(chosen_R, minlength=len(self.router_bias))
        if self.training:
            self.load += load_E
        order_R = chosen_R.argsort(stable=True)
        # Tokens are copied before they are sorted: gathering one row K times would add their gradients in thread order.
        x_RD = x_SD.repeat_interleave(self.top_k, dim=0)[order_R]
        hidden_RF = nn.functional.silu(self.gate_proj(x_RD, load_E)) * self.up_proj(x_RD, load_E)
        y_RD = self.down_proj(hidden_RF, load_E)[order_R.argsort()]
        y_SKD = y_RD.unflatten(0, (-1, self.top_k))
        return (y_SKD * weight_SK.unsqueeze(-1).to(y_SKD.dtype)).sum(1).view_as(x_BTD)

    @torch.no_grad()
    def rebalance(self, rate: float) -> float:
        """Moves each expert's bias by `rate` towards the mean load, forgets the load, and returns its violation.

        The violation is the greatest load over the mean, minus 1: 0 when balanced, E / K - 1 when K experts take all.
        """
        load_E = self.load.float()
        mean = load_E.mean()
        self.router_bias += rate * torch.sign(mean - load_E)
        self.load.zero_()
        return float(load_E.max() / mean - 1)
