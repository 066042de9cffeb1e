"""The stage `signals` beside plain definitions, by hand, on real pages and on odd and huge texts."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import signal_reference
from batches import texts_batch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from classifiers import signals as room
from classifiers.signals import LAYER, STAGE, SignalsConfig, signals
from core.hashing import table_digest

SAMPLES = st.one_of(
    st.lists(
        st.sampled_from(["a", "b", "the", "漢", "字。", "กี", "\n", "\n\n", " ", "...", "…", "Ab.", "[1]", "- ", "#"])
    ).map("".join),
    st.lists(st.sampled_from(["x", "yy", "z!"]), max_size=60).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)


def measured(texts: list[str | None]) -> pa.RecordBatch:
    batch, rejects = signals(SignalsConfig(), texts_batch(texts))
    assert rejects == []
    assert batch.schema == LAYER
    assert batch.num_rows == len(texts)
    return batch


def one(text: str) -> dict[str, float]:
    return measured([text]).to_pylist()[0]


def assert_equals_reference(texts: list[str]) -> None:
    got = measured(texts).to_pydict()
    want = [signal_reference.measure(t) for t in texts]
    assert {*want[0], "zstd_ratio"} == set(LAYER.names)
    for name in want[0]:
        np.testing.assert_allclose(got[name], [w[name] for w in want], rtol=1e-6, atol=1e-7, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=5))
@example(["a b c d e a b c d e a b c d e f"])
@example(["", "\n", "x"])
def test_every_value_equals_the_plain_definition(texts: list[str]) -> None:
    assert_equals_reference(texts)


def test_every_value_equals_the_plain_definition_in_twelve_languages(twelve_languages: dict[str, list[str]]) -> None:
    assert len(twelve_languages) == 12
    texts = []
    for lines in twelve_languages.values():
        texts += ["\n".join(lines[i : i + 12] + lines[i : i + 4] + ["", *lines[i + 2 : i + 9]]) for i in (0, 60)]
        texts.append(" ".join(lines[100:140] + lines[110:125]))
    assert_equals_reference(texts)


def test_every_value_equals_the_plain_definition_on_real_pages(shared_data: Path) -> None:
    """Tag soup read as text: long lines, brackets, repeated attributes, script."""
    pages = sorted((shared_data / "web-pages" / "html").rglob("*.gz"))[:4]
    assert pages
    assert_equals_reference([gzip.decompress(p.read_bytes()).decode("utf-8", "replace")[:10_000] for p in pages])


def test_gopher_repetition_by_hand() -> None:
    text = "a bb ccc dddd e\na bb ccc dddd e\nz"  # 11 words, 33 code points; line 2 repeats line 1
    got = one(text)
    assert got["dup_line_fraction"] == pytest.approx(1 / 3)
    assert got["dup_line_char_fraction"] == pytest.approx(15 / 33)
    assert got["dup_line_char_fraction_no_newlines"] == pytest.approx(15 / 31)
    assert got["top_2gram_char_fraction"] == pytest.approx(2 * 4 / 33)  # `a bb` is the first of those that occur twice
    assert got["top_4gram_char_fraction"] == pytest.approx(2 * 13 / 33)  # `a bb ccc dddd`
    assert got["dup_5gram_char_fraction"] == pytest.approx(11 / 33)  # letters of the second copy, without spaces
    assert got["dup_6gram_char_fraction"] == 0
    assert got["unique_word_fraction"] == pytest.approx(6 / 11)


def test_overlapping_duplicate_ngrams_count_each_character_once() -> None:
    got = one("a b c d e f g x a b c d e f g")
    assert got["dup_5gram_char_fraction"] == pytest.approx(7 / 29)


def test_top_ngram_without_repetition_is_the_first() -> None:
    assert one("aaaa b cc")["top_2gram_char_fraction"] == pytest.approx(6 / 9)
    assert one("aaaa")["top_2gram_char_fraction"] == 0


def test_equal_words_of_different_documents_are_no_repetition() -> None:
    got = measured(["one two three four five"] * 3)
    assert got.column("dup_5gram_char_fraction").to_pylist() == [0.0] * 3
    assert got.column("unique_word_fraction").to_pylist() == [1.0] * 3


def test_paragraphs_are_split_by_blank_lines_only() -> None:
    got = one("p one\np two\n\n \t\np one\np two\n\n\nq")
    assert (got["paragraphs"], got["lines"]) == (3, 5)
    assert got["dup_paragraph_fraction"] == pytest.approx(1 / 3)
    assert got["dup_paragraph_char_fraction"] == pytest.approx(11 / 31)


def test_gopher_quality_by_hand() -> None:
    got = one("# The end... of\n- it and -- 42…\n• x")
    assert (got["raw_words"], got["words"], got["stop_words"]) == (11, 7, 3)  # the, of, and
    assert got["hash_ratio"] == pytest.approx(1 / 11)
    assert got["ellipsis_ratio"] == pytest.approx(2 / 11)
    assert got["bullet_line_fraction"] == pytest.approx(2 / 3)
    assert got["ellipsis_line_fraction"] == pytest.approx(1 / 3)
    assert got["alpha_word_fraction"] == pytest.approx(6 / 11)
    assert got["mean_word_length"] == pytest.approx((3 + 3 + 2 + 2 + 3 + 2 + 1) / 7)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("He said “Stop.” Then he went", 2),
        ("It costs 3.14 e.g. here. Really?!", 2),
        ("今日は。元気！はい", 3),
        ("यह है। वह था।", 2),
        ("no mark at all", 1),
        ("Title\n\nText. More", 3),
        ("--- ***", 0),
        ("", 0),
    ],
)
def test_sentences_by_hand(text: str, count: int) -> None:
    assert one(text)["sentences"] == count


@pytest.mark.parametrize(
    ("line", "rule", "removed"),
    [
        ("A proper line of text.", "any", False),
        ("A proper line of text", "no_terminal", True),
        ("A proper line of text...", "no_terminal", True),
        ('He said so, "yes"', "no_terminal", False),
        ("As was shown. [12]", "no_terminal", False),
        ("As was shown [edit]", "no_terminal", True),
        ("Two words.", "few_words", True),
        ("Please enable JavaScript in here.", "javascript", True),
        ("Read our Privacy Policy at once.", "policy", True),
        ("This is " + "x" * 1001 + " long.", "long_word", True),
        ("This is " + "x" * 995 + " long.", "long_word", False),
    ],
)
def test_c4_line_rules_by_hand(line: str, rule: str, removed: bool) -> None:
    got = one(f"First come five good words.\n{line}")
    assert got[f"c4_{rule}_line_fraction"] == (0.5 if removed else 0)
    assert (got[f"c4_{rule}_word_fraction"] > 0) is removed
    assert (got["c4_any_line_fraction"] == 0.5) is removed


def test_c4_counts_sentences_of_lines_it_would_keep() -> None:
    got = one("Here are two. In one line.\nNo mark in this line\nShort one.")
    assert (got["sentences"], got["c4_sentences"], got["c4_sentences_unterminated"]) == (4, 2, 3)
    assert got["c4_any_line_fraction"] == pytest.approx(2 / 3)
    assert got["c4_any_but_terminal_word_fraction"] == pytest.approx(2 / 13)


def test_phrases_do_not_reach_across_documents() -> None:
    got = measured(["lorem", "ipsum java", "script", "lorem ipsum {"])
    assert got.column("lorem_ipsum").to_pylist() == [0, 0, 0, 1]
    assert got.column("curly_brackets").to_pylist() == [0, 0, 0, 1]
    assert got.column("c4_javascript_line_fraction").to_pylist() == [0.0] * 4


def test_fineweb_by_hand() -> None:
    short, long = "x" * 30, "y" * 31 + "."
    got = one(f"{short}\n{long}\n\n{long}")
    assert got["short_line_fraction"] == pytest.approx(1 / 3)
    assert got["terminal_line_fraction"] == pytest.approx(2 / 3)
    assert got["newline_ratio"] == pytest.approx(3 / 3)
    assert got["dup_line_char_fraction_no_newlines"] == pytest.approx(32 / 94)
    batch, _ = signals(SignalsConfig(short_line_chars=31), texts_batch([f"{short}\n{'z' * 31}"]))
    assert batch.column("short_line_fraction").to_pylist() == [1.0]


def test_compression_tells_repetition_from_noise() -> None:
    rng = np.random.default_rng(0)
    noise = "".join(map(chr, rng.integers(33, 127, 5000)))
    flat, rough, empty = measured(["spam " * 1000, noise, ""]).column("zstd_ratio").to_pylist()
    assert flat > 50
    assert 0.9 < rough < 1.4
    assert empty == 0


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\n", "\0", "\0\0 \0", "😀", "\ufffd" * 5, "x", "漢", "\u200b", "." * 50]
)
def test_odd_documents_are_finite(text: str) -> None:
    got = one(text)
    assert all(np.isfinite(v) for v in got.values())
    assert got["chars"] == len(text)
    assert_equals_reference([text, "between", text])


def test_null_and_no_documents() -> None:
    assert measured([None]).column("words").to_pylist() == [0]
    assert measured([]).num_rows == 0


def test_batch_size_chunk_size_and_order_change_nothing(
    twelve_languages: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["\n".join(lines[i : i + 9] * 2) for lines in twelve_languages.values() for i in range(0, 60, 20)] + [""]
    whole = measured(texts)
    digest = table_digest(whole)
    pieces = pa.Table.from_batches([measured(texts[i : i + 5]) for i in range(0, len(texts), 5)])
    assert table_digest(pieces) == digest
    assert table_digest(measured(texts[::-1]).take(pa.array(range(len(texts))[::-1]))) == digest
    assert table_digest(signals(SignalsConfig(), texts_batch(["head", *texts]).slice(1))[0]) == digest
    monkeypatch.setattr(room, "CHUNK_BYTES", 1000)
    assert table_digest(measured(texts)) == digest


def test_one_line_of_fifty_megabytes() -> None:
    letters = np.random.default_rng(1).integers(ord("a"), ord("z") + 1, (5_000_000, 10), dtype=np.uint8)
    letters[:, 9] = ord(" ")
    letters[-12:] = letters[:12]  # twelve words come again at the end
    got = one(letters.tobytes().decode())
    assert (got["chars"], got["words"], got["lines"]) == (50_000_000, 5_000_000, 1)
    assert got["mean_word_length"] == 9
    assert got["dup_10gram_char_fraction"] == pytest.approx(108 / 5e7)


def test_a_document_that_is_nothing_but_repetition() -> None:
    got = one("word " * 200_000)
    assert got["dup_5gram_char_fraction"] == pytest.approx(4 * 199_999 / 1e6)
    assert got["top_2gram_char_fraction"] == pytest.approx(9 * 199_999 / 1e6)


def test_the_stage_declares_what_it_writes() -> None:
    assert STAGE.layer is LAYER
    assert STAGE.columns(SignalsConfig()) == ("text",)
    assert {str(f.type) for f in LAYER} == {"int32", "float"}
