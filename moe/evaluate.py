"""Held-out bits per byte of each document and domain: comparable between tokenizers, as a byte is a byte for all of them.

In: a model, or its folder, and a `TokenSource` of held-out documents. Out: `DocumentLosses`, one entry a document in the source's
order, and by domain `HeldOut`; domains without documents are absent. bits per byte = sum of -log2 p
over all tokens, EOS included, / UTF-8 bytes of the text, EOS excluded. A document is read behind EOS, or behind what a hub
folder's tokenizer puts there. One longer than the
context is read in windows that move by half a context: the first window scores all its tokens, each later one its
second half only, so every token is scored once and behind a full half context at least. Cost: one forward pass over at
most twice the tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np

import moe
from core.errors import ConfigError
from moe.data import TokenSource
from moe.model import Decoder
from moe.score import Span, behind, score

WINDOWS = 512  # of documents, read and scored at a time


@dataclass(frozen=True)
class DocumentLosses:
    """What a model needs for each held-out document; entry i is entry i of the source."""

    bits: np.ndarray  # float64 [n]
    tokens: np.ndarray  # int64 [n], EOS included
    bytes: np.ndarray  # int64 [n], UTF-8 of the text
    domain: np.ndarray  # int32 [n], index into the source's domains


class HeldOut(TypedDict):
    """Sums over the documents of a domain, and their bits per byte (None where no document has text)."""

    bpb: float | None
    tokens: int
    bytes: int
    docs: int


def evaluate(model: Path | Decoder, source: TokenSource) -> dict[str, HeldOut]:
    """Bits per byte by domain (see the module). A source of another vocabulary than the model's is a `ConfigError`."""
    return by_domain(document_losses(model, source), source.domains)


def by_domain(losses: DocumentLosses, domains: Sequence[str]) -> dict[str, HeldOut]:
    """The documents' losses summed up."""
    size = len(domains)
    bits = np.bincount(losses.domain, losses.bits, size)
    tokens, text_bytes = (np.bincount(losses.domain, n, size) for n in (losses.tokens, losses.bytes))
    docs = np.bincount(losses.domain, minlength=size)
    return {
        name: {
            "bpb": float(bits[d] / text_bytes[d]) if text_bytes[d] else None,
            "tokens": int(tokens[d]),
            "bytes": int(text_bytes[d]),
            "docs": int(docs[d]),
        }
        for d, name in enumerate(domains)
        if docs[d]
    }


def document_losses(model: Path | Decoder, source: TokenSource) -> DocumentLosses:
    """The loss of every document. A source of another vocabulary than the model's is a `ConfigError`."""
    decoder = moe.load(model) if isinstance(model, Path) else model
    config = decoder.config
    if source.vocab_size > config.vocab_size or source.eos != config.eos:
        raise ConfigError(
            f"evaluate: the documents have another vocabulary, got {source.vocab_size} tokens and EOS {source.eos}, "
            f"expected at most {config.vocab_size} and EOS {config.eos}; tokenise them with the model's tokenizer"
        )
    docs = range(len(source))
    nats = np.zeros(len(source))
    start = behind(decoder, [])
    every = ((i, span) for i in docs for span in windows(source.tokens(i), config.context, start))
    for some in _groups(every, WINDOWS):
        for (document, _), found in zip(some, score(decoder, [span for _, span in some]), strict=True):
            nats[document] += found.nats
    return DocumentLosses(
        nats / np.log(2),
        np.array([source.length(i) for i in docs], np.int64),
        np.array([source.bytes(i) for i in docs], np.int64),
        np.array([source.domain(i) for i in docs], np.int32),
    )


def windows(tokens: np.ndarray, context: int, before: Sequence[int]) -> Iterator[Span]:
    """The windows of one document (see the module) behind the tokens `before` it, of which the context holds more."""
    whole, stride = np.concatenate((before, tokens)).astype(np.int64), max(1, context // 2)
    inputs, targets = whole[:-1], whole[1:]
    start, scored = 0, len(before) - 1
    while scored < len(targets):
        stop = min(start + context, len(targets))
        yield Span(inputs[start:stop], targets[start:stop], scored - start)
        start, scored = start + stride, stop


def _groups(items: Iterator[tuple[int, Span]], size: int) -> Iterator[list[tuple[int, Span]]]:
    while some := list(islice(items, size)):
        yield some
