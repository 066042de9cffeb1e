"""Files that are there whole or not at all, whatever stops the process or the machine.

In: a path and its content. Out: the file, on the disk when the call returns where it says so. A small file is written beside its
place, synced and renamed; a folder of many is written under `TEMPORARY` by its owner, who syncs and renames it.
"""

import gzip
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".writing"


def sync(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """`sync` of a folder's files, then of itself."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON with a line a value; neither synced nor atomic, for files of a folder that is."""
    path.write_text(json.dumps(values, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(text)
    _into_place(temporary, path)


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSONL file, gzipped or not. What cannot be read is an `OSError`, a `ValueError` or an `EOFError`."""
    opener = gzip.open if path.suffix == ".gz" else open
    found = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg} in line {number}, column {error.colno}") from error
    return found


def copy_file(source: Path, path: Path) -> None:
    """Copies a small file whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.copyfile(source, temporary)
    _into_place(temporary, path)


def _into_place(temporary: Path, path: Path) -> None:
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
