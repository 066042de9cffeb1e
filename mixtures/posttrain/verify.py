"""Rewards of responses to RL records, one value a line: what `pipelines verify` prints as JSON.

In: a JSONL file of records as `rl` writes them, each with a `response` (text) or `responses` (a list of texts). Out, for each
line: `id`, `verifier`, `rewards` (0 to 1, one a response) and `detail` (what decided). A line that is no such record gives
`error` in the place of rewards.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError, InputError
from mixtures.posttrain.sandbox import protections
from mixtures.posttrain.verify_code import code_reward
from mixtures.posttrain.verify_maths import maths_reward

TIMEOUT_S = 10.0


def verify_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What each line of the file is worth. ConfigError where it cannot be read."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as e:
        raise ConfigError(f"verify: {path} cannot be read: {e}; name a JSONL file of records with responses") from e
    with file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _verified(line, number)


def walls() -> list[str]:
    """One line for each protection of the sandbox that is missing on this machine."""
    missing = {
        "calls": "no seccomp: code under test can open sockets and start processes; run this in a container",
        "files": "no Landlock: code under test can read and write what this user may; run this in a container",
    }
    return [text for name, text in missing.items() if not protections()[name]]


def _verified(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise InputError(f"verify: line {number} is {type(record).__name__}, expected an object")
        scored = [reward(record, r) for r in _responses(record, number)]
    except (ValueError, InputError) as e:
        return {"line": number, "error": str(e)}
    about = {"id": record.get("id"), "verifier": record["verifier"]}
    return {**about, "rewards": [r for r, _ in scored], "detail": [d for _, d in scored]}


def _responses(record: Mapping[str, Any], number: int) -> list[str]:
    given = record.get("responses", [record.get("response")])
    if not isinstance(given, list) or not all(isinstance(r, str) for r in given):
        raise InputError(f"verify: line {number} has no response, expected `response` or `responses` with text")
    return given


def reward(record: Mapping[str, Any], response: str) -> tuple[float, Any]:
    """(reward, what decided) of one response. InputError where the record cannot be verified."""
    if record.get("verifier") == "maths" and isinstance(record.get("answer"), str):
        return maths_reward(response, record["answer"])
    if record.get("verifier") == "code" and isinstance(record.get("tests"), list):
        return code_reward(response, record["tests"], float(record.get("timeout_s") or TIMEOUT_S))
    raise InputError(f"verify: verifier {record.get('verifier')!r} lacks its answer or tests; expected maths or code")
