"""Words and shingles: hand-computed cases, the frozen tables against Unicode, numpy against the compiled kernel."""

import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import shingles as module
from dedup.alphabet import ALONE, CLASSES, SEPARATOR, UNSTABLE, WORD
from dedup.shingles import (
    BYTE_BASE,
    Shingles,
    compiled_available,
    folded,
    mix_shingles,
    mix_words,
    shingle,
    word_powers,
)

MASK = (1 << 64) - 1
needs_numba = pytest.mark.skipif(not compiled_available(), reason="numba is not installed")


def column(*texts: str | None) -> pa.Array:
    return pa.array(texts, type=pa.large_string())


def words_of(text: str) -> list[str]:
    """The definition of a word, one code point at a time."""
    words, run = [], ""
    for char in pc.utf8_lower(unicodedata.normalize("NFC", text)).as_py():
        kind = CLASSES[ord(char)]
        if kind != WORD and run:
            words.append(run)
            run = ""
        if kind == WORD:
            run += char
        elif kind == ALONE:
            words.append(char)
    return words + ([run] if run else [])


def word_hash(word: str) -> int:
    h = 0
    for byte in word.encode():
        h = (h * int(BYTE_BASE) + byte) & MASK
    return int(mix_words(np.array([h], dtype=np.uint64))[0])


def shingles_of(text: str, ngram: int) -> list[int]:
    """The definition of a document's shingles in Python integers."""
    words = [word_hash(w) for w in words_of(text)]
    grams = [words[i : i + ngram] for i in range(len(words) - ngram + 1)] or ([words] if words else [])
    sums = [sum(w * int(p) for w, p in zip(gram, word_powers(ngram), strict=False)) & MASK for gram in grams]
    return mix_shingles(np.array(sums, dtype=np.uint64)).tolist()


def as_lists(found: Shingles) -> list[list[int]]:
    return [found.values[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)]


def test_words_are_runs_of_letters_and_digits():
    assert words_of("Don't stop: x86_64, naïve-Bayes!") == ["don", "t", "stop", "x86", "64", "naïve", "bayes"]
    assert words_of("日本語のテスト abc") == ["日", "本", "語", "の", "テ", "ス", "ト", "abc"]
    assert words_of("한국어 문장") == ["한국어", "문장"]
    assert words_of("हिन्दी में।") == ["हिन्दी", "में"]
    assert words_of("❤️ 👍🏽 \x00\t…—") == []


def test_short_and_empty_documents():
    found = as_lists(shingle(column("", "one two", None, "...", "a b c d e", "a b c d e f"), 5))
    assert [len(f) for f in found] == [0, 1, 0, 0, 1, 2]
    assert found[1] == shingles_of("one two", 5)
    assert found[4][0] == found[5][0]


def test_shingles_follow_the_definition():
    texts = [
        "The quick brown fox jumps over the lazy dog.",
        "ไทย ภาษา is mixed 中文 text, isn't it?",
        "x" * 300 + " é É e\u0301 ok",
    ]
    for compiled in {False, compiled_available()}:
        for ngram in (1, 3, 5):
            assert as_lists(shingle(column(*texts), ngram, compiled)) == [shingles_of(t, ngram) for t in texts]


def test_case_spacing_composition_and_punctuation_leave_no_trace():
    a, b, c = as_lists(
        shingle(
            column("Cafe\u0301 au lait,\n\nplease: NOW", "café  AU lait please now", "café au lait please later"), 5
        )
    )
    assert a == b != c


@needs_numba
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=8), st.integers(1, 7))
def test_numpy_equals_compiled(texts, ngram):
    slow, fast = (shingle(column(*texts), ngram, compiled) for compiled in (False, True))
    assert slow.values.tolist() == fast.values.tolist()
    assert slow.offsets.tolist() == fast.offsets.tolist()


@needs_numba
def test_numpy_equals_compiled_across_block_borders(monkeypatch):
    rng = np.random.default_rng(3)
    parts = np.array(["word ", "Größe", " 中文字", "a", "\n", "é, ", "ไทย", "\U0001f44d", "\U00020001"])
    texts = ["".join(rng.choice(parts, n)) for n in (0, 1, 7, 40, 4000, 0, 2, 900)] + ["x" * 5000, "好" * 3000, "z"]
    want = as_lists(shingle(column(*texts), 5, True))
    for size in (16, 64, 1024):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        assert as_lists(shingle(column(*texts), 5, False)) == want


def test_batches_and_slices_change_nothing():
    texts = column("zero one two three four five", "六七八 nine", "", "ten eleven", "a b c d e f g h")
    want = as_lists(shingle(texts, 5))
    assert [as_lists(shingle(texts.slice(i, 1), 5))[0] for i in range(len(texts))] == want
    assert as_lists(shingle(texts.slice(2), 5)) == want[2:]


def test_classes_follow_unicode():
    """Every assigned code point of this Python's table is letter, mark or number exactly where the frozen table says so."""
    for point in range(0x110000):
        category = unicodedata.category(chr(point))
        variation = 0xFE00 <= point < 0xFE10 or point >= 0xE0000
        newer = unicodedata.unidata_version > "14.0.0" and point > 0xFFFF
        if category in ("Cn", "Cs") or variation or newer:
            continue
        word = CLASSES[point] != SEPARATOR
        if point < 0x10000 or category[0] in "LN":
            assert word == (category[0] in "LMN") or (point > 0xFFFF and category == "No"), f"U+{point:04X} {category}"


def test_unstable_blocks_hold_everything_that_nfc_moves():
    for point in range(0x110000):
        char = chr(point)
        if unicodedata.category(char) in ("Cs", "Cn"):
            continue
        if unicodedata.combining(char) or unicodedata.normalize("NFC", char) != char:
            assert UNSTABLE[point >> 6], f"U+{point:04X}"


UGLY = st.sampled_from(
    [
        "e",
        "é",
        "\u0301",
        "\u0323",
        "\u1161",
        "\u1100",
        "각",
        "\u11a8",
        " ",
        "\u2126",
        "“",
        "\u2001",
        "の",
        "\u3099",
        "中",
        "ß",
    ]
)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30) | st.lists(UGLY).map("".join), max_size=5))
def test_folding_equals_normalising_everything(texts):
    want = pc.utf8_lower(pc.utf8_normalize(column(*texts), form="NFC"))
    assert folded(column(*texts)).equals(want)


def test_one_huge_document():
    text = " ".join(f"w{i % 99991}" for i in range(1_500_000))  # 9.6 million characters
    found = shingle(column(text, "a short one"), 5)
    assert np.diff(found.offsets).tolist() == [1_499_996, 1]
    assert len(np.unique(found.values)) <= 99_991
