"""Files that are there whole or not at all, and one place for how they get there."""

import ast
import resource
from collections import defaultdict
from pathlib import Path

import pytest

import moe
from moe.files import TEMPORARY, copy_file, replace_text, sync_folder, write_json

LEAST_STATEMENTS = 3  # of a body that is written twice; shorter ones may be alike by chance


def test_what_a_full_disk_does_not_take_leaves_the_file_before(tmp_path: Path) -> None:
    path, source = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("new" * 100)
    replace_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        for write in (lambda: replace_text(path, "new" * 100), lambda: copy_file(source, path)):
            with pytest.raises(OSError, match="File too large"):
                write()
            assert path.read_text() == "old"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    copy_file(source, path)
    assert path.read_text() == source.read_text()
    assert not path.with_name("a.txt" + TEMPORARY).exists()


def test_json_has_a_line_a_value(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1, "b": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1,\n "b": [\n  2\n ]\n}\n'
    sync_folder(tmp_path)


def test_no_function_of_moe_is_written_twice() -> None:
    """By its body without the docstring, whatever its name."""
    places = defaultdict(list)
    for path in sorted(Path(moe.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if sum(isinstance(n, ast.stmt) for b in body for n in ast.walk(b)) >= LEAST_STATEMENTS:
                places["\n".join(ast.dump(b) for b in body)].append(f"{path.name}:{node.name}")
    assert [found for found in places.values() if len(found) > 1] == []
