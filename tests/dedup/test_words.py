"""Words with places: hand-made texts, masks, windows, and the way back to bytes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.schema import TEXT
from dedup import shingles
from dedup.words import NUMBER, Windows, masked, original_bytes, ragged, window_places, words_of

UGLY = [
    "",
    "\x00 a\x00b",
    "日本語 12 月",
    "e\u0301te\u0301",
    "\u1025\u102e x",
    "か\u3099き",
    "\u212a9 \u0130x",
    "a" * 99_999,
    "3.14 2pm",
]
texts = st.lists(
    st.text(st.sampled_from(list("ab1 .,é\u0301日か\u3099\u1025\u102e\u0130\u212a\ufffd\U0001f600\x00")), max_size=40),
    max_size=5,
)


def cut(text):
    """The words of one text as folded strings."""
    words = words_of(pa.array([text], TEXT))
    data = shingles.folded(pa.array([text], TEXT))[0].as_py().encode()
    return [data[a:b].decode() for a, b in zip(words.starts, words.ends, strict=True)]


def test_words_by_hand():
    assert cut("I have 2.5kg, don't I?") == ["i", "have", "2", "5kg", "don", "t", "i"]
    assert cut("日本語 12月") == ["日", "本", "語", "12", "月"]
    assert cut("\x00NUL\x00inside E\u0301t\u00e9") == ["nul", "inside", "\u00e9t\u00e9"]


def test_hashes_are_those_of_shingles():
    column = pa.array(["one two", "two", "ONE"], TEXT)
    words = words_of(column)
    assert words.offsets.tolist() == [0, 2, 3, 4]
    assert words.hashes[1] == words.hashes[2]
    assert words.hashes[0] == words.hashes[3] != words.hashes[1]
    one_word = shingles.shingle(column, 1, compiled=False).values
    assert one_word.tolist() == shingles.mix_shingles(words.hashes * shingles.WORD_BASE).tolist()


def test_masks_by_hand():
    """A run of numbers is one; a document's last number and the next one's first are not one run."""
    words = words_of(pa.array(["pay 1,000.50 or 2pm", "7 8", "9 x"], TEXT))
    hidden = masked(words)
    assert hidden.offsets.tolist() == [0, 4, 5, 7]
    assert (hidden.hashes == NUMBER).tolist() == [False, True, False, True, True, True, False]
    assert (hidden.starts - np.repeat(hidden.edges[:-1], np.diff(hidden.offsets))).tolist() == [0, 4, 13, 16, 0, 0, 2]
    assert (hidden.ends - np.repeat(hidden.edges[:-1], np.diff(hidden.offsets))).tolist() == [3, 12, 15, 19, 3, 1, 3]
    same = masked(words_of(pa.array(["pay 3 or 11am"], TEXT)))
    assert same.hashes.tolist() == hidden.hashes[:4].tolist()


def test_windows_do_not_depend_on_place():
    words = words_of(pa.array(["a b c d", "x b c d", "b c"], TEXT))
    windows = Windows(words.hashes)
    every = windows.all(3)
    assert every[1] == every[5]
    assert len(set(every.tolist())) == len(every) - 1
    assert windows.of(np.array([1, 8]), 2)[0] == windows.of(np.array([8]), 2)[0]
    assert windows.of(np.arange(len(every)), 3).tolist() == every.tolist()
    assert Windows(words.hashes[:2]).all(3).tolist() == []
    assert window_places(words, 3).tolist() == [0, 1, 4, 5]


def test_ragged_by_hand():
    assert ragged(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]


@given(texts)
@example(UGLY)
def test_a_batch_is_its_documents(batch):
    whole = words_of(pa.array(batch, TEXT))
    for i, text in enumerate(batch):
        alone = words_of(pa.array([text], TEXT))
        at = slice(whole.offsets[i], whole.offsets[i + 1])
        assert whole.hashes[at].tolist() == alone.hashes.tolist()
        assert whole.numbers[at].tolist() == alone.numbers.tolist()
        assert (whole.starts[at] - whole.edges[i]).tolist() == alone.starts.tolist()


@given(texts)
@example(UGLY)
def test_ranges_of_the_text_hold_the_words(batch):
    """What the range of a word cuts out of the text folds to that word, or to more where code points compose."""
    for text in batch:
        words = words_of(pa.array([text], TEXT))
        starts, ends = original_bytes(text, words.starts, words.ends)
        folded = shingles.folded(pa.array([text], TEXT))[0].as_py().encode()
        for a, b, c, d in zip(starts, ends, words.starts, words.ends, strict=True):
            piece = text.encode()[a:b].decode()  # on code points
            assert folded[c:d].decode() in shingles.folded(pa.array([piece], TEXT))[0].as_py()


def test_ranges_are_exact_where_only_case_changes():
    text = "Größe ÀÉ \u0130stanbul"
    words = words_of(pa.array([text], TEXT))
    starts, ends = original_bytes(text, words.starts, words.ends)
    assert [text.encode()[a:b].decode() for a, b in zip(starts, ends, strict=True)] == ["Größe", "ÀÉ", "\u0130stanbul"]


@pytest.mark.parametrize("size", [1 << 15, (1 << 15) + 1])
def test_blocks_leave_no_trace(size):
    text = ("word1 and more " * (size // 15 + 2))[:size] + " end"
    words = words_of(pa.array([text], TEXT))
    assert len(words.hashes) == len(text.split())
    assert len(set(words.hashes[:-2].tolist())) == 3
