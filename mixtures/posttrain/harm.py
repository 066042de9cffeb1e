"""A small linear rule for harmful content: weighted words per length, dangerous requests, and refusals.

In: texts. Out: `score` in [0, 1): w / (w + words + 20) with w = 20 times the summed weights of matched words
(harm_terms.txt), so that one slur in a tweet outweighs one in a chapter; 20 words of padding keep single words from scoring
alone. `request` names what a prompt asks for when a verb of making stands near a weapon, drug or crime. A refusal turns a
harmful prompt into a good example.

Honest figures, on 24,783 tweets labelled hate, offensive or neither (Davidson et al. 2017, arXiv 1703.04009; base rate of the
first two 0.83): the score tells the first two from the third with AUC 0.94, finds 84 % of them at 0.5 and flags 5 % of the
others. Hate against offensive is 0.60: a word list sees coarse words, not intent. The words are English with a few German,
French and Spanish ones; other languages, and harm without such words, pass unseen. It is a first sieve.
"""

import functools
import re
from collections import Counter
from importlib import resources

LENGTH = 20.0  # words of padding, and the factor of a weight; chosen
VERBS = r"(?:make|build|create|synthesi[sz]e|cook|produce|buy|get away with|commit|plan|carry out|hack|write|spread|assemble)"
THINGS = {
    "weapon": r"(?:pipe ?bombs?|bombs?|explosives?|grenades?|nerve (?:gas|agents?)|sarin|ricin|anthrax|molotov\w*|ghost guns?)",
    "drug": r"(?:meth|methamphetamine|crystal meth|heroin|fentanyl|crack cocaine)",
    "malware": r"(?:ransomware|keyloggers?|malware|computer virus(?:es)?|botnets?|rootkits?)",
    "violence": r"(?:mass shooting|murders?|genocide|terror(?:ist)? attacks?|kidnapping|school shooting)",
    "abuse": r"(?:child porn\w*|revenge porn|sexual(?:ly)? (?:abuse|content) (?:of|with) (?:a )?(?:child\w*|minors?))",
}
REQUESTS = {
    name: re.compile(rf"\b{VERBS}\b[^.?!\n]{{0,40}}?\b{thing}\b", re.IGNORECASE) for name, thing in THINGS.items()
}
REFUSAL = re.compile(
    r"\bI(?:'m| am)? ?(?:really |so |very )?(?:sorry|unable|afraid)\b[^.\n]{0,80}"
    r"\b(?:can(?:'t|not)|not able|unable|won't|help|assist|provide)\b"
    r"|\bI (?:can(?:'t|not)|won't|will not|must decline|refuse|am not able to)\b[^.\n]{0,60}"
    r"\b(?:help|assist|provide|do that|support|comply|with that)\b"
    r"|\bI must decline\b|\bIch kann (?:dabei|dir|Ihnen)[^.\n]{0,40} nicht\b|\bJe ne peux pas (?:vous |t')?aider\b"
    r"|\bNo puedo (?:ayudar|proporcionar)"
    r"|(?:我)?(?:无法|不能)(?:提供|帮助|协助)",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")
BEGINNING = 600  # characters in which an answer that refuses says so


@functools.cache
def _terms() -> tuple[dict[str, int], dict[str, int], tuple[int, ...]]:
    """(weights of whole words, weights of beginnings, the lengths of beginnings, longest first)."""
    whole: dict[str, int] = {}
    beginnings: dict[str, int] = {}
    for line in resources.files("mixtures.posttrain").joinpath("harm_terms.txt").read_text("utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        weight, *words = line.split()
        whole.update({w: int(weight) for w in words if not w.endswith("*")})
        beginnings.update({w[:-1]: int(weight) for w in words if w.endswith("*")})
    return whole, beginnings, tuple(sorted({len(b) for b in beginnings}, reverse=True))


def _weight(word: str) -> int:
    """The weight of one word in lower case, 0 for most."""
    whole, beginnings, lengths = _terms()
    return whole.get(word) or next((beginnings[word[:n]] for n in lengths if word[:n] in beginnings), 0)


def score(text: str) -> float:
    """How much of a text is abuse, 0 to below 1."""
    counts = Counter(WORD.findall(text.lower()))
    weight = LENGTH * sum(n * _weight(word) for word, n in counts.items())
    return weight / (weight + counts.total() + LENGTH) if weight else 0.0


def request(prompt: str) -> str | None:
    """What dangerous thing a prompt asks to make or do, or None."""
    return next((name for name, pattern in REQUESTS.items() if pattern.search(prompt)), None)


def refuses(answer: str) -> bool:
    """Whether an answer begins by declining."""
    return bool(REFUSAL.search(answer[:BEGINNING]))
