"""What a conversation offers a verifier, and why it may not serve reinforcement learning.

In: a record's fields and the parts of its conversation. Out: the verifier's kind, the gold answer or tests, and the first
reason against it. Filters follow section 1.11 of the Step 3.5 Flash report (images, external links, open-ended without a
unique answer) and Big-Math's signals (multiple choice, true or false, yes or no, proofs, several parts, empty boxes).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import InputError
from mixtures.posttrain.parts import Parts
from mixtures.posttrain.verify_code import checked_test
from mixtures.posttrain.verify_maths import answer_of, is_verifiable, last_boxed

KINDS = {"maths": "maths", "math": "maths", "math_verify": "maths", "code": "code", "python": "code"}
ANSWER_KEYS = ("answer", "ground_truth", "gold", "final_answer", "solution_answer")
LINK = re.compile(r"https?://|www\.\w", re.IGNORECASE)
IMAGE = re.compile(
    r"!\[[^\]]*\]\(|<img\b|\[asy\]|\b(?:figure|diagram|graph|picture|image) (?:below|above|shown)\b|\bshown (?:below|above)\b",
    re.IGNORECASE,
)
CHOICES = re.compile(r"(?:^|\s)\(?A[).:]\s.{0,300}?(?:^|\s)\(?B[).:]\s.{0,300}?(?:^|\s)\(?C[).:]\s", re.DOTALL)
PROOF = re.compile(r"\b(?:prove|show) that\b|\bprove\b|\bdisprove\b|\bgive a proof\b|证明", re.IGNORECASE)
BINARY = re.compile(
    r"\btrue or false\b|\byes or no\b|^\s*(?:is|are|does|do|can|could|has|have|will|was|were)\b[^.?!]*\?\s*$",
    re.IGNORECASE,
)
MULTIPART = re.compile(r"(?:^|\n)\s*\(?(?:a|i|1)[).]\s.*?(?:\n)\s*\(?(?:b|ii|2)[).]\s", re.DOTALL)
OPEN = re.compile(
    r"^\s*(?:write (?:an? )?(?:essay|story|poem|letter|blog)|explain|discuss|describe|summari[sz]e|what do you think)\b",
    re.IGNORECASE,
)
BINARY_ANSWERS = {"true", "false", "yes", "no"}


def gold_of(record: Mapping[str, Any], parts: Parts) -> str | None:
    """The gold answer: the record's own, else what the last assistant message boxes or marks with `####`."""
    for key in ANSWER_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            return answer_of(value) or value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    last = parts.answers[-1] if parts.answers else ""
    boxed = last_boxed(last)
    if boxed is None and "####" in last:
        boxed = answer_of(last)
    return boxed or None


def tests_of(record: Mapping[str, Any]) -> list[Any]:
    """The record's tests, as a list; those of one text or object count as one. Empty where it has none that can be run."""
    tests = record.get("tests")
    listed = tests if isinstance(tests, list) else [tests] if tests else []
    try:
        return [checked_test(t) for t in listed]
    except InputError:
        return []


def verifier_of(record: Mapping[str, Any], parts: Parts) -> str | None:
    """`code` where there are tests, `maths` where there is an answer that can be compared, null where neither."""
    named = KINDS.get(str(record.get("verifier") or record.get("verifier_type") or "").lower())
    if tests_of(record) and named != "maths":
        return "code"
    gold = gold_of(record, parts)
    if named != "code" and gold is not None and (named == "maths" or is_verifiable(gold)):
        return "maths"
    return None


def unfit(record: Mapping[str, Any], parts: Parts, images: Sequence[Any], verifier: str | None) -> str | None:
    """The first reason why a conversation gives no RL record, or None."""
    prompt = parts.prompt
    if images or IMAGE.search(prompt):
        return "image"
    if LINK.search(prompt):
        return "link"
    if verifier == "code":
        return None
    gold = gold_of(record, parts)
    if PROOF.search(prompt):
        return "proof"
    if CHOICES.search(prompt) or (gold is not None and re.fullmatch(r"\(?[A-E]\)?", gold)):
        return "multiple_choice"
    if BINARY.search(prompt) or (gold or "").strip().lower().strip(".") in BINARY_ANSWERS:
        return "true_false"
    if MULTIPART.search(prompt):
        return "multi_part"
    if not gold or (verifier is None and OPEN.search(prompt)):
        return "open_ended"
    return None if verifier else "unverifiable_answer"
