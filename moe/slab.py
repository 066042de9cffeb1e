"""Slabs: pieces of many parameters laid end to end, so that ranks share their update and one kernel does many at once.

In: parameters and the shapes of the units (whole matrices, or single elements) that must not be cut. Out: `Slab`s. A
slab is rank-major: every member of the team owns an equal share of it, padded with zeros where it has fewer units. So
one reduce-scatter brings an owner the summed gradients of whole matrices, and one all-gather the new weights to all
(ZeRO-1, after Step 3.5 Flash, arXiv 2602.10604). What is stored under a parameter's name has that parameter's shape, so
no file depends on the number of ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.parallel import Team

SLAB_ELEMENTS = 2**25  # owned by one rank; chosen: an E32 F512 layer at width 1024 has 2**25.6, workspace below 1 GB


@dataclass(frozen=True)
class Piece:
    """`length` elements from `start` of the flat parameter `name` stand at `place` of the flat rank-major slab."""

    name: str
    start: int
    place: int
    length: int


@dataclass(frozen=True)
class Unit:
    """What one owner updates whole: `shape` elements from `start` of the flat parameter `name`."""

    name: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What the parameters of a slab have in common."""

    team: Team  # shares the update
    device: torch.device
    dtype: torch.dtype
    decay: float
    sharded: bool  # every rank of the expert team holds other experts under the same name


@dataclass
class Slab:
    """Units of `shape` ((m, n) of matrices, () of elements), of which member r owns the first `owned[r]` of its share.

    `state` holds what this owner keeps, [units, *shape] each.
    """

    kind: Kind
    shape: tuple[int, ...]
    owned: tuple[int, ...]
    pieces: tuple[Piece, ...]
    state: dict[str, Tensor] = field(default_factory=dict)
    grad: Tensor | None = None  # the owner's share between the reduction and the step

    def __post_init__(self) -> None:
        self.units = self.owned[self.kind.team.rank]
        self._share = max(self.owned) * torch.Size(self.shape).numel()
        first = self._share * self.kind.team.rank
        self._own = tuple(
            Piece(p.name, p.start, p.place - first, p.length)
            for p in self.pieces
            if first <= p.place < first + self._share
        )

    @property
    def names(self) -> list[str]:
        """Parameters that have a piece here."""
        return list(dict.fromkeys(p.name for p in self.pieces))

    def reduced(self, grads: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """The owner's gradients [units, *shape], summed over the team in `dtype`; a parameter without one counts as zero."""
        team = self.kind.team
        whole = _packed(self.pieces, grads, self._share * team.size, dtype, self.kind.device)
        return team.sum_parts(whole).view(-1, *self.shape)[: self.units]

    def own(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The owner's part [units, *shape] of tensors by parameter name."""
        size = self.units * torch.Size(self.shape).numel()
        return _packed(self._own, tensors, size, dtype, self.kind.device).view(-1, *self.shape)

    def whole(self, own: Tensor) -> Tensor:
        """The flat slab from every owner's part, on all members."""
        flat = own.flatten()
        return self.kind.team.join_parts(functional.pad(flat, (0, self._share - len(flat))))

    def unpack(self, whole: Tensor, into: Mapping[str, Tensor]) -> None:
        """Writes a flat slab into tensors by parameter name."""
        targets = [into[p.name].view(-1)[p.start : p.start + p.length] for p in self.pieces]
        torch._foreach_copy_(targets, [whole[p.place : p.place + p.length] for p in self.pieces])


def matrix_slabs(units: Sequence[Unit], kind: Kind, held: list[int]) -> Iterator[Slab]:
    """Slabs of equal units, at most `SLAB_ELEMENTS` a rank. `held` counts the elements that each member owns so far.

    Owners differ by one unit at most; those with the least so far take the odd ones, or rank 0 would collect the
    remainders of all shapes.
    """
    team, shape = kind.team, units[0].shape
    size = torch.Size(shape).numel()
    most = max(1, SLAB_ELEMENTS // size) * team.size
    for low in range(0, len(units), most):
        here = units[low : low + most]
        count = -(-len(here) // team.size)
        lean = set(sorted(range(team.size), key=lambda r: (held[r], r))[len(here) - (count - 1) * team.size :])
        owned = [count - (rank in lean) for rank in range(team.size)]
        places = [rank * count + i for rank in range(team.size) for i in range(owned[rank])]
        for rank in range(team.size):
            held[rank] += owned[rank] * size
        pieces = [Piece(u.name, u.start, place * size, size) for u, place in zip(here, places, strict=True)]
        yield Slab(kind, shape, tuple(owned), tuple(_merged(pieces, count * size)))


def element_slabs(parameters: Mapping[str, nn.Parameter], kind: Kind) -> Iterator[Slab]:
    """Slabs of parameters that may be cut anywhere."""
    sizes = [p.numel() for p in parameters.values()]
    lasts = list(accumulate(sizes))
    spans = [(name, last - size, last) for name, size, last in zip(parameters, sizes, lasts, strict=True)]
    most = SLAB_ELEMENTS * kind.team.size
    for low in range(0, lasts[-1], most):
        high = min(low + most, lasts[-1])
        count = -(-(high - low) // kind.team.size)
        shares = [(min(high, low + r * count), min(high, low + (r + 1) * count)) for r in range(kind.team.size)]
        cuts = [
            (name, first, max(first, start), min(last, end))
            for start, end in shares
            for name, first, last in spans
            if max(first, start) < min(last, end)
        ]
        pieces = [Piece(name, start - first, start - low, end - start) for name, first, start, end in cuts]
        owned = [end - start for start, end in shares]
        yield Slab(kind, (), tuple(owned), tuple(pieces))


def _merged(pieces: Sequence[Piece], share: int) -> list[Piece]:
    """Neighbours that lie end to end in both the parameter and one rank's share of the slab become one."""
    out: list[Piece] = []
    for p in pieces:
        last = out[-1] if out else None
        joined = last and (last.name, last.start + last.length, last.place + last.length) == (p.name, p.start, p.place)
        if last and joined and p.place % share:
            out[-1] = Piece(p.name, last.start, last.place, last.length + p.length)
        else:
            out.append(p)
    return out


def _packed(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Tensor | None],
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Pieces at their places in a flat tensor, zeros between them."""
    out = torch.zeros(size, dtype=dtype, device=device)
    targets, sources = [], []
    for p in pieces:
        value = tensors[p.name]
        if value is not None:
            targets.append(out[p.place : p.place + p.length])
            sources.append(value.reshape(-1)[p.start : p.start + p.length])
    if targets:
        torch._foreach_copy_(targets, sources)
    return out
