"""Token files of Megatron's preprocessing (`.bin` and `.idx`) from elsewhere, as a `TokenSource`.

In: paths without suffix by domain. Out: the files' documents, file after file in the order given, so a run over several
domains wants `train.shuffle`. Read is the `IndexedDataset` format of megatron-core (magic MMIDIDX, version 1: there is no
other), little-endian:

    .idx  magic 9 bytes, version u64, dtype code u8, sequences n u64, boundaries m u64, then tokens of each sequence
          int32 [n], byte offsets int64 [n], boundaries int64 [m]: document d is the sequences from boundary d to d + 1;
          multimodal files have a mode int8 [n] behind
    .bin  the tokens of all sequences

A file whose documents were written without EOS (`preprocess_data.py` without `--append-eod`) gets one behind each: every
document here ends in `eos`, whatever its file does, and an empty one stays empty. What the format does not have: bytes of
the texts (0 here, so bits per byte are NaN), loss masks, and a hash of the tokens. `content` covers the indexes, the sizes and
all of a `.bin` up to `HASHED_BYTES`, of a longer one evenly spread blocks of as many bytes in all; tokens changed between them
go unnoticed.

Cost: 9 bytes a document, and at the start one page read a document to see how it ends. The `.bin` is mapped.
"""

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from core.errors import InputError
from core.hashing import digest, file_digest

MAGIC, FAIRSEQ_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
INTEGERS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # codes of megatron-core 0.16's DType
FLOATS = (6, 7)
HASHED_BYTES, BLOCK_BYTES = 256 << 20, 64 << 10
SUFFIXES = (".bin", ".idx")


class MegatronSource:
    """Documents of Megatron files; `files` maps a domain to the path or paths of its files, with or without suffix.

    A file that is no whole one is an `InputError`, and so is a token outside the vocabulary when its document is read.
    """

    def __init__(self, files: Mapping[str, str | Path | Sequence[str | Path]], *, vocab_size: int, eos: int) -> None:
        self._arguments = dict(files), vocab_size, eos
        self.vocab_size, self.eos, self.domains = vocab_size, eos, tuple(files)
        self._files = [
            _open(_prefix(path), d, eos)
            for d, paths in enumerate(files.values())
            for path in ([paths] if isinstance(paths, str | Path) else paths)
        ]
        counts = [len(f.ended) for f in self._files]
        self._ends = np.cumsum(counts, dtype=np.int64).tolist()
        self.content = digest(
            [vocab_size, eos, list(self.domains), [[f.domain, _content(f.prefix)] for f in self._files]]
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, self._arguments

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def tokens(self, i: int) -> np.ndarray:
        """int32 token ids of entry i, EOS last."""
        file, d = self._place(i)
        raw = file.tokens[file.begins[d] : file.begins[d + 1]]
        if len(raw) and not 0 <= int(raw.min()) <= int(raw.max()) < self.vocab_size:
            raise InputError(
                f"train: document {d} of {file.prefix}.bin has a token outside the vocabulary, got {raw.min()} to "
                f"{raw.max()}, expected 0 to {self.vocab_size - 1}; name the vocabulary of its tokenizer"
            )
        if file.ended[d]:
            return raw.astype(np.int32)
        return np.append(raw.astype(np.int32), np.int32(self.eos))

    def length(self, i: int) -> int:
        file, d = self._place(i)
        return int(file.begins[d + 1] - file.begins[d]) + (not file.ended[d])

    def lengths(self) -> np.ndarray:
        """int64 [len(self)]: tokens of every entry."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(f.begins) + ~f.ended for f in self._files)])

    def mask(self, i: int) -> np.ndarray | None:
        """None: the format has no loss masks."""
        return None

    def domain(self, i: int) -> int:
        return self._place(i)[0].domain

    def bytes(self, i: int) -> int:
        """0: the format does not say."""
        return 0

    def _place(self, i: int) -> tuple["_File", int]:
        """The file of entry i and its document there."""
        if not 0 <= i < len(self):
            raise IndexError(f"entry {i} of {len(self)}")
        at = bisect_right(self._ends, i)
        return self._files[at], i - (self._ends[at - 1] if at else 0)


@dataclass(frozen=True)
class _File:
    prefix: str
    domain: int
    tokens: np.ndarray  # mapped
    begins: np.ndarray  # int64 [documents + 1], in tokens
    ended: np.ndarray  # bool [documents]: ends in EOS, or is empty


def _reopened(files: Mapping[str, str | Path | Sequence[str | Path]], vocab_size: int, eos: int) -> MegatronSource:
    return MegatronSource(files, vocab_size=vocab_size, eos=eos)


def _prefix(path: str | Path) -> str:
    text = str(path)
    return text[:-4] if text.endswith(SUFFIXES) else text


def _open(prefix: str, domain: int, eos: int) -> _File:
    for suffix in SUFFIXES:
        if not Path(prefix + suffix).is_file():
            raise InputError(f"train: no Megatron file {prefix}{suffix}; name the path that .bin and .idx share")
    dtype, begins = _index(f"{prefix}.idx")
    size, expected = Path(f"{prefix}.bin").stat().st_size, int(begins[-1]) * dtype.itemsize
    if size != expected:
        raise InputError(
            f"train: {prefix}.bin is cut short or not its index's, got {size} bytes, expected {expected}; copy both again"
        )
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r") if size else np.zeros(0, dtype)
    ended = np.diff(begins) == 0
    full = np.flatnonzero(~ended)
    ended[full] = tokens[begins[full + 1] - 1] == eos
    return _File(prefix, domain, tokens, begins, ended)


def _index(path: str) -> tuple[np.dtype, np.ndarray]:
    """The dtype of the tokens, and where each document begins, in tokens, with the end behind: int64 [documents + 1]."""
    raw = np.fromfile(path, dtype=np.uint8)
    head = raw[: HEADER.size].tobytes()
    if head.startswith(FAIRSEQ_MAGIC):
        raise _wrong(path, "an index of fairseq's older format", "TNTIDX", "MMIDIDX")
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise _wrong(path, "no Megatron index", f"{len(raw)} bytes that begin {head[:9]!r}", repr(MAGIC))
    _, version, code, n, m = HEADER.unpack(head)
    if version != VERSION:
        raise _wrong(path, "an index of another version", str(version), str(VERSION))
    if code not in INTEGERS:
        kind = "floating-point numbers" if code in FLOATS else "an unknown type"
        raise _wrong(path, f"an index of {kind}", f"dtype code {code}", f"one of {sorted(INTEGERS)}")
    whole = HEADER.size + n * 12 + m * 8
    if len(raw) not in (whole, whole + n):
        raise _wrong(path, "cut short or overwritten", f"{len(raw)} bytes", f"{whole} for {n} sequences")
    if raw[whole:].any():
        raise _wrong(path, "of a multimodal dataset", f"{np.count_nonzero(raw[whole:])} sequences", "text alone")
    dtype = np.dtype(INTEGERS[code])
    lengths = raw[HEADER.size :][: n * 4].view("<i4")
    pointers = raw[HEADER.size + n * 4 :][: n * 8].view("<i8")
    boundaries = raw[HEADER.size + n * 12 :][: m * 8].view("<i8")
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise _wrong(path, "damaged", "offsets other than the sums of the lengths", "sequences end to end")
    if not m or boundaries[0] != 0 or boundaries[-1] != n or (np.diff(boundaries) < 0).any():
        raise _wrong(path, "damaged", "document boundaries that do not rise from 0 to the end", f"0 to {n}")
    return dtype, starts[boundaries]


def _wrong(path: str, what: str, got: str, expected: str) -> InputError:
    return InputError(
        f"train: {path} is {what}, got {got}, expected {expected}; write it again with megatron-core's preprocessing"
    )


def _content(prefix: str) -> str:
    """Hash of a file pair (see the module)."""
    size = Path(f"{prefix}.bin").stat().st_size
    blocks = HASHED_BYTES // BLOCK_BYTES
    starts = (
        range(0, size, BLOCK_BYTES)
        if size <= HASHED_BYTES
        else [k * (size - BLOCK_BYTES) // (blocks - 1) for k in range(blocks)]
    )
    running = xxhash.xxh3_128()
    with open(f"{prefix}.bin", "rb") as f:
        for start in starts:
            f.seek(start)
            running.update(f.read(BLOCK_BYTES))
    return digest([file_digest(f"{prefix}.idx"), size, running.hexdigest()])
