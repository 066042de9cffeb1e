"""Held-out bits per byte of each document and domain: comparable between tokenizers, as a byte is a byte for all of them.

In: a model folder and a `TokenSource` of held-out documents. Out: `DocumentLosses`, one entry a document in the source's
order, and by domain {bpb, tokens, bytes, docs}; domains without documents are absent. bits per byte = sum of -log2 p
over all tokens, EOS included, / UTF-8 bytes of the text, EOS excluded. A document starts from EOS. One longer than the
context is read in windows that move by half a context: the first window scores all its tokens, each later one its
second half only, so every token is scored once and behind a full half context at least. Cost: one forward pass over at
most twice the tokens.
"""

from collections.abc import Iterator, Sequence
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

    document: int
    inputs: np.ndarray
    targets: np.ndarray
    scored: int


@dataclass(frozen=True)
class DocumentLosses:
    """What a model needs for each held-out document; entry i is entry i of the source."""

    bits: np.ndarray  # float64 [n]
    tokens: np.ndarray  # int64 [n], EOS included
    bytes: np.ndarray  # int64 [n], UTF-8 of the text
    domain: np.ndarray  # int32 [n], index into the source's domains


def evaluate(model_folder: Path, source: TokenSource) -> dict[str, dict[str, float]]:
    """Bits per byte by domain (see the module). A source of another vocabulary than the model's is a `ConfigError`."""
    return by_domain(document_losses(model_folder, source), source.domains)


def by_domain(losses: DocumentLosses, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """Sums of the documents of each domain, and their bits per byte (NaN where no document has text)."""
    size = len(domains)
    bits = np.bincount(losses.domain, losses.bits, size)
    tokens, text_bytes = (np.bincount(losses.domain, n, size) for n in (losses.tokens, losses.bytes))
    docs = np.bincount(losses.domain, minlength=size)
    return {
        name: {
            "bpb": float(bits[d] / text_bytes[d]) if text_bytes[d] else float("nan"),
            "tokens": int(tokens[d]),
            "bytes": int(text_bytes[d]),
            "docs": int(docs[d]),
        }
        for d, name in enumerate(domains)
        if docs[d]
    }


def document_losses(model_folder: Path, source: TokenSource) -> DocumentLosses:
    """The loss of every document. A source of another vocabulary than the model's is a `ConfigError`."""
    model = checkpoint.load(Path(model_folder))
    config = model.config
    if source.vocab_size > config.vocab_size or source.eos != config.eos:
        raise ConfigError(
            f"evaluate: the documents have another vocabulary, got {source.vocab_size} tokens and EOS {source.eos}, "
            f"expected at most {config.vocab_size} and EOS {config.eos}; tokenise them with the model's tokenizer"
        )
    docs = range(len(source))
    nats = np.zeros(len(source))
    for batch in _batches(source, config.context):
        for window, nll in zip(batch, window_nats(model, batch), strict=True):
            nats[window.document] += nll
    return DocumentLosses(
        nats / np.log(2),
        np.array([source.length(i) for i in docs], np.int64),
        np.array([source.bytes(i) for i in docs], np.int64),
        np.array([source.domain(i) for i in docs], np.int32),
    )


def windows(tokens: np.ndarray, document: int, context: int, eos: int) -> Iterator[Window]:
    """The windows of one document (see the module)."""
    inputs, stride = np.concatenate(([eos], tokens[:-1])), max(1, context // 2)
    start, scored = 0, 0
    while scored < len(tokens):
        stop = min(start + context, len(tokens))
        yield Window(document, inputs[start:stop], tokens[start:stop], scored - start)
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
        for window in windows(source.tokens(i), i, context, source.eos):
            longest = max(longest, len(window.targets))
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                yield batch
                batch, longest = [], len(window.targets)
            batch.append(window)
    if batch:
        yield batch
