"""Rule presets: thresholds as published, what null means, overrides, mistakes."""

import re

import pyarrow as pa
import pytest

from classifiers import language, signals, tiers
from classifiers.rules import PRESETS, Rule, preset
from core.errors import ConfigError
from core.predicate import Predicate

LAYERS = {"signals": signals.LAYER, "language": language.LAYER, "tiers": tiers.LAYER}


def first_reason(rules: list[Rule], **values: object) -> str | None:
    """The reason of the first rule that holds for one document; values that are not given are those of good prose."""
    good: dict[str, object] = dict.fromkeys(signals.LAYER.names, 0)
    good |= {
        "words": 500,
        "mean_word_length": 5.0,
        "alpha_word_fraction": 1.0,
        "stop_words": 8,
        "terminal_line_fraction": 1.0,
    }
    good |= {"c4_sentences": 20, "c4_sentences_unterminated": 20, "language": "en", "rank": 2, **values}
    table = {
        f"{layer}.{field.name}": pa.array([good.get(field.name)], field.type)
        for layer, schema in LAYERS.items()
        for field in schema
    }
    return next((r.reason for r in rules if Predicate(r.when).holds(table)[0]), None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_rule_reads_columns_that_exist_and_lets_good_prose_pass(name: str) -> None:
    rules = preset(name)
    assert len({r.reason for r in rules}) == len(rules)
    for rule in rules:
        for column in Predicate(rule.when).columns:
            layer, _, field = column.partition(".")
            assert field in LAYERS[layer].names, rule
    assert first_reason(rules) is None


@pytest.mark.parametrize(
    ("name", "column", "kept", "dropped", "reason"),
    [
        ("gopher_quality", "words", 50, 49, "gopher_few_words"),
        ("gopher_quality", "words", 100_000, 100_001, "gopher_many_words"),
        ("gopher_quality", "mean_word_length", 3.0, 2.9, "gopher_short_words"),
        ("gopher_quality", "mean_word_length", 10.0, 10.1, "gopher_long_words"),
        ("gopher_quality", "hash_ratio", 0.1, 0.11, "gopher_hashes"),
        ("gopher_quality", "ellipsis_ratio", 0.1, 0.11, "gopher_ellipses"),
        ("gopher_quality", "bullet_line_fraction", 0.9, 0.91, "gopher_bullet_lines"),
        ("gopher_quality", "ellipsis_line_fraction", 0.3, 0.31, "gopher_ellipsis_lines"),
        ("gopher_quality", "alpha_word_fraction", 0.8, 0.79, "gopher_alpha_words"),
        ("gopher_quality", "stop_words", 2, 1, "gopher_stop_words"),
        ("gopher_repetition", "dup_line_fraction", 0.3, 0.31, "gopher_dup_lines"),
        ("gopher_repetition", "dup_paragraph_fraction", 0.3, 0.31, "gopher_dup_paragraphs"),
        ("gopher_repetition", "dup_line_char_fraction", 0.2, 0.21, "gopher_dup_line_chars"),
        ("gopher_repetition", "dup_paragraph_char_fraction", 0.2, 0.21, "gopher_dup_paragraph_chars"),
        ("gopher_repetition", "top_2gram_char_fraction", 0.2, 0.21, "gopher_top_2gram"),
        ("gopher_repetition", "top_3gram_char_fraction", 0.18, 0.19, "gopher_top_3gram"),
        ("gopher_repetition", "top_4gram_char_fraction", 0.16, 0.17, "gopher_top_4gram"),
        ("gopher_repetition", "dup_5gram_char_fraction", 0.15, 0.16, "gopher_dup_5gram"),
        ("gopher_repetition", "dup_6gram_char_fraction", 0.14, 0.15, "gopher_dup_6gram"),
        ("gopher_repetition", "dup_7gram_char_fraction", 0.13, 0.14, "gopher_dup_7gram"),
        ("gopher_repetition", "dup_8gram_char_fraction", 0.12, 0.13, "gopher_dup_8gram"),
        ("gopher_repetition", "dup_9gram_char_fraction", 0.11, 0.12, "gopher_dup_9gram"),
        ("gopher_repetition", "dup_10gram_char_fraction", 0.1, 0.11, "gopher_dup_10gram"),
        ("c4", "lorem_ipsum", 0, 1, "c4_lorem_ipsum"),
        ("c4", "curly_brackets", 0, 1, "c4_curly_bracket"),
        ("c4", "c4_sentences", 5, 4, "c4_few_sentences"),
        ("tiers", "rank", 2, 1, "low_tier"),
        ("fineweb", "terminal_line_fraction", 0.12, 0.11, "fineweb_terminal_lines"),
        ("fineweb", "short_line_fraction", 0.67, 0.68, "fineweb_short_lines"),
        ("fineweb", "dup_line_char_fraction_no_newlines", 0.01, 0.02, "fineweb_dup_line_chars"),
        ("fineweb", "newline_ratio", 0.3, 0.31, "fineweb_newlines"),
    ],
)
def test_a_value_on_the_published_threshold_is_kept(
    name: str, column: str, kept: float, dropped: float, reason: str
) -> None:
    assert first_reason(preset(name), **{column: kept}) is None
    assert first_reason(preset(name), **{column: dropped}) == reason


def test_stop_words_are_asked_of_english_only_unless_told() -> None:
    rules = preset("gopher_quality")
    for other in ("de", None):
        assert first_reason(rules, stop_words=0, language=other) is None
    assert first_reason(preset("gopher_quality", {"stop_word_languages": ()}), stop_words=0, language="de")
    both = preset("gopher_quality", {"stop_word_languages": ("en", "sco")})
    assert first_reason(both, stop_words=0, language="sco") == "gopher_stop_words"


def test_word_length_is_not_asked_of_scripts_without_spaces() -> None:
    assert first_reason(preset("gopher_quality"), mean_word_length=1.0, unspaced_fraction=0.9) is None


def test_null_signals_drop_nothing() -> None:
    nothing = dict.fromkeys([*signals.LAYER.names, "rank"])
    for name in PRESETS:
        assert first_reason(preset(name), **nothing) is None


def test_overrides_replace_thresholds_and_switch_columns() -> None:
    loose = preset("c4", {"min_sentences": 2, "require_terminal": False, "max_removed_words": 0.05})
    assert first_reason(loose, c4_sentences=0, c4_sentences_unterminated=2) is None
    assert first_reason(loose, c4_sentences_unterminated=1) == "c4_few_sentences"
    assert first_reason(loose, c4_any_but_terminal_word_fraction=0.06) == "c4_removed_words"
    assert preset("fineweb", {"max_short_lines": 0.5}) != preset("fineweb")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gopher_qualty", {}, r"no preset 'gopher_qualty'; did you mean 'gopher_quality'\?"),
        ("zzz", {}, "expected one of gopher_quality, "),
        ("c4", {"min_sentence": 1}, r"c4 has no threshold 'min_sentence'; did you mean 'min_sentences'\?"),
        ("c4", {"min_sentences": "many"}, r"c4\.min_sentences: .*integer.*got 'many'"),
        ("fineweb", {"max_short_lines": 2}, r"fineweb\.max_short_lines: .*less than or equal to 1, got 2"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(name, overrides)


def test_every_threshold_names_its_source() -> None:
    source = re.compile("Gopher|C4|FineWeb|DCLM|Step 3.5|languages")
    for thresholds, _ in PRESETS.values():
        for field, info in thresholds.model_fields.items():
            assert source.search(info.description or ""), field
