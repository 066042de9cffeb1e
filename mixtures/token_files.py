"""Token shards as files: Megatron's `.bin` + `.idx`, datatrove's `.ds` + `.ds.index`, and their names below a root.

A token is a little-endian number of `token_dtype`; each document is one sequence that ends in EOS.

- `<shard>.bin`: the tokens of all documents, nothing else. `<shard>.ds` holds the same bytes.
- `<shard>.idx` (`IndexedDataset` of megatron-core 0.16): magic, version 1 (u64), dtype code (u8), sequences n (u64),
  document boundaries n + 1 (u64), then lengths int32 [n], byte offsets int64 [n], boundaries int64 [n + 1].
- `<shard>.ds.index` (`TokenizedFile` of datatrove 0.10): where each document ends, in tokens, u64 [n].
- `<shard>.levels`: one byte a token, its level (`mixtures.levels`); only where some token's is not 0.
- `<shard>.docs.parquet`: one row a document in the order of the files above; it is written last and commits them.

A shard without documents has only the last one: an empty `.bin` cannot be mapped. Numpy only, for `mixtures.reader`.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import StageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[np.dtype, int] = {
    np.dtype(np.uint16): 8,
    np.dtype(np.int32): 4,
}  # those that `optimal_dtype` picks
AGAIN = "remove manifests/tokenize.json and run tokenize, which makes this shard again"
ANSWER, PROMPT, SCAFFOLD = 0, 1, 2  # levels; all that is no dialogue is ANSWER
LEARN = {"all": SCAFFOLD, "content": PROMPT, "answers": ANSWER}  # what a phase learns: highest level in the loss
UINT16_VOCAB = 65_500  # Megatron's `optimal_dtype`: two bytes below this vocabulary


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below a vocabulary of 65,500, else int32 (which datatrove reads as its uint32: ids are not negative)."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB else np.int32)


def shard_name(tokenizer: str, dataset: str, shard: str) -> str:
    """Name of a token shard below the root, without suffix."""
    return f"tokens/{tokenizer}/{dataset}/{shard}"


def docs_name(tokenizer: str, dataset: str, shard: str) -> str:
    return f"{shard_name(tokenizer, dataset, shard)}.docs.parquet"


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The `.idx` file of documents with `lengths` tokens each."""
    n = len(lengths)
    pointers = np.zeros(n, dtype="<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], n, n + 1)
    return b"".join(
        [header, lengths.astype("<i4").tobytes(), pointers.tobytes(), np.arange(n + 1, dtype="<i8").tobytes()]
    )


def ds_index_bytes(lengths: np.ndarray) -> bytes:
    """The `.ds.index` file of documents with `lengths` tokens each."""
    return np.cumsum(lengths.astype(np.uint64), dtype="<u8").tobytes()


@dataclass(frozen=True)
class TokenShard:
    """One mapped `.bin` with its index. `tokens[starts[d]:starts[d] + lengths[d]]` is document d."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    levels: np.ndarray | None = None  # uint8, one a token; None: all 0


def open_shard(index_path: Path, data_path: Path, levels_path: Path | None = None) -> TokenShard:
    """Map a `.bin`, read its `.idx` and map its `.levels`, if it has them. Any other length than the index says is a
    StageError; a file that is not there is FileNotFoundError."""
    raw, size = index_path.read_bytes(), data_path.stat().st_size
    dtype, n = _header(index_path, raw)
    at = HEADER.size
    lengths = np.frombuffer(raw, dtype="<i4", count=n, offset=at)
    pointers = np.frombuffer(raw, dtype="<i8", count=n, offset=at + lengths.nbytes)
    tokens = int(lengths.sum(dtype=np.int64))
    _check_size(data_path, size, tokens * dtype.itemsize)
    mapped = np.memmap(data_path, dtype=dtype, mode="r")
    return TokenShard(
        mapped, pointers // dtype.itemsize, lengths, _levels(levels_path, tokens) if levels_path else None
    )


def _levels(path: Path, tokens: int) -> np.ndarray:
    _check_size(path, path.stat().st_size, tokens)
    return np.memmap(path, dtype=np.uint8, mode="r")


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise StageError(f"tokens: {path} is cut short or overwritten, got {size} bytes, expected {expected}; {AGAIN}")


def _header(path: Path, raw: bytes) -> tuple[np.dtype, int]:
    """dtype and number of documents of an `.idx` file of the right length."""
    if len(raw) >= HEADER.size:
        magic, version, code, n, boundaries = HEADER.unpack_from(raw)
        dtype = next((d for d, c in CODES.items() if c == code), None)
        whole = HEADER.size + n * (4 + 8) + boundaries * 8
        if magic == MAGIC and version == VERSION and dtype is not None and boundaries == n + 1 and len(raw) == whole:
            return dtype, n
    raise StageError(f"tokens: {path} is no whole Megatron index, got {len(raw)} bytes that begin {raw[:9]!r}; {AGAIN}")
