"""Token files of other programs as a `TokenSource`, one domain a file.

In: for each domain `{"tokens": FILE}`, a flat run of token ids in which EOS ends documents: `.npz` (array `tokens`; `vocab_size`
and `eos` if it says so itself) or `.bin` (little-endian ids, `dtype` uint16 unless said), or `{"megatron": PREFIX}`, a
`PREFIX.bin` and `PREFIX.idx` (moe/megatron.py). Out: a source whose documents are those of the domains one after the other; a run
mixes them with `shuffle`. The sizes of their texts are not known, so `bytes` is 0. Cost: `.bin` files are mapped, others read;
each is read through once to check its ids and find its documents; 8 bytes a document. Mixtures of this project's own roots are
read by its pipelines, which `moe` does not know.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError, InputError
from core.hashing import digest, file_digest
from moe.data import TokenSource
from moe.megatron import MegatronSource

KEYS = ("tokens", "megatron", "dtype")
DTYPES = ("uint16", "uint32", "int32", "int64")
LONGEST_DOCUMENT = 10**6  # tokens of a file without any EOS; chosen: longer than a book


class FlatTokens:
    """Documents of one flat run of token ids; what stands behind the last EOS is a document too, and gets an EOS.

    Token ids that the vocabulary does not have are an `InputError`, and so is a long run without any EOS: it was written with
    another one, and would be one document.
    """

    def __init__(self, tokens: np.ndarray, *, vocab_size: int, eos: int, content: str, domain: str = "all") -> None:
        self.vocab_size, self.eos, self.content, self.domains = vocab_size, eos, content, (domain,)
        self._tokens = tokens
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(
                f"source.{domain}: no token ids, got {tokens.dtype} of shape {tokens.shape}, expected one row of whole numbers"
            )
        lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if lowest < 0 or highest >= vocab_size:
            raise InputError(
                f"source.{domain}: token ids outside the vocabulary, got {lowest} to {highest}, expected 0 to {vocab_size - 1}; "
                "correct the file's dtype or model.vocab_size"
            )
        ends = np.flatnonzero(tokens == eos) + 1
        if not len(ends) and len(tokens) > LONGEST_DOCUMENT:
            raise InputError(
                f"source.{domain}: no document ends, got {len(tokens)} tokens without EOS {eos}, expected one within "
                f"{LONGEST_DOCUMENT}; correct model.eos, or write the file with EOS behind each document"
            )
        if len(tokens) and (not len(ends) or ends[-1] < len(tokens)):
            ends = np.append(ends, len(tokens) + 1)  # the EOS that `tokens` appends
        self._starts = np.concatenate(([0], ends))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def tokens(self, i: int) -> np.ndarray:
        found = self._tokens[self._starts[i] : self._starts[i + 1]].astype(np.int32)
        return found if len(found) == self.length(i) else np.append(found, np.int32(self.eos))

    def length(self, i: int) -> int:
        return int(self._starts[i + 1] - self._starts[i])

    def lengths(self) -> np.ndarray:
        return np.diff(self._starts)

    def mask(self, i: int) -> np.ndarray | None:
        return None

    def domain(self, i: int) -> int:
        return 0

    def bytes(self, i: int) -> int:
        return 0


class JoinedSources:
    """Several sources as one; each part is a domain of the name it is given under."""

    def __init__(self, parts: Mapping[str, TokenSource]) -> None:
        self.domains: Sequence[str] = tuple(parts)
        self._parts = list(parts.values())
        self._ends = np.cumsum([len(p) for p in self._parts])
        self.vocab_size = max(p.vocab_size for p in self._parts)
        self.eos = self._parts[0].eos
        others = sorted({p.eos for p in self._parts})
        if len(others) > 1:
            raise ConfigError(f"source: the domains end documents differently, got tokens {others}, expected one")

    @property
    def content(self) -> str:
        return digest([[name, p.content] for name, p in zip(self.domains, self._parts, strict=True)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, i: int) -> tuple[TokenSource, int, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], i - (int(self._ends[part - 1]) if part else 0), part

    def tokens(self, i: int) -> np.ndarray:
        source, place, _ = self._at(i)
        return source.tokens(place)

    def length(self, i: int) -> int:
        source, place, _ = self._at(i)
        return source.length(place)

    def lengths(self) -> np.ndarray:
        return np.concatenate([p.lengths() for p in self._parts])

    def mask(self, i: int) -> np.ndarray | None:
        source, place, _ = self._at(i)
        return source.mask(place)

    def domain(self, i: int) -> int:
        return self._at(i)[2]

    def bytes(self, i: int) -> int:
        source, place, _ = self._at(i)
        return source.bytes(place)


def open_source(
    given: Mapping[str, Any], folder: Path, vocab_size: int | None = None, eos: int | None = None
) -> JoinedSources:
    """The source that a run file names. Relative paths are meant from `folder`; what a file does not say of its vocabulary is
    `vocab_size` and `eos`."""
    problems = []
    for name, entry in given.items():
        if isinstance(entry, Mapping) and not all(isinstance(value, str) for value in entry.values()):
            problems.append(f"source.{name}: its values must be texts, got {dict(entry)!r}")
            continue
        if not isinstance(entry, Mapping) or not {"tokens", "megatron"} & entry.keys() or entry.keys() - set(KEYS):
            problems.append(f"source.{name}: must name `tokens: FILE` or `megatron: PREFIX`, got {entry!r}")
    if not given:
        problems.append("source: names no files, expected domain: {tokens: FILE} or domain: {megatron: PREFIX}")
    if problems:
        raise ConfigError(*problems)
    return JoinedSources({name: _open(name, entry, folder, vocab_size, eos) for name, entry in given.items()})


def _open(name: str, entry: Mapping[str, Any], folder: Path, vocab_size: int | None, eos: int | None) -> TokenSource:
    path = folder / Path(entry.get("tokens") or entry["megatron"]).expanduser()
    try:
        if "megatron" in entry:
            known = _vocabulary(name, vocab_size, eos)
            return MegatronSource({name: path}, vocab_size=known[0], eos=known[1])
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                tokens = arrays["tokens"]
                vocab_size = int(arrays["vocab_size"]) if "vocab_size" in arrays else vocab_size
                eos = int(arrays["eos"]) if "eos" in arrays else eos
        else:
            tokens = np.memmap(path, dtype=_dtype(name, entry.get("dtype", "uint16")), mode="r")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"source: {path} cannot be read, got {error}, expected token ids; correct source.{name}"
        ) from error
    known = _vocabulary(name, vocab_size, eos)
    return FlatTokens(tokens, vocab_size=known[0], eos=known[1], content=file_digest(path), domain=name)


def _dtype(name: str, given: str) -> np.dtype:
    if given not in DTYPES:
        raise ConfigError(f"source.{name}.dtype: unknown, got {given!r}, expected one of {', '.join(DTYPES)}")
    return np.dtype(given).newbyteorder("<")


def _vocabulary(name: str, vocab_size: int | None, eos: int | None) -> tuple[int, int]:
    wrong = [v for v in (vocab_size, eos) if v is not None and (isinstance(v, bool) or not isinstance(v, int))]
    if wrong:
        raise ConfigError(f"source.{name}: model.vocab_size and model.eos must be whole numbers, got {wrong[0]!r}")
    if vocab_size is None or eos is None:
        raise ConfigError(
            f"source.{name}: the file does not say its vocabulary, got vocab_size {vocab_size} and eos {eos}; "
            "set model.vocab_size and model.eos"
        )
    return vocab_size, eos
