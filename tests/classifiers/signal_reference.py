"""The signals of one document in plain Python, written from the definitions in the modules' docstrings. Slow on purpose."""

import itertools
import re
import unicodedata
from collections import Counter

import regex

from core.text import SENTENCE_STOPS, UNSPACED, code_point_ranges

UNSPACED_POINTS = {c for low, high in code_point_ranges(UNSPACED) for c in range(low, high + 1)}
STOPS = {chr(c) for low, high in code_point_ranges(SENTENCE_STOPS) for c in range(low, high + 1)}
VARIATION = re.compile("[\ufe00-\ufe0f\u20e3\U000e0100-\U000e01ef]")
POLICY = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.A | re.I)


def _alone(c: str) -> bool:
    return ord(c) in UNSPACED_POINTS and unicodedata.category(c)[0] == "L"


def _joins(c: str) -> bool:
    """A mark that goes with the letter before it."""
    kind = unicodedata.category(c)
    other = kind in ("Nl", "No") or kind[0] == "M"
    return bool(VARIATION.match(c)) or (ord(c) in UNSPACED_POINTS and other)


def raw_words(text: str) -> list[str]:
    out = []
    for run in text.split():
        word = run[0]
        for before, c in itertools.pairwise(run):
            if _alone(c) or ((_alone(before) or _joins(before)) and not _joins(c)):
                out.append(word)
                word = c
            else:
                word += c
        out.append(word)
    return out


def _symbol(c: str) -> bool:
    return unicodedata.category(c)[0] not in "LNM" or bool(VARIATION.match(c))


def words(text: str) -> list[str]:
    out = []
    for word in raw_words(text):
        solid = [i for i, c in enumerate(word) if not _symbol(c)]
        if solid:
            out.append(word[solid[0] : solid[-1] + 1])
    return out


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def paragraphs(text: str) -> list[str]:
    out, held = [], []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            held.append(line)
        elif held:
            out.append("\n".join(held).strip())
            held = []
    return out


def duplicates(items: list[str]) -> tuple[int, int]:
    seen: set[str] = set()
    number = chars = 0
    for item in items:
        if item in seen:
            number += 1
            chars += len(item)
        seen.add(item)
    return number, chars


def top_ngram(tokens: list[str], n: int) -> int:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]  # of equals the first met
    return len(" ".join(gram)) * count


def dup_ngram(tokens: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(tokens[i]) for i in covered)


def sentences(line: str) -> int:
    stops = regex.escape("".join(STOPS), special_only=True).replace("]", "")
    pattern = regex.compile(f"(?P<mark>[{stops}])(?![{stops}])(?P<close>[\"')\\]}}»”’›」』）】]{{0,2}})")
    ends = []
    for m in pattern.finditer(line + "\n"):
        after = (line + "\n")[m.end() :]
        lower = m["mark"] == "." and after[:1] != "\n" and unicodedata.category((after + "  ")[1]) == "Ll"
        if m["mark"] in "。！？｡．" or (after[:1].isspace() and not lower):
            ends.append(m.start() + 1)
    return len(ends) + bool(words(line[ends[-1] if ends else 0 :]))


def terminal(line: str) -> bool:
    bare = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line).rstrip() if line.endswith("]") else line
    return bare.endswith((".", "?", "!", '"', "'")) and not bare.endswith("...") and not bare.endswith("…")


def measure(text: str, short: int = 30) -> dict[str, float]:
    """Every column of the layer but `zstd_ratio`."""
    raw, tokens, rows, blocks = raw_words(text), words(text), lines(text), paragraphs(text)
    chars = len(text)
    kinds = [unicodedata.category(c) for c in text]

    def share(part: float, whole: float) -> float:
        return part / max(whole, 1)

    letters = sum(k[0] == "L" for k in kinds)
    dup_lines, dup_line_chars = duplicates(rows)
    dup_blocks, dup_block_chars = duplicates(blocks)
    out = {
        "chars": chars,
        "words": len(tokens),
        "raw_words": len(raw),
        "lines": len(rows),
        "paragraphs": len(blocks),
        "sentences": sum(map(sentences, rows)),
        "stop_words": len(
            {"the", "be", "to", "of", "and", "that", "have", "with"} & {t.lower() for t in tokens if t.isascii()}
        ),
        "lorem_ipsum": len(re.findall("lorem ipsum", text, re.A | re.I)),
        "curly_brackets": text.count("{"),
        "replacement_chars": text.count("\ufffd"),
        "mean_word_length": share(sum(map(len, tokens)), len(tokens)),
        "unique_word_fraction": share(len(set(tokens)), len(tokens)),
        "unspaced_fraction": share(sum(_alone(t[0]) for t in tokens), len(tokens)),
        "letter_fraction": share(letters, chars),
        "digit_fraction": share(kinds.count("Nd"), chars),
        "space_fraction": share(sum(c.isspace() for c in text), chars),
        "upper_fraction": share(sum(k in ("Lu", "Lt") for k in kinds), letters),
        "hash_ratio": share(text.count("#"), len(raw)),
        "ellipsis_ratio": share(text.count("...") + text.count("…"), len(raw)),
        "alpha_word_fraction": share(sum(any(unicodedata.category(c)[0] == "L" for c in w) for w in raw), len(raw)),
        "bullet_line_fraction": share(sum(r[0] in "•-" for r in rows), len(rows)),
        "ellipsis_line_fraction": share(sum(r.endswith(("...", "…")) for r in rows), len(rows)),
        "dup_line_fraction": share(dup_lines, len(rows)),
        "dup_line_char_fraction": share(dup_line_chars, chars),
        "dup_paragraph_fraction": share(dup_blocks, len(blocks)),
        "dup_paragraph_char_fraction": share(dup_block_chars, chars),
        "terminal_line_fraction": share(sum(r[-1] in STOPS for r in rows), len(rows)),
        "short_line_fraction": share(sum(len(r) <= short for r in rows), len(rows)),
        "dup_line_char_fraction_no_newlines": share(dup_line_chars, chars - text.count("\n")),
        "newline_ratio": share(text.count("\n"), len(raw)),
    }
    out.update({f"top_{n}gram_char_fraction": share(top_ngram(tokens, n), chars) for n in (2, 3, 4)})
    out.update({f"dup_{n}gram_char_fraction": share(dup_ngram(tokens, n), chars) for n in range(5, 11)})
    return {**out, **_c4(rows, len(raw))}


def _c4(rows: list[str], raw_count: int) -> dict[str, float]:
    verdicts = []
    for row in rows:
        v = {
            "long_word": any(len(w) > 1000 for w in raw_words(row)),
            "no_terminal": not terminal(row),
            "few_words": len(raw_words(row)) < 3,
            "javascript": bool(re.search("javascript", row, re.A | re.I)),
            "policy": bool(POLICY.search(row)),
        }
        v["any_but_terminal"] = v["long_word"] or v["few_words"] or v["javascript"] or v["policy"]
        v["any"] = v["any_but_terminal"] or v["no_terminal"]
        verdicts.append(v)
    out: dict[str, float] = {
        "c4_sentences": sum(sentences(r) for r, v in zip(rows, verdicts, strict=True) if not v["any"]),
        "c4_sentences_unterminated": sum(
            sentences(r) for r, v in zip(rows, verdicts, strict=True) if not v["any_but_terminal"]
        ),
    }
    for rule in ("long_word", "no_terminal", "few_words", "javascript", "policy", "any", "any_but_terminal"):
        gone = [r for r, v in zip(rows, verdicts, strict=True) if v[rule]]
        out[f"c4_{rule}_line_fraction"] = len(gone) / max(len(rows), 1)
        out[f"c4_{rule}_word_fraction"] = sum(len(raw_words(r)) for r in gone) / max(raw_count, 1)
    return out
