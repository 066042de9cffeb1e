"""From clones, dumps and releases to documents and dialogues, through the command: accounts, masks, resume, same bytes."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from core.errors import ConfigError
from crawl.harvest.blocks import apply, parse
from crawl.harvest.capture import unit_name
from crawl.harvest.config import Api, ReleasePair, Repository
from crawl.harvest.dialogues import DialoguesConfig, dialogue, round_trips
from crawl.harvest.documents import masks_of
from crawl.harvest.record import FileChange, Issue, Record, Remark, from_json
from crawl.harvest.templates import chat_messages, joined, masked_for_annealing, masked_for_chat, problem_of
from crawl.sources import HarvestSource
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions
from tests.bounds import BOUND_S
from tests.crawl.small_repository import SmallRepository
from tests.crawl.test_harvest_inputs import AFTER, BEFORE, as_sdist, comment, package, pull, write
from tests.pipelines.small_pipeline import command, environment, state

CONFIG = """\
root: {folder}/root
engine: {{workers: {workers}, memory_gb: 1}}
sources:
  pulls:
    kind: harvest
    repositories: [{{name: ada/small, path: {folder}/small, stars: 20}}, {{name: ada/broken, path: {folder}/broken}}]
    dumps: [{{name: ada/other, path: {folder}/dump.json, license: MIT}}]
    archives: ["{folder}/archives"]
    release_list: {folder}/releases.json
    rules: {{unwanted_files: leave_out}}
  dialogues: {{kind: made, stage: dialogues}}
stages:
  harvest: {{}}
  extract: {{}}
  dialogues: {{whole_lines: 50}}
"""


def inputs(folder: Path, pulls: int = 3) -> None:
    """One of each kind of input, and a repository that is none."""
    repo = SmallRepository(folder / "small")
    long = "".join(f"value_{i} = {i}\n" for i in range(200))
    repo.commit("Two hundred values to start with", {"app/long.py": long})
    repo.pull(1, "Return two, not one\n\nNobody ever wanted just one.", {"app/main.py": "def main():\r\n    return 2"})
    for i in range(2, pulls + 1):
        files = {"app/long.py": long.replace(f"value_{i * 9} =", f"other_{i * 9} ="), f"app/new_{i}.py": f"x = {i}\n"}
        repo.pull(i, f"Rename value {i * 9}, which says nothing to a reader", files)
    (folder / "broken" / ".git").mkdir(parents=True)
    write(folder / "dump.json", [pull(comments=[comment("eve", "Please do, @ada")])])
    (folder / "archives").mkdir()
    elsewhere = {**BEFORE, "repo": {"name": "ada/elsewhere"}}
    lines = "\n".join(json.dumps(e) for e in (BEFORE, AFTER, elsewhere))
    (folder / "archives" / "2025-10-09-0.json.gz").write_bytes(gzip.compress(lines.encode()))
    as_sdist(folder / "a.tar.gz", package("1.0.9", 1))
    as_sdist(folder / "b.tar.gz", package("1.1.0", 2))
    pair = {"name": "small", "base": "a.tar.gz", "head": "b.tar.gz", "version": "1.1.0"}
    (folder / "releases.json").write_text(json.dumps([pair]))


def config(folder: Path, workers: int = 1) -> Path:
    path = folder / "p.yaml"
    path.write_text(CONFIG.format(folder=folder, workers=workers))
    return path


def run(path: Path) -> list[str]:
    """The whole pipeline in this process; what it said."""
    said: list[str] = []
    Runner(load_pipeline(path), RunOptions("test"), say=said.append).run()
    return said


def documents(folder, name):
    files = sorted((folder / "root" / "datasets" / name / "documents").glob("*.parquet"))
    rows = [row for f in files for row in pq.read_table(f).to_pylist()]
    return [{**row, "metadata": json.loads(row["metadata"])} for row in rows]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    inputs(folder)
    run(config(folder))
    return folder


def test_accounts_of_all_inputs(harvested):
    found = json.loads((harvested / "root/datasets/pulls/manifests/documents.json").read_text())["accounts"]
    # Three pull requests and a commit of the clone, a discussion, a release; a broken clone, an entry of the index.
    expected = {"records": 8, "documents": 6, "drops": 2, "drops.unhydrated": 1, "drops.unreadable": 1, "rejects": 0}
    assert found == expected
    capture = json.loads((harvested / "root/datasets/pulls/manifests/harvest.json").read_text())
    assert capture["accounts"]["indexed_in_clones"] == 2
    assert capture["accounts"]["records"] == found["records"]


def test_documents_say_what_they_are_and_mask_people(harvested):
    rows = {(r["metadata"]["change"], r["metadata"].get("number")): r for r in documents(harvested, "pulls")}
    first = rows["pull_request", 1]
    assert first["text"].startswith(
        "Return two, not one\n\nNobody ever wanted just one.\n\ndiff --git a/app/main.py b/app/main.py\n"
    )
    assert (first["kind"], first["license"], first["url"]) == (
        "pull_request",
        "MIT",
        "https://github.com/ada/small/pull/1",
    )
    about = first["metadata"]
    assert (about["repo"], about["merged"], about["languages"], about["stars"]) == ("ada/small", True, ["Python"], 20)
    assert (about["files"], about["removed"], about["added"], about["tests"]) == (1, 3, 2, False)
    talk = rows["pull_request", 5]["text"]
    assert "user2: Please do, @user1" in talk
    assert ("release_pair", None) in rows


def test_dialogues_lead_back_and_their_segments_tile_the_text(harvested):
    parents = {r["doc_id"]: r for r in documents(harvested, "pulls")}
    rows = documents(harvested, "dialogues")
    kinds = {(r["metadata"]["template"], r["metadata"]["change"]) for r in rows}
    assert kinds >= {("localise", "pull_request"), ("repair", "pull_request"), ("repair", "release_pair")}
    for row in rows:
        about, data = row["metadata"], row["text"].encode()
        assert about["generation"] == 1
        (parent,) = about["parents"]
        assert row["license"] == parents[parent]["license"]
        spans = [tuple(s) for s in about["segments"]]
        assert [s[0] for s in spans] == [0, *(s[1] for s in spans[:-1])]
        assert spans[-1][1:] == (len(data), "assistant", "answer")
        messages = chat_messages(row["text"], spans)
        assert [(m["role"], m["loss_mask"]) for m in messages] == [("user", 0), ("assistant", 1)]
        assert "".join(m["content"] for m in messages) == row["text"]


def test_answers_applied_to_the_clone_give_the_head(harvested):
    repo = SmallRepository.__new__(SmallRepository)
    repo.path, repo._minute = harvested / "small", 0
    rows = [r for r in documents(harvested, "dialogues") if r["metadata"]["template"] == "repair"]
    mine = {r["metadata"].get("number"): r for r in rows if r["metadata"]["repo"] == "ada/small"}
    parents = {r["doc_id"]: r["metadata"] for r in documents(harvested, "pulls")}
    for number in (1, 2, 3):
        row = mine[number]
        about = parents[row["metadata"]["parents"][0]]
        answer = chat_messages(row["text"], row["metadata"]["segments"])[-1]["content"]
        paths = {b.path for b in parse(answer)}

        def blob(commit, path):
            done = subprocess.run(
                ["git", "-C", repo.path, "show", f"{commit}:{path}"], capture_output=True, timeout=BOUND_S
            )
            return done.stdout.decode() if done.returncode == 0 else None

        after = apply(parse(answer), {p: blob(about["base_commit"], p) for p in paths})
        assert after == {p: blob(about["head_commit"], p) for p in paths}
    shown = mine[2]["text"]
    assert "app/long.py, lines " in shown  # 200 lines: a window only
    assert "value_199" not in shown


def test_localise_names_the_files_and_hides_them_among_others(harvested):
    rows = [r for r in documents(harvested, "dialogues") if r["metadata"]["template"] == "localise"]
    row = next(r for r in rows if r["metadata"].get("number") == 2)
    prompt, answer = chat_messages(row["text"], row["metadata"]["segments"])
    assert answer["content"] == "app/long.py\napp/new_2.py\n"
    assert "README.md" in prompt["content"]
    assert "app/long.py" in prompt["content"]
    assert "app/new_2.py" not in prompt["content"]


def test_a_second_run_does_nothing(harvested):
    before = state(harvested / "root")
    said = run(harvested / "p.yaml")
    assert state(harvested / "root") == before
    assert said == ["harvest [pulls]: up to date", "extract [pulls]: up to date", "dialogues [dialogues]: up to date"]


def test_two_workers_and_another_folder_give_the_same_bytes(harvested, tmp_path):
    inputs(tmp_path)
    run(config(tmp_path, workers=2))
    assert state(tmp_path / "root") == state(harvested / "root")


def test_a_killed_harvest_goes_on_to_the_same_bytes(harvested, tmp_path):
    """Killed as soon as a unit is committed: that unit is not made again."""
    inputs(tmp_path)
    process = subprocess.Popen(
        command("run", "all", "-c", config(tmp_path)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    captures = tmp_path / "root" / "captures" / "pulls"
    while process.poll() is None and not list(captures.glob("*.json")):
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # it was faster than this loop
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p.name: p.stat().st_mtime_ns for p in captures.glob("*.json")}
    assert done
    run(tmp_path / "p.yaml")
    assert state(tmp_path / "root") == state(harvested / "root")
    assert all((captures / name).stat().st_mtime_ns == at for name, at in done.items())


def test_inputs_that_are_not_there_are_told_before_any_work(tmp_path):
    inputs(tmp_path)
    path = config(tmp_path)
    path.write_text(path.read_text().replace("/dump.json", "/nowhere.json"))
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        run(path)
    assert not (tmp_path / "root" / "captures").exists()


def test_an_empty_list_of_releases_is_an_empty_dataset(tmp_path):
    (tmp_path / "releases.json").write_text("[]")
    path = tmp_path / "p.yaml"
    source = f"{{kind: harvest, release_list: {tmp_path}/releases.json}}"
    path.write_text(f"root: {tmp_path}/root\nsources:\n  pulls: {source}\nstages:\n  harvest: {{}}\n  extract: {{}}\n")
    run(path)
    assert documents(tmp_path, "pulls") == []


def test_another_archive_is_read_by_the_next_run(tmp_path):
    """The list of archives is no knob of the identity; what it stands for is."""
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders, start=1):
        folder.mkdir()
        event = {**BEFORE, "payload": {"action": "closed", "number": number, "pull_request": {"number": number}}}
        (folder / f"2025-10-0{number}-0.json.gz").write_bytes(gzip.compress(json.dumps(event).encode()))
    path, records = tmp_path / "p.yaml", []
    for named in (folders[:1], folders):
        source = f"{{kind: harvest, archives: [{', '.join(map(str, named))}]}}"
        path.write_text(f"root: {tmp_path}/root\nsources:\n  pulls: {source}\nstages:\n  harvest: {{}}\n")
        run(path)
        manifest = json.loads((tmp_path / "root/datasets/pulls/manifests/harvest.json").read_text())
        records.append(manifest["accounts"]["records"])
    assert records == [1, 2]
    before = HarvestSource(archives=(str(folders[0]),)).lists
    assert before == HarvestSource(archives=(str(folders[0].rename(tmp_path / "moved")),)).lists
    assert HarvestSource(archives=(str(tmp_path / "nowhere"),)).lists == {"archives": "absent"}


def test_a_clone_that_changed_is_read_again_when_the_manifest_is_gone(tmp_path):
    """As docs/operations.md says: the plan believes the manifest, the units look at their clones."""
    clones = [SmallRepository(tmp_path / name) for name in ("small", "still")]
    for clone in clones:
        clone.pull(1, "Return two, not one", {"app/main.py": "def main():\r\n    return 2"})
    named = ", ".join(f"{{name: ada/{c}, path: {tmp_path}/{c}, license: MIT}}" for c in ("small", "still"))
    path = tmp_path / "p.yaml"
    source = f"{{kind: harvest, repositories: [{named}]}}"
    path.write_text(f"root: {tmp_path}/root\nsources:\n  pulls: {source}\nstages: {{harvest: {{}}, extract: {{}}}}\n")
    run(path)
    clones[0].pull(2, "Return three, not two", {"app/main.py": "def main():\r\n    return 3"})
    assert run(path) == ["harvest [pulls]: up to date", "extract [pulls]: up to date"]
    manifest = tmp_path / "root/datasets/pulls/manifests/harvest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()
    said = run(path)
    after = json.loads(manifest.read_text())
    assert after["accounts"]["records"] > before["accounts"]["records"]
    assert [after["outputs"][name] == value for name, value in sorted(before["outputs"].items())] == [False, True]
    assert "1 units were committed before" in said[0]
    assert "up to date" not in said[1]


def test_names_and_identities_know_no_paths():
    a, b = (Repository(name="ada/small", path=p) for p in ("/one/x", "/two/y"))
    assert unit_name(a) == unit_name(b)
    assert "path" not in HarvestSource(repositories=(a,)).model_dump(mode="json")["repositories"][0]
    api = Api(token_variable="OTHER", max_requests=1)
    assert HarvestSource(api=api).model_dump(mode="json") == HarvestSource(api=Api()).model_dump(mode="json")
    pair = ReleasePair(name="small", base="a", head="b", version="1.0/../x")
    assert "/" not in unit_name(pair)
    with pytest.raises(ValueError, match="name"):
        Repository(name="../../etc", path="x")


def change(**more):
    files = (FileChange("a.py", "one\n", "two\n", 1, 1, "Python"), FileChange("b.py", None, "new\n", 0, 1, "Python"))
    said = {
        "title": "Say two and not one",
        "body": "One is a lonely number, two can talk.",
        "merged_at": "2024-01-03T00:00:00Z",
    }
    record = Record("pull_request", "ada/small", "pull/1", 1, files=files, tree=("a.py", "c.py"), tree_size=2)
    return replace(record, **said | more)


CONFIGURED = DialoguesConfig()


def test_a_dialogue_by_hand():
    segments, blocks = dialogue(change(), "localise", CONFIGURED)
    text, spans = joined(segments)
    assert blocks == 0
    assert text == (
        "A problem in a repository is to be solved. Read it first.\n\n<problem>\nSay two and not one\n\nOne is a lonely number, "
        "two can talk.\n</problem>\n\nThese are files of the repository:\n\n<files>\na.py\nc.py\n</files>\n\nWhich files must be "
        "changed or added? Name their paths, one a line, most changed first.\n\na.py\nb.py\n"
    )
    masked = masked_for_annealing(spans)
    learned = text.encode()
    for start, end in reversed(masked):
        learned = learned[:start] + b"|" + learned[end:]
    assert learned.decode() == "|Say two and not one\n\nOne is a lonely number, two can talk.|a.py\nc.py|a.py\nb.py\n"
    assert masked_for_chat(spans) == [(0, len(text) - len("a.py\nb.py\n"))]


def test_masks_are_bytes_on_character_borders():
    segments, _ = dialogue(change(title="Sag zwei – nicht eins, bitte schön"), "repair", CONFIGURED)
    text, spans = joined(segments)
    assert all(text.encode()[a:b].decode() for a, b, _, _ in spans)
    assert "".join(m["content"] for m in chat_messages(text, spans)) == text


def test_nothing_dated_after_the_merge_is_in_a_prompt():
    before = Issue(1, "One is wrong", "since ever, and everywhere", "eve", "2024-01-01T00:00:00Z")
    after = Issue(2, "Two is wrong", "since the merge", "eve", "2024-01-04T00:00:00Z")
    unknown = Issue(3, "Nobody knows when", "it was said", "eve", None)
    later = Remark("eve", "2024-01-05T00:00:00Z", "this broke us")
    record = change(issues=(after, before, unknown), remarks=(later,))
    assert problem_of(record, masks_of(record)) == "One is wrong\n\nsince ever, and everywhere"
    for template in ("localise", "repair"):
        text, _ = joined(dialogue(record, template, CONFIGURED)[0])
        assert "broke" not in text
        assert "since the merge" not in text
    late_only = change(issues=(after,))
    assert problem_of(late_only, masks_of(late_only)).startswith("Say two and not one")


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        ("localise", change(title="x", body=""), "no_problem"),
        ("localise", change(tree=("a.py",)), "no_distractors"),
        ("localise", change(files=change().files[1:]), "only_new_files"),
        ("repair", change(files=change().files[1:]), "only_new_files"),
        ("repair", change(files=(FileChange("a.md", "T\n=======\nx\n", "T\n=======\ny\n"),)), "marker_collision"),
        ("repair", change(files=(FileChange("a.py", "a\n" * 2000, "b\n" * 2000),)), "too_many_lines"),
    ],
)
def test_changes_that_give_no_dialogue(template, record, reason):
    assert str(dialogue(record, template, CONFIGURED)).partition(":")[0] == reason


def test_a_wrong_answer_does_not_round_trip():
    record = change()
    good = joined(dialogue(record, "repair", CONFIGURED)[0][-1:])[0]
    assert round_trips(record, good)
    assert not round_trips(record, good.replace("two", "Two"))
    assert not round_trips(record, good.replace("one", "uno"))
    assert not round_trips(record, good.partition("### b.py")[0])


def test_captures_are_lines_of_records(harvested):
    (path,) = (harvested / "root/captures/pulls").glob("repository-ada_small-*.jsonl.zst")
    lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    found = [from_json(json.loads(line)) for line in lines]
    assert [r.key for r in found][:3] == ["pull/1", "pull/2", "pull/3"]
    assert found[0].files[0].head == "def main():\r\n    return 2"


def test_a_config_of_unknown_templates_is_refused():
    with pytest.raises(ConfigError, match="sing"):
        DialoguesConfig(templates=("sing",))
