"""CUDA graphs, and reading back what they leave: the two places where decoding meets the device's clock.

In: a step's body, which works in place on tensors of fixed shape. Out: the same step as one launch, and its tokens on
the host one copy later. Without a GPU the body is called and the copy is a copy.

Legend: B rows of a step, T tokens a row, C candidates with log probabilities, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.sampling import log_probabilities

DIVERGED = -1  # stands in a readback for a token chosen from logits that are not finite
WARM_UP = 3  # runs before a capture: libraries choose kernels and allocate in the first ones


class Replay:
    """A function without arguments: called, or, once it was captured as a CUDA graph, replayed.

    A replay's result lies in the same memory each time, so it is to be copied before the next one.
    """

    def __init__(self, body: Callable[[], Tensor], pool: Any = None) -> None:
        self.body, self.pool = body, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def prepare(self, runs: int = WARM_UP) -> None:
        """Captures. The body runs a few times first, so its effects must be harmless at that moment.

        One run is enough for a body that ran before.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(runs):
                self.body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.result = self.body()
        self.graph = graph

    def __call__(self) -> Tensor:
        if self.graph is None:
            return self.body()
        self.graph.replay()
        assert self.result is not None
        return self.result


@dataclass
class Readback:
    """What one step gave its rows, on its way to the host."""

    packet: Tensor  # [B, T + 1]: tokens or DIVERGED, then how many of them count
    logprobs: tuple[Tensor, Tensor, Tensor] | None  # of each token [B, T], and of the likeliest [B, T, C] with ids
    ready: torch.cuda.Event | None

    @classmethod
    def start(cls, out_BT: Tensor, kept_B: Tensor, logits_BTV: Tensor, logprobs_wanted: bool) -> "Readback":
        """Starts the copy. A token whose logits hold a NaN or have no finite maximum is `DIVERGED`."""
        peak_BT = logits_BTV.amax(-1)
        finite_BT = peak_BT - peak_BT == 0  # two kernels, where isfinite takes four
        packet = _to_host(torch.cat((torch.where(finite_BT, out_BT, DIVERGED), kept_B.unsqueeze(1)), 1))
        logprobs = None
        if logprobs_wanted:
            flat = log_probabilities(logits_BTV.flatten(0, 1), out_BT.flatten())
            chosen, top, ids = (_to_host(t.unflatten(0, out_BT.shape)) for t in flat)
            logprobs = chosen, top, ids
        ready = None
        if out_BT.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        return cls(packet, logprobs, ready)

    def tokens(self) -> list[list[int]]:
        """Each row's new tokens; waits for the copy."""
        if self.ready is not None:
            self.ready.synchronize()
        return [row[: row[-1]] for row in self.packet.tolist()]


def _to_host(x: Tensor) -> Tensor:
    """A copy in progress; complete when the stream has come so far."""
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
