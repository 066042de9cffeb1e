"""Texts to token ids with one tokenizer file: no special token from the text, EOS after each document, bounded memory.

`models/<tokenizer>/tokenizer.json` is a tokenizer of the `tokenizers` library; `tokenizer_config.json` beside it names EOS and
carries the fingerprint under which token shards are committed. About 1.5 MB/s on one core (vocabulary 16k, web pages).
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from core.errors import ConfigError, StageError
from core.hashing import digest
from core.storage import Root
from mixtures.levels import token_levels
from mixtures.token_files import token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# An `Encoding` takes some 100 bytes a token while it is alive, so a text goes in by pieces of this many characters and a call
# encodes about as many: 50 MB of memory whatever the document. Chosen, untested beyond that.
PIECE_CHARS = 1 << 20
BREAK = re.compile(r"\n(?=[^\W\d_])")  # a newline before a letter: no pre-tokenizer in use joins the two


@dataclass(frozen=True)
class TokenizerInfo:
    """What a token shard must know of its tokenizer. `vocab_size` is one more than the largest id."""

    name: str
    fingerprint: str
    eos: int
    eos_token: str
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)


def tokenizer_name(name: str) -> str:
    return f"models/{name}/tokenizer.json"


def info_name(name: str) -> str:
    return f"models/{name}/tokenizer_config.json"


def read_info(root: Root, name: str) -> TokenizerInfo:
    """The committed description of a tokenizer."""
    try:
        stored = root.read_json(info_name(name))
    except FileNotFoundError as e:
        raise StageError(f"tokenize: no tokenizer {name!r} in {root.url}; run stage {name} first") from e
    return TokenizerInfo(name, stored["fingerprint"], stored["eos_id"], stored["eos_token"], stored["vocab_size"])


def describe(tokenizer: "Tokenizer", name: str, eos_token: str) -> TokenizerInfo:
    """The description of a tokenizer. One without `eos_token`, or that finds it in plain text, is a ConfigError."""
    eos = tokenizer.token_to_id(eos_token)
    if eos is None:
        raise ConfigError(
            f"tokenizer: {name} has no token {eos_token!r}; set `eos` to the token that ends a document in this tokenizer"
        )
    as_text(tokenizer)
    if eos in tokenizer.encode(eos_token, add_special_tokens=False).ids:
        raise ConfigError(
            f"tokenizer: {name} reads {eos_token!r} in a document as its end of text; mark the token as special in the file"
        )
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerInfo(name, digest([tokenizer.to_str(), eos_token]), eos, eos_token, size)


def as_text(tokenizer: "Tokenizer") -> None:
    """Make a tokenizer read special tokens in a document as the characters they are, and neither cut nor pad."""
    tokenizer.encode_special_tokens = True  # not stored in the file
    tokenizer.no_truncation()
    tokenizer.no_padding()


class Encoder:
    """Encodes whole documents."""

    def __init__(self, tokenizer: "Tokenizer", eos: int, dtype: np.dtype) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts end to end, each text followed by EOS, and int32 [len(texts)] tokens per text, EOS included."""
        tokens, lengths, _ = self.encode_levels(texts, [None] * len(texts))
        return tokens, lengths

    def encode_levels(
        self, texts: Sequence[str], levels: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`encode`, and uint8 levels of all tokens from those of each text's characters (None: 0). EOS has the last one's."""
        lengths, read = np.zeros(len(texts), dtype=np.int32), [0] * len(texts)
        parts, level_parts = [np.zeros(0, dtype=self._dtype)], [np.zeros(0, dtype=np.uint8)]
        eos = np.array([self._eos], dtype=self._dtype)
        for group in _groups(texts):
            known = any(levels[i] is not None for i, _, _ in group)
            encode = self._tokenizer.encode_batch if known else self._tokenizer.encode_batch_fast  # fast: no offsets
            encodings = encode([piece for _, piece, _ in group], add_special_tokens=False)
            for (i, piece, last), encoding in zip(group, encodings, strict=True):
                ids, own = np.array(encoding.ids, dtype=self._dtype), levels[i]
                parts += [ids, eos] if last else [ids]
                lengths[i] += len(ids) + last
                if own is None:
                    level_parts.append(np.zeros(len(ids) + last, dtype=np.uint8))
                else:
                    level_parts += [token_levels(own[read[i] : read[i] + len(piece)], encoding.offsets)]
                    level_parts += [own[-1:] if len(own) else np.zeros(1, dtype=np.uint8)] if last else []
                read[i] += len(piece)
        return np.concatenate(parts), lengths, np.concatenate(level_parts)


@lru_cache(maxsize=2)
def open_encoder(url: str, info: TokenizerInfo) -> Encoder:
    """The encoder of a committed tokenizer; loaded once per worker. A file that changed since `info` is a StageError."""
    from tokenizers import Tokenizer

    # One worker is one core: without this every worker starts a thread for each core of the machine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_str(Root(url).read_bytes(tokenizer_name(info.name)).decode())
    if describe(tokenizer, info.name, info.eos_token) != info:
        raise StageError(f"tokenize: {tokenizer_name(info.name)} is not what stage {info.name} wrote; run it again")
    return Encoder(tokenizer, info.eos, info.dtype)


def pieces_of(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, cut behind the last newline before a letter where there is one.

    Such a cut changes no token; a cut in a line of more than `limit` characters can change the tokens at the cut. Either way
    the pieces depend on the text alone."""
    at = 0
    while len(text) - at > limit:
        end = at + limit
        for match in BREAK.finditer(text, at + limit // 2, at + limit + 1):
            end = match.end()
        yield text[at:end]
        at = end
    yield text[at:]


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str, bool]]]:
    """(index of the text, piece, last of its text) in groups of about PIECE_CHARS characters."""
    group: list[tuple[int, str, bool]] = []
    size = 0
    for i, text in enumerate(texts):
        pieces = list(pieces_of(text))
        for k, piece in enumerate(pieces):
            group.append((i, piece, k == len(pieces) - 1))
            size += len(piece)
            if size >= PIECE_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group
