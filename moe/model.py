"""The decoder: an embedding, layers with full and windowed attention, dense and routed feed-forward, and MTP heads.

In: token ids [B, T], int64, each row starting with EOS, and segment ids [B, T] where a row holds several documents, each
in one piece. Out: logits [B, T, V]. Positions restart with each segment and attention stays within it. The architecture
is Step 3.5 Flash's (arXiv 2602.10604, section 2); layers follow F, then S, S, S, F repeated (F full attention, S a
window). Parameters carry the released checkpoint's names, but for the experts' gate and up projections, which are one
tensor here (moe/experts.py, `halves`), and the MTP heads (moe/mtp.py).

Rows do not influence each other: the loss-free router drops nothing. On CPU in fp32 a row's bits may still change with
the rows beside it, since matrix products of another height are summed in another order; the same batch gives the same
bits.

Legend: B rows, T positions, D model width, V vocabulary.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from moe import attention, flops
from moe.attention import Layout
from moe.config import ModelConfig
from moe.experts import ExpertLinear, MoE
from moe.layers import Layer, RMSNorm, Rope, Tables
from moe.mtp import MTPHead, shifted

EMBEDDING_STD = 0.02  # GPT-2's; the paper does not publish its initialisation


class Cache(Protocol):
    """Keys and values of earlier positions (moe/cache.py)."""

    def step(self, positions: int, /) -> Layout:
        """The layout of that many new positions, which go on where the cache ends."""
        ...


class Decoder(nn.Module):
    """`hidden` gives the normed states, for a loss that never holds all logits; calling the model gives the logits.

    The weights are a function of config and seed: they are drawn on the CPU in fp32, whatever the defaults, and the
    trunk's do not depend on the number of MTP heads.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # What begins every prompt, and what ends an answer beside `config.eos`: a hub folder may have tokens of its own.
        self.prefix: tuple[int, ...] = (config.eos,)
        self.stop_tokens: tuple[int, ...] = ()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
                "layers": nn.ModuleList(Layer(config, i) for i in range(config.layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPHead(config, h) for h in range(config.mtp_heads))
        self.full_rope, self.window_rope = Rope(config, full=True), Rope(config, full=False)
        self._initialise(torch.Generator("cpu").manual_seed(seed))

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.hidden(tokens_BT, segments_BT, cache))

    def hidden(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """States [B, T, D] behind the final norm."""
        return self.norm(self.states(tokens_BT, segments_BT, cache))

    def states(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The residual stream [B, T, D] before the final norm, which MTP heads read.

        With a cache the tokens go on where it ends; segments are then not allowed.
        """
        if cache is not None and segments_BT is not None:
            raise ValueError("moe: a cache holds one document per row, got segments; pass one of them")
        x_BTD = self.model["embed_tokens"](tokens_BT)
        layout = cache.step(tokens_BT.shape[1]) if cache is not None else self._layout(x_BTD, segments_BT)
        return self._trunk(x_BTD, self.tables(layout.position_BT), layout)

    def all_states(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`states`, and `mtp_states` of it: trunk and heads share one layout, so masks and tables are made once."""
        x_BTD = self.model["embed_tokens"](tokens_BT)
        layout = self._layout(x_BTD, segments_BT)
        tables = self.tables(layout.position_BT)
        x_BTD = self._trunk(x_BTD, tables, layout)
        return x_BTD, self._ahead(x_BTD, tokens_BT, segments_BT, tables, layout)

    def norm(self, x_BTD: Tensor) -> Tensor:
        """The final norm: `lm_head(norm(states(tokens)))` are the logits."""
        return self.model["norm"](x_BTD)

    def mtp_states(self, x_BTD: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> list[Tensor]:
        """States [B, T, D] of each MTP head before its `shared_head_norm`, from the stream that `states` gave.

        Entry h, position t predicts token t + 2 + h. Where token t + 1 + h, which the head reads, lies in another
        segment or beyond the row, it reads EOS, and the prediction is not to be counted.
        """
        if not self.mtp:
            return []
        layout = self._layout(x_BTD, segments_BT)
        return self._ahead(x_BTD, tokens_BT, segments_BT, self.tables(layout.position_BT), layout)

    def _trunk(self, x_BTD: Tensor, tables: dict[bool, Tables], layout: Layout) -> Tensor:
        for layer in self.model["layers"].children():
            x_BTD = layer(x_BTD, tables, layout)
        return x_BTD

    def _ahead(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        segments_BT: Tensor | None,
        tables: dict[bool, Tables],
        layout: Layout,
    ) -> list[Tensor]:
        """`mtp_states` over a layout that is there."""
        states = []
        for h, head in enumerate(self.mtp):
            ahead_BTD = self.model["embed_tokens"](shifted(tokens_BT, segments_BT, 1 + h, self.config.eos))
            x_BTD = head(torch.cat((ahead_BTD, x_BTD), dim=-1), tables, layout)
            states.append(x_BTD)
        return states

    def tables(self, position_BT: Tensor) -> dict[bool, Tables]:
        """Rotary tables of full layers (True) and of windowed ones and MTP heads (False)."""
        return {True: self.full_rope(position_BT), False: self.window_rope(position_BT)}

    @property
    def routed(self) -> list[MoE]:
        """The MoE modules in layer order."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that one token passes through on its way to the next token's logits.

        The second leaves out the experts that are not chosen, other tokens' embedding rows, and MTP heads.
        """
        c, total = self.config, sum(p.numel() for p in self.parameters())
        idle = (c.layers - c.dense_layers) * (c.experts - c.top_k) * 3 * c.dim * c.expert_dim
        ahead = sum(p.numel() for p in self.mtp.parameters())
        return total, total - ahead - idle - (c.vocab_size - 1) * c.dim

    def flops_per_token(self, context: int) -> float:
        """Operations of training on one token, on average over a row of `context` (moe/flops.py); MTP heads count."""
        return flops.training_flops(self.config, context, mtp=bool(self.mtp))

    def _layout(self, x_BTD: Tensor, segments_BT: Tensor | None) -> Layout:
        rows, positions, _ = x_BTD.shape
        return attention.layout(self.config, segments_BT, (rows, positions), x_BTD.device, x_BTD.dtype)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Matrices N(0, 1/fan_in); those that write to the residual stream smaller by sqrt(2 * layers), as in GPT-2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or name == "lm_head" or name.endswith(".output"):
                std = EMBEDDING_STD
            elif isinstance(module, nn.Linear | ExpertLinear):
                std = module.weight.shape[-1] ** -0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * self.config.layers)
            else:
                continue
            drawn = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
            module.weight.copy_(drawn.normal_(0, std, generator=generator))
