"""The annotate stage `signals`: one column per measured value of the Gopher, C4 and FineWeb rules, never a verdict.

In: `text`. Out: one row per document, float32 ratios and int32 counts, never null. Thresholds live in `classifiers.rules`, so
re-thresholding is a query. Words, raw words, lines, paragraphs and sentences are defined in `core.text` and
`classifiers.lines`; a ratio over none of them is taken over one, so an empty text has zeros and falls to `words < 50`.

Sources: Gopher (Rae et al. 2021, arXiv 2112.11446, A1.1), C4 (Raffel et al. 2020, arXiv 1910.10683, 2.2), FineWeb
(Penedo et al. 2024, arXiv 2406.17557, 3.6). Where datatrove's code and a paper differ, the column's comment says which holds.
Cost: 7 to 13 MB/s on one core of a busy machine, 12 times datatrove's four filters on prose, 6 times on raw HTML
(`benchmarks/signals.py`); memory about 30 bytes per code point of CHUNK_BYTES or of the longest document.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard
from pydantic import Field

from classifiers import lines as line_rules
from classifiers.lines import Lines, ellipsis_count, ends_with_ellipsis, find_all, folded, lines_of, sentences_per_line
from classifiers.repetition import DUPLICATE, TOP, duplicates, group_within_documents, word_ngrams
from core.stage import Kind, Reject, Resources, Stage, StageConfig
from core.text import (
    ALONE,
    DIGIT,
    LETTER,
    SPACE,
    STOP,
    UPPER,
    CodePoints,
    Hashes,
    Pieces,
    any_flags,
    code_points,
    raw_words,
    words,
)  # fmt: skip

# text worked on at once; at 1, 4 and 16 MB it ran at 98, 84 and 77 % of this speed (cache misses)
CHUNK_BYTES = 1 << 18
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher, A1.1
LOREM_IPSUM = b"lorem ipsum"
REPLACEMENT = 0xFFFD
COUNTS = (
    "chars",  # code points
    "words", "raw_words", "lines", "paragraphs", "sentences",
    "stop_words",  # how many of Gopher's eight occur, in any case (datatrove: in lower case only)
    "c4_sentences",  # sentences in lines that pass every C4 line rule
    "c4_sentences_unterminated",  # the same when lines need no terminal mark, as FineWeb ran C4
    "lorem_ipsum", "curly_brackets",  # occurrences anywhere, also in lines that C4 would remove
    "replacement_chars",  # U+FFFD
)  # fmt: skip
C4_RULES = line_rules.C4Lines._fields
RATIOS = (
    "mean_word_length", "unique_word_fraction",
    "unspaced_fraction",  # words of scripts without spaces; there, rules on word length mean nothing
    "letter_fraction", "digit_fraction", "space_fraction",  # of code points
    "upper_fraction",  # of letters
    "zstd_ratio",  # UTF-8 bytes over bytes compressed at level 1
    "hash_ratio", "ellipsis_ratio",  # per raw word
    "alpha_word_fraction",  # of raw words, as in datatrove: a table of numbers and bars fails here
    "bullet_line_fraction", "ellipsis_line_fraction",  # of lines that are not blank (datatrove: of all)
    "dup_line_fraction", "dup_line_char_fraction", "dup_paragraph_fraction", "dup_paragraph_char_fraction",
    *(f"top_{n}gram_char_fraction" for n in TOP),
    *(f"dup_{n}gram_char_fraction" for n in DUPLICATE),
    "terminal_line_fraction",  # FineWeb: lines ending in a mark of Sentence_Terminal, so not in a quote
    "short_line_fraction", "dup_line_char_fraction_no_newlines", "newline_ratio",
    *(f"c4_{rule}_{unit}_fraction" for rule in (*C4_RULES, "any", "any_but_terminal") for unit in ("line", "word")),
)  # fmt: skip
LAYER = pa.schema([*(pa.field(c, pa.int32()) for c in COUNTS), *(pa.field(c, pa.float32()) for c in RATIOS)])


class SignalsConfig(StageConfig):
    """Knobs of what is measured; thresholds are `classifiers.rules`."""

    short_line_chars: int = Field(
        default=30, ge=0, description="longest line that `short_line_fraction` counts (FineWeb: 30)"
    )


def signals(state: SignalsConfig, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[Reject]]:
    """All signals of every document, same order."""
    parts = [_measure(part, state) for part in _chunks(batch.column("text"))]
    columns = [
        pa.array(np.concatenate([p[f.name] for p in parts]) if parts else [], pa.float64()).cast(f.type, safe=False)
        for f in LAYER
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LAYER), []


def _chunks(column: pa.Array) -> Iterator[pa.Array]:
    """Slices of whole documents with about CHUNK_BYTES of text each."""
    size = np.cumsum(pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    at = 0
    while at < len(column):
        base = int(size[at - 1]) if at else 0
        cut = max(at + 1, int(np.searchsorted(size, base + CHUNK_BYTES, side="right")))
        yield column.slice(at, cut - at)
        at = cut


def _measure(column: pa.Array, config: SignalsConfig) -> dict[str, np.ndarray]:
    """float64 [D] for every column of LAYER."""
    text = code_points(column)
    raw = raw_words(text)
    word = words(text, raw)
    lines = lines_of(text, raw)
    fold = folded(text.points)
    hashes = Hashes(text.points)
    return {
        **_characters(text, column),
        **_words(text, raw, word, fold),
        **_lines(text, raw, lines, config),
        **_c4(text, raw, word, lines, fold),
        **_repetition(text, word, lines, hashes),
    }


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, over one where the whole is zero."""
    return part / np.maximum(whole, 1)


def _per_document(values: np.ndarray, items: Pieces) -> np.ndarray:
    """Sums of one value per piece, by document."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[items.first])


def _flagged(text: CodePoints, flag: int) -> np.ndarray:
    return line_rules.count_within(np.flatnonzero((text.flags & flag) != 0), text.start, text.end)


def _occurring(text: CodePoints, point: int) -> np.ndarray:
    return line_rules.count_within(np.flatnonzero(text.points == point), text.start, text.end)


def _characters(text: CodePoints, column: pa.Array) -> dict[str, np.ndarray]:
    chars, letters = text.end - text.start, _flagged(text, LETTER)
    return {
        "chars": chars,
        "letter_fraction": _over(letters, chars),
        "digit_fraction": _over(_flagged(text, DIGIT), chars),
        "space_fraction": _over(_flagged(text, SPACE), chars),
        "upper_fraction": _over(_flagged(text, UPPER), letters),
        "curly_brackets": _occurring(text, ord("{")),
        "replacement_chars": _occurring(text, REPLACEMENT),
        "zstd_ratio": _zstd_ratio(column),
    }


def _zstd_ratio(column: pa.Array) -> np.ndarray:
    """Bytes over compressed bytes per document; a tenth of this stage's time. Empty: 0."""
    compress = zstandard.ZstdCompressor(level=1, write_content_size=False).compress
    data = pc.fill_null(column, "").cast(pa.large_binary())
    views = (value.as_buffer() for value in data)
    return np.array([v.size / len(compress(v)) if v.size else 0.0 for v in views], dtype=np.float64)


def _words(text: CodePoints, raw: Pieces, word: Pieces, fold: bytes) -> dict[str, np.ndarray]:
    raw_count, count = np.diff(raw.first), np.diff(word.first)
    alpha = (any_flags(text, raw.start, raw.end) & LETTER) != 0
    alone = (text.flags[word.start] & ALONE) != 0
    hashes = _occurring(text, ord("#"))
    return {
        "words": count,
        "raw_words": raw_count,
        "mean_word_length": _over(_per_document(word.end - word.start, word), count),
        "unspaced_fraction": _over(_per_document(alone, word), count),
        "alpha_word_fraction": _over(_per_document(alpha, raw), raw_count),
        "hash_ratio": _over(hashes, raw_count),
        "ellipsis_ratio": _over(ellipsis_count(text.points, text.start, text.end), raw_count),
        "newline_ratio": _over(_occurring(text, line_rules.NEWLINE), raw_count),
        "stop_words": _stop_words(word, fold),
    }


def _stop_words(word: Pieces, fold: bytes) -> np.ndarray:
    """How many different stop words each document has. Words of two to four ASCII letters, packed into one integer."""
    size = word.end - word.start
    at = np.flatnonzero((size >= 2) & (size <= 4))
    chars = np.frombuffer(fold + b"\0\0\0", dtype=np.uint8)
    packed = np.zeros(len(at), dtype=np.int64)
    for i in range(4):
        packed |= np.where(size[at] > i, chars[word.start[at] + i], 0).astype(np.int64) << (8 * i)
    documents = len(word.first) - 1
    doc = np.repeat(np.arange(documents), np.diff(word.first))[at]
    wanted = [int.from_bytes(w.encode(), "little") for w in STOP_WORDS]
    return sum(
        (np.bincount(doc[packed == w], minlength=documents) > 0 for w in wanted), np.zeros(documents, dtype=np.int64)
    )


def _lines(text: CodePoints, raw: Pieces, lines: Lines, config: SignalsConfig) -> dict[str, np.ndarray]:
    start, end, count = lines.text.start, lines.text.end, np.diff(lines.text.first)

    def share(which: np.ndarray) -> np.ndarray:
        return _over(_per_document(which, lines.text), count)

    return {
        "lines": count,
        "paragraphs": np.diff(lines.paragraphs.first),
        "bullet_line_fraction": share(np.isin(text.points[start], line_rules.BULLETS)),
        "ellipsis_line_fraction": share(ends_with_ellipsis(text.points, start, end)),
        "terminal_line_fraction": share((text.flags[end - 1] & STOP) != 0),
        "short_line_fraction": share(end - start <= config.short_line_chars),
    }


def _c4(text: CodePoints, raw: Pieces, word: Pieces, lines: Lines, fold: bytes) -> dict[str, np.ndarray]:
    rules = line_rules.c4_lines(text, lines, raw, fold)
    but_terminal = rules.long_word | rules.few_words | rules.javascript | rules.policy
    removed = {**rules._asdict(), "any": but_terminal | rules.no_terminal, "any_but_terminal": but_terminal}
    sentences = sentences_per_line(text, lines, word.start)
    in_line = np.diff(lines.word)
    out = {
        "sentences": _per_document(sentences, lines.text),
        "c4_sentences": _per_document(sentences * ~removed["any"], lines.text),
        "c4_sentences_unterminated": _per_document(sentences * ~but_terminal, lines.text),
        "lorem_ipsum": line_rules.count_within(find_all(fold, LOREM_IPSUM), text.start, text.end),
    }
    for rule, gone in removed.items():
        out[f"c4_{rule}_line_fraction"] = _over(_per_document(gone, lines.text), np.diff(lines.text.first))
        out[f"c4_{rule}_word_fraction"] = _over(_per_document(gone * in_line, lines.text), np.diff(raw.first))
    return out


def _repetition(text: CodePoints, word: Pieces, lines: Lines, hashes: Hashes) -> dict[str, np.ndarray]:
    documents, chars = len(text.start), text.end - text.start
    out = {}
    for name, items in (("line", lines.text), ("paragraph", lines.paragraphs)):
        count = np.diff(items.first)
        doc = np.repeat(np.arange(documents), count)
        number, length = duplicates(group_within_documents(hashes, items, doc), items, doc, documents)
        out[f"dup_{name}_fraction"] = _over(number, count)
        out[f"dup_{name}_char_fraction"] = _over(length, chars)
        if name == "line":
            out["dup_line_char_fraction_no_newlines"] = _over(length, chars - _occurring(text, line_rules.NEWLINE))
    doc = np.repeat(np.arange(documents), np.diff(word.first))
    groups = group_within_documents(hashes, word, doc)
    distinct = np.bincount(doc[groups.first], minlength=documents)
    out["unique_word_fraction"] = _over(distinct, np.diff(word.first))
    for name, length in word_ngrams(word, doc, groups).items():
        out[f"{name}_char_fraction"] = _over(length, chars)
    return out


STAGE = Stage(
    name="signals",
    kind=Kind.ANNOTATE,
    config=SignalsConfig,
    fn=signals,
    version=1,
    reads=("text",),
    layer=LAYER,
    libraries=("zstandard",),
    resources=Resources(cpus=1, memory_gb=3),
)
