"""Prompts, read a chunk at a time by the model's own layers; on a GPU as a graph where a chunk's shape comes again.

In: a `Decode`, and chunks of some rows' prompts. Out: the rows' caches filled and, where a prompt ends, its row active with its
first token. For the preset `1b` a chunk is some 1,800 small launches, which take the host longer than the device; nobody's next
token is made meanwhile. So shapes are rounded up, and one that was read before is captured when it comes again (which
takes as long as reading it twice more): a caller with one prompt captures nothing, a server soon has all shapes that it meets.
Rounded up are all chunks, captured or not, so that a prompt gives the same bits either way.

Legend: B rows of a chunk, T its tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.backends import capturable
from moe.graphs import Replay
from moe.sampling import Mode
from moe.speculative import row_at

if TYPE_CHECKING:
    from moe.decode import Decode

LEAST_TOKENS, LEAST_REACH = 16, 256  # chosen: below, the device's time does not depend on them
MOST_SHAPES = 64  # the one read longest ago is forgotten


@dataclass(frozen=True)
class Chunk:
    """What a graph reads: a chunk's rows and tokens, in memory of its own."""

    rows: Tensor  # [B]
    tokens: Tensor  # [B, T]
    counts: Tensor  # [B]: so many of each row's tokens are its own, the others padding
    ahead: Tensor  # [B]: the token behind the chunk, any where the prompt ends
    last: Tensor  # [B] bool: whether it does

    @classmethod
    def empty(cls, rows: int, tokens: int, device: torch.device) -> "Chunk":
        rows_B, counts_B, ahead_B = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        tokens_BT = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        return cls(rows_B, tokens_BT, counts_B, ahead_B, torch.zeros(rows, dtype=torch.bool, device=device))

    def fill(self, rows: Sequence[int], chunks: Sequence[Sequence[int]], ahead: Sequence[int | None]) -> None:
        """One copy to the device for each tensor."""
        width = self.tokens.shape[1]
        self.rows.copy_(torch.tensor(rows))
        self.tokens.copy_(torch.tensor([[*c, *[0] * (width - len(c))] for c in chunks]))
        self.counts.copy_(torch.tensor([len(c) for c in chunks]))
        self.ahead.copy_(torch.tensor([a or 0 for a in ahead]))
        self.last.copy_(torch.tensor([a is None for a in ahead]))


class Prompts:
    """Chunks by shape."""

    def __init__(self, state: "Decode") -> None:
        self.state = state
        self.captures = state.capture and capturable(state.model)
        self.rounds = self.captures  # a captured shape serves every chunk that it holds
        self.shapes: dict[tuple[int, int, int, Mode], tuple[Chunk, Replay]] = {}

    def read(
        self, rows: Sequence[int], chunks: Sequence[Sequence[int]], ahead: Sequence[int | None], reach: int, mode: Mode
    ) -> Tensor:
        """`Decode.prefill`."""
        tokens = max(len(c) for c in chunks)
        if self.rounds:
            tokens, reach = _rounded(tokens, LEAST_TOKENS), _rounded(reach, LEAST_REACH)
        key = len(rows), tokens, reach, mode
        known = self.shapes.pop(key, None)
        if known is None:
            chunk = Chunk.empty(len(rows), tokens, self.state.device)
            replay = Replay(lambda: self._body(chunk, reach, mode), self.state.pool)
        else:
            chunk, replay = known
            if replay.graph is None:
                chunk.fill(rows, [()] * len(rows), [0] * len(rows))  # what runs before a capture changes nothing
                replay.prepare(runs=1)
        if self.captures:
            self.shapes[key] = chunk, replay
        if len(self.shapes) > MOST_SHAPES:
            del self.shapes[next(iter(self.shapes))]
        chunk.fill(rows, chunks, ahead)
        return replay()

    def _body(self, chunk: Chunk, reach: int, mode: Mode) -> Tensor:
        """Rows of no tokens keep their state, but that they are not active."""
        state, rows_B, tokens_BT, counts_B, last_B = self.state, chunk.rows, chunk.tokens, chunk.counts, chunk.last
        end_B = (counts_B - 1).clamp(min=0)
        x_BTD = state.states(tokens_BT, state.trunk.feed(rows_B, counts_B, reach))
        logits_B1V = state.model.lm_head(state.model.norm(row_at(x_BTD, end_B))).unsqueeze(1)
        token_B = state.next_token(logits_B1V[:, 0], rows_B, mode)
        state.active_B[rows_B] = last_B.long()
        state.gain(rows_B, token_B.unsqueeze(1), last_B.long(), mode)
        if state.drafter is not None:
            following_B = torch.where(last_B, token_B, chunk.ahead)
            next_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1)).scatter(1, end_B[:, None], following_B[:, None])
            state.draft(x_BTD, next_BT, counts_B, rows_B, mode)
        return logits_B1V


def _rounded(count: int, least: int) -> int:
    """A power of two."""
    return max(least, 1 << (count - 1).bit_length())
