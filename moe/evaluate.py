"""Held-out bits per byte of each domain: comparable between tokenizers, as a byte is a byte for all of them.

In: a model folder and a `TokenSource` of held-out documents. Out: domain -> {bpb, tokens, bytes, docs}; domains without
documents are absent. bits per byte = sum of -log2 p over all tokens, EOS included, / UTF-8 bytes of the text, EOS
excluded. A document starts from EOS. One longer than the context is read in windows that move by half a context: the
first window scores all its tokens, each later one its second half only, so every token is scored once and behind a full
half context at least. Cost: one forward pass over at most twice the tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.errors import ConfigError
from moe import checkpoint
from moe.data import TokenSource
from moe.loss import token_losses
from moe.model import Decoder

BATCH_TOKENS = 8192  # chosen: 2 cores gain nothing from more


@dataclass(frozen=True)
class Window:
    """Inputs and targets of one document's window; targets from `scored` on count."""

    domain: int
    inputs: np.ndarray
    targets: np.ndarray
    scored: int


def evaluate(model_folder: Path, source: TokenSource) -> dict[str, dict[str, float]]:
    """See the module. A source of another vocabulary than the model's is a `ConfigError`."""
    model = checkpoint.load(Path(model_folder))
    config = model.config
    if source.vocab_size > config.vocab_size or source.eos != config.eos:
        raise ConfigError(
            f"evaluate: the documents have another vocabulary, got {source.vocab_size} tokens and EOS {source.eos}, "
            f"expected at most {config.vocab_size} and EOS {config.eos}; tokenise them with the model's tokenizer"
        )
    size = len(source.domains)
    nats, tokens, text_bytes, docs = np.zeros(size), *(np.zeros(size, dtype=np.int64) for _ in range(3))
    for batch in _batches(source, config.context):
        for window, nll in zip(batch, window_nats(model, batch), strict=True):
            nats[window.domain] += nll
            tokens[window.domain] += len(window.targets) - window.scored
    for i in range(len(source)):
        docs[source.domain(i)] += 1
        text_bytes[source.domain(i)] += source.bytes(i)
    return {
        name: {
            "bpb": float(nats[d] / np.log(2) / text_bytes[d]) if text_bytes[d] else float("nan"),
            "tokens": int(tokens[d]),
            "bytes": int(text_bytes[d]),
            "docs": int(docs[d]),
        }
        for d, name in enumerate(source.domains)
        if docs[d]
    }


def windows(tokens: np.ndarray, domain: int, context: int, eos: int) -> Iterator[Window]:
    """The windows of one document (see the module)."""
    inputs, stride = np.concatenate(([eos], tokens[:-1])), max(1, context // 2)
    start, scored = 0, 0
    while scored < len(tokens):
        stop = min(start + context, len(tokens))
        yield Window(domain, inputs[start:stop], tokens[start:stop], scored - start)
        start, scored = start + stride, stop


@torch.inference_mode()
def window_nats(model: Decoder, batch: list[Window]) -> list[float]:
    """Summed negative log-likelihood of each window's scored targets.

    Shorter windows are padded behind their end, which no token sees.
    """
    longest = max(len(w.targets) for w in batch)
    padded = np.zeros((2, len(batch), longest), dtype=np.int64)
    for row, w in enumerate(batch):
        padded[0, row, : len(w.inputs)], padded[1, row, : len(w.targets)] = w.inputs, w.targets
    inputs_BT, targets_BT = torch.from_numpy(padded)
    x_SD = model.hidden(inputs_BT).flatten(0, 1)
    nll_BT = token_losses(x_SD, model.lm_head.weight, targets_BT.flatten()).view_as(targets_BT).double()
    return [float(nll_T[w.scored : len(w.targets)].sum()) for w, nll_T in zip(batch, nll_BT, strict=True)]


def _batches(source: TokenSource, context: int) -> Iterator[list[Window]]:
    """Windows in the source's order, as many as fill `BATCH_TOKENS`."""
    batch: list[Window] = []
    longest = 0
    for i in range(len(source)):
        for window in windows(source.tokens(i), source.domain(i), context, source.eos):
            longest = max(longest, len(window.targets))
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                yield batch
                batch, longest = [], len(window.targets)
            batch.append(window)
    if batch:
        yield batch
