"""What runs, what is skipped and why: on a small pipeline of text files, run for real."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError, StageError
from core.lock import held
from core.manifest import read_manifest
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.plan import Planned, plan, plan_json, plan_step
from pipelines.runner import Runner, RunOptions, grouped
from pipelines.scope import between, steps
from tests.builders import tree_digest

CONFIG = """\
root: {root}
engine: {{name: local, workers: 1, memory_gb: 1}}
sources:
  web: {{kind: files, path: {pages}/web}}
  mail: {{kind: files, path: {pages}/mail}}
stages:
  extract: {{}}
  signals: {{}}
  pii: {{}}
  select@final: {{}}
policy:
  final:
    - {{drop: signals.words < 3, reason: too_short}}
"""
TEXTS = {
    "web/a.txt": "A page with several words on it, written by a person for other people to read.",
    "web/b.txt": "Too short.",
    "web/c.txt": "Write to someone@example.org about the second page with enough words in it.",
    "mail/m.txt": "A letter with several words in it, sent long ago to a friend of the family.",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root in which everything has run once."""
    folder = tmp_path_factory.mktemp("plan")
    for name, text in TEXTS.items():
        path = folder / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    config = folder / "p.yaml"
    config.write_text(CONFIG.format(root=folder / "root", pages=folder / "pages"))
    said = go(config)
    return config, said


def go(config, options=None, first=None, last=None):
    """Run and return what was said."""
    pipeline, said = load_pipeline(config), []
    Runner(pipeline, options or RunOptions("test"), say=said.append).run(between(pipeline, first, last))
    return said


def runs(config):
    """{step: reasons} of what the plan would run."""
    pipeline = load_pipeline(config)
    return {p.step.name: p.why for p in plan(pipeline, Root(pipeline.root)) if p.run}


@pytest.fixture
def copy(made, tmp_path):
    """A config over a copy of the root and the pages, to be changed."""
    import shutil

    config, _ = made
    for part in ("root", "pages"):
        shutil.copytree(config.parent / part, tmp_path / part)
    text = config.read_text()
    (tmp_path / "p.yaml").write_text(text.replace(str(config.parent), str(tmp_path)))
    return tmp_path / "p.yaml"


def edit(config, old, new):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def test_everything_runs_once_and_adds_up(made):
    config, said = made
    assert [line.partition(":")[0] for line in said] == [
        "extract [web]",
        "extract [mail]",
        "signals [web]",
        "pii [web]",
        "signals [mail]",
        "pii [mail]",
        "select@final",
    ]
    root = Root(load_pipeline(config).root)
    accounts = read_manifest(root, "documents", "web").accounts
    assert accounts["documents"] == 3
    fates = root.read_table("datasets/web/layers/fate@final/" + root.names("datasets/web/layers/fate@final")[0])
    manifest = read_manifest(root, "fate@final", "web")
    assert set(manifest.outputs) == set(read_manifest(root, "documents", "web").outputs)
    assert fates.column("computed").to_pylist() == [True] * fates.num_rows
    assert root.names("locks") == [] or all(n.endswith(".guard") for n in root.names("locks"))


def test_a_second_run_skips_everything(copy):
    before = tree_digest(Root(load_pipeline(copy).root), "datasets")
    assert runs(copy) == {}
    said = go(copy)
    assert len(said) == 7
    assert all(line.endswith(": up to date") for line in said)
    assert tree_digest(Root(load_pipeline(copy).root), "datasets") == before


def test_what_only_says_how_to_run_changes_nothing(copy):
    edit(copy, "workers: 1, memory_gb: 1", "workers: 2, memory_gb: 2, stall_s: 5")
    assert runs(copy) == {}


def test_a_changed_knob_reruns_what_depends_on_it(copy):
    edit(copy, "  pii: {}", "  pii: {where: signals.words > 3}")
    planned = runs(copy)
    assert set(planned) == {"pii [web]", "pii [mail]"}
    for name in ("web", "mail"):
        why = planned[f"pii [{name}]"]
        assert why[0] == "config.where: None -> signals.words > 3"
        assert why[1].startswith(f"inputs.{name}/signals: absent -> ")
    said = go(copy)
    assert [s for s in said if not s.endswith("up to date")] == [s for s in said if s.startswith("pii")]
    assert runs(copy) == {}


def test_a_changed_policy_reruns_the_select_alone(copy):
    edit(copy, "signals.words < 3", "signals.words < 4")
    planned = runs(copy)
    assert list(planned) == ["select@final"]
    assert planned["select@final"][0].startswith("config.policy: ")


def test_changed_input_reaches_its_dataset_only(copy):
    (copy.parent / "pages/web/d.txt").write_text("One more page that came later, with enough words for every rule.")
    planned = runs(copy)
    assert set(planned) == {"extract [web]", "signals [web]", "pii [web]", "select@final"}
    assert any(line.startswith("inputs.source: ") for line in planned["extract [web]"])
    assert planned["signals [web]"] == ["documents will run first"]
    go(copy)
    assert runs(copy) == {}
    assert read_manifest(Root(load_pipeline(copy).root), "documents", "web").accounts["documents"] == 4


def test_a_touched_file_is_not_a_changed_one(copy):
    path = copy.parent / "pages/web/a.txt"
    path.write_text(path.read_text())
    assert runs(copy) == {}


def test_a_lost_layer_manifest_is_restored_without_computing(copy):
    root = Root(load_pipeline(copy).root)
    before = read_manifest(root, "signals", "web")
    root.remove("datasets/web/manifests/signals.json")
    assert runs(copy)["signals [web]"] == ["never run here"]
    assert any("units were committed before" in line for line in go(copy, last="signals"))
    again = read_manifest(root, "signals", "web")
    assert (again.identity, again.outputs, again.accounts) == (before.identity, before.outputs, before.accounts)


def test_from_until_and_what_is_missing(copy):
    pipeline = load_pipeline(copy)
    assert [s.name for s in between(pipeline, "pii", "pii")] == ["pii [web]", "pii [mail]"]
    assert between(pipeline, None, None) == steps(pipeline)
    with pytest.raises(ConfigError, match="--from pii stands after --until extract"):
        between(pipeline, "pii", "extract")
    with pytest.raises(ConfigError, match="no stage 'pi'"):
        between(pipeline, "pi", None)
    edit(copy, f"root: {copy.parent}/root", f"root: {copy.parent}/empty")
    with pytest.raises(
        ConfigError, match=r"run stage `extract` first|reads documents of dataset web, which is not there"
    ):
        go(copy, first="signals", last="signals")


def test_one_dataset_only(copy):
    edit(copy, f"root: {copy.parent}/root", f"root: {copy.parent}/one")
    said = go(copy, RunOptions("test", dataset="mail"), last="pii")
    assert [line.partition(":")[0] for line in said] == ["extract [mail]", "signals [mail]", "pii [mail]"]


def test_shards_by_range_leave_the_manifest_for_the_last(copy):
    edit(copy, f"root: {copy.parent}/root", f"root: {copy.parent}/one")
    go(copy, last="extract")
    root = Root(load_pipeline(copy).root)
    count = len(read_manifest(root, "documents", "web").outputs)
    said = go(copy, RunOptions("test", dataset="web", shards=(0, 1)), "signals", "signals")
    assert said == [f"signals [web]: 1 of {count} shards are committed; `--finish` writes the manifest"]
    assert read_manifest(root, "signals", "web") is None
    assert any(
        "units were committed before" in line or "up to date" in line for line in go(copy, None, "signals", "signals")
    )


def test_another_run_is_refused_and_the_same_one_re_enters(copy):
    edit(copy, f"root: {copy.parent}/root", f"root: {copy.parent}/one")
    root = Root(load_pipeline(copy).root)
    with held(root, "web.extract", "first"):
        with pytest.raises(StageError, match="held by run first"):
            go(copy, RunOptions("second"), last="extract")
        assert go(copy, RunOptions("first"), last="extract")


def test_groups_are_one_pass_for_each_dataset(made):
    groups = [[s.name for s in g] for g in grouped(steps(load_pipeline(made[0])))]
    assert groups == [
        ["extract [web]"],
        ["extract [mail]"],
        ["signals [web]", "pii [web]"],
        ["signals [mail]", "pii [mail]"],
        ["select@final"],
    ]


def test_json_names_what_waits_for_what(made):
    pipeline = load_pipeline(made[0])
    planned = plan(pipeline, Root(pipeline.root))
    out = json.loads(json.dumps(plan_json(pipeline, planned)))
    after = {s["name"]: s["after"] for s in out["steps"]}
    assert after["extract [web]"] == []
    assert after["signals [web]"] == ["extract [web]"]
    assert set(after["select@final"]) >= {"extract [web]", "extract [mail]", "signals [web]", "signals [mail]"}
    assert [s["run"] for s in out["steps"]] == [False] * 7
    command = next(s["command"] for s in out["steps"] if s["name"] == "signals [web]")
    assert command == ["pipelines", "run", "stage", "signals", "-c", str(made[0]), "--dataset", "web"]
    parts = next(s["parts"] for s in out["steps"] if s["name"] == "signals [web]")
    assert parts == ["pipelines", "shards", "signals", "-c", str(made[0]), "--dataset", "web"]
    assert out["report"] == ["pipelines", "report", "-c", str(made[0])]


MADE = """\
root: {folder}/root
sources:
  web: {{kind: jsonl, path: {folder}}}
  changes: {{kind: harvest, release_list: {folder}/list.json}}
  dialogues: {{kind: made, stage: dialogues}}
stages:
  harvest: {{}}
  extract: {{}}
  dialogues: {{datasets: [changes]}}
  signals: {{}}
  tokenizer: {{}}
  tokenize: {{}}
  mix:
    phases:
      pretrain: {{components: [{{dataset: web, weight: 1}}]}}
      anneal: {{components: [{{dataset: web, weight: 1}}]}}
  sft: {{}}
  train: {{}}
"""


def test_json_names_what_others_may_wait_for(tmp_path):
    """Documents and exports by their place in the root; neither captures nor layers nor relations."""
    (tmp_path / "p.yaml").write_text(MADE.format(folder=tmp_path))
    pipeline = load_pipeline(tmp_path / "p.yaml")
    named = plan_json(pipeline, [Planned(step, True) for step in steps(pipeline)])["steps"]
    assert {s["name"]: s["makes"] for s in named if s["makes"]} == {
        "extract [web]": ["datasets/web/documents"],
        "extract [changes]": ["datasets/changes/documents"],
        "dialogues [dialogues]": ["datasets/dialogues/documents"],
        "tokenizer": ["models/tokenizer"],
        "tokenize": ["tokens/tokenizer"],
        "mix": ["mixtures/pretrain", "mixtures/anneal", "mixtures/held_out"],
        "sft": ["sft"],
        "train": ["models/train"],
    }


def test_a_manifest_of_another_format_is_refused(copy):
    path = Path(load_pipeline(copy).root, "datasets/web/manifests/signals.json")
    path.write_text(json.dumps({"format": 2}))
    pipeline = load_pipeline(copy)
    step = next(s for s in steps(pipeline) if s.name == "signals [web]")
    with pytest.raises(ConfigError, match="written in format 2"):
        plan_step(pipeline, Root(pipeline.root), step)
