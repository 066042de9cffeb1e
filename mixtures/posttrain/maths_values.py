"""Mathematical answers as exact values: what can be compared without a computer algebra system.

`read_value` takes the text of an answer, in LaTeX or plain, and gives a number (`Fraction`, with the digits of a decimal and
whether it was a percentage), a tuple, a set, an interval, or a choice of one letter. Anything else is None: left to
`math-verify`, never guessed at. `equal` compares two values. Source of the conventions: they are this project's; the cases in
its tests are GSM8K's and MATH's kinds.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

EXPONENT_LIMIT = 400  # 10^400 is beyond any double; larger ones would only burn memory
SIGNIFICANT = 4  # digits from which a decimal counts as the rounding of an exact value; chosen
WRAPPERS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname|displaystyle|boldsymbol)\s*\{([^{}]*)\}")
SPACING = re.compile(
    r"\\(?:left|right|displaystyle|,|;|:|!|quad|qquad| )(?![A-Za-z])|\\(?:bigl|bigr|Bigl|Bigr|big|Big)(?![A-Za-z])|~"
)
FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d)|(\d)\s*\{([^{}]+)\}|\{([^{}]+)\}\s*(\d))"
)
CURRENCY = re.compile(r"^\\?[$€£¥₹]\s*|\s*\\?[$€£¥₹]$")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,)\d{3})+(?![\d,])")
DECIMAL = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,4}))?")
POWER = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d{1,3})\s*\}?")
# A unit is a word of three letters or more behind a space, or one of these: `5x`, `2 ab` and `2 pi` are expressions.
SHORT_UNITS = "mm|cm|km|m|mi|ft|in|yd|kg|mg|g|lb|oz|ml|mL|L|s|h|hr|am|pm|J|N|W|V|K"
UNIT = re.compile(
    r"\s*(?:\\?%|°|\^\s*\{?\s*\\circ\s*\}?)(?:\s*[CF])?$"
    rf"|\s+(?:(?!sqrt|sin|cos|tan|log|exp)[A-Za-z]{{3,}}|(?:{SHORT_UNITS})(?![A-Za-z]))(?:[\s/-]+[A-Za-z]+\.?)*(?:\s*\^\{{?[23]\}}?|[²³])?\.?$"
)
PERCENT = re.compile(r"(?:\\?%|\bpercent\b)\s*$")
EQUATION = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?=[^=])")


@dataclass(frozen=True)
class Number:
    """An exact number. `digits`: places behind the point of a decimal, None for integers and fractions."""

    value: Fraction
    digits: int | None = None
    significant: int = 0
    percent: bool = False


@dataclass(frozen=True)
class Group:
    """A tuple (ordered), a set, or an interval, of numbers or groups. `brackets` tells an interval's ends apart."""

    kind: str  # tuple, set, interval
    items: tuple["Value", ...]
    brackets: str = ""


@dataclass(frozen=True)
class Choice:
    """One letter of a multiple choice, or a word such as `true`."""

    word: str


Value = Number | Group | Choice


def read_value(text: str) -> Value | None:
    """The exact value of an answer, or None where this module cannot tell."""
    text = _plain(text)
    if not text or len(text) > 2000:
        return None
    return _value(text, 0)


def _plain(text: str) -> str:
    text = text.strip().strip("$").replace("−", "-").replace("–", "-").replace("\\$", "$")
    text = SPACING.sub(" ", text)
    while (new := WRAPPERS.sub(r" \1 ", text)) != text:
        text = new
    text = EQUATION.sub("", text.strip())
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _value(text: str, depth: int) -> Value | None:
    if depth > 4:
        return None
    if re.fullmatch(r"\(?([A-Z])\)?", text) or text.lower() in ("true", "false", "yes", "no"):
        return Choice(text.strip("()").lower())
    return _number(text) or _group(text, depth)


def _group(text: str, depth: int) -> Value | None:
    """`(a, b)`, `[a, b)`, `{a, b}`; a list without brackets is a set, as answers such as `x = 2, 3` are meant."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    opening, closing = text[:1], text[-1:]
    pairs = {"(": ")]", "[": ")]", "{": "}"}
    inner = text[1:-1] if opening in pairs and closing in pairs[opening] and _balanced(text[1:-1]) else None
    parts = _split(inner if inner is not None else text)
    if len(parts) < 2 and opening != "{":
        return None
    items = [_value(p.strip(), depth + 1) if p.strip() else None for p in parts]
    if any(i is None for i in items):
        return None
    found = tuple(i for i in items if i is not None)
    if inner is None or opening == "{":
        return Group("set", found)
    if len(found) == 2 and (opening + closing) in ("[]", "[)", "(]"):
        return Group("interval", found, opening + closing)
    return Group(
        "tuple", found
    )  # (a, b) may be an open interval or a point: as a pair they are equal in the same cases


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str) -> list[str]:
    """At commas and semicolons outside brackets; `1,000` stays one number only where it must be (no space behind the comma)."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and (c == ";" or c == ","):
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _number(text: str) -> Number | None:
    percent = bool(PERCENT.search(text))
    text = CURRENCY.sub("", text).strip()
    text = UNIT.sub("", text).strip()
    text = CURRENCY.sub("", text).strip()
    text = THOUSANDS.sub(lambda m: m[0].replace("{,}", "").replace(",", ""), text)
    if power := POWER.fullmatch(text):
        text = f"{power[1]}e{power[2]}"
    if match := DECIMAL.fullmatch(text.replace(" ", "") if re.fullmatch(r"[+-] [\d.]+", text) else text):
        return _decimal(match, percent)
    value = _fraction(text)
    return Number(value, percent=percent) if value is not None else None


def _decimal(match: re.Match[str], percent: bool) -> Number | None:
    exponent = int(match[3] or 0)
    if abs(exponent) > EXPONENT_LIMIT or len(match[2]) > 1000:
        return None
    value = Fraction(match[2].rstrip(".") if match[2][-1] == "." else match[2]) * Fraction(10) ** exponent
    places = len(match[2].partition(".")[2]) - exponent
    digits = places if "." in match[2] and places > 0 else None
    significant = len(match[2].replace(".", "").lstrip("0"))
    return Number(-value if match[1] == "-" else value, digits, significant, percent)


def _fraction(text: str) -> Fraction | None:
    r"""`\frac{a}{b}`, `a/b`, and mixed numbers `2 \frac{1}{3}`, `2 1/3` of decimals."""
    sign = -1 if text.startswith("-") else 1
    body = text.lstrip("+-").strip()
    if match := FRACTION.search(body):
        top, bottom = (next(g for g in match.groups()[i::2] if g is not None) for i in (0, 1))
        if match.end() != len(body):
            return None
        whole = body[: match.start()].strip()
        return _mixed(sign, whole, top, bottom)
    if match := re.fullmatch(r"(?:(\d+)\s+)?\(?\s*([+-]?[\d.]+)\s*\)?\s*/\s*\(?\s*([+-]?[\d.]+)\s*\)?", body):
        return _mixed(sign, match[1] or "", match[2], match[3])
    return None


def _mixed(sign: int, whole: str, top: str, bottom: str) -> Fraction | None:
    try:
        value = Fraction(top.strip()) / Fraction(bottom.strip())
        return sign * (value + (Fraction(int(whole)) if whole else 0))
    except (ValueError, ZeroDivisionError):
        return None


def equal(gold: Value, answer: Value) -> bool:
    """Whether an answer's value is the gold value. A percentage equals its number and its hundredth; an open pair equals
    itself."""
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_number(gold, answer)
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        return gold.word == answer.word
    if not isinstance(gold, Group) or not isinstance(answer, Group):
        single = [g.items[0] for g in (gold, answer) if isinstance(g, Group) and g.kind == "set" and len(g.items) == 1]
        other = [g for g in (gold, answer) if isinstance(g, Number)]
        return bool(single and other) and equal(other[0], single[0])
    if gold.kind != answer.kind or gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
        return False
    if gold.kind != "set":
        return all(map(equal, gold.items, answer.items))
    left = list(answer.items)
    for item in gold.items:
        match = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_number(gold: Number, answer: Number) -> bool:
    wanted = {gold.value}
    if gold.percent != answer.percent:
        wanted |= {gold.value * 100, gold.value} if answer.percent else {gold.value / 100}
    if answer.value in wanted:
        return True
    return any(_rounds_to(w, answer) or _rounds_to(answer.value, gold) for w in wanted)


def _rounds_to(exact: Fraction, shown: Number) -> bool:
    """Whether a decimal of SIGNIFICANT digits and more is the exact value to its last digit (cut off or rounded)."""
    if shown.digits is None or shown.significant < SIGNIFICANT:
        return False
    return abs(exact - shown.value) < Fraction(1, 10**shown.digits) and not _short(exact)


def _short(value: Fraction) -> bool:
    """Whether a value has a finite decimal of few places: then only equality will do (0.1235 is not 0.12345's double)."""
    return (value * 10**6).denominator == 1
