"""Log-likelihood of given targets: one loop for held-out documents, answers of benchmarks and prompts of a server.

In: a decoder and `Span`s, each a row of inputs with the targets behind them, of which those from `scored` on count. Out: for
each span the nats of its scored targets and whether each of them was the likeliest token. Spans are sorted by length and packed
into padded batches of about `BATCH_TOKENS`; padding stands behind a span's end, where no token sees it. Logits exist for
`CHUNK` positions at a time. Cost: one forward pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core.errors import StageError
from moe.model import Decoder

BATCH_TOKENS = 8192  # chosen: 2 cores gain nothing from more
CHUNK = 1024  # positions; the logits of 1,024 with 128,896 entries take 0.5 GB in fp32


@dataclass(frozen=True)
class Span:
    """Inputs and targets of one stretch of tokens, int64 [T]; targets from `scored` on count."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: int


@dataclass(frozen=True)
class Score:
    """`nats` is the negative log-likelihood of the scored targets, `greedy` whether greedy decoding would give them all."""

    nats: float
    greedy: bool


def behind(model: Decoder, context: Sequence[int]) -> list[int]:
    """What a model reads before a text: what begins every prompt, then the context; EOS where neither is there."""
    return [*model.prefix, *context] or [model.config.eos]


def continuation(before: Sequence[int], tokens: Sequence[int], longest: int) -> Span:
    """The span that scores `tokens` behind those `before` them, of which as many stay as `longest` inputs allow.

    Of tokens that exceed `longest` themselves the first cannot be scored in one pass: `ValueError`.
    """
    if not tokens or len(tokens) > longest:
        raise ValueError(f"score: got {len(tokens)} tokens, expected 1 to {longest}")
    whole = np.array([*before, *tokens], dtype=np.int64)[-(longest + 1) :]
    return Span(whole[:-1], whole[1:], len(whole) - 1 - len(tokens))


def score_continuations(model: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Scores of (context, tokens) pairs in the order given; without tokens nothing is lost, and all of them were likeliest.

    Tokens that exceed the model's context are read by halves of it, each behind what stands before it, as much as fits:
    every token is scored once.
    """
    spans, owner = [], []
    for i, (context, tokens) in enumerate(pairs):
        new = list(_pieces(behind(model, context), tokens, model.config.context))
        spans += new
        owner += [i] * len(new)
    found = [Score(0.0, True)] * len(pairs)
    for i, one in zip(owner, score(model, spans), strict=True):
        found[i] = Score(found[i].nats + one.nats, found[i].greedy and one.greedy)
    return found


def score(model: Decoder, spans: Sequence[Span]) -> list[Score]:
    """Scores in the order given. A model that gives no numbers is a `StageError`: what is compared by them would mean nothing."""
    scores: dict[int, Score] = {}
    for batch in _batches(spans):
        scores |= zip(batch, _scored(model, [spans[i] for i in batch]), strict=True)
    found = [scores[i] for i in range(len(spans))]
    if lost := sum(not math.isfinite(one.nats) for one in found):
        raise StageError(
            f"evaluate: the model gives no likelihoods, got logits that are not finite for {lost} of {len(found)} texts, "
            "expected numbers: it has diverged, or its type overflows; take an earlier checkpoint, or float32"
        )
    return found


def _pieces(context: Sequence[int], tokens: Sequence[int], longest: int) -> Iterator[Span]:
    step = len(tokens) if len(tokens) <= longest else max(1, longest // 2)
    for start in range(0, len(tokens), step or 1):
        before = [*context, *tokens[max(0, start - longest) : start]]
        yield continuation(before, tokens[start : start + step], longest)


def _batches(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Indices of spans, longest first, so that little is padded and the largest batch comes first."""
    batch: list[int] = []
    for i in sorted(range(len(spans)), key=lambda i: -len(spans[i].targets)):
        if batch and len(spans[batch[0]].targets) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _scored(model: Decoder, batch: Sequence[Span]) -> list[Score]:
    longest = max(len(span.targets) for span in batch)
    inputs, targets = np.zeros((2, len(batch), longest), dtype=np.int64)
    counted = np.zeros((len(batch), longest), dtype=bool)
    for row, span in enumerate(batch):
        n = len(span.targets)
        inputs[row, :n], targets[row, :n], counted[row, span.scored : n] = span.inputs, span.targets, True
    device = model.lm_head.weight.device
    x_SD = model.hidden(torch.from_numpy(inputs).to(device))[torch.from_numpy(counted).to(device)]
    target_S = torch.from_numpy(targets[counted]).to(device)
    nats, likeliest = [], []
    for x, y in zip(x_SD.split(CHUNK), target_S.split(CHUNK), strict=True):
        logits = model.lm_head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats.append(logits.logsumexp(-1) - logits.gather(1, y[:, None])[:, 0])
        likeliest.append(logits.argmax(-1) == y)
    ends = np.cumsum(counted.sum(1))[:-1]
    parts = np.split(torch.cat(nats).double().cpu().numpy(), ends)
    hits = np.split(torch.cat(likeliest).cpu().numpy(), ends)
    return [Score(float(n.sum()), bool(h.all())) for n, h in zip(parts, hits, strict=True)]
