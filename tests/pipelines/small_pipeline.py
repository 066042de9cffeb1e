"""Small whole pipelines for tests: made prose, a config over the stages, and the command in a process of its own."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.hashing import digest
from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
WHO = "the miller|a teacher|our neighbour|the old captain|every gardener|the printer|a young doctor|the baker|my aunt"
DID = "carried|repaired|painted|counted|described|followed|remembered|weighed|borrowed|planted|measured|sold"
WHAT = "a wooden boat|seven red apples|the broken clock|an unsigned letter|two grey horses|the first map|a copper bell"
WHERE = "beside the river|under the stone bridge|in the long valley|before the winter|near the harbour|on the hill"
WHY = "because the rain had stopped|while the children were asleep|although nobody had asked|since the road was closed"
PARTS = [part.split("|") for part in (WHO, DID, WHAT, WHERE, WHY)]

# Judging and deciding only: what a kill can interrupt in a few seconds, with every kind of shuffle in it.
JUDGED = """\
root: {root}
engine: {{workers: {workers}, memory_gb: 1}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
  pii: {{}}
  exact: {{}}
  minhash: {{}}
  select@final:
    duplicates: [exact, minhash]
    prefer: [-signals.chars]
policy:
  final:
    - {{drop: signals.words < 20, reason: too_short}}
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def prose(seed: int, sentences: int = 12) -> str:
    """English sentences, the same for the same seed; two seeds share hardly any run of five words."""
    choose = random.Random(seed)
    lines = [
        f"{' '.join(choose.choice(part) for part in PARTS)}, {choose.randrange(1000)} times." for _ in range(sentences)
    ]
    return " ".join(line[0].upper() + line[1:] for line in lines)


def nearly(text: str) -> str:
    """The same text with another last sentence: a near-duplicate of texts of a dozen sentences and more."""
    return text.rpartition(". ")[0] + ". Nobody knew the end."


def texts(count: int) -> list[str]:
    """`count` texts: one in nine repeats an earlier one, one in nine nearly does, one in nine is too short to stay."""
    made: list[str] = []
    for i in range(count):
        if i % 9 == 3:
            made.append(made[i // 2])
        elif i % 9 == 6:
            made.append(nearly(prose(i - 1)))
        elif i % 9 == 8:
            made.append(f"Page {i} says little.")
        else:
            made.append(prose(i))
    return made


def write_jsonl(folder: Path, lines: Sequence[str], files: int, order: int = 0) -> None:
    """The texts as documents in `files` files, created in an order that `order` draws."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(range(files))
    random.Random(order).shuffle(numbers)
    for n in numbers:
        rows = [{"text": text, "url": f"https://notes.example/{i}"} for i, text in enumerate(lines) if i % files == n]
        body = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        (folder / f"part-{n:02d}.jsonl").write_text(body, encoding="ascii")


def write_config(path: Path, template: str, **values: Any) -> Path:
    """`template` with its values put in, as a config file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.format(**values), encoding="utf-8")
    return path


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), **(variables or {})}


def pipelines(*arguments: Any, variables: Mapping[str, str] | None = None, preexec: Any = None) -> Ran:
    """The command, run to its end."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(variables),
        preexec_fn=preexec,
        timeout=BOUND_S,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Every manifest of a root, by its path in it."""
    found = [*root.glob("manifests/*.json"), *root.glob("datasets/*/manifests/*.json")]
    return {str(p.relative_to(root)): json.loads(p.read_text("utf-8")) for p in sorted(found)}


def state(root: Path) -> dict[str, str]:
    """One digest a manifest, of all that must not depend on how, where and how often the pipeline ran."""
    parts = ("identity", "outputs", "accounts", "units")
    return {name: digest([stored[part] for part in parts]) for name, stored in manifests(root).items()}


def scratch(root: Path) -> list[str]:
    """What stages that have ended left of their intermediate files."""
    return sorted(str(p.relative_to(root)) for p in (root / "exchange").glob("*"))


def leftovers(root: Path) -> list[str]:
    """Scratch, and half-written files under temporary names: a run that could say goodbye leaves neither."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*.tmp")) + scratch(root)
