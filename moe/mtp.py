"""Multi-token prediction: heads that predict tokens beyond the next one, for training and for drafts.

In: the trunk's residual stream before its final norm, and the tokens. Out: one state a position and head. Head h
(0-based) turns the stream of position t and the embedding of token t + 1 + h into the state that predicts token
t + 2 + h, with one windowed layer of its own. Heads are chained: head h > 0 reads the output of head h - 1 before its
output norm. The embedding comes first in the concatenation, and each head has its own output weight (Step 3.5 Flash,
section 2, and its released checkpoint).

On the hub, head h is `model.layers.{layers + h}`, with `shared_head_norm` and `output` under `transformer.shared_head`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe.attention import Layout
from moe.config import ModelConfig
from moe.layers import Layer, RMSNorm, Tables


class MTPHead(Layer):
    """A windowed layer with a dense feed-forward over the merged embedding and state.

    Its logits are `output(shared_head_norm(state))`.
    """

    def __init__(self, config: ModelConfig, head: int) -> None:
        super().__init__(config, config.layers + head)
        c = config
        self.enorm, self.hnorm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
        self.eh_proj = nn.Linear(2 * c.dim, c.dim, bias=False)
        self.shared_head_norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(self, x_BTD: Tensor, tables: Mapping[bool, Tables], layout: Layout) -> Tensor:
        """The head's state [B, T, D] before `shared_head_norm`.

        In: side by side, twice as wide, the embedding of the token that is one place further than the previous state's,
        and the previous state.
        """
        embedded_BTD, previous_BTD = x_BTD.chunk(2, dim=-1)
        merged_BTD = self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(previous_BTD)), dim=-1))
        return super().forward(merged_BTD, tables, layout)

    def logits(self, state_BTD: Tensor) -> Tensor:
        """Scores [B, T, V] of the token that the head predicts."""
        return self.output(self.shared_head_norm(state_BTD))


def shifted(tokens_BT: Tensor, segments_BT: Tensor | None, places: int, eos: int) -> Tensor:
    """Entry t is token t + places; EOS where that lies in another segment or beyond the row."""
    ahead_BT = nn.functional.pad(tokens_BT, (0, places), value=eos)[:, places:]
    if segments_BT is None:
        return ahead_BT
    same_BT = nn.functional.pad(segments_BT, (0, places), value=-1)[:, places:] == segments_BT
    return torch.where(same_BT, ahead_BT, eos)
