"""What becomes of a request, step by step: new tokens and text, log probabilities, and how it ended."""

from dataclasses import dataclass
from typing import Literal

from core.errors import StageError
from moe.speculative import Acceptance

Finish = Literal["stop", "length", "cancelled", "failed"]


class DivergedError(StageError):
    """The model's logits are no numbers for this text; other texts may get their answers."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token: its log probability, and the likeliest tokens with theirs, highest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """What a step gave a request. A stop token is not among `tokens`; `text` lacks what may yet become a stop string."""

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # where asked for: one a token, and the stop token's
    finished: Finish | None = None
    text: str = ""  # empty without a tokenizer
    acceptance: Acceptance | None = None  # with the last event, of a request that speculated
    end: int | None = None  # the stop token that ended it
    error: str | None = None  # why it failed


def lost(read: int, made: int) -> str:
    """What is said of a request whose next token nobody can tell, behind so many tokens of its prompt and its answer."""
    return (
        f"generate: the model gives no next token, got logits that are not finite behind {read} + {made} tokens, expected "
        "numbers: it has diverged, or its type overflows; take an earlier checkpoint, or float32"
    )
