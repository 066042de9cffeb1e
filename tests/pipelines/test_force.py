"""A damaged layer is found by `check --content` and made again by `run stage NAME --force`."""

from pathlib import Path

import pytest

from core.lock import held
from core.schema import LAYER_HEAD
from core.storage import Root
from mixtures.posttrain.sft import STAGE as SFT
from pipelines.config import StageEntry
from pipelines.runner import remove_output
from pipelines.scope import Step
from tests.pipelines.small_pipeline import JUDGED, pipelines, state, texts, write_config, write_jsonl


@pytest.mark.timeout(120)
def test_a_changed_file_is_found_and_made_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "notes", texts(60), files=1)
    config = write_config(tmp_path / "p.yaml", JUDGED, root="./root", workers=1, source="./notes")
    assert pipelines("run", "all", "-c", config, "--until", "signals").code == 0
    before = state(tmp_path / "root")
    root = Root(str(tmp_path / "root"))
    (path,) = (tmp_path / "root/datasets/notes/layers/signals").iterdir()
    name = str(path.relative_to(tmp_path / "root"))
    table, note = root.read_table(name), root.note(name)
    column = next(c for c in table.column_names if c not in {f.name for f in LAYER_HEAD})
    reversed_column = table.column(column).take(list(range(table.num_rows))[::-1])
    changed = table.set_column(table.column_names.index(column), table.schema.field(column), reversed_column)
    root.write_table(name, [changed], table.schema.remove_metadata(), note)  # the footer still names the right identity
    assert pipelines("check", "-c", config).code == 0
    found = pipelines("check", "-c", config, "--content")
    assert found.code == 1
    assert "it was changed; `pipelines run stage signals --force`" in found.err
    assert "up to date" in pipelines("run", "stage", "signals", "-c", config).out
    assert pipelines("run", "stage", "signals", "-c", config, "--force").code == 0
    assert pipelines("check", "-c", config, "--content").code == 0
    assert state(tmp_path / "root") == before


@pytest.mark.parametrize(("stage", "lock"), [("signals", "notes.signals"), ("exact", "root.exact")])
def test_what_another_run_works_on_is_not_removed(tmp_path, stage, lock):
    write_jsonl(tmp_path / "notes", texts(12), files=1)
    config = write_config(tmp_path / "p.yaml", JUDGED, root="./root", workers=1, source="./notes")
    assert pipelines("run", "all", "-c", config, "--until", "exact").code == 0
    before = files_of(tmp_path / "root")
    with held(Root(str(tmp_path / "root")), lock, "other"):
        refused = pipelines("run", "stage", stage, "-c", config, "--force")
        assert (refused.code, "held by run other" in refused.err) == (1, True)
    assert files_of(tmp_path / "root") == before


def files_of(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_lines_that_would_vouch_for_themselves_are_forgotten_too(tmp_path):
    root = Root(str(tmp_path))
    for name in ("sft/chats/s0.jsonl", "rl/chats/s0.jsonl"):
        root.write_bytes(name, b"{}\n")
    remove_output(root, Step(StageEntry("sft", SFT, SFT.config()), None))
    assert (root.names("sft"), root.names("rl")) == ([], ["chats"])
