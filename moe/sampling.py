"""Which token comes next: a request's settings, the distribution they make of logits, and a draw from it.

In: logits [B, V] and one `Sampling` per row. Out: probabilities [B, V], then token ids. Settings of all rows lie in
tensors of fixed shape (`Settings`), so that one captured graph serves any mixture of requests.

A draw inverts the cumulative distribution at one number in [0, 1) from the request's own stream: Philox keyed by its
seed, indexed by how many tokens it has made. So a request's tokens are a function of its prompt, settings and seed; not
of the other rows, as far as its logits are (matrix products of another batch size may differ in the last bits, and then
a token changes where two candidates are that close).

Order: repetition penalty (Keskar et al. 2019, arXiv 1909.05858, as transformers applies it: to the prompt's tokens
too), temperature, top-k, top-p over what top-k left. Log probabilities are the model's own, before any of these.

Legend: B rows, V vocabulary, N tokens made at most, W draws a token, C candidates reported.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError

# Columns of `draws`: plain decoding uses CHOOSE alone; speculation drafts with DRAFT, accepts with ACCEPT and draws what
# replaces a rejected token with CHOOSE.
CHOOSE, DRAFT, ACCEPT, DRAWS = 0, 1, 2, 3
MAX_LOGPROBS = 20  # the OpenAI interface's bound
# Logits of some hundreds stay finite in fp32 behind these, with room to spare; chosen. Only 0 is colder, and means greedy.
COLDEST, LEAST_PENALTY, MOST_PENALTY = 1e-4, 0.01, 100.0

# What a step must be able to do: the likeliest token alone; any temperature and penalty; top-k and top-p as well.
Mode = Literal["greedy", "sample", "filter"]
MODES: tuple[Mode, ...] = ("greedy", "sample", "filter")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """One request's settings.

    Temperature 0 takes the likeliest token, the lower id of two. `stop` ends the text before the first of the strings,
    `stop_tokens` end it like EOS; neither is part of the answer. `max_tokens` None: as far as the context reaches.
    `logprobs` n: log probabilities of each token chosen and of the n likeliest.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    max_tokens: int | None = None
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (
                "temperature",
                self.temperature == 0 or COLDEST <= self.temperature < float("inf"),
                f"0, or at least {COLDEST}",
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
                f"{LEAST_PENALTY} to {MOST_PENALTY}",
            ),
            ("stop", all(self.stop), "strings that are not empty"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        )
        problems = [
            f"sampling.{name}: out of range, got {getattr(self, name)!r}, expected {expected}"
            for name, fine, expected in checks
            if not fine
        ]
        if problems:
            raise ConfigError(*problems)

    @property
    def mode(self) -> Mode:
        """The least that a step must do for this request."""
        if self.temperature > 0 and (self.top_k is not None or self.top_p < 1):
            return "filter"
        return "greedy" if self.temperature == 0 and self.repetition_penalty == 1 else "sample"


class Settings:
    """The rows' settings as tensors [N rows]; `put` writes one row's."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.temperature_B = torch.ones(rows, device=device)
        self.top_k_B = torch.full((rows,), vocab_size, device=device)
        self.top_p_B = torch.ones(rows, device=device)
        self.penalty_B = torch.ones(rows, device=device)

    def put(self, row: int, sampling: Sampling) -> None:
        """Takes a request's settings into a row."""
        self.temperature_B[row] = sampling.temperature
        self.top_k_B[row] = min(sampling.top_k or self.vocab_size, self.vocab_size)
        self.top_p_B[row] = sampling.top_p
        self.penalty_B[row] = sampling.repetition_penalty

    def part(self, rows: slice | Tensor) -> "Settings":
        """Those of some rows."""
        part = object.__new__(Settings)
        part.vocab_size = self.vocab_size
        part.temperature_B, part.top_k_B = self.temperature_B[rows], self.top_k_B[rows]
        part.top_p_B, part.penalty_B = self.top_p_B[rows], self.penalty_B[rows]
        return part

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "Settings":
        """One row's, on the CPU."""
        settings = cls(1, vocab_size, "cpu")
        settings.put(0, sampling)
        return settings


def distribution(logits_BV: Tensor, settings: Settings, seen_BV: Tensor, mode: Mode) -> Tensor:
    """What the next token is drawn from, up to a factor per row: [B, V], fp32 or wider.

    `seen_BV`: tokens of the prompt and the answer so far. A row comes out the same in every mode that can serve it.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if mode == "greedy":
        return _likeliest(logits_BV)
    penalty_B1, temperature_B1 = settings.penalty_B[:, None], settings.temperature_B[:, None]
    punished_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = torch.where(seen_BV, punished_BV, logits_BV)
    greedy_B1 = temperature_B1 == 0
    p_BV = (logits_BV / torch.where(greedy_B1, 1, temperature_B1)).softmax(-1)
    if mode == "filter":
        p_BV = p_BV * _kept(p_BV, settings)
    return torch.where(greedy_B1, _likeliest(logits_BV), p_BV)


def choose(p_BV: Tensor, draw_B: Tensor) -> Tensor:
    """The token [B] at which each row's cumulative share first exceeds its draw; never one of probability 0.

    A row that is no distribution (all zero, or not finite, as of a model that has diverged) gives the last token; who reads
    it back tells by the logits (`moe.graphs.Readback`).
    """
    cumulative_BV = p_BV.double().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # u * total may round up to the total, and no share exceeds that.
    level_B1 = torch.minimum(draw_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, level_B1, right=True)[:, 0].clamp_(max=p_BV.shape[-1] - 1)


def draws(seed: int, tokens: int) -> np.ndarray:
    """The numbers in [0, 1) of a request's stream: float64 [tokens, W]; a longer stream begins with a shorter one."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random((tokens, DRAWS))


def log_probabilities(logits_BV: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens [B], and of the likeliest [B, C] with their ids, all fp32."""
    log_p_BV = logits_BV.float().log_softmax(-1)
    top_BC, id_BC = log_p_BV.topk(min(MAX_LOGPROBS, log_p_BV.shape[-1]), dim=-1)
    return log_p_BV.gather(-1, token_B[:, None])[:, 0], top_BC, id_BC


def _likeliest(logits_BV: Tensor) -> Tensor:
    # argmax names the first of equal maxima on every device.
    return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1)


def _kept(p_BV: Tensor, settings: Settings) -> Tensor:
    """Which tokens top-k and top-p leave [B, V]; of equal ones the lower id goes first. The likeliest always stays."""
    sorted_BV, id_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(p_BV.shape[-1], device=p_BV.device)
    sorted_BV = sorted_BV * (rank_V < settings.top_k_B[:, None])
    upto_BV = sorted_BV.double().cumsum(-1)
    before_BV = upto_BV - sorted_BV
    # Without top_p all stay: a sum that rounds to 1 early must not cut the tail off.
    free_B1 = settings.top_p_B[:, None] == 1
    kept_BV = (sorted_BV > 0) & (free_B1 | (before_BV < settings.top_p_B[:, None].double() * upto_BV[:, -1:]))
    return torch.zeros_like(kept_BV).scatter_(-1, id_BV, kept_BV)
