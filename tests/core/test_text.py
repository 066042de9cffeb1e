"""Words, hashes of ranges, normal forms and spans over columns of text."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.text import (
    Hashes,
    Span,
    any_flags,
    apply_spans,
    classes,
    code_points,
    normalise,
    raw_words,
    replace_surrogates,
    unite_spans,
    words,
)

UGLY = " \n\r\t.,-'#äяก็漢字かな한😀\0\ufffd\u200b\u0301\ufe0f"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(UGLY))


def column(*texts: str | None) -> pa.Array:
    return pa.array(texts, pa.large_string())


def cut(texts: list[str], kind: str) -> list[list[str]]:
    """The raw words or words of each text as strings."""
    text = code_points(column(*texts))
    raw = raw_words(text)
    found = raw if kind == "raw" else words(text, raw)
    chars = text.points.tobytes().decode("utf-32-le")
    spans = [chars[s:e] for s, e in zip(found.start, found.end, strict=True)]
    return [spans[a:b] for a, b in zip(found.first, found.first[1:], strict=False)]


@pytest.mark.parametrize(
    ("text", "raw", "stripped"),
    [
        ("", [], []),
        (" \n\t\u3000", [], []),
        ("one", ["one"], ["one"]),
        ("“Don't!” -- (see a.b)", ["“Don't!”", "--", "(see", "a.b)"], ["Don't", "see", "a.b"]),
        ("!!a?? ---", ["!!a??", "---"], ["a"]),
        ("你好，world。", ["你", "好", "，world。"], ["你", "好", "world"]),
        ("カタカナ3日", ["カ", "タ", "カ", "ナ", "3", "日"], ["カ", "タ", "カ", "ナ", "3", "日"]),
        ("ที่นี่", ["ที่", "นี่"], ["ที่", "นี่"]),
        ("한국어 문장", ["한국어", "문장"], ["한국어", "문장"]),
        ("go 😀 ❤️ now\u00a0then", ["go", "😀", "❤️", "now", "then"], ["go", "now", "then"]),
        ("a\0b \ufffd", ["a\0b", "\ufffd"], ["a\0b"]),
        ("cafe\u0301 5%", ["cafe\u0301", "5%"], ["cafe\u0301", "5"]),
    ],
)
def test_words_by_hand(text: str, raw: list[str], stripped: list[str]) -> None:
    assert cut([text], "raw") == [raw]
    assert cut([text], "words") == [stripped]


@given(st.lists(TEXTS, max_size=6))
def test_words_do_not_depend_on_the_batch(texts: list[str]) -> None:
    for kind in ("raw", "words"):
        assert cut(texts, kind) == [w for t in texts for w in cut([t], kind)]


@given(TEXTS.filter(lambda t: not (classes()[[ord(c) for c in t] or [32]] & 64).any()))
def test_raw_words_of_spaced_scripts_are_str_split(text: str) -> None:
    marks_of_unspaced = (classes()[[ord(c) for c in text] or [32]] & 128).any()
    if not marks_of_unspaced:
        assert cut([text], "raw") == [text.split()]


def test_any_flags_looks_inside_each_range_only() -> None:
    text = code_points(column("ab 12 a1 漢", "9"))
    raw = raw_words(text)
    letters = (any_flags(text, raw.start, raw.end) & 2) != 0
    assert letters.tolist() == [True, False, True, True, False]


def test_hashes_are_equal_for_equal_ranges_wherever_they_lie() -> None:
    rng = np.random.default_rng(5)
    points = rng.integers(0, 0x110000, 200_000, dtype=np.uint32)
    points[150_000:150_400] = points[100:500]  # across blocks of 65,536
    points[65_500:65_900] = points[100:500]
    h = Hashes(points)
    at = np.array([100, 150_000, 65_500])
    assert len(set(h.of(at, at + 400).tolist())) == 1
    assert len(set(h.of(at, at + np.array([400, 399, 398])).tolist())) == 3
    assert len(set(h.of(np.arange(199_999), np.arange(1, 200_000)).tolist())) == len(set(points[:199_999].tolist()))


def test_hashes_tell_nul_and_order_apart() -> None:
    h = Hashes(np.array([0, 0, 1, 0, 0, 1], dtype=np.uint32))
    assert len({int(x) for x in h.of(np.array([0, 0, 1, 2]), np.array([1, 2, 3, 4]))}) == 4
    assert h.of(np.array([0]), np.array([3])) == h.of(np.array([3]), np.array([6]))


@given(st.lists(TEXTS, max_size=5))
@example(["e\u0301  \x1c\x85\u2029x ", "\u2000\u212b", "", "a\0b"])
def test_normalise_is_nfc_with_single_spaces(texts: list[str]) -> None:
    once = normalise(column(*texts))
    assert normalise(once).equals(once)
    for text, got in zip(texts, once.to_pylist(), strict=True):
        composed = unicodedata.normalize("NFC", text)
        if unicodedata.is_normalized("NFC", got):  # Arrow's Unicode is newer than Python's: skip what only one composes
            assert got == " ".join(composed.split())


def test_normalise_keeps_case_and_null() -> None:
    assert normalise(column(" A\r\n b ", None)).to_pylist() == ["A b", None]


@pytest.mark.parametrize(
    ("text", "clean", "count"),
    [
        ("plain", "plain", 0),
        ("é", "é", 0),
        ("a\ud800b\udc00", "a\ufffdb\ufffd", 2),
        ("\ud83d\ude00", "😀", 0),
        ("\ude00\ud83d\ud83d\ude00", "\ufffd\ufffd😀", 2),
    ],
)
def test_lone_surrogates_are_replaced_and_counted(text: str, clean: str, count: int) -> None:
    assert replace_surrogates(text) == (clean, count)


def test_spans_that_share_a_byte_unite_and_the_earlier_stage_wins() -> None:
    first, second = [Span(4, 8, "A")], [Span(0, 5, "B"), Span(8, 9, "C"), Span(20, 22)]
    assert unite_spans([first, second]) == [Span(0, 8, "A"), Span(8, 9, "C"), Span(20, 22)]
    assert unite_spans([second, first]) == [Span(0, 8, "B"), Span(8, 9, "C"), Span(20, 22)]
    assert apply_spans(b"0123456789", [[Span(2, 4, "é")], [Span(9, 10)]]) == "01é45678"
    assert apply_spans(b"abc", [[Span(1, 1, "x")]]) == "abc"


def test_spans_outside_or_inside_a_character_are_refused() -> None:
    for span in (Span(0, 1), Span(1, 2), Span(0, 9), Span(-1, 2)):
        with pytest.raises(ValueError, match=r"spans: range"):
            apply_spans("é".encode(), [[span]])


@given(TEXTS, st.data())
def test_apply_spans_replaces_each_covered_run_once(text: str, data: st.DataObject) -> None:
    edges = np.cumsum([0, *(len(c.encode()) for c in text)]).tolist()
    pair = st.tuples(st.sampled_from(edges), st.sampled_from(edges)).map(sorted)
    stages = data.draw(st.lists(st.lists(pair.map(lambda p: Span(p[0], p[1], "|")), max_size=4), max_size=3))
    raw = text.encode()
    covered = np.zeros(len(raw), dtype=bool)
    joined = np.zeros(len(raw), dtype=bool)  # byte i and i + 1 lie in one span
    for start, end, _ in (s for spans in stages for s in spans):
        covered[start:end] = True
        joined[start : max(end - 1, start)] = True
    want = bytearray()
    for i in range(len(raw)):
        if not covered[i]:
            want.append(raw[i])
        elif i == 0 or not joined[i - 1]:
            want += b"|"
    assert apply_spans(raw, stages) == want.decode()


def test_one_range_with_and_without_a_replacement() -> None:
    both = [Span(0, 3, "x"), Span(0, 3, None)]
    assert unite_spans([both]) == unite_spans([both[::-1]]) == [Span(0, 3, None)]
