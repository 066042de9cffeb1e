"""Speculative decoding with the model's own MTP heads: drafts, their verification, and whether it pays.

In: the trunk's states of verified tokens, and the tokens behind them. Out: up to three drafted tokens a row, then how
many of them stand. Head h (0-based) is used once, at step h of a draft; heads are chained before their output norms
(Step 3.5 Flash, section 2).

A head runs ahead of the trunk: its state of row t reads token t + 1 + h. So when tokens up to n are verified, head h has
h rows fewer that rest on verified tokens alone, and its draft needs h more that rest on drafts. Those are taken back
and fed again with what was verified in their place, together with the next round's (`Drafter.draft`).

Verification is exact in distribution (Leviathan et al. 2023, arXiv 2211.17192): a drafted token x stands with
probability min(1, p(x) / q(x)); the first that falls is replaced by a draw from max(p - q, 0), and if all stand the
model's own next token follows for free. At temperature 0 that is: the longest prefix equal to the model's choices.

Legend: B rows, K drafts, T = K + 1 tokens verified (or those of a prompt's chunk), D model width, V vocabulary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moe.cache import Cache, LayerStep
from moe.layers import Layer, Tables
from moe.model import Decoder
from moe.mtp import MTPHead
from moe.sampling import ACCEPT, CHOOSE, choose

Rows = int | Tensor  # the first so many rows, or those of an index
# (head, its logits [B, V], drafts so far [B, h]) -> the drafted token [B]
RunLayer = Callable[[Layer, Tensor, dict[bool, Tables], LayerStep], Tensor]
Pick = Callable[[int, Tensor, Tensor], Tensor]


class Drafter:
    """The heads' caches, and the state of verified tokens that each head reads next."""

    def __init__(self, model: Decoder, drafts: int, *, rows: int, capacity: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.drafts = model, drafts
        self.heads = [cast(MTPHead, head) for head in model.mtp]
        self.caches = [
            # A head is fed up to 2 K + 1 tokens at once and K - 1 are taken back.
            Cache(
                config, [config.layers + h], rows=rows, capacity=capacity, slack=2 * drafts,
                device=weight.device, dtype=weight.dtype,
            )
            for h in range(drafts)
        ]  # fmt: skip
        # Entry h: the output of head h - 1 in its last verified row, which head h reads first. Entry 0 is not used.
        self.carry_HBD = torch.zeros(drafts, rows, config.dim, device=weight.device, dtype=weight.dtype)
        # The caches' lengths are its rows: one operation moves all of them on.
        self.lengths_HB = torch.zeros(drafts, rows, dtype=torch.int64, device=weight.device)
        for cache, lengths_B in zip(self.caches, self.lengths_HB, strict=True):
            cache.lengths_B = lengths_B

    def restart(self, row: Tensor, length: int | Tensor = 0) -> None:
        """Forgets what the rows' heads have read; the next state fed is that of position `length`."""
        for h, cache in enumerate(self.caches):
            cache.restart(row, start=length, length=length - h)

    def draft(self, x_BTD: Tensor, next_BT: Tensor, counts_B: Tensor, rows: Rows, pick: Pick, run: RunLayer) -> Tensor:
        """Reads verified states and drafts K tokens [B, K] behind the last of them.

        Row b gives `counts_B[b]` states of the trunk, going on where the last call ended, and for each the token behind
        it. Others are padding. A row of count 0 keeps its state, and its drafts mean nothing.
        """
        busy_B, last_B = counts_B > 0, (counts_B - 1).clamp(min=0)
        view = rows if isinstance(rows, Tensor) else slice(rows)
        tokens_BY = nn.functional.pad(next_BT, (0, self.drafts - 1))
        drafts_BK = next_BT.new_zeros(len(next_BT), 0)
        state_BTD, carry_HBD = x_BTD, self.carry_HBD[:, view].clone()  # what this call leaves is for the next one
        for h, cache in enumerate(self.caches):
            if h:
                state_BTD = torch.cat((carry_HBD[h].unsqueeze(1), state_BTD), 1)
            state_BTD = self._read(h, state_BTD, tokens_BY, torch.where(busy_B, counts_B + h, 0), rows, run)
            cache.rollback(torch.where(busy_B, h, 0), rows)
            if h + 1 < self.drafts:
                verified_BD = torch.where(busy_B[:, None], row_at(state_BTD, last_B), carry_HBD[h + 1])
                self.carry_HBD[h + 1, view] = verified_BD
            logits_BV = self._logits(h, row_at(state_BTD, last_B + h))
            token_B1 = pick(h, logits_BV, drafts_BK).unsqueeze(1)
            drafts_BK = torch.cat((drafts_BK, token_B1), 1)
            if h + 1 < self.drafts:
                tokens_BY = tokens_BY.scatter(1, (last_B + 1 + h).unsqueeze(1), token_B1)
        return drafts_BK

    def _logits(self, h: int, state_BD: Tensor) -> Tensor:
        head = self.heads[h]
        return head.output(head.shared_head_norm(state_BD))

    def _read(
        self, h: int, state_BTD: Tensor, tokens_BY: Tensor, counts_B: Tensor, rows: Rows, run: RunLayer
    ) -> Tensor:
        """Head h over the states, each with its token's embedding."""
        tokens = state_BTD.shape[1]
        step = self.caches[h].feed(rows, counts_B).step(tokens)
        embedded_BTD = self.model.model["embed_tokens"](tokens_BY[:, :tokens])
        layout = step.of(self.model.config.layers + h, full=False)
        tables = self.model.tables(layout.position_BT)
        return run(self.heads[h], torch.cat((embedded_BTD, state_BTD), -1), tables, layout)


def verify(p_BTV: Tensor, drafts_BK: Tensor, q_BKV: Tensor, draw_BTW: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens each row gains, 1 to K + 1, and these tokens [B, T] (what lies behind them is padding).

    `p` are the model's distributions at each position and `q` the drafts', both up to a factor; `draw_BTW` the
    positions' numbers in [0, 1).
    """
    p_BTV, q_BKV = p_BTV.double(), q_BKV.double()
    p_BTV, q_BKV = p_BTV / p_BTV.sum(-1, keepdim=True), q_BKV / q_BKV.sum(-1, keepdim=True)
    p_BK = p_BTV[:, :-1].gather(2, drafts_BK.unsqueeze(2)).squeeze(2)
    q_BK = q_BKV.gather(2, drafts_BK.unsqueeze(2)).squeeze(2)
    stands_BK = draw_BTW[:, :-1, ACCEPT] * q_BK < p_BK
    accepted_B = stands_BK.long().cumprod(1).sum(1)
    p_BV = row_at(p_BTV, accepted_B)
    q_BV = row_at(nn.functional.pad(q_BKV, (0, 0, 0, 1)), accepted_B)  # behind the last draft: nothing to subtract
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # A draft falls only where q exceeds p somewhere, so something is left, but for rounding.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    token_B = choose(rest_BV, row_at(draw_BTW[:, :, CHOOSE, None], accepted_B)[:, 0])
    return accepted_B + 1, _with_last(drafts_BK, accepted_B, token_B)


def verify_greedy(choice_BT: Tensor, drafts_BK: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where both distributions are one token: the model's choices, and how many follow accepted drafts."""
    accepted_B = (choice_BT[:, :-1] == drafts_BK).long().cumprod(1).sum(1)
    return accepted_B + 1, choice_BT


def _with_last(drafts_BK: Tensor, accepted_B: Tensor, token_B: Tensor) -> Tensor:
    return nn.functional.pad(drafts_BK, (0, 1)).scatter(1, accepted_B.unsqueeze(1), token_B.unsqueeze(1))


def row_at(x_BTD: Tensor, index_B: Tensor) -> Tensor:
    """x[b, index_B[b]] for each b."""
    return x_BTD.gather(1, index_B[:, None, None].expand(-1, 1, x_BTD.shape[2])).squeeze(1)


@dataclass
class Acceptance:
    """How drafts fared: rounds, and how often the draft at each position stood."""

    rounds: int
    accepted: list[int]

    @classmethod
    def none(cls, drafts: int) -> "Acceptance":
        return cls(0, [0] * drafts)

    def add(self, gained: int) -> None:
        """One round that gave `gained` tokens."""
        self.rounds += 1
        for position in range(gained - 1):
            self.accepted[position] += 1

    @property
    def length(self) -> float:
        """Mean tokens a round, the model's own counted; 1 when no draft ever stands, NaN without a round."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else float("nan")

    @property
    def fractions(self) -> list[float]:
        """Share of rounds in which the draft at each position stood; falls from position to position."""
        return [a / self.rounds if self.rounds else float("nan") for a in self.accepted]


class Pace:
    """Switches speculation off where it loses, and tries again later.

    A round costs more than a plain step and gives more tokens. It pays while (mean tokens of the last `window` rounds)
    x (cost of a step) is at least the cost of a round. Costs are measured once for each batch size, acceptance all the
    time; no other input, so the same costs and rounds give the same choices. After a loss come `pause` plain steps,
    then `window` rounds on trial; each loss in a row doubles the pause, up to 16 times.
    """

    LONGEST = 16

    def __init__(self, drafts: int, *, window: int = 64, pause: int = 512) -> None:
        # Chosen, untested: with 64 rounds the mean's standard error is about 0.15 tokens.
        self.drafts, self.pause = drafts, pause
        self.recent: deque[int] = deque(maxlen=window)
        self.costs: dict[int, tuple[float, float]] = {}
        self.resting, self.losses = 0, 0

    def cost(self, bucket: int, plain_s: float, round_s: float) -> None:
        """Notes what a step and a round of a batch size cost."""
        self.costs[bucket] = plain_s, round_s

    def saw(self, gained: int) -> None:
        """Notes the tokens that a row gained in a round."""
        self.recent.append(gained)

    def speculate(self, bucket: int) -> bool:
        """Whether the next step of this batch size is a round; to be asked once a step."""
        plain_s, round_s = self.costs[bucket]
        if round_s > (self.drafts + 1) * plain_s:  # not even when every draft stands
            return False
        if self.resting:
            self.resting -= 1
            return False
        if len(self.recent) < (self.recent.maxlen or 0):
            return True
        if sum(self.recent) * plain_s >= len(self.recent) * round_s:
            self.losses = 0
            return True
        self.recent.clear()
        self.resting = self.pause * min(2**self.losses, self.LONGEST) - 1
        self.losses += 1
        return False
