"""The ranks that train one model together: who they are, and the collective calls between them.

In: the environment that torchrun sets, or nothing for one rank. Out: a `World` with three teams (all ranks; the ranks
that share one set of experts; those that hold the same experts), sums and gathers over each. Alone every call returns
its input, so callers have one path. gloo serves CPUs and NCCL GPUs; both have every collective used here (torch 2.11 and
2.13, tried on CPU).

Data parallel: each rank takes its slice of the step's rows and divides its loss by the targets counted over all ranks,
so that gradients are parts of one sum. Expert parallel (`expert_ranks` > 1): consecutive ranks hold E / expert_ranks
experts each (moe/exchange.py). A rank that dies or hangs is a `StageError` on the others: at once with gloo, after
`timeout_s` at the latest; NCCL ends the process instead.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import ConfigError, StageError

TIMEOUT_S = 600.0  # chosen: longer than compiling a layer or writing a checkpoint while the others wait
# torch 2.13 renamed two collectives; 2.11 has the old names only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Loaded(Protocol):
    """A layer that counts the tokens of its experts (moe/experts.py)."""

    load: Tensor


@dataclass(frozen=True)
class Team:
    """Some of the ranks. Every member must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all members' values, on each of them."""
        if self.size == 1:
            return value
        value = value.clone()
        with _answered():
            dist.all_reduce(value, group=self.group)
        return value

    def sum_parts(self, value: Tensor) -> Tensor:
        """Of `size` equal parts of the first dimension, this member's, summed over all."""
        if self.size == 1:
            return value
        own = value.new_empty(len(value) // self.size, *value.shape[1:])
        with _answered():
            _reduce_scatter(own, value, group=self.group)
        return own

    def join_parts(self, own: Tensor) -> Tensor:
        """The inverse of the split in `sum_parts`: all members' parts along the first dimension."""
        if self.size == 1:
            return own
        whole = own.new_empty(len(own) * self.size, *own.shape[1:])
        with _answered():
            _all_gather(whole, own.contiguous(), group=self.group)
        return whole

    def swap(self, value: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """Sends `given[i]` rows to member i, in order, and returns the `taken[i]` rows that it sent here."""
        if self.size == 1:
            return value
        out = value.new_empty(sum(taken), *value.shape[1:])
        with _answered():
            dist.all_to_all_single(out, value.contiguous(), list(taken), list(given), group=self.group)
        return out

    def gather(self, value: Any) -> list[Any]:
        """Every member's value (small, picklable), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass(frozen=True)
class World:
    """This rank's place. `experts` hold one set of experts between them, `replicas` have the same experts as this rank."""

    device: torch.device
    everyone: Team = Team()
    experts: Team = Team()
    replicas: Team = Team()

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "World":
        """One rank; nothing is set up."""
        return cls(torch.device(device))

    @classmethod
    def from_env(cls, *, expert_ranks: int = 1, device: str = "auto", timeout_s: float = TIMEOUT_S) -> "World":
        """The world that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or one rank.

        `device` auto: this rank's GPU if there is one. Joins the process group; `close` leaves it.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if size % expert_ranks:
            raise ConfigError(f"train.expert_ranks: must divide the ranks, got {expert_ranks} for {size} ranks")
        if size > 1 and device.startswith("cuda:"):
            raise ConfigError(
                f"train.device: names one GPU for {size} ranks, got {device!r}, expected auto or cuda, each rank on its own; "
                "choose GPUs with CUDA_VISIBLE_DEVICES"
            )
        place = _place(device, int(os.environ.get("LOCAL_RANK", "0")))
        if place.type == "cuda":
            torch.cuda.set_device(place)  # what is made without naming a device, as NCCL's buffers are, goes there too
        if size == 1:
            return cls.alone(place)
        limit = timedelta(seconds=timeout_s)
        with _answered():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=limit)
            experts = [range(first, first + expert_ranks) for first in range(0, size, expert_ranks)]
            replicas = [range(first, size, expert_ranks) for first in range(expert_ranks)]
            everyone = Team(rank, size, dist.group.WORLD)
            return cls(place, everyone, _join(experts, rank, limit), _join(replicas, rank, limit))

    @property
    def rank(self) -> int:
        return self.everyone.rank

    @property
    def size(self) -> int:
        return self.everyone.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on each of them."""
        return self.everyone.sum(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (small, picklable), by rank."""
        return self.everyone.gather(value)

    def wait(self) -> None:
        """Returns when every rank has called it."""
        self.sum(torch.zeros((), device=self.device)).item()

    @torch.no_grad()
    def sum_loads(self, layers: Iterable[Loaded]) -> None:
        """Sums the expert loads of all layers over the ranks, in place; once an update, before `rebalance`."""
        layers = list(layers)
        if self.size > 1 and layers:
            total = self.sum(torch.stack([layer.load for layer in layers]))
            for layer, load_E in zip(layers, total, strict=True):
                layer.load.copy_(load_E)

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _place(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cuda":
        return torch.device(device)
    if torch.cuda.device_count() <= local_rank:
        raise ConfigError(
            f"train.device: local rank {local_rank} has no GPU, got {torch.cuda.device_count()} here, expected one a "
            "rank; start fewer ranks, or set device to cpu"
        )
    return torch.device("cuda", torch.device(device).index or local_rank)


def _join(teams: Sequence[range], rank: int, limit: timedelta) -> Team:
    """This rank's team; groups are made by all ranks in the same order."""
    if len(teams[0]) == 1:
        return Team()
    groups = [dist.new_group(list(team), timeout=limit) for team in teams]
    mine = next(i for i, team in enumerate(teams) if rank in team)
    return Team(teams[mine].index(rank), len(teams[mine]), groups[mine])


@contextmanager
def _answered() -> Iterator[None]:
    """A collective call that the others do not answer is a `StageError`."""
    try:
        yield
    except torch.OutOfMemoryError:  # this rank's own; the others will miss it
        raise
    except RuntimeError as error:
        raise StageError(
            f"train: the ranks lost each other, got {str(error).splitlines()[0]}, expected an answer from all; look for "
            "the first rank that failed, then start all again: they go on from the newest checkpoint"
        ) from error
