"""The published rule sets as data: ordered (reason, predicate) pairs over the layers `signals`, `language` and `tiers`.

A document is dropped for the first rule whose predicate holds (`core.predicate`). Presets: `gopher_quality`,
`gopher_repetition`, `c4`, `fineweb`, `tiers`. Thresholds are the fields of one frozen model per preset, and each field names its
source; `preset("c4", {"min_sentences": 3})` overrides one. Null never drops: a document that a layer was not computed for
passes that layer's rules, and a document without a language is not English.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import ConfigError


class Rule(NamedTuple):
    """Drop a document with `reason` where the predicate `when` holds."""

    reason: str
    when: str


class _Thresholds(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GopherQuality(_Thresholds):
    """Gopher (Rae et al. 2021, arXiv 2112.11446), appendix A1.1, quality filtering."""

    min_words: int = Field(default=50, ge=0, description="Gopher A1.1: words of symbols only are not counted")
    max_words: int = Field(default=100_000, ge=1, description="Gopher A1.1")
    min_mean_word_length: float = Field(
        default=3, ge=0, description="Gopher A1.1; only where words are written with spaces"
    )
    max_mean_word_length: float = Field(
        default=10, ge=0, description="Gopher A1.1; only where words are written with spaces"
    )
    max_symbol_ratio: float = Field(default=0.1, ge=0, description="Gopher A1.1: `#` per word, and ellipses per word")
    max_bullet_lines: float = Field(
        default=0.9, ge=0, le=1, description="Gopher A1.1: share of lines that begin with a bullet"
    )
    max_ellipsis_lines: float = Field(
        default=0.3, ge=0, le=1, description="Gopher A1.1: share of lines that end in an ellipsis"
    )
    min_alpha_words: float = Field(
        default=0.8, ge=0, le=1, description="Gopher A1.1: share of words that have a letter"
    )
    min_stop_words: int = Field(
        default=2, ge=0, le=8, description="Gopher A1.1: of the eight English stop words; 0 turns it off"
    )
    stop_word_languages: tuple[str, ...] = Field(
        default=("en",),
        description="languages that the stop-word rule applies to: the eight are English; empty: every document",
    )


class GopherRepetition(_Thresholds):
    """Gopher (Rae et al. 2021, arXiv 2112.11446), table A1."""

    max_dup_lines: float = Field(default=0.30, ge=0, le=1, description="Gopher table A1")
    max_dup_paragraphs: float = Field(default=0.30, ge=0, le=1, description="Gopher table A1")
    max_dup_line_chars: float = Field(default=0.20, ge=0, le=1, description="Gopher table A1")
    max_dup_paragraph_chars: float = Field(default=0.20, ge=0, le=1, description="Gopher table A1")
    max_top_2gram: float = Field(default=0.20, ge=0, description="Gopher table A1; can exceed 1 where n-grams overlap")
    max_top_3gram: float = Field(default=0.18, ge=0, description="Gopher table A1")
    max_top_4gram: float = Field(default=0.16, ge=0, description="Gopher table A1")
    max_dup_5gram: float = Field(default=0.15, ge=0, le=1, description="Gopher table A1")
    max_dup_6gram: float = Field(default=0.14, ge=0, le=1, description="Gopher table A1")
    max_dup_7gram: float = Field(default=0.13, ge=0, le=1, description="Gopher table A1")
    max_dup_8gram: float = Field(default=0.12, ge=0, le=1, description="Gopher table A1")
    max_dup_9gram: float = Field(default=0.11, ge=0, le=1, description="Gopher table A1")
    max_dup_10gram: float = Field(default=0.10, ge=0, le=1, description="Gopher table A1")


class C4(_Thresholds):
    """C4 (Raffel et al. 2020, arXiv 1910.10683), section 2.2. Its line removal is measured, never applied to the text."""

    min_sentences: int = Field(default=5, ge=0, description="C4 2.2: sentences in the lines that pass the line rules")
    require_terminal: bool = Field(
        default=True, description="C4 2.2 counts only lines ending in a terminal mark; FineWeb ran C4 without that rule"
    )
    max_removed_words: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of words in lines that C4 would remove; 1 turns it off as in C4 (DCLM: 0.05)",
    )


class FineWeb(_Thresholds):
    """FineWeb (Penedo et al. 2024, arXiv 2406.17557), section 3.6: its own three rules and the list rule of its code."""

    min_terminal_lines: float = Field(
        default=0.12, ge=0, le=1, description="FineWeb 3.6: share of lines ending in punctuation"
    )
    max_short_lines: float = Field(
        default=0.67, ge=0, le=1, description="FineWeb 3.6: share of lines of at most 30 characters"
    )
    max_dup_line_chars: float = Field(
        default=0.01, ge=0, le=1, description="FineWeb's code: of characters but newlines (paper: 0.1)"
    )
    max_newline_ratio: float = Field(default=0.3, ge=0, description="datatrove's FineWeb filter: newlines per word")


class Tiers(_Thresholds):
    """Keep the tiers from `least` up (`classifiers.tiers`)."""

    least: Literal["low", "medium_low", "medium", "medium_high", "high"] = Field(
        default="medium",
        description="lowest tier that stays: Step 3.5 Flash, App. C, keeps the upper three of web, the upper two of books",
    )


def _above(column: str, limit: float) -> str:
    return f"signals.{column} > {limit!r}"


def _below(column: str, limit: float) -> str:
    return f"signals.{column} < {limit!r}"


def _gopher_quality(t: GopherQuality) -> list[Rule]:
    spaced = "signals.unspaced_fraction < 0.5"
    stop = _below("stop_words", t.min_stop_words)
    if t.stop_word_languages:
        stop += f" and language.language in {list(t.stop_word_languages)!r}"
    return [
        Rule("gopher_few_words", _below("words", t.min_words)),
        Rule("gopher_many_words", _above("words", t.max_words)),
        Rule("gopher_short_words", f"{_below('mean_word_length', t.min_mean_word_length)} and {spaced}"),
        Rule("gopher_long_words", f"{_above('mean_word_length', t.max_mean_word_length)} and {spaced}"),
        Rule("gopher_hashes", _above("hash_ratio", t.max_symbol_ratio)),
        Rule("gopher_ellipses", _above("ellipsis_ratio", t.max_symbol_ratio)),
        Rule("gopher_bullet_lines", _above("bullet_line_fraction", t.max_bullet_lines)),
        Rule("gopher_ellipsis_lines", _above("ellipsis_line_fraction", t.max_ellipsis_lines)),
        Rule("gopher_alpha_words", _below("alpha_word_fraction", t.min_alpha_words)),
        Rule("gopher_stop_words", stop),
    ]


def _gopher_repetition(t: GopherRepetition) -> list[Rule]:
    rules = [
        Rule("gopher_dup_lines", _above("dup_line_fraction", t.max_dup_lines)),
        Rule("gopher_dup_paragraphs", _above("dup_paragraph_fraction", t.max_dup_paragraphs)),
        Rule("gopher_dup_line_chars", _above("dup_line_char_fraction", t.max_dup_line_chars)),
        Rule("gopher_dup_paragraph_chars", _above("dup_paragraph_char_fraction", t.max_dup_paragraph_chars)),
    ]
    for kind, limits in (
        ("top", {2: t.max_top_2gram, 3: t.max_top_3gram, 4: t.max_top_4gram}),
        ("dup", {5: t.max_dup_5gram, 6: t.max_dup_6gram, 7: t.max_dup_7gram}),
        ("dup", {8: t.max_dup_8gram, 9: t.max_dup_9gram, 10: t.max_dup_10gram}),
    ):
        for n, limit in limits.items():
            rules.append(Rule(f"gopher_{kind}_{n}gram", _above(f"{kind}_{n}gram_char_fraction", limit)))
    return rules


def _c4(t: C4) -> list[Rule]:
    sentences = "c4_sentences" if t.require_terminal else "c4_sentences_unterminated"
    removed = "any" if t.require_terminal else "any_but_terminal"
    rules = [
        Rule("c4_lorem_ipsum", "signals.lorem_ipsum > 0"),
        Rule("c4_curly_bracket", "signals.curly_brackets > 0"),
        Rule("c4_few_sentences", _below(sentences, t.min_sentences)),
    ]
    if t.max_removed_words < 1:
        rules.append(Rule("c4_removed_words", _above(f"c4_{removed}_word_fraction", t.max_removed_words)))
    return rules


def _fineweb(t: FineWeb) -> list[Rule]:
    return [
        Rule("fineweb_terminal_lines", _below("terminal_line_fraction", t.min_terminal_lines)),
        Rule("fineweb_short_lines", _above("short_line_fraction", t.max_short_lines)),
        Rule("fineweb_dup_line_chars", _above("dup_line_char_fraction_no_newlines", t.max_dup_line_chars)),
        Rule("fineweb_newlines", _above("newline_ratio", t.max_newline_ratio)),
    ]


def _tiers(t: Tiers) -> list[Rule]:
    ranks = ("low", "medium_low", "medium", "medium_high", "high")
    return [Rule("low_tier", f"tiers.rank < {ranks.index(t.least)}")]


PRESETS: dict[str, tuple[type[_Thresholds], Callable[[Any], list[Rule]]]] = {
    "gopher_quality": (GopherQuality, _gopher_quality),
    "gopher_repetition": (GopherRepetition, _gopher_repetition),
    "c4": (C4, _c4),
    "fineweb": (FineWeb, _fineweb),
    "tiers": (Tiers, _tiers),
}


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> list[Rule]:
    """The rules of a preset in order, with thresholds replaced by `overrides`; all mistakes are one ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"rules: no preset {name!r}{_nearest(name, PRESETS)}; presets are {', '.join(PRESETS)}")
    thresholds, build = PRESETS[name]
    known = thresholds.model_fields
    unknown = [k for k in overrides or {} if k not in known]
    if unknown:
        raise ConfigError(*(f"rules: {name} has no threshold {k!r}{_nearest(k, known)}" for k in unknown))
    try:
        return build(thresholds(**(overrides or {})))
    except ValidationError as e:
        problems = (f"rules: {name}.{'.'.join(map(str, p['loc']))}: {p['msg']}, got {p['input']!r}" for p in e.errors())
        raise ConfigError(*problems) from e


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}"
