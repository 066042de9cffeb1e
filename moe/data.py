"""Packed training rows from a mixture of tokenised documents; numpy only.

In: a `TokenSource`, the mixture's documents in its own order, each ending in EOS. Out: `Batch`es that are a pure
function of (source, context, rows, packing, seed, step), so that resume needs no cursor and a changed number of ranks no
care: a rank reads its slice of a step's rows, and the slices together are the same rows for every number of ranks.

`moe.packing` says which tokens make a row. In a stream, targets tile the documents laid end to end: each token is
predicted once a pass, except the last `tokens % context`. Best-fit rows hold each token once and may end in padding,
which is a segment of its own and does not count in the loss. A document's input is its tokens moved right by one behind
an EOS, so EOS is what a document starts from, in training as in evaluation and generation, and no target has to be
masked at a border. A document that a cut divides goes on in another row without the text before the cut, but for the
one token that is its first input. Cost: what the packing holds; a batch reads only the documents that it overlaps.
"""

import bisect
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import xxhash

from core.errors import ConfigError, InputError
from core.hashing import digest
from moe.config import TrainConfig
from moe.fim import FimSource
from moe.packing import BestFit, Packing, Stream, permuted


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

    def lengths(self) -> np.ndarray:
        """Number of tokens of every entry, an array of integers."""
        ...

    def mask(self, i: int) -> np.ndarray | None:
        """bool, one a token of entry i: whether it counts in the loss as a target. None: all do."""
        ...

    def domain(self, i: int) -> int:
        """Index into `domains`."""
        ...

    def bytes(self, i: int) -> int:
        """UTF-8 bytes of the text of entry i; 0 where they are not known, which leaves bits per byte NaN."""
        ...


@dataclass(frozen=True)
class Batch:
    """Arrays of shape [B, T], int64 and `mask` bool.

    `segments` numbers the documents of a row from 0; attention stays within one. Where `mask` is False the target does
    not count in the loss: the source masks it, or it is padding, whose domain means nothing.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    domains: np.ndarray
    mask: np.ndarray


class ArrayTokenSource:
    """A `TokenSource` over arrays in memory.

    `documents` end in EOS; `text_bytes` are the UTF-8 bytes of their texts, `masks` as `TokenSource.mask` gives them.
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
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self.vocab_size, self.eos, self.domains = vocab_size, eos, tuple(domains)
        self._documents = [np.asarray(d, dtype=np.int32) for d in documents]
        self._bytes = list(text_bytes)
        self._domains = list(document_domains) if document_domains is not None else [0] * len(documents)
        self._masks = list(masks) if masks is not None else [None] * len(documents)
        if not len(self._documents) == len(self._bytes) == len(self._domains) == len(self._masks):
            raise InputError(
                f"tokens: a document needs its bytes and domain, got {len(self._documents)} documents, "
                f"{len(self._bytes)} byte counts, {len(self._domains)} domains, {len(self._masks)} masks; "
                "pass one of each"
            )

    @property
    def content(self) -> str:
        h = xxhash.xxh3_128()
        for document, domain, mask in zip(self._documents, self._domains, self._masks, strict=True):
            h.update(f"{len(document)}:{domain}:{mask is not None}:".encode())
            h.update(document.tobytes())
            if mask is not None:
                h.update(np.packbits(mask).tobytes())
        return h.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def tokens(self, i: int) -> np.ndarray:
        return self._documents[i]

    def length(self, i: int) -> int:
        return len(self._documents[i])

    def lengths(self) -> np.ndarray:
        return np.array([len(d) for d in self._documents], dtype=np.int64)

    def mask(self, i: int) -> np.ndarray | None:
        return self._masks[i]

    def domain(self, i: int) -> int:
        return self._domains[i]

    def bytes(self, i: int) -> int:
        return self._bytes[i]


class PackedRows:
    """A source packed into rows; `batch(step)` gives the rows of one training step.

    `growth` holds (step, rows) with rising steps: from this step on, that many rows.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        context: int,
        rows: int,
        seed: int = 0,
        shuffle: bool = False,
        repeat: bool = False,
        growth: Sequence[tuple[int, int]] = (),
        packing: Literal["stream", "best_fit"] = "stream",
    ) -> None:
        self.source, self.context = source, context
        self.seed, self.shuffle, self.repeat = seed, shuffle, repeat
        lengths = source.lengths()
        self.packing: Packing = Stream(lengths, context) if packing == "stream" else BestFit(lengths, context)
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.rows_per_pass = self.packing.rows
        self._stages = [(0, rows), *growth]
        self._first_rows = [0]  # of each stage
        for (start, count), (stop, _) in zip(self._stages, self._stages[1:], strict=False):
            self._first_rows.append(self._first_rows[-1] + (stop - start) * count)
        self.fingerprint = digest([source.vocab_size, source.eos, list(source.domains), source.content])
        if not self.rows_per_pass:
            raise ConfigError(
                f"train: the mixture does not fill one row, got {self.tokens} tokens, expected at least {context}; "
                "add documents or shorten model.context"
            )

    @property
    def steps(self) -> int | None:
        """Training steps that the mixture holds; None when it is repeated without end."""
        if self.repeat:
            return None
        stage = bisect.bisect_right(self._first_rows, self.rows_per_pass) - 1
        start, rows = self._stages[stage]
        return start + (self.rows_per_pass - self._first_rows[stage]) // rows

    def rows_of(self, step: int) -> int:
        """Rows of training step `step`, of all ranks."""
        return self._stages[self._stage(step)][1]

    def first_row(self, step: int) -> int:
        """Rows of all steps before `step`."""
        stage = self._stage(step)
        start, rows = self._stages[stage]
        return self._first_rows[stage] + (step - start) * rows

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of training step `step`, counted from 0, that rank `rank` of `world` takes: an equal slice, in order.

        Beyond the last full batch: `ConfigError`, unless `repeat`. So are rows that `world` does not divide.
        """
        rows = self.rows_of(step)
        if not 0 <= rank < world or rows % world:
            raise ConfigError(
                f"train: the ranks do not share a step's rows equally, got rank {rank} of {world} and {rows} rows from "
                f"step {self._stages[self._stage(step)][0]} on; make train.rows and train.row_growth multiples of the ranks"
            )
        if self.steps is not None and step >= self.steps:
            raise ConfigError(
                f"train: the mixture has no batch {step}, got {self.tokens} tokens = {self.steps} batches of "
                f"{' then '.join(str(count) for _, count in self._stages)} x {self.context}; "
                "lower train.steps, add tokens to the mixture or set train.repeat"
            )
        count = rows // world
        batch = Batch(*(np.empty((count, self.context), dtype) for dtype in (*[np.int64] * 4, np.bool_)))
        first = self.first_row(step) + rank * count
        for b in range(count):
            self._fill(batch, b, first + b)
        return batch

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._stages, step, key=lambda stage: stage[0]) - 1

    def _fill(self, batch: Batch, b: int, row: int) -> None:
        """Row b of a batch: the `row`-th row counted over all passes. What no document fills is padding."""
        turn, index = divmod(row, self.rows_per_pass)
        if self.shuffle:
            index = permuted(index, self.rows_per_pass, self.seed, turn)
        at = segment = 0
        for segment, (i, low, high) in enumerate(self.packing.pieces(index), 1):
            here = slice(at, at := at + high - low)
            batch.inputs[b, here], batch.targets[b, here], batch.mask[b, here] = self._shifted(i, low, high)
            batch.segments[b, here], batch.domains[b, here] = segment - 1, self.source.domain(i)
        batch.inputs[b, at:] = batch.targets[b, at:] = self.source.eos
        batch.segments[b, at:], batch.domains[b, at:], batch.mask[b, at:] = segment, 0, False

    def _shifted(self, i: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | bool]:
        """Inputs, targets and loss mask of tokens `low` to `high` of entry i."""
        tokens, mask, vocab_size = self.source.tokens(i), self.source.mask(i), self.source.vocab_size
        expected = self.source.length(i)
        if len(tokens) != expected or (mask is not None and len(mask) != expected):
            raise InputError(
                f"train: document {i} of the mixture changed, got {len(tokens)} tokens"
                f"{'' if mask is None else f' and a loss mask of {len(mask)}'}, expected {expected}; mix again"
            )
        targets = tokens[low:high]
        if not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
            raise InputError(
                f"train: document {i} has a token outside the vocabulary, got {targets.min()} to {targets.max()}, "
                f"expected 0 to {vocab_size - 1}; tokenise again with this tokenizer"
            )
        inputs = np.empty_like(targets)
        inputs[:1] = tokens[low - 1] if low else self.source.eos
        inputs[1:] = targets[:-1]
        return inputs, targets, True if mask is None else mask[low:high]


def training_rows(config: TrainConfig, source: TokenSource) -> PackedRows:
    """The rows that a run trains on. A source that does not fit the model or is too short is a `ConfigError`."""
    model, seed = config.model, config.seed if config.order_seed is None else config.order_seed
    if config.fim_fraction and config.fim_tokens is not None:
        if config.packing != "best_fit":
            raise ConfigError(
                f"train.fim_fraction: a stream cuts rearranged documents between their parts, got train.packing "
                f"{config.packing} and fraction {config.fim_fraction}; set train.packing to best_fit"
            )
        source = FimSource(
            source,
            fraction=config.fim_fraction,
            domains=config.fim_domains,
            sentinels=config.fim_tokens,
            context=model.context,
            seed=seed,
        )
    check_vocabulary(source, vocab_size=model.vocab_size, eos=model.eos)
    rows = PackedRows(
        source,
        context=model.context,
        rows=config.rows,
        seed=seed,
        shuffle=config.shuffle,
        repeat=config.repeat,
        growth=config.row_growth,
        packing=config.packing,
    )
    if rows.steps is not None and rows.steps < config.steps:
        raise ConfigError(
            f"train: the mixture is too short, got {rows.tokens} tokens = {rows.steps} steps of {config.rows} x "
            f"{model.context}, expected {config.steps}; lower train.steps, add tokens or set train.repeat"
        )
    return rows


def check_vocabulary(source: TokenSource, *, vocab_size: int, eos: int) -> None:
    """`ConfigError` for a source whose tokens a model of that vocabulary does not have, or that ends documents differently."""
    problems = []
    if source.vocab_size > vocab_size:
        problems.append(
            f"train: the mixture's vocabulary exceeds the embedding, got {source.vocab_size} tokens, "
            f"expected at most {vocab_size}; raise model.vocab_size"
        )
    if source.eos != eos:
        problems.append(
            f"train: the mixture ends documents differently, got token {source.eos}, expected model.eos {eos}; "
            "tokenise it with the model's tokenizer"
        )
    if problems:
        raise ConfigError(*problems)


class ReadAhead:
    """`PackedRows.batch` for one rank with the next step's batch read by a thread meanwhile; it changes nothing but time.

    What reading raises is raised by the call that asks for that step. Use as a context manager, or `close` it.
    """

    def __init__(self, rows: PackedRows, rank: int = 0, world: int = 1) -> None:
        self._rows, self._rank, self._world = rows, rank, world
        self._thread = ThreadPoolExecutor(1, "batches")  # one: sources map their shards without a lock
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int) -> Batch:
        ready = self._next[1] if self._next is not None and self._next[0] == step else self._read(step)
        batch = ready.result()
        self._next = step + 1, self._read(step + 1)
        return batch

    def close(self) -> None:
        """Waits for the batch that is being read."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._rows.batch, step, self._rank, self._world)
