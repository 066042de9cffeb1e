"""Whether a response's program passes its tests: a reward between 0 and 1, the share of tests passed.

In: the response (the last fenced block of Python in it, or all of it where there is no fence) and tests, each one of
- text: Python statements, usually asserts, that call the candidate's functions by their names (also `def check(f): ...`
  followed by `check(name)`);
- `{"stdin": ..., "stdout": ...}`: the candidate runs as a program; output is compared without white space at line ends and at
  the end.

Tests run in `mixtures.posttrain.sandbox`. A program's output is compared here; a function's value is compared in a second
sandbox that never runs a line of the candidate, so ending early, patching `assert` or `==`, or printing `pass` earns nothing.
The price: values must be plain data (None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict), and
tests cannot pass functions or objects in.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import InputError
from mixtures.posttrain.sandbox import Limits, run_program, run_tests

FENCE = re.compile(r"^[ ]{0,3}(```+|~~~+)[ \t]*([\w+.-]*)[^\n]*\n(.*?)^[ ]{0,3}\1[ \t]*$", re.DOTALL | re.MULTILINE)
PYTHON = ("", "py", "python", "python3")


def candidate_of(response: str) -> str:
    """The program in a response: its last fenced block that is Python or names no language, else the response itself."""
    blocks = [(m[2].lower(), m[3]) for m in FENCE.finditer(response)]
    named = [text for language, text in blocks if language in PYTHON[1:]]
    bare = [text for language, text in blocks if language == ""]
    return (named or bare or [response])[-1]


def code_reward(response: str, tests: Sequence[Any], timeout_s: float = 10.0) -> tuple[float, list[str]]:
    """(share of tests passed, what each one said). No tests is an InputError: nothing would be verified."""
    checked = [checked_test(t) for t in tests]
    if not checked:
        raise InputError("verify: a code record has no tests, expected at least one; leave the record out")
    source = candidate_of(response)
    limits = Limits(wall_s=timeout_s, cpu_s=max(1, round(timeout_s)))
    calls = [t for t in checked if isinstance(t, str)]
    called = iter(run_tests(source, calls, limits) if calls else [])
    said = [next(called) if isinstance(t, str) else _program(source, t, limits) for t in checked]
    return sum(s == "pass" for s in said) / len(said), said


def checked_test(test: Any) -> str | dict[str, str]:
    """A test in one of the two forms; InputError otherwise."""
    if isinstance(test, str) and test.strip():
        return test
    if isinstance(test, Mapping):
        given = {k: test.get(k, "") for k in ("stdin", "stdout")}
        if "stdout" in test and all(isinstance(v, str) for v in given.values()):
            return given
    raise InputError(
        f"verify: a test must be Python text or stdin and stdout, got {str(test)[:60]!r}; correct the record"
    )


def _program(source: str, test: dict[str, str], limits: Limits) -> str:
    ran = run_program(source, test["stdin"].encode("utf-8", "replace"), limits)
    if not ran.ok:
        last = ran.err.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        return f"fail {ran.ended} {ran.code} {last}".rstrip()
    out = ran.out.decode("utf-8", "replace")
    return "pass" if same_output(out, test["stdout"]) else f"fail printed {out[:120]!r}"


def same_output(got: str, wanted: str) -> bool:
    """Equal line by line, without white space at the ends of lines and of the whole."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(got) == lines(wanted)
