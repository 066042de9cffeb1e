"""Packed training rows from a mixture of tokenised documents; numpy only.

In: a `TokenSource`, the mixture's documents in its own order, each ending in EOS. Out: `Batch`es that are a pure
function of (source, context, rows, seed, step), so that resume needs no cursor and a changed number of workers no care.

Documents are laid end to end and the stream is cut every `context` tokens. Targets tile the stream: each token is
predicted once a pass, except the last `tokens % context`. A document's input is its tokens moved right by one behind an
EOS, so EOS is what a document starts from, in training as in evaluation and generation, and no target has to be masked
at a border. A document that a cut divides goes on in the next row without the text before the cut. Cost: 8 bytes a
document for prefix sums; a batch reads only the documents that it overlaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from core.errors import ConfigError, InputError
from core.hashing import digest, seeded

FEISTEL_ROUNDS = 4  # Luby and Rackoff 1988: four rounds make a strong pseudo-random permutation


class TokenSource(Protocol):
    """A mixture's documents, in order. A document that the mixture repeats has several entries."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def domains(self) -> Sequence[str]: ...

    @property
    def content(self) -> str:
        """Hash of all entries and their tokens: a run resumes only on the mixture it began with."""
        ...

    def __len__(self) -> int:
        """Documents in the mixture's index."""
        ...

    def tokens(self, i: int) -> np.ndarray:
        """int32 token ids of entry i, EOS included."""
        ...

    def length(self, i: int) -> int:
        """Number of tokens of entry i, EOS included."""
        ...

    def domain(self, i: int) -> int:
        """Index into `domains`."""
        ...

    def bytes(self, i: int) -> int:
        """UTF-8 bytes of the text of entry i."""
        ...


@dataclass(frozen=True)
class Batch:
    """int64 arrays of shape [B, T]. `segments` numbers the documents of a row from 0; attention stays within one."""

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    domains: np.ndarray


class ArrayTokenSource:
    """A `TokenSource` over arrays in memory.

    `documents` end in EOS; `text_bytes` are the UTF-8 bytes of their texts.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        *,
        vocab_size: int,
        eos: int,
        text_bytes: Sequence[int],
        document_domains: Sequence[int] | None = None,
        domains: Sequence[str] = ("all",),
    ) -> None:
        self.vocab_size, self.eos, self.domains = vocab_size, eos, tuple(domains)
        self._documents = [np.asarray(d, dtype=np.int32) for d in documents]
        self._bytes = list(text_bytes)
        self._domains = list(document_domains) if document_domains is not None else [0] * len(documents)
        if not len(self._documents) == len(self._bytes) == len(self._domains):
            raise InputError(
                f"tokens: a document needs its bytes and domain, got {len(self._documents)} documents, "
                f"{len(self._bytes)} byte counts, {len(self._domains)} domains; pass one of each"
            )

    @property
    def content(self) -> str:
        h = xxhash.xxh3_128()
        for document, domain in zip(self._documents, self._domains, strict=True):
            h.update(f"{len(document)}:{domain}:".encode())
            h.update(document.tobytes())
        return h.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def tokens(self, i: int) -> np.ndarray:
        return self._documents[i]

    def length(self, i: int) -> int:
        return len(self._documents[i])

    def domain(self, i: int) -> int:
        return self._domains[i]

    def bytes(self, i: int) -> int:
        return self._bytes[i]


class PackedRows:
    """The source's token stream cut into rows; `batch(step)` gives the rows of one training step."""

    def __init__(
        self,
        source: TokenSource,
        *,
        context: int,
        rows: int,
        seed: int = 0,
        shuffle: bool = False,
        repeat: bool = False,
    ) -> None:
        self.source, self.context, self.rows = source, context, rows
        self.seed, self.shuffle, self.repeat = seed, shuffle, repeat
        lengths = np.fromiter((source.length(i) for i in range(len(source))), dtype=np.int64, count=len(source))
        self._ends = np.cumsum(lengths)
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.rows_per_pass = self.tokens // context
        self.fingerprint = digest([source.vocab_size, source.eos, list(source.domains), source.content])
        if not self.rows_per_pass:
            raise ConfigError(
                f"train: the mixture does not fill one row, got {self.tokens} tokens, expected at least {context}; "
                "add documents or shorten model.context"
            )

    @property
    def steps(self) -> int | None:
        """Training steps that the mixture holds; None when it is repeated without end."""
        return None if self.repeat else self.rows_per_pass // self.rows

    def batch(self, step: int) -> Batch:
        """The rows of training step `step`, counted from 0.

        Beyond the last full batch: `ConfigError`, unless `repeat`.
        """
        if self.steps is not None and step >= self.steps:
            raise ConfigError(
                f"train: the mixture has no batch {step}, got {self.tokens} tokens = {self.steps} batches of "
                f"{self.rows} x {self.context}; lower train.steps, add tokens to the mixture or set train.repeat"
            )
        rows = [self._row(r) for r in range(step * self.rows, (step + 1) * self.rows)]
        return Batch(*(np.stack(part) for part in zip(*rows, strict=True)))

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets, segments and domains, [T] each, of the `row`-th row counted over all passes."""
        turn, index = divmod(row, self.rows_per_pass)
        if self.shuffle:
            index = permuted(index, self.rows_per_pass, self.seed, turn)
        start, stop = index * self.context, (index + 1) * self.context
        inputs, targets, segments, domains = (np.empty(self.context, dtype=np.int64) for _ in range(4))
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        for i in range(first, last + 1):
            begin = int(self._ends[i - 1]) if i else 0
            low, high = max(start, begin), min(stop, int(self._ends[i]))
            here = slice(low - start, high - start)
            inputs[here], targets[here] = self._shifted(i, low - begin, high - begin)
            segments[here], domains[here] = i - first, self.source.domain(i)
        return inputs, targets, segments, domains

    def _shifted(self, i: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of tokens `low` to `high` of entry i. An entry without tokens gives none."""
        tokens, vocab_size = self.source.tokens(i), self.source.vocab_size
        if len(tokens) != self.source.length(i):
            raise InputError(
                f"train: document {i} of the mixture changed, got {len(tokens)} tokens, "
                f"expected {self.source.length(i)}; mix again"
            )
        targets = tokens[low:high]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
            raise InputError(
                f"train: document {i} has a token outside the vocabulary, got {targets.min()} to {targets.max()}, "
                f"expected 0 to {vocab_size - 1}; tokenise again with this tokenizer"
            )
        inputs = np.empty_like(targets)
        inputs[:1] = tokens[low - 1] if low else self.source.eos
        inputs[1:] = targets[:-1]
        return inputs, targets


def permuted(index: int, n: int, seed: int, turn: int = 0) -> int:
    """Where a seeded permutation of range(n) sends `index`; `turn` gives each pass its own order.

    A Feistel cipher over the next power of four, walked until inside n (at most four walks on average). It needs no
    table, so row r of a pass of 10^10 rows costs the same as row 0.
    """
    half = max(1, (n.bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ int(seeded(seed, f"{turn}/{r}/{right}") * (mask + 1))
        index = left << half | right
        if index < n:
            return index
