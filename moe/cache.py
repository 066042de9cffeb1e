"""Keys and values of what was read, in buffers of fixed shape.

In: keys and values of new tokens, layer by layer. Out: what the queries of these tokens attend to. Each row has a
length of its own, held on the device, so that a captured CUDA graph replays for any lengths. Layers with full attention
keep every position up to `capacity`; windowed layers keep the last `window + slack` in a ring, position p in slot
p % (window + slack). Tokens behind a row's length may be taken back (`rollback`) up to `slack`: the ring still holds the
window before them.

A cache is one more layout for the model's attention (moe/attention.py): `cache.feed(...).step(T)` is what
`Decoder.states(tokens, cache=...)` asks for. Every buffer has one slot more than positions; padding, tokens beyond the
capacity and tokens before a row's start are written there, and nothing reads it.

Cost of a step: each query reads all slots of its buffer, seen or not; shapes do not depend on lengths.

Legend: B rows fed, T new tokens a row, P slots, N rows of the cache, H query heads, G key/value heads, C head width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import ModelConfig

# Below it scores are made by two plain products: a fused kernel starts one block per (row, key head), and a decode
# step has so few of them that most of a GPU would idle. Above, the score matrix is what costs. Chosen, untested.
FEW_TOKENS = 16


@dataclass(frozen=True)
class Reach:
    """Where the new tokens go in a kind of layer, and which slots their queries see."""

    joined: bool  # queries see the ring as it was and the new tokens beside it; otherwise the buffer after the write
    slots: int
    slot: Tensor  # [B, T]
    visible: Tensor  # [B, T, P]


class Cache:
    """Buffers of `layers`. `lengths_B` and `starts_B` [N] int64: positions from start to length are held."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[int],
        *,
        rows: int,
        capacity: int,
        slack: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`slack`: tokens that one `rollback` may take back, and one fewer than a step may write into a ring at once."""
        self.window, self.capacity, self.slack = config.window, capacity, slack
        self.ring = min(config.window + slack, capacity)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows_B = torch.arange(rows, device=device)
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in layers:
            slots = capacity if config.full(layer) else self.ring
            shape = (rows, config.kv_heads, slots + 1, config.head_dim)
            self.buffers[layer] = (
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(t.nbytes for pair in self.buffers.values() for t in pair)

    def step(self, tokens: int) -> "Step":
        """The layout of `tokens` new tokens in every row."""
        return Step(self, None, tokens, None, None)

    def feed(
        self, rows: int | Tensor | None = None, counts_B: Tensor | None = None, reach: int | None = None
    ) -> "Feed":
        """For `Decoder.states`: new tokens of some rows, the first `rows` or those of an index (which copies buffers).

        Of row b's tokens only the first `counts_B[b]` are kept; the others are padding, whose states mean nothing.
        `reach`: a bound on all lengths after the step, where the caller knows one; slots beyond it are not read.
        """
        return Feed(self, rows, counts_B, reach)

    def rollback(self, count_B: Tensor, rows: int | Tensor | None = None) -> None:
        """Takes back the last `count_B` tokens of each of some rows, at most `slack` since the last step."""
        self.lengths_B[rows if isinstance(rows, Tensor) else slice(rows)] -= count_B

    def clear(self, row: int) -> None:
        """Forgets a row's numbers. A slot that no query sees is still multiplied, by zero: a NaN there would spread."""
        torch._foreach_zero_([buffer[row] for pair in self.buffers.values() for buffer in pair])

    def restart(self, row: Tensor, start: int | Tensor = 0, length: int | Tensor = 0) -> None:
        """Empties rows: the next token has position `length`, and positions below `start` count as never fed."""
        self.lengths_B[row] = length
        self.starts_B[row] = start


class Feed:
    """A cache and the rows that a forward feeds."""

    def __init__(self, cache: Cache, rows: int | Tensor | None, counts_B: Tensor | None, reach: int | None) -> None:
        self.cache, self.rows, self.counts_B, self.reach = cache, rows, counts_B, reach

    def step(self, tokens: int) -> "Step":
        """The layout of `tokens` new tokens, padding included; lengths move on by the counts at once."""
        return Step(self.cache, self.rows, tokens, self.counts_B, self.reach)


class Step:
    """Attention of T new tokens a row over what the cache holds and themselves."""

    def __init__(
        self, cache: Cache, rows: int | Tensor | None, tokens: int, counts_B: Tensor | None, reach: int | None
    ) -> None:
        self.cache, self.view = cache, rows if isinstance(rows, Tensor) else slice(rows)
        self.reach = cache.capacity if reach is None else min(reach, cache.capacity)
        index_T = torch.arange(tokens, device=cache.rows_B.device)
        self.old_B1 = cache.lengths_B[self.view][:, None].clone()
        self.first_B1 = cache.starts_B[self.view][:, None]
        counts_B1 = torch.full_like(self.old_B1, tokens) if counts_B is None else counts_B[:, None]
        self.place_BT = self.old_B1 + index_T
        self.end_B1 = self.old_B1 + counts_B1
        self.held_BT = (index_T < counts_B1) & (self.place_BT >= self.first_B1)
        self.position_BT = self.place_BT.clamp(min=0)
        cache.lengths_B[self.view] = self.end_B1[:, 0]
        self.reaches: dict[bool, Reach] = {}

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Stores keys and values and returns the queries' outputs [B, H, T, C]."""
        return self.of(layer, full).attend(layer, full, q_BHTC, k_BGTC, v_BGTC)

    def of(self, layer: int, full: bool) -> "LayerStep":
        """The same for one layer alone: nothing in it but tensors, so that layers of a kind share compiled code."""
        if full not in self.reaches:
            self.reaches[full] = self._reach(full)
        keys, values = self.cache.buffers[layer]
        if isinstance(self.view, Tensor):
            return LayerStep(self.position_BT, self.reaches[full], keys, values, self.view[:, None], gather=True)
        rows_B1 = self.cache.rows_B[self.view, None]
        return LayerStep(
            self.position_BT, self.reaches[full], keys[self.view], values[self.view], rows_B1, gather=False
        )

    def _reach(self, full: bool) -> Reach:
        cache, tokens = self.cache, self.place_BT.shape[1]
        size = cache.capacity if full else cache.ring
        ring = size < cache.capacity
        if not ring:
            held_BT, slots = self.held_BT & (self.place_BT < size), min(size, self.reach)
            slot_BT, joined = torch.where(held_BT, self.place_BT, size), False
            place_BP = torch.arange(slots, device=slot_BT.device)[None]
        else:
            # The newest `size` of them: two tokens of one step never share a slot.
            held_BT, slots = self.held_BT & (self.place_BT >= self.end_B1 - size), size
            slot_BT, joined = torch.where(held_BT, self.place_BT % size, size), tokens > cache.slack + 1
            newest_B1 = (self.old_B1 if joined else self.end_B1) - 1
            place_BP = newest_B1 - (newest_B1 - torch.arange(size, device=slot_BT.device)) % size
        known_BP = place_BP >= self.first_B1
        if joined:
            place_BP = torch.cat((place_BP, self.place_BT), 1)
            known_BP = torch.cat((known_BP, self.held_BT), 1)
        # Padding sees what the row's last token sees, so that its states stay finite.
        query_BT1 = torch.minimum(self.place_BT, self.end_B1 - 1).unsqueeze(-1)
        visible_BTP = known_BP[:, None] & (place_BP[:, None] <= query_BT1)
        if not full:
            visible_BTP &= place_BP[:, None] > query_BT1 - cache.window
        return Reach(joined, slots, slot_BT, visible_BTP)


@dataclass(frozen=True)
class LayerStep:
    """A layer's buffers and the rows of them that are fed."""

    position_BT: Tensor  # noqa: N815 - the name that every layout has
    reach: Reach
    keys: Tensor
    values: Tensor
    rows: Tensor  # [B, 1]
    gather: bool  # the rows are some of the buffers' and not all

    def attend(self, layer: int, full: bool, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """`Step.attend`; the layer is known."""
        reach = self.reach
        if not reach.joined:
            self._write(k_BGTC, v_BGTC)
            return attention(q_BHTC, self._read(self.keys), self._read(self.values), reach.visible)
        k_BGPC = torch.cat((self._read(self.keys), k_BGTC), 2)
        v_BGPC = torch.cat((self._read(self.values), v_BGTC), 2)
        self._write(k_BGTC, v_BGTC)
        return attention(q_BHTC, k_BGPC, v_BGPC, reach.visible)

    def _read(self, buffer: Tensor) -> Tensor:
        return (buffer[self.rows[:, 0]] if self.gather else buffer)[:, :, : self.reach.slots]

    def _write(self, k_BGTC: Tensor, v_BGTC: Tensor) -> None:
        self.keys[self.rows, :, self.reach.slot] = k_BGTC.transpose(1, 2)
        self.values[self.rows, :, self.reach.slot] = v_BGTC.transpose(1, 2)


def attention(q_BHTC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, visible_BTP: Tensor) -> Tensor:
    """Softmax attention; query head h reads key head h // (H / G). A query that sees nothing gets a finite value."""
    B, H, T, C = q_BHTC.shape
    G, P = k_BGPC.shape[1:3]
    hidden = torch.finfo(q_BHTC.dtype).min  # not -inf: a row without a visible slot must not become NaN
    if T > FEW_TOKENS and q_BHTC.dtype != torch.float64:
        mask_B1TP = torch.zeros_like(visible_BTP, dtype=q_BHTC.dtype).masked_fill_(~visible_BTP, hidden)[:, None]
        k_BHPC, v_BHPC = (kv.repeat_interleave(H // G, dim=1) for kv in (k_BGPC, v_BGPC))
        return torch.nn.functional.scaled_dot_product_attention(q_BHTC, k_BHPC, v_BHPC, attn_mask=mask_B1TP)
    q_BGSC = (q_BHTC * C**-0.5).reshape(B, G, H // G * T, C)
    score_BGHTP = (q_BGSC @ k_BGPC.transpose(-2, -1)).view(B, G, H // G, T, P)
    score_BGHTP = score_BGHTP.masked_fill(~visible_BTP[:, None, None], hidden)
    weight_BGSP = torch.softmax(score_BGHTP, -1, dtype=_wide(q_BHTC.dtype)).to(q_BHTC.dtype).flatten(2, 3)
    return (weight_BGSP @ v_BGPC).view(B, H, T, C)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
