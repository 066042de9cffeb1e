"""Vectors of texts in any language without a model: hashed features of characters and words, added up in integers.

In: a `large_string` column. Out: int64 [n, dims]; a text without a word is all zeros. A feature is a word, each run of four code
points within a word, or, in scripts written without spaces, each pair of neighbouring letters; all in lower case. A feature adds
or subtracts its damped count at one place, both given by its hash (the hashing trick: Weinberger et al. 2009, arXiv 0902.2206),
so inner products of such vectors are in the mean those of the counts. There is no knowledge in them: two texts are alike as far
as they share spellings, and texts in two languages are not.

Measured on 839 documents in 11 languages other than English: the nearest of the others came from the same host for 91 %, with the
English encoder's static vectors for 91 % as well, with TF-IDF for 88 %. Cost: 7 MB/s of text on one core.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.text import ALONE, Hashes, code_points, raw_words, words

GRAM = 4  # code points; chosen, untested beside 3 and 5
PAIR_SALT = np.uint64(0x9E3779B97F4A7C15)  # so that a pair of letters is another feature than a word of the same two
WHOLE_SALT = np.uint64(0xC2B2AE3D27D4EB4F)
# Weight of a feature by its count in the document: round(32 (1 + ln count)), an integer so that sums are exact in any order.
COUNTS = 1 << 12
DAMPED = np.rint(32 * (1 + np.log(np.arange(1, COUNTS + 1)))).astype(np.int64)


def hashed_vectors(texts: pa.Array, dims: int) -> np.ndarray:
    """int64 [n, dims]: signed sums of damped counts. A null text counts as empty."""
    document, feature = features(pc.utf8_lower(pc.fill_null(texts, "")))
    order = np.lexsort((feature, document))
    document, feature = document[order], feature[order]
    first = np.flatnonzero(np.append(True, (document[1:] != document[:-1]) | (feature[1:] != feature[:-1])))
    first = first[: len(document)]
    count = np.diff(first, append=len(document))
    weight = DAMPED[np.minimum(count, COUNTS) - 1]
    document, feature = document[first], feature[first]
    sign = np.where(feature >> np.uint64(63), -1, 1)
    place = document * dims + (feature % np.uint64(dims)).astype(np.int64)
    sums = np.bincount(place, weights=weight * sign, minlength=len(texts) * dims)  # below 2^53, so exact
    return sums.astype(np.int64).reshape(len(texts), dims)


def features(lowered: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(document int64 [m], hash uint64 [m]) of every feature of every text, repeated as often as it occurs."""
    text = code_points(lowered)
    found = words(text, raw_words(text))
    document = np.repeat(np.arange(len(lowered)), np.diff(found.first))
    hashes = Hashes(text.points)
    start, end = found.start, found.end
    whole = hashes.of(start, end) ^ WHOLE_SALT
    runs = np.maximum(end - start - GRAM + 1, 0)
    runs[runs == 1] = 0  # a word of GRAM code points is its own only run
    at = np.repeat(start - np.cumsum(runs) + runs, runs) + np.arange(runs.sum())
    grams = hashes.of(at, at + GRAM)
    alone = (text.flags[start] & ALONE) != 0
    paired = np.flatnonzero(alone[:-1] & alone[1:] & (end[:-1] == start[1:]))
    pairs = hashes.of(start[paired], end[paired + 1]) ^ PAIR_SALT
    return (
        np.concatenate([document, np.repeat(document, runs), document[paired]]),
        np.concatenate([whole, grams, pairs]),
    )
