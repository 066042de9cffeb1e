"""The device's half of decoding: every row's state in tensors of fixed shape, and steps that work on them in place.

In: a decoder and how many rows it serves. Out: tokens, read back with one copy a step. A step takes no argument and
reads nothing back, so on a GPU it is captured once for each batch size (powers of two) and mode, and replayed; on a CPU
the same code runs as it is. Its first rows take part, those that are not `active` without effect: their keys go to the
cache's spare slot and their lengths stay.

Two kinds: `plain` reads each row's pending token and chooses the next; `round` reads it with K drafts behind it, keeps
what `verify` lets stand, and drafts anew. Either can follow the other.

Prompts are read by the model's own layers. Steps are too, or by fused kernels (moe/fused_steps.py): on a GPU, where the
kernels serve the model (moe/backends.py) and a step has few enough tokens for them. Which of the two depends on a step's kind
and number of rows alone. Both give the same logits but for rounding; by kernels alone, rounds and plain steps give the
same bits, so that greedy answers with drafts are those without.

Legend: B rows of a step, N rows in all, K drafts, T = tokens that a step reads (1 or K + 1), V vocabulary, W draws.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from core.errors import ConfigError
from moe.backends import capturable, unserved
from moe.cache import Cache, Feed, LayerStep, Step
from moe.graphs import Replay
from moe.layers import Layer, Tables
from moe.model import Decoder
from moe.prompts import Prompts
from moe.sampling import CHOOSE, DRAFT, DRAWS, Mode, Sampling, Settings, choose, distribution, draws
from moe.speculative import Drafter, Rows, RunLayer, verify, verify_greedy

if TYPE_CHECKING:
    from moe.fused_steps import FusedSteps

Kind = Literal["plain", "round"]
Start = tuple[Tensor, Step, dict[bool, Tables]]
MOST_VARIANTS = 64  # of a compiled layer: four kinds by the batch sizes and by one or K + 1 + h tokens


class Decode:
    """State of `rows` rows of at most `context` tokens, and the steps on it."""

    def __init__(
        self,
        model: Decoder,
        *,
        rows: int,
        context: int,
        drafts: int = 0,
        capture: bool = True,
        compiled: bool = False,
        fused: bool | None = None,
    ) -> None:
        """`capture`: graphs on a GPU. `compiled`: layers by torch.compile, once for each kind and shape of step.

        `fused`: steps of few tokens by fused kernels; None: on a GPU, where they serve the model. The model's weights are
        then read as they are now. With both, what is left to the layers is compiled.
        """
        config, weight = model.config, model.lm_head.weight
        self.run: RunLayer = _run_layer
        self.begin: Callable[..., Start] = _begin
        if compiled:
            self.run, self.begin = _compiled()
        self.model, self.rows, self.drafts, self.device = model, rows, drafts, weight.device
        capacity = context + drafts  # a round near the end reads drafts that can no longer count
        self.trunk = Cache(
            config, range(config.layers), rows=rows, capacity=capacity, slack=drafts,
            device=self.device, dtype=weight.dtype,
        )  # fmt: skip
        self.drafter = Drafter(model, drafts, rows=rows, capacity=capacity) if drafts else None
        vocab = config.vocab_size
        self.settings = Settings(rows, vocab, self.device)
        self.token_B, self.active_B, self.made_B = (self._zeros(rows) for _ in range(3))
        self.kept_B, self.out_BT = self._zeros(rows), self._zeros(rows, drafts + 1)
        self.draft_BK = self._zeros(rows, drafts)
        self.q_BKV = torch.ones(rows, drafts, vocab, device=self.device)
        self.seen_BV = self._zeros(rows, vocab, dtype=torch.bool)
        self.draw_BNW = self._zeros(rows, capacity + 1, DRAWS, dtype=torch.float64)
        self.replays: dict[tuple[Kind, int, Mode], Replay] = {}
        self.capture = capture and self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None
        self.fused = self._fused(fused)
        self.prompts = Prompts(self)

    def _fused(self, wanted: bool | None) -> "FusedSteps | None":
        problem = unserved(self.model)
        if wanted and problem:
            raise ConfigError(f"decode: fused kernels cannot serve this model, {problem}; set fused to None or False")
        if problem or wanted is False or (wanted is None and self.device.type != "cuda"):
            return None
        from moe.fused_steps import FusedSteps  # Triton is there on machines with a GPU alone

        return FusedSteps(self)

    def admit(self, row: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """Gives a row to a request. `prompt` counts for the repetition penalty; it is not read here."""
        index = torch.tensor([row], device=self.device)
        self.trunk.restart(index)
        self.trunk.clear(row)
        if self.drafter is not None:
            self.drafter.restart(index)
            self.drafter.carry_HBD[:, row] = 0
            for cache in self.drafter.caches:
                cache.clear(row)
        self.settings.put(row, sampling)
        self.active_B[row] = self.made_B[row] = 0
        self.seen_BV[row] = False
        self.seen_BV[row, torch.tensor(prompt, dtype=torch.int64, device=self.device)] = True
        if sampling.temperature > 0:
            self.draw_BNW[row] = torch.from_numpy(draws(sampling.seed, self.draw_BNW.shape[1])).to(self.device)

    def release(self, row: int) -> None:
        """Takes the row out of the following steps."""
        self.active_B[row] = 0

    @torch.inference_mode()
    def prefill(
        self, index: Sequence[int], chunks: Sequence[Sequence[int]], ahead: Sequence[int | None], reach: int, mode: Mode
    ) -> Tensor:
        """Reads one chunk of each row's prompt. `ahead`: the token behind it, None where the prompt ends with it.

        Where it ends the row becomes active, and its first token is in `out_BT`. Returns logits [B, 1, V]. `reach`: a
        bound on the rows' lengths afterwards.
        """
        return self.prompts.read(index, chunks, ahead, reach, mode)

    @torch.inference_mode()
    def step(self, kind: Kind, rows: int, mode: Mode) -> Tensor:
        """One step of the first `rows` rows; tokens are in `out_BT`, counts in `kept_B`. Returns logits [B, T, V]."""
        return self._replay(kind, rows, mode)()

    @torch.inference_mode()
    def restart_drafts(self, rows: int) -> None:
        """Before the first round behind plain steps: heads begin where the rows are, and the first drafts are a guess.

        Token 0 with certainty is as valid a draft as any other: verification makes up for it.
        """
        assert self.drafter is not None
        self.drafter.restart(self.trunk.rows_B[:rows], self.trunk.lengths_B[:rows])
        self.draft_BK[:rows] = 0
        self.q_BKV[:rows] = 0
        self.q_BKV[:rows, :, 0] = 1

    @torch.inference_mode()
    def measure(self, rows: int, mode: Mode, clock: Callable[[], float], repeats: int = 3) -> tuple[float, float]:
        """Seconds of a plain step and of a round, each the least of a few; changes no row's state."""
        active_B = self.active_B.clone()
        self.active_B.zero_()
        least = []
        for kind in ("plain", "round"):
            replay, times = self._replay(kind, rows, mode), []
            for _ in range(repeats + 1):  # the first warms caches and is not counted
                self.wait()
                begin = clock()
                replay()
                self.wait()
                times.append(clock() - begin)
            least.append(min(times[1:]))
        self.active_B.copy_(active_B)
        return least[0], least[1]

    def wait(self) -> None:
        """Returns when the device has done all that it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _replay(self, kind: Kind, rows: int, mode: Mode) -> Replay:
        key = kind, rows, mode
        if key not in self.replays:
            steps: Decode | FusedSteps = self if self.fused is None or not self.fused.takes(kind, rows) else self.fused
            body = steps.plain if kind == "plain" else steps.round
            replay = Replay(lambda: body(rows, mode), self.pool)
            if self.capture and (steps is not self or capturable(self.model)):
                active_B = self.active_B.clone()
                self.active_B.zero_()  # the runs before a capture change nothing then
                replay.prepare()
                self.active_B.copy_(active_B)
            self.replays[key] = replay
        return self.replays[key]

    def plain(self, rows: int, mode: Mode) -> Tensor:
        """The body of a plain step by the model's layers; returns logits [B, 1, V]."""
        active_B = self.active_B[:rows]
        x_B1D = self.states(self.token_B[:rows, None], self.trunk.feed(rows, active_B), self.run)
        logits_B1V = self.model.lm_head(self.model.norm(x_B1D))
        self.gain(rows, self.next_token(logits_B1V[:, 0], rows, mode).unsqueeze(1), active_B, mode)
        return logits_B1V

    def round(self, rows: int, mode: Mode) -> Tensor:
        """The body of a round by the model's layers; returns logits [B, T, V]."""
        active_B, tokens = self.active_B[:rows], self.drafts + 1
        drafts_BK = self.draft_BK[:rows]
        tokens_BT = torch.cat((self.token_B[:rows, None], drafts_BK), 1)
        x_BTD = self.states(tokens_BT, self.trunk.feed(rows, active_B * tokens), self.run)
        logits_BTV = self.model.lm_head(self.model.norm(x_BTD))
        if mode == "greedy":
            gained_B, out_BT = verify_greedy(logits_BTV.argmax(-1), drafts_BK)
        else:
            gained_B, out_BT = self.verified(logits_BTV, rows, mode)
        kept_B = gained_B * active_B
        self.trunk.rollback(tokens * active_B - kept_B, rows)
        self.gain(rows, out_BT, kept_B, mode)
        self.draft(x_BTD, out_BT, kept_B, rows, mode, self.run)
        return logits_BTV

    def verified(self, logits_BTV: Tensor, rows: int, mode: Mode) -> tuple[Tensor, Tensor]:
        """`verify` of the first rows' drafts under their settings."""
        drafts_BK, tokens = self.draft_BK[:rows], self.drafts + 1
        p_TBV = [self._distribution(logits_BTV[:, i], rows, drafts_BK[:, :i], mode) for i in range(tokens)]
        at_BT = self.made_B[:rows, None] + torch.arange(tokens, device=self.device)
        draw_BTW = self.draw_BNW[self.trunk.rows_B[:rows, None], at_BT.clamp(max=self.draw_BNW.shape[1] - 1)]
        return verify(torch.stack(p_TBV, 1), drafts_BK, self.q_BKV[:rows], draw_BTW)

    def states(self, tokens_BT: Tensor, feed: Feed, run: RunLayer | None = None) -> Tensor:
        """`Decoder.states`, layer by layer through `run`; None: as they are."""
        run = run or _run_layer
        begin = _begin if run is _run_layer else self.begin
        x_BTD, step, tables = begin(self.model, feed, tokens_BT)
        for number, layer in enumerate(self.model.model["layers"].children()):
            x_BTD = run(cast(Layer, layer), x_BTD, tables, step.of(number, self.model.config.full(number)))
        return x_BTD

    def draft(
        self,
        x_BTD: Tensor,
        next_BT: Tensor,
        counts_B: Tensor,
        rows: Rows,
        mode: Mode,
        run: RunLayer | None = None,
    ) -> None:
        """Drafts behind the rows' last tokens, into `draft_BK` and, for sampling, `q_BKV`; idle rows keep theirs."""
        assert self.drafter is not None
        view, busy_B1 = _view(rows), counts_B[:, None] > 0

        def pick(head: int, logits_BV: Tensor, before_BH: Tensor) -> Tensor:
            return self.draft_token(head, logits_BV, before_BH, counts_B, rows, mode)

        drafts_BK = self.drafter.draft(x_BTD, next_BT, counts_B, rows, pick, run or _run_layer)
        self.draft_BK[view] = torch.where(busy_B1, drafts_BK, self.draft_BK[view])

    def draft_token(
        self, head: int, logits_BV: Tensor, before_BH: Tensor, counts_B: Tensor, rows: Rows, mode: Mode
    ) -> Tensor:
        """A head's draft [B] behind those before it; for sampling, what it was drawn from is noted where counts are not 0."""
        if mode == "greedy":
            return logits_BV.argmax(-1)
        q_BV, view = self._distribution(logits_BV, rows, before_BH, mode).float(), _view(rows)
        self.q_BKV[view, head] = torch.where(counts_B[:, None] > 0, q_BV, self.q_BKV[view, head])
        return choose(q_BV, self._draw(rows, head, DRAFT))

    def next_token(self, logits_BV: Tensor, rows: Rows, mode: Mode) -> Tensor:
        """The tokens [B] behind what the rows have read."""
        if mode == "greedy":
            return logits_BV.argmax(-1)
        no_drafts = self._zeros(len(logits_BV), 0)
        return choose(self._distribution(logits_BV, rows, no_drafts, mode), self._draw(rows, 0, CHOOSE))

    def _distribution(self, logits_BV: Tensor, rows: Rows, before_BH: Tensor, mode: Mode) -> Tensor:
        """Of the token behind drafts that are not yet part of the answer."""
        settings, seen_BV = self.settings.part(_view(rows)), self.seen_BV[_view(rows)]
        if before_BH.shape[1]:
            seen_BV = seen_BV.scatter(1, before_BH, True)
        return distribution(logits_BV, settings, seen_BV, mode)

    def _draw(self, rows: Rows, ahead: int, column: int) -> Tensor:
        index_B = rows if isinstance(rows, Tensor) else self.trunk.rows_B[:rows]
        at_B = (self.made_B[index_B] + ahead).clamp(max=self.draw_BNW.shape[1] - 1)
        return self.draw_BNW[index_B, at_B, column]

    def gain(self, rows: Rows, out_BT: Tensor, kept_B: Tensor, mode: Mode) -> None:
        """Notes the first `kept_B` of each row's tokens; the last of them is read next."""
        view, tokens = _view(rows), out_BT.shape[1]
        busy_B = kept_B > 0
        last_B = out_BT.gather(1, (kept_B - 1).clamp(min=0)[:, None])[:, 0]
        self.token_B[view] = torch.where(busy_B, last_B, self.token_B[view])
        self.made_B[view] += kept_B
        self.out_BT[view, :tokens] = out_BT
        self.kept_B[view] = kept_B
        if mode != "greedy":  # a request without penalty never asks; with one the mode is another
            self.mark(rows, out_BT, kept_B)

    def mark(self, rows: Rows, out_BT: Tensor, kept_B: Tensor) -> None:
        """Notes the tokens as seen, for the repetition penalty."""
        view, tokens = _view(rows), out_BT.shape[1]
        new_BT = torch.arange(tokens, device=self.device) < kept_B[:, None]
        marks = torch.zeros_like(self.seen_BV[view]).scatter_(
            1, torch.where(new_BT, out_BT, out_BT[:, :1]), (kept_B > 0)[:, None].expand(-1, tokens)
        )
        self.seen_BV[view] |= marks

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def _run_layer(layer: Layer, x_BTD: Tensor, tables: dict[bool, Tables], layout: LayerStep) -> Tensor:
    return layer(x_BTD, tables, layout)


def _begin(model: Decoder, feed: Feed, tokens_BT: Tensor) -> Start:
    """What comes before the layers: some sixty tiny operations on places and angles, which a compiler fuses."""
    x_BTD = model.model["embed_tokens"](tokens_BT)
    step = feed.step(tokens_BT.shape[1])
    for number in range(min(2, model.config.layers)):  # one layer of each kind
        step.of(number, model.config.full(number))
    return x_BTD, step, model.tables(step.position_BT)


@cache
def _compiled() -> tuple[RunLayer, Callable[..., Start]]:
    """One function for all layers, so that those of a kind share code; each batch size is compiled for itself."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    run, begin = (torch.compile(f, fullgraph=True, dynamic=False) for f in (_run_layer, _begin))
    return cast(RunLayer, run), cast(Callable[..., Start], begin)


def _view(rows: Rows) -> Tensor | slice:
    return rows if isinstance(rows, Tensor) else slice(rows)
