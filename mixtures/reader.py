"""A mixture as documents of token ids, for training: the index in memory, token shards mapped when first used.

In: a root and the name of a phase. Out: for entry i of the index its tokens (EOS included), domain and size. It is the
`TokenSource` that `moe.data` reads; numpy, pyarrow and fsspec only. Memory: 28 bytes an entry. From an object store a shard is
fetched whole into this machine's cache when its first document is read (`core.cache`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.cache import opened
from core.errors import StageError
from core.storage import Root
from mixtures.index_file import Entries, read_index
from mixtures.token_files import AGAIN, LEARN, TokenShard, docs_name, open_shard, shard_name, token_dtype

MAPPED_SHARDS = 4096  # at a time; Linux allows 65,530 maps a process (vm.max_map_count)


class MixtureSource:
    """One phase of a root. Picklable: a loader process maps the shards again."""

    def __init__(self, root: Root | str | Path, phase: str) -> None:
        self._root = root if isinstance(root, Root) else Root(str(root))
        self.phase = phase
        self._entries: Entries
        self._entries, note = read_index(self._root, phase)
        self.vocab_size: int = note["vocab_size"]
        self.eos: int = note["eos"]
        self.domains: Sequence[str] = note["domains"]
        self.tokenizer: str = note["tokenizer"]  # fingerprint
        self.content: str = note["content"]  # of the index and of every token shard it reads
        self.learn: str = note.get("learn", "all")  # what counts in the loss, one of `LEARN`
        self._tokenizer_name: str = note["tokenizer_name"]
        self._contents: dict[str, str] = note["shards"]
        self._mapped: dict[int, TokenShard] = {}

    def __reduce__(self) -> tuple[type["MixtureSource"], tuple[Root, str]]:
        return MixtureSource, (self._root, self.phase)

    def __len__(self) -> int:
        """Documents in the index; one that is repeated counts each time."""
        return len(self._entries)

    def tokens(self, i: int) -> np.ndarray:
        """int32 token ids of entry i, EOS last."""
        shard = self._shard(int(self._entries.shard[i]))
        start = int(shard.starts[self._entries.document[i]])
        return shard.tokens[start : start + self.length(i)].astype(np.int32)

    def length(self, i: int) -> int:
        return int(self._entries.tokens[i])

    def lengths(self) -> np.ndarray:
        """int32 [len(self)]: tokens of every entry."""
        return self._entries.tokens

    def mask(self, i: int) -> np.ndarray | None:
        """bool, one a token of entry i: whether the phase learns it. None: all of them."""
        if self.learn == "all":
            return None
        shard = self._shard(int(self._entries.shard[i]))
        if shard.levels is None:
            return None
        start = int(shard.starts[self._entries.document[i]])
        return np.asarray(shard.levels[start : start + self.length(i)] <= LEARN[self.learn])

    def domain(self, i: int) -> int:
        """Index into `domains`."""
        return int(self._entries.domain[i])

    def bytes(self, i: int) -> int:
        """UTF-8 bytes of the text of entry i, spans applied."""
        return int(self._entries.bytes[i])

    def check(self) -> None:
        """Open every shard once: StageError at the first that is missing, cut short or not the one that was mixed."""
        for ordinal in range(len(self._entries.shards)):
            self._open(ordinal) if self._root.is_local else self._checked(ordinal)

    def _shard(self, ordinal: int) -> TokenShard:
        found = self._mapped.get(ordinal)
        if found is None:
            while len(self._mapped) >= MAPPED_SHARDS:
                self._mapped.pop(next(iter(self._mapped)))
            found = self._mapped[ordinal] = self._open(ordinal)
        return found

    def _open(self, ordinal: int) -> TokenShard:
        name, note = self._checked(ordinal)
        files = [f"{name}.idx", f"{name}.bin", *([f"{name}.levels"] if note.get("levels", False) else [])]
        try:
            return opened(self._root, files, note["content"], lambda found: open_shard(*found))
        except FileNotFoundError as e:
            raise _missing(e.filename or f"{self._root.url}/{name}.bin or .idx") from e

    def _checked(self, ordinal: int) -> tuple[str, dict[str, Any]]:
        """A shard's name and what is stored beside it. In an object store its size is compared as well: opening it would fetch
        it whole."""
        dataset, name = self._entries.shards[ordinal]
        docs = docs_name(self._tokenizer_name, dataset, name)
        note = self._root.note(docs)
        if note is None:
            raise StageError(f"mixture {self.phase}: {docs} is missing; {AGAIN}")
        if note["tokenizer"] != self.tokenizer:
            raise StageError(
                f"mixture {self.phase}: {docs} was made by another tokenizer, got {note['tokenizer'][:8]}, "
                f"expected {self.tokenizer[:8]}; run mix again"
            )
        if note["content"] != self._contents[f"{dataset}/{name}"]:
            raise StageError(f"mixture {self.phase}: {docs} was written anew since the mixture was made; run mix again")
        shard = shard_name(self._tokenizer_name, dataset, name)
        if not self._root.is_local:
            self._check_size(f"{shard}.bin", note["tokens"] * token_dtype(self.vocab_size).itemsize)
            if note.get("levels", False):
                self._check_size(f"{shard}.levels", note["tokens"])
        return shard, note

    def _check_size(self, name: str, expected: int) -> None:
        try:
            got = self._root.size(name)
        except FileNotFoundError as e:
            raise _missing(f"{self._root.url}/{name}") from e
        if got != expected:
            raise StageError(f"tokens: {name} was cut short, got {got} bytes, expected {expected}; {AGAIN}")


def _missing(what: str) -> StageError:
    return StageError(f"tokens: {what} is missing; {AGAIN}")
