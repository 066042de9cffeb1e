"""What a run left below a root, as logical content; and how two roots differ, named by stage, file, column and row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.hashing import digest, file_digest, table_digest, type_name
from moe.metrics import TIME_FIELDS

# How a run went, not what came out: spills, locks, a crawl's queue, and the log that `answers.parquet` is made from.
LEFT_OUT = ("exchange/", "locks/", "runs/", "captures/web/frontier.", "captures/answers/answers.jsonl")
MAKERS = {"dialogues": "dialogues", "augmented": "augment"}  # dataset -> the stage that made its documents
FOLDERS = {"tokens": "tokenize", "mixtures": "mix", "rl": "rl", "sft": "sft"}


@dataclass(frozen=True)
class Difference:
    """Where two runs part."""

    stage: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.file}: {self.what}"


def files_of(root: Path) -> list[str]:
    """Relative names of everything that is compared."""
    names = (p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file())
    return [n for n in names if not n.startswith(LEFT_OUT) and not Path(n).name.startswith(".")]


def content(root: Path) -> dict[str, str]:
    """Digest of the logical content of every file that is compared."""
    return {name: _digest(root / name) for name in files_of(root)}


def stage_of(name: str) -> str:
    """The stage (with its label) whose output a file of a root is."""
    parts = name.split("/")
    if parts[0] == "datasets":
        folder, instance = parts[2], Path(parts[3]).stem if parts[2] == "manifests" else parts[3]
        if folder in ("documents", "drops", "rejects", "renumbered") or instance == "documents":
            return MAKERS.get(parts[1], "extract")
        head, _, label = instance.partition("@")
        return f"select@{label}" if head in ("fate", "duplicates") else instance
    if parts[0] == "captures":
        return {"web": "crawl", "answers": "answers"}.get(parts[1], "harvest")
    if parts[0] == "models":
        return "evaluate" if parts[-1].startswith("evaluation-") else "train" if "-" in parts[1] else parts[1]
    return FOLDERS.get(parts[0]) or Path(parts[1]).stem


def differences(expected: Path, got: Path) -> list[Difference]:
    """The first difference in every file of two roots, in the order of their names; empty when the roots agree."""
    a, b = content(expected), content(got)
    found = []
    for name in sorted({*a, *b}):
        if name not in b or name not in a:
            found.append(Difference(stage_of(name), name, "is missing" if name in a else "should not be there"))
        elif a[name] != b[name]:
            found.append(Difference(stage_of(name), name, _what(expected / name, got / name)))
    return found


def _digest(path: Path) -> str:
    if path.suffix == ".parquet":
        return table_digest(_table(path))
    if path.suffix in (".json", ".jsonl"):
        return digest(_said(path))
    return file_digest(path)


def _table(path: Path) -> pa.Table:
    """A Parquet file with dictionaries, which are a matter of storage, as plain values."""
    table = pq.ParquetFile(path).read()
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pa.schema(plain))


def _said(path: Path) -> Any:
    """A JSON file without what it says of time and place."""
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]
    value = json.loads(text)
    if path.parent.name == "manifests":
        value.pop("observed")
    return value


def _what(expected: Path, got: Path) -> str:
    if expected.suffix == ".parquet":
        return _table_difference(_table(expected), _table(got))
    if expected.suffix in (".json", ".jsonl"):
        return next(_json_differences("", _said(expected), _said(got)), "")
    a, b = expected.read_bytes(), got.read_bytes()
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"byte {at} differs, {len(a)} bytes expected, {len(b)} found"


def _table_difference(a: pa.Table, b: pa.Table) -> str:
    names = [(f.name, type_name(f.type)) for f in a.schema], [(f.name, type_name(f.type)) for f in b.schema]
    if names[0] != names[1]:
        return f"columns are {names[1]}, expected {names[0]}"
    for name in a.column_names:
        x, y = a.column(name).to_pylist(), b.column(name).to_pylist()
        for row, (old, new) in enumerate(zip(x, y, strict=False)):
            if repr(old) != repr(new):
                return f"column {name} row {row} is {_short(new)}, expected {_short(old)}"
    return f"{b.num_rows} rows, expected {a.num_rows}"


def _json_differences(path: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _json_differences(f"{path}.{key}", a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _json_differences(f"{path}[{i}]", x, y)
    elif repr(a) != repr(b):
        yield f"{path.lstrip('.')} is {_short(b)}, expected {_short(a)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
