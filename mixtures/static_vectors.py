"""A static embedding: one vector a token, made once from a sentence encoder; a text's vector is the sum over its tokens.

`make_table` turns encoder outputs into a table (model2vec's recipe: Tulkens & van Dongen 2024, MinishLab/model2vec, MIT): centre,
principal components, then a weight a / (a + p) for a token of probability p (Arora et al. 2017, "A simple but tough-to-beat
baseline for sentence embeddings"). The probability follows from the token's place in the vocabulary by Zipf's law, because
WordPiece vocabularies list words by frequency. The table holds int16, so a text's sum is an exact integer: neither batches
nor the CPU's order of additions can move it.

`StaticVectors` reads texts: lower case, runs of letters and digits, each distinct word tokenised once per worker. Cost: see
`mixtures.embed`. A text without a known word is all zeros.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.errors import StageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORD = re.compile(r"[^\W_]+")
CACHED_WORDS = 1 << 19  # about 100 MB of word -> tokens in a worker; then it starts afresh, which changes no vector
MOST = (1 << 15) - 1
CONTINUES = "##"  # WordPiece marks a token that goes on within a word


def token_ranks(tokens: Sequence[str]) -> np.ndarray:
    """float64 [V]: the place of each token by falling frequency, from 1; infinite for special and unused ones (`[...]`).

    A vocabulary lists single characters before words and in the order of their code points. Those of ASCII get rank 1 ("a", "I",
    pieces of numbers say little), others the middle rank."""
    rank = np.full(len(tokens), np.inf)
    single = np.array([len(t.removeprefix(CONTINUES)) == 1 for t in tokens], dtype=bool)
    special = np.array([len(t) > 2 and t[0] == "[" and t[-1] == "]" for t in tokens], dtype=bool)
    whole = np.flatnonzero(~single & ~special)
    rank[whole] = np.arange(1, len(whole) + 1)
    ascii_only = np.array([t.isascii() for t in tokens], dtype=bool)
    rank[single] = np.where(ascii_only[single], 1.0, max(1.0, len(whole) / 2))
    return rank


def token_probabilities(rank: np.ndarray) -> np.ndarray:
    """float64 [V], summing to 1: 1 / (rank + 1) over those with a rank."""
    p = 1.0 / (rank + 1.0)
    return p / p.sum()


def make_table(vectors_VE: np.ndarray, rank: np.ndarray, dims: int, smoothing: float) -> np.ndarray:
    """int16 [V, dims] from encoder outputs [V, E]: centred by probability, rotated to the first `dims` principal components,
    weighted, scaled so that the largest entry is `MOST`. Tokens without a rank are zeros.

    The sign of a component is fixed by its entry of largest magnitude; an eigensolver leaves it open."""
    p, known = token_probabilities(rank), np.isfinite(rank)
    x = vectors_VE.astype(np.float64)
    x = np.where(known[:, None], x - p @ x, 0.0)
    _, axes = np.linalg.eigh(x.T @ x)
    axes = axes[:, ::-1][:, :dims]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    x = (x @ axes) * (smoothing / (smoothing + p))[:, None]
    largest = np.abs(x).max()
    if not np.isfinite(largest) or largest == 0:
        raise StageError(
            "embedder: the model gives every token the same vector, or one that is not finite; use another"
        )
    return np.rint(x * (MOST / largest)).astype(np.int16)


class StaticVectors:
    """Reads texts with one table."""

    def __init__(self, tokenizer: "Tokenizer", table: np.ndarray) -> None:
        if tokenizer.get_vocab_size() > len(table):
            raise StageError(
                f"embed: the tokenizer has {tokenizer.get_vocab_size()} tokens, the table {len(table)}; run stage embedder again"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.table = table.astype(np.int64)
        self._known: list[bool] = np.any(table, axis=1).tolist()
        self._tokenizer = tokenizer
        self._tokens: dict[str, list[int]] = {}

    def sums(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n, dims]: for each text the sum of its tokens' rows, unknown tokens left out."""
        from scipy.sparse import csr_array

        counts = [Counter(WORD.findall(text.lower())) for text in texts]
        self._learn({word for count in counts for word in count})
        tokens: list[int] = []
        weights: list[int] = []
        ends = [0]
        for count in counts:
            for word, n in count.items():
                pieces = self._tokens[word]
                tokens += pieces
                weights += [n] * len(pieces)
            ends.append(len(tokens))
        matrix = csr_array(
            (np.array(weights, np.int64), np.array(tokens, np.int64), np.array(ends)), (len(texts), len(self.table))
        )
        return np.asarray(matrix @ self.table)

    def _learn(self, words: set[str]) -> None:
        """Tokenise the words that were not met before."""
        if len(self._tokens) + len(words) > CACHED_WORDS:
            self._tokens.clear()
        fresh = sorted(words - self._tokens.keys())
        for word, encoding in zip(fresh, self._tokenizer.encode_batch(fresh, add_special_tokens=False), strict=True):
            self._tokens[word] = [i for i in encoding.ids if self._known[i]]


def to_int8(sums: np.ndarray) -> np.ndarray:
    """int8 [n, dims]: each row scaled so that its largest entry is 127 in magnitude. Only directions are kept."""
    most = np.abs(sums).max(axis=1, keepdims=True, initial=0)
    return np.rint(sums * (127.0 / np.maximum(most, 1))).astype(np.int8)
