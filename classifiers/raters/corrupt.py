"""Texts made worse on purpose: the negatives of `integrity`, `commercial` and of the fluency card.

In: a text, its doc_id, sometimes its language. Out: the spoilt text, the same for the same doc_id. Each way of spoiling is a
*source* of its own, so that a rater is tested on a way it was not trained on. Phrases of advertising are `lexicon.json`.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

from core.hashing import seeded

# What extraction leaves of pages: navigation, consent, sharing. Chosen; none is taken from the demo's pages.
BOILERPLATE = (
    "Home | About | Contact | Login", "We use cookies to improve your experience. Accept all", "Share on Facebook",
    "Skip to main content", "All rights reserved.", "Read more...", "Previous | Next", "Toggle navigation", "Tweet",
    "Privacy Policy | Terms of Use", "Posted by admin on", "0 comments", "Back to top", "Loading...", "Menu", "Search",
    "You must be logged in to post a comment.", "Sign in | Register", "Print this page", "Copyright ©", "Follow us",
    "JavaScript is disabled in your browser.", "Related posts", "Subscribe to RSS", "Page 1 of 12", "View all categories",
)  # fmt: skip
MOJIBAKE = ("â€™", "Ã©", "Â ", "\ufffd", "â€œ", "ï»¿", "&amp;nbsp;", "&#8217;")
WORD = re.compile(r"\S+")


class Chance:
    """Numbers in [0, 1) in a row that depends on `key` only."""

    def __init__(self, key: str) -> None:
        self._key, self._drawn = key, 0

    def __call__(self) -> float:
        self._drawn += 1
        return seeded(self._drawn, self._key)

    def of(self, choices: Sequence[str]) -> str:
        return choices[int(self() * len(choices))]

    def shuffled(self, items: Sequence[str]) -> list[str]:
        return [item for _, item in sorted((self(), item) for item in items)]


def boilerplate(text: str, chance: Chance) -> str:
    """Half as many lines of navigation and consent as the text has lines, among them."""
    out: list[str] = []
    for line in text.split("\n"):
        out += [line] if chance() < 0.6 else [chance.of(BOILERPLATE), line]
    return "\n".join([chance.of(BOILERPLATE), chance.of(BOILERPLATE), *out, chance.of(BOILERPLATE)])


def menu(text: str, chance: Chance) -> str:
    """A third of the text's words as a list of links in a shuffled order."""
    words = [w.strip(".,;:()") for w in WORD.findall(text)]
    items = [" ".join(words[i : i + 2]).capitalize() for i in range(0, len(words), 6)]
    mark = chance.of(("", "- ", "» ", "| ", "• "))
    return "\n".join(mark + item for item in chance.shuffled(items))


def truncated(text: str, chance: Chance) -> str:
    """Lines cut anywhere, some with an ellipsis."""
    cut = [line[: max(8, int(len(line) * (0.2 + 0.6 * chance())))] for line in text.split("\n")]
    return "\n".join(line + ("..." if chance() < 0.4 else "") for line in cut)


def encoding(text: str, chance: Chance) -> str:
    """UTF-8 read as Latin-1; where that changes nothing, debris of it in place of one space in twelve."""
    broken = text.encode("utf-8", "replace").decode("latin-1")
    if broken != text and chance() < 0.5:
        return broken
    return "".join(c if c != " " or chance() > 0.08 else chance.of(MOJIBAKE) for c in text)


def wrapped(text: str, chance: Chance) -> str:
    """A page of print: lines of equal width, words torn with hyphens, numbers of pages between."""
    width = 30 + int(40 * chance())
    flat = " ".join(WORD.findall(text))
    lines = [flat[i : i + width] for i in range(0, len(flat), width)]
    torn = [line + ("-" if line[-1:].isalpha() and chance() < 0.7 else "") for line in lines]
    return "\n".join(f"{line}\n{i // 8}\n" if i % 8 == 7 else line for i, line in enumerate(torn))


def repeated(text: str, chance: Chance) -> str:
    """Lines that come back two to four times."""
    return "\n".join("\n".join([line] * (1 + int(3 * chance()))) for line in text.split("\n") if line.strip())


SPOILED: dict[str, Callable[[str, Chance], str]] = {
    "boilerplate": boilerplate,
    "menu": menu,
    "truncated": truncated,
    "encoding": encoding,
    "wrapped": wrapped,
    "repeated": repeated,
}


def spoil(text: str, doc_id: str) -> tuple[str, str]:
    """(spoilt text, which way), the way drawn by doc_id."""
    chance = Chance(f"spoil {doc_id}")
    way = chance.of(tuple(SPOILED))
    return SPOILED[way](text, chance), way


@cache
def lexicon() -> dict[str, dict[str, list[str]]]:
    """language -> theme -> phrases of advertising."""
    found: dict[str, dict[str, list[str]]] = json.loads(
        files("classifiers.raters").joinpath("lexicon.json").read_text("utf-8")
    )
    return found


def advertise(text: str, doc_id: str, language: str) -> tuple[str, str]:
    """(the text with half of its lines and more replaced by advertising of one theme, the theme)."""
    chance = Chance(f"advertise {doc_id}")
    theme = chance.of(tuple(lexicon()["en"]))
    phrases = lexicon()[language][theme]
    words = [w for w in WORD.findall(text) if w.isalpha()][:400] or ["it"]
    share = 0.5 + 0.5 * chance()
    lines = [line for line in text.split("\n") if line.strip()]
    return "\n".join(line if chance() > share else _advert(chance, phrases, words) for line in lines), theme


def _advert(chance: Chance, phrases: Sequence[str], words: Sequence[str]) -> str:
    parts = []
    for _ in range(1 + int(3 * chance())):
        thing = " ".join(chance.of(words) for _ in range(1 + int(4 * chance())))
        phrase = chance.of(phrases)
        parts.append(f"{phrase.capitalize()} {thing}{chance.of(('!', '.', ' -', '', ' »'))}")
    return " ".join(parts)


def scramble(text: str, doc_id: str) -> tuple[str, str]:
    """(text without its order: words shuffled, or letters swapped; which). The fluency card compares it to the text itself."""
    chance = Chance(f"scramble {doc_id}")
    if chance() < 0.5:
        return " ".join(chance.shuffled(WORD.findall(text))), "shuffled_words"
    out = list(text)
    for i in range(1, len(out)):
        if out[i].isalpha() and out[i - 1].isalpha() and chance() < 0.15:
            out[i - 1], out[i] = out[i], out[i - 1]
    return "".join(out), "swapped_letters"
