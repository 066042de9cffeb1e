"""Which answers are worth a document: they say what the passage says, all in all, and nothing that it does not.

In: a passage and an answer. Out: the cleaned text, or the reason why it falls with the value that was measured. The rules and
limits are the same for every model; of the template only the bounds of length and form depend. In order:

| reason | an answer falls when |
|---|---|
| finish_reason | the model did not end by itself (`stop`): it was cut off or filtered |
| refusal | it speaks of itself as a model, or says that it cannot |
| prompt_leak | it repeats the marks of the prompt, or speaks of `the passage` where the passage does not |
| empty | nothing is left after introduction and fences |
| format | question_answer without a pair, knowledge_list with fewer than two lines |
| repetition | three equal pieces of 8 or more characters, or two of 100 or more, stand behind one another |
| length | words / words of the passage lies outside the template's bounds |
| language | it is in another language than the passage (both scores at least 0.5) |
| copied | more than 60 % of its word 13-grams stand in the passage |
| drift | it shares less than 35 % of content words with the passage, counted from the one that has fewer |
| numbers | a number or date does not stand in the passage |
| names | more than 10 % of the words in its names do not stand in the passage |

Cost: about 2 ms an answer of 200 words, most of it in the language model and the search for repetition.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtures.augment.facts import all_words, content, names, unfounded
from mixtures.augment.prompts import Template

COPY_NGRAM = 13
LANGUAGE_SCORE = 0.5
NOUNS_CAPITALISED = frozenset({"de", "lb", "nds", "als"})  # a capital letter says nothing of names there
REPEAT_CHARS, REPEAT_TIMES, REPEAT_LONG_CHARS = 8, 3, 100  # the second: datatrove's rule for synthetic text
REPEAT_PERIOD = 1024  # longest piece looked for
REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b|\bI(?:'m| am) (?:an AI|a (?:large )?language model)\b"
    r"|^\W*(?:I(?:'m| am) (?:sorry|unable|not able)|sorry\b|I (?:cannot|can't|can not|won't)\b|I apologi[sz]e)"
    r"|\b(?:cannot|can't) (?:assist|help) with (?:that|this)\b",
    re.IGNORECASE,
)
LEAK = re.compile(r"\[/?passage\b[^\]]*\]|\b(?:this|the) passage\b", re.IGNORECASE)
FENCE = re.compile(r"\A\s*```[\w-]*[ \t]*\n(?P<inside>.*?)\n?```\s*\Z", re.DOTALL)
INTRODUCTION = re.compile(
    r"\A\s*(?:(?:sure|certainly|of course|okay|ok)[!,.:]\s*)?"
    r"(?:(?:here(?: is| are|['\u2019]s)|below (?:is|are)|the following (?:is|are)|this is)\b[^\n]{0,120}?:\s*(?=\S)"
    r"|(?:\*\*)?(?:paraphrased|rephrased|rewritten|revised|shorter|distilled|condensed)?\s*"
    r"(?:text|version|passage|summary|answer|output)(?:\*\*)?:(?:\*\*)?\s*(?=\S))?",
    re.IGNORECASE,
)
QUOTES = (('"', '"'), ("\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"))
# An answer may be 60 kB of newlines or blanks: no pattern looks over a line's beginning or into a run twice, and no run is given
# back (`*+`) where nothing that follows could match inside it.
PAIR = re.compile(
    r"^[^\w\n]*+(?:Question|Q)\s*+\d*+\s*+[:.)]\s*+\S[^\n]*+\n\W*+(?:Answer|A)\s*+\d*+\s*+[:.)]\s*+\S",
    re.IGNORECASE | re.MULTILINE,
)
ITEM = re.compile(r"^[^\S\n]*+(?:[-*\u2022]|\d{1,3}[.)])\s++\S", re.MULTILINE)
SPACES = re.compile(r"(?<![ \t])[ \t]++$", re.MULTILINE)

Language = Callable[[str], tuple[str | None, float]]  # (language, score) of a text


@dataclass(frozen=True)
class Limits:
    """The shares beyond which an answer falls; the same for every model."""

    copied: float = 0.6
    recall: float = 0.35
    novel_names: float = 0.1


@dataclass(frozen=True)
class Wrong:
    """Why an answer falls."""

    reason: str
    detail: str


def validate(
    answer: str, finish_reason: str, source: str, template: Template, language: Language, limits: Limits
) -> str | Wrong:
    """The text of the document to be, or the first rule that it breaks."""
    if finish_reason != "stop":
        return Wrong("finish_reason", finish_reason or "none given")
    if refused := REFUSAL.search(answer):
        return Wrong("refusal", refused[0][:60])
    text = cleaned(answer)
    if not text:
        return Wrong("empty", "")
    if (leaked := LEAK.search(text)) and leaked[0].lower() not in source.lower():
        return Wrong("prompt_leak", leaked[0][:60])
    if not _formed(text, template.name):
        return Wrong("format", template.name)
    if piece := repeated(text):
        return Wrong("repetition", piece[:60])
    return _compared(text, source, template, language, limits) or text


def _compared(text: str, source: str, template: Template, language: Language, limits: Limits) -> Wrong | None:
    """The rules that need the passage."""
    said, given = all_words(text), all_words(source)
    ratio = len(said) / max(1, len(given))
    if not template.least_ratio <= ratio <= template.most_ratio:
        return Wrong("length", f"{ratio:.2f}")
    (mine, my_score), (theirs, their_score) = language(text), language(source)
    if mine != theirs and min(my_score, their_score) >= LANGUAGE_SCORE:
        return Wrong("language", f"{mine}, expected {theirs}")
    if (copied := containment(said, given, COPY_NGRAM)) > limits.copied:
        return Wrong("copied", f"{copied:.2f}")
    if (recall := overlap(content(said), content(given))) < limits.recall:
        return Wrong("drift", f"{recall:.2f}")
    if wrong := unfounded(text, source):
        return Wrong("numbers", ", ".join(wrong[:5]))
    if mine not in NOUNS_CAPITALISED and (share := novelty(names(text), given)) > limits.novel_names:
        return Wrong("names", f"{share:.2f}")
    return None


def cleaned(answer: str) -> str:
    """The answer without a Markdown fence around it, an introduction before it and quotation marks at its ends."""
    text = answer.replace("\r\n", "\n").strip()
    for _ in range(2):  # an introduction may stand before the fence, or inside it
        text = INTRODUCTION.sub("", text, count=1).strip()
        if fenced := FENCE.match(text):
            text = fenced["inside"].strip()
    for left, right in QUOTES:
        if (
            len(text) > 1
            and text[0] == left
            and text[-1] == right
            and left not in text[1:-1]
            and right not in text[1:-1]
        ):
            text = text[1:-1].strip()
    return SPACES.sub("", text)


def _formed(text: str, template: str) -> bool:
    if template == "question_answer":
        return PAIR.search(text) is not None
    if template == "knowledge_list":
        return len(ITEM.findall(text)) >= 2
    return True


def repeated(text: str) -> str:
    """The first piece, of the shortest length, that stands `REPEAT_TIMES` times (100 characters and more: twice) in a row."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    for period in range(REPEAT_CHARS, min(REPEAT_PERIOD, len(points) // 2) + 1):
        copies = 2 if period >= REPEAT_LONG_CHARS else REPEAT_TIMES
        same = points[period:] == points[:-period]
        if (at := _run(same, period * (copies - 1))) is not None and any(map(str.isalnum, text[at : at + period])):
            return text[at : at + period]
    return ""


def _run(flags: np.ndarray, length: int) -> int | None:
    """Where the first run of `length` true flags begins."""
    if len(flags) < length:
        return None
    breaks = np.concatenate([[-1], np.flatnonzero(~flags), [len(flags)]])
    long = np.flatnonzero(np.diff(breaks) - 1 >= length)
    return int(breaks[long[0]]) + 1 if len(long) else None


def containment(said: list[str], given: list[str], n: int) -> float:
    """Share of the answer's distinct word n-grams that stand in the source; 0 where it has none."""
    mine, theirs = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (said, given))
    return len(mine & theirs) / len(mine) if mine else 0.0


def overlap(a: set[str], b: set[str]) -> float:
    """Shared words / words of the smaller set (Szymkiewicz-Simpson); 0 where one is empty."""
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def novelty(named: set[str], given: list[str]) -> float:
    """Share of the words in names that do not stand in the source, in any case."""
    return len(named - {part for word in given for part in re.findall(r"\w+", word)}) / len(named) if named else 0.0
