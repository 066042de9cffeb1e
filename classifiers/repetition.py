"""How much of a document repeats itself, after Gopher (Rae et al. 2021, arXiv 2112.11446, table A1). Kernels of `signals`.

In: the words, lines and paragraphs of a batch as flat arrays (`core.text`). Out: one value per document, float64 [D].

- *duplicate lines, paragraphs*: those equal to an earlier one of the same document, as a share of their number and of the
  document's code points.
- *top n-gram*: the most frequent n-gram of words (of equals the first), its length with single spaces times its count, over
  the document's code points. A document without any repeated n-gram has its first one counted once, as in datatrove.
- *duplicate n-grams*: code points of words covered by an n-gram that occurred earlier in the document, each counted once
  however many n-grams cover it. Gopher's text says exactly this; datatrove scans greedily and jumps n words after a hit,
  so a repeated run of 9 words counts 5 there and 9 here for n = 5. `benchmarks/signals.py` prints how often that matters.

An n-gram can only repeat where both (n-1)-grams in it repeat, so each n sorts the survivors of the last: sorting all words
once is most of the cost. Keys of n-grams are pairs of exact ids; only words and lines rely on 64-bit hashes.
"""

from typing import NamedTuple

import numpy as np

from core.text import Hashes, Pieces

TOP = (2, 3, 4)  # Gopher, table A1
DUPLICATE = (5, 6, 7, 8, 9, 10)  # Gopher, table A1
DOC_SPREAD = np.uint64(0xD6E8FEB86659FD93)  # an odd constant: sets equal words of different documents apart


class Groups(NamedTuple):
    """Equal keys as groups: `member` [n] is the group of each key, `size` and `first` (smallest index) one per group."""

    member: np.ndarray
    size: np.ndarray
    first: np.ndarray


def group(keys: np.ndarray) -> Groups:
    """Groups of equal uint64 keys. The numbering of groups carries no meaning."""
    if len(keys) == 0:
        none = np.zeros(0, dtype=np.int64)
        return Groups(none, none, none)
    order = np.argsort(keys)
    arranged = keys[order]
    new = np.concatenate([[True], arranged[1:] != arranged[:-1]])
    starts = np.flatnonzero(new)
    member = np.empty(len(keys), dtype=np.int64)
    member[order] = np.cumsum(new) - 1
    return Groups(member, np.diff(np.append(starts, len(keys))), np.minimum.reduceat(order, starts))


def group_within_documents(hashes: Hashes, items: Pieces, doc: np.ndarray) -> Groups:
    """Groups of equal pieces of text of the same document; `doc` is the document of each piece."""
    return group(hashes.of(items.start, items.end) + (doc + 1).astype(np.uint64) * DOC_SPREAD)


def duplicates(groups: Groups, items: Pieces, doc: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(number, code points) of the pieces that equal an earlier one, per document."""
    again = (groups.size - 1).astype(np.float64)
    length = (items.end - items.start)[groups.first]
    owner = doc[groups.first]
    return (
        np.bincount(owner, weights=again, minlength=documents),
        np.bincount(owner, weights=again * length, minlength=documents),
    )


def word_ngrams(words: Pieces, doc: np.ndarray, groups: Groups) -> dict[str, np.ndarray]:
    """Code points in the top 2..4-gram (`top_2gram`, ...) and in duplicate 5..10-grams (`dup_5gram`, ...), per document.

    `groups` are the groups of equal words within documents.
    """
    length_to = np.concatenate([[0], np.cumsum(words.end - words.start)])
    out = {}
    at = np.flatnonzero(groups.size[groups.member] > 1)  # where a repeated (n-1)-gram begins
    name = groups.member[at]
    for n in range(2, max(DUPLICATE) + 1):
        pair = np.flatnonzero((np.diff(at) == 1) & (doc[at[1:]] == doc[at[:-1]]))
        found = group(name[pair].astype(np.uint64) << np.uint64(32) | name[pair + 1].astype(np.uint64))
        at = at[pair]
        if n in TOP:
            out[f"top_{n}gram"] = _top(words, doc, at, found, n, length_to)
        if n in DUPLICATE:
            again = np.ones(len(at), dtype=bool)
            again[found.first] = False
            out[f"dup_{n}gram"] = _covered(words, at[again], n, length_to)
        keep = (found.size > 1)[found.member]
        at, name = at[keep], found.member[keep]
    return out


def _top(words: Pieces, doc: np.ndarray, at: np.ndarray, found: Groups, n: int, length_to: np.ndarray) -> np.ndarray:
    """Code points of the top n-gram per document. `at`: candidates' first words; all n-grams left out occur once."""
    documents = len(words.first) - 1
    best_at = words.first[:-1].copy()
    count = (np.diff(words.first) >= n).astype(np.int64)
    first = at[found.first]
    often = np.flatnonzero(found.size > 1)
    ranked = often[
        np.lexsort((-first[often], found.size[often], doc[first[often]]))
    ]  # a document's best group comes last
    owner = doc[first[ranked]]
    last = np.flatnonzero(np.append(owner[1:] != owner[:-1], True)) if len(owner) else owner
    best_at[owner[last]], count[owner[last]] = first[ranked[last]], found.size[ranked[last]]
    out = np.zeros(documents)
    some = np.flatnonzero(count)
    begin = best_at[some]
    out[some] = count[some] * (length_to[begin + n] - length_to[begin] + n - 1)
    return out


def _covered(words: Pieces, at: np.ndarray, n: int, length_to: np.ndarray) -> np.ndarray:
    """Code points of the words within n words from any of `at` (ascending), per document, each word once."""
    if len(at) == 0:
        return np.zeros(len(words.first) - 1)
    begin = np.maximum(at, np.concatenate([[0], at[:-1] + n]))
    covered = np.concatenate([[0], np.cumsum(length_to[at + n] - length_to[begin])])
    bounds = np.searchsorted(at, words.first)
    return np.diff(covered[bounds]).astype(np.float64)
