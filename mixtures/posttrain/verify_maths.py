r"""Whether a response gives the gold answer of a mathematical task: reward 1 or 0.

In: the gold answer and a response. The answer of a response is its last `\boxed{...}` (braces may nest), else what follows
the last `####` (GSM8K), else what follows the last "answer is" or "answer:". Gold and answer are read as exact values first
(`maths_values`); where one cannot be, `math-verify` (Apache-2.0, sympy behind it) compares them, gold parsed first: its order
matters. sympy can take for ever on a hostile power tower, so that comparison runs in a child process that is killed after 5
seconds and may use 1 GB. Its clock begins when sympy is loaded, so that a busy machine costs no reward; what was killed is told
as `timeout`.

A response without a marked answer scores 0: taking any last number in it would reward a list of guesses. A gold answer that
math-verify cannot read is an InputError: no response could be told right from wrong by it.
"""

import json
import re
import resource
import subprocess
import sys
import threading

from core.errors import ConfigError, InputError, StageError
from mixtures.posttrain.maths_values import equal, read_value

LOAD_S = 120.0  # for a Python to begin and to import sympy, some 2 s on an idle core; beyond it the machine is broken
COMPARE_S = 5.0  # math-verify's own limit for parsing and comparing, here enforced from outside
MEMORY_BYTES = 1 << 30
UNREADABLE = "unreadable"  # what the child says of a gold answer
MISSING = 3  # exit status of the child where the package is not installed
PHRASE = re.compile(r"(?i)\banswer\s*(?:is|:|=)\s*:?\s*\**\s*")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(\{|\s\S)")
TAIL = 400  # characters of an answer behind a phrase that are read
CHILD = f"""
import json, sys
try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError:
    sys.exit({MISSING})
print("ready", flush=True)
pairs = json.load(sys.stdin)
how = [LatexExtractionConfig(), ExprExtractionConfig()]
for gold, answer in pairs:
    try:
        wanted = parse(f"${{gold}}$", extraction_config=how, parsing_timeout=None, raise_on_error=True)
    except Exception:
        wanted = []
    try:
        given = parse(f"${{answer}}$", extraction_config=how, parsing_timeout=None, raise_on_error=True)
        same = bool(wanted) and bool(given) and verify(wanted, given, timeout_seconds=None)
    except Exception:  # an answer that cannot be read is a wrong one
        same = False
    read = any(not isinstance(part, str) for part in wanted)  # the text itself stands beside what was read of it
    print(json.dumps(bool(same)) if read else "{UNREADABLE}", flush=True)
"""


def answer_of(response: str) -> str | None:
    """The marked answer of a response, or None."""
    if (boxed := last_boxed(response)) is not None:
        return boxed
    _, mark, tail = response.rpartition("####")
    if mark and tail.strip():
        return tail.strip().split("\n")[0]
    end = response[-8 * TAIL :]
    starts = [m.end() for m in PHRASE.finditer(end)]
    tail = end[starts[-1] :].partition("\n")[0][:TAIL] if starts else ""
    return _end_of_phrase(tail) or None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}` whose braces close; escaped braces do not count."""
    for match in reversed(list(BOXED.finditer(text))):
        if match[1] != "{":
            return match[1].strip()
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 2
                continue
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        if not depth:
            return text[match.end() : at - 1].strip()
    return None


def _end_of_phrase(tail: str) -> str:
    """The answer in the rest of a line: up to the end of a sentence, without emphasis."""
    cut = re.split(r"(?<!\d)\.(?!\d)|\.\s|\.$|\s(?:because|since)\b", tail.strip())[0]
    return cut.strip().strip("*_`").strip()


def maths_reward(response: str, gold: str) -> tuple[float, str]:
    """(1.0 or 0.0, how it was decided)."""
    answer = answer_of(response)
    if answer is None:
        return 0.0, "no marked answer"
    same = same_answer(gold, answer)
    if same is None:
        return 0.0, f"timeout: answered {answer[:80]!r}"
    return (1.0, "equal") if same else (0.0, f"answered {answer[:80]!r}")


def same_answer(gold: str, answer: str) -> bool | None:
    """Whether two answers mean the same; None: not known, the comparison was killed. A gold answer that boxes or marks its
    value is unwrapped first."""
    gold = answer_of(gold) or gold
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    wanted, given = read_value(gold), read_value(answer)
    if wanted is not None and given is not None:
        return equal(wanted, given)
    return compare([(gold, answer)])[0]


def compare(pairs: list[tuple[str, str]]) -> list[bool | None]:
    """What math-verify says of (gold, answer) pairs; None from the pair on which the child died or had to be killed. InputError
    for a gold answer that it cannot read."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_limits,
        text=True,
        encoding="utf-8",
    ) as child:
        _wait_until_ready(child)
        try:
            said, _ = child.communicate(json.dumps(pairs), timeout=COMPARE_S * len(pairs))
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
    lines = said.splitlines()[: len(pairs)]
    if UNREADABLE in lines:
        gold = pairs[lines.index(UNREADABLE)][0]
        raise InputError(
            f"verify: the gold answer {gold[:80]!r} cannot be read, expected a value or LaTeX; leave it out"
        )
    made: list[bool | None] = [line == "true" for line in lines]
    return [*made, *[None] * (len(pairs) - len(made))]


def _wait_until_ready(child: "subprocess.Popen[str]") -> None:
    """Return when the child has loaded what it compares with. ConfigError without the package, StageError where it cannot."""
    assert child.stdout is not None
    alarm = threading.Timer(LOAD_S, child.kill)
    alarm.start()
    try:
        said = child.stdout.readline()
    finally:
        alarm.cancel()
    if said == "ready\n":
        return
    child.kill()
    if child.wait() == MISSING:
        raise ConfigError(
            "verify: comparing LaTeX needs the package math-verify; install the extra `posttrain`, see README"
        )
    raise StageError(
        f"verify: math-verify was not loaded within {LOAD_S:.0f} s and {MEMORY_BYTES >> 20} MB, its process ended with "
        f"{child.returncode}; import it by hand to see why"
    )


def _limits() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def is_verifiable(gold: str) -> bool:
    """Whether a gold answer can be told right from wrong: an exact value that is no choice, or LaTeX with a digit or an
    operator whose braces close."""
    value = read_value(answer_of(gold) or gold)
    if value is not None:
        return not hasattr(value, "word")
    text = (answer_of(gold) or gold).strip()
    plain = re.sub(r"\\[{}]", "", text)  # an escaped brace opens nothing
    closes = plain.count("{") == plain.count("}")
    return (
        len(text) <= TAIL and closes and bool(re.search(r"\\(?:frac|sqrt|pi|cup|infty)|[\d)]\s*[\^*/+-]|[a-z]\^", text))
    )
