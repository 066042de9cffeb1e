"""The steps of moe/decode.py by fused kernels: one launch reads tokens, one settles what they gave.

In: a `Decode`, whose tensors these steps work on in place. Out: the same steps, the same state but for rounding. Either
kind of step may follow the other, and those that run by the model's own layers: caches, carries and counts are shared.

A round: the trunk reads each row's pending token and K drafts, `settle` keeps those that stand, and each head in turn
reads what was verified and the drafts before its own. Everything is a graph of fixed shape: padding is computed, written
to spare slots and read by nothing.

Legend: B rows of a step, K drafts, T = tokens that a step reads (1 or K + 1), M = B * T, D model width, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe import kernels_decode, kernels_rounds
from moe.fused import FusedDecoder
from moe.sampling import Mode

if TYPE_CHECKING:
    from moe.decode import Decode, Kind


class FusedSteps:
    """`plain` and `round` of a `Decode`."""

    def __init__(self, state: "Decode") -> None:
        self.state, self.model = state, FusedDecoder(state.model, state.trunk.capacity, state.drafts)

    def takes(self, kind: "Kind", rows: int) -> bool:
        """Whether a step has few enough tokens. Heads then read up to 2 K of a row, which costs little more."""
        tokens = 1 if kind == "plain" else self.state.drafts + 1
        return rows * tokens <= kernels_decode.TOKENS

    def plain(self, rows: int, mode: Mode) -> Tensor:
        """`Decode.plain`."""
        state = self.state
        x_MD = kernels_rounds.embed(state.token_B[:rows], None, self.model.embedding)
        logits_BV = self.model.logits(self.model.layers(x_MD, state.trunk, state.active_B[:rows], extra=0))
        token_B = kernels_rounds.greedy(logits_BV) if mode == "greedy" else state.next_token(logits_BV, rows, mode)
        self._settle(token_B.unsqueeze(1), None, None, rows, mode)
        return logits_BV.unsqueeze(1)

    def round(self, rows: int, mode: Mode) -> Tensor:
        """`Decode.round`."""
        state, tokens = self.state, self.state.drafts + 1
        drafts_BK = state.draft_BK[:rows]
        x_MD = kernels_rounds.embed(state.token_B[:rows], drafts_BK, self.model.embedding)
        x_MD = self.model.layers(x_MD, state.trunk, state.active_B[:rows], extra=tokens - 1)
        logits_MV = self.model.logits(x_MD)
        logits_BTV = logits_MV.unflatten(0, (rows, tokens))
        if mode == "greedy":
            self._settle(kernels_rounds.greedy(logits_MV).view(rows, tokens), drafts_BK, None, rows, mode)
        else:
            gained_B, out_BT = state.verified(logits_BTV, rows, mode)
            self._settle(out_BT.contiguous(), drafts_BK, gained_B, rows, mode)
        self._draft(x_MD, rows, mode)
        return logits_BTV

    def _settle(self, new_BT: Tensor, drafts_BK: Tensor | None, gained_B: Tensor | None, rows: int, mode: Mode) -> None:
        state = self.state
        into = state.token_B, state.out_BT, state.kept_B, state.made_B, state.trunk.lengths_B
        kernels_rounds.settle(new_BT, drafts_BK, gained_B, state.active_B[:rows], into)
        if mode != "greedy":
            state.mark(rows, new_BT, state.kept_B[:rows])

    def _draft(self, x_MD: Tensor, rows: int, mode: Mode) -> None:
        """Drafts behind the rows' last tokens; heads' lengths move on by what was verified."""
        state, drafter = self.state, self.state.drafter
        assert drafter is not None
        kept_B, drafts_BK = state.kept_B[:rows], state.draft_BK[:rows]
        verified = state.out_BT[:rows], kept_B
        for head, cache in enumerate(drafter.caches):
            x_MD = self.model.draft_states(head, x_MD, drafter.carry_HBD[head], verified, drafts_BK, cache)
            logits_BV = self.model.draft_logits(head, x_MD, kept_B)
            if mode == "greedy":
                kernels_rounds.greedy(logits_BV, drafts_BK[:, head], kept_B)
            else:
                token_B = state.draft_token(head, logits_BV, drafts_BK[:, :head], kept_B, rows, mode)
                drafts_BK[:, head] = torch.where(kept_B > 0, token_B, drafts_BK[:, head])
        drafter.lengths_HB[:, :rows] += kept_B
