"""Plans to tasks, edges and ids as plain data, against small plans worked out by hand. No Airflow here."""

import json
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dags import settings as settings_module
from airflow_dags.notices import RunEnded, TaskFailed
from airflow_dags.settings import Settings, TaskSettings, read_settings
from airflow_dags.tasks import PlanError, plain, read_plan, safe_id, step_line, tasks, uri
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.options import MOST_GROUPS
from pipelines.plan import plan, plan_json
from tests.bounds import BOUND_S
from tests.pipelines.small_pipeline import JUDGED, write_config, write_jsonl

REPO = Path(__file__).resolve().parents[2]


def step(stage, dataset=None, after=(), run=True, **more):
    """One step as `pipelines plan --json` writes it."""
    name = f"{stage} [{dataset}]" if dataset else stage
    command = ["pipelines", "run", "stage", stage, "-c", "/data/p.yaml"]
    command += ["--dataset", dataset] if dataset else []
    why = ["never run here", "inputs.web: a -> b"] if run else []
    return {
        "makes": [],
        "parts": None,
        "name": name,
        "stage": stage,
        "kind": "any",
        "dataset": dataset,
        "run": run,
        "why": why,
        "after": list(after),
        "command": command,
        **more,
    }


def edges(steps, **options):
    return {t.full_id: t.after for t in tasks({"root": "/r", "steps": steps}, **options)}


DIAMOND = [
    step("extract", "web"),
    step("language", "web", ["extract [web]"], run=False),
    step("signals", "web", ["extract [web]"]),
    step("select@final", None, ["extract [web]", "language [web]", "signals [web]"]),
    step("split", "web", ["extract [web]", "select@final"]),
]


def test_a_step_becomes_a_task_of_its_datasets_group():
    first, *_, last = tasks({"root": "/r", "steps": DIAMOND})
    assert (first.name, first.stage, first.group, first.id, first.full_id) == (
        "extract [web]",
        "extract",
        "web",
        "extract",
        "web.extract",
    )
    assert first.arguments == ("run", "stage", "extract", "-c", "/data/p.yaml", "--dataset", "web")
    assert first.note == "never run here; inputs.web: a -> b"
    assert last.full_id == "web-2.split"  # it waits for what waits for the group `web`


def test_edges_that_follow_from_others_are_left_out():
    assert edges(DIAMOND) == {
        "web.extract": (),
        "web.language": ("web.extract",),
        "web.signals": ("web.extract",),
        "select-final": ("web.language", "web.signals"),
        "web-2.split": ("select-final",),
    }


def test_what_is_up_to_date_can_be_left_out_and_hands_on_its_waits():
    assert edges(DIAMOND, leave_out_up_to_date=True) == {
        "web.extract": (),
        "web.signals": ("web.extract",),
        "select-final": ("web.signals",),
        "web-2.split": ("select-final",),
    }
    chain = [step("a"), step("b", after=["a"], run=False), step("c", after=["b"], run=False), step("d", after=["c"])]
    assert edges(chain, leave_out_up_to_date=True) == {"a": (), "d": ("a",)}
    assert tasks({"root": "/r", "steps": [step("a", run=False)]}, leave_out_up_to_date=True) == ()


@given(st.integers(1, 14).flatmap(lambda n: st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n)))
def test_fewer_edges_lead_to_the_same_order(waits):
    """Whatever the plan: every step still comes after all that it named, and no edge can be spared."""
    steps = [step(f"s{i}", after=[f"s{j}" for j in sorted(w) if j < i]) for i, w in enumerate(waits)]
    short = edges(steps)

    def above(name, graph):
        return set(graph[name]).union(*(above(b, graph) for b in graph[name]))

    wanted = {s["name"]: s["after"] for s in steps}
    for name in wanted:
        assert above(name, short) == above(name, wanted)
        for edge in short[name]:
            assert edge not in set().union(*(above(b, short) for b in short[name] if b != edge))


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.sets(st.integers(0, 11))), max_size=12))
def test_groups_never_wait_for_each_other_in_a_circle(drawn):
    """Airflow's graph page fails on such a plan, though its tasks could run."""
    steps = [step(f"s{i}", dataset) for i, (dataset, _) in enumerate(drawn)]
    for i, (_, waits) in enumerate(drawn):
        steps[i]["after"] = [steps[j]["name"] for j in sorted(waits) if j < i]
    made = tasks({"root": "/r", "steps": steps})
    box = {t.full_id: t.group or t.full_id for t in made}
    graph: dict[str, set[str]] = {name: set() for name in box.values()}
    for t in made:
        graph[box[t.full_id]] |= {box[b] for b in t.after} - {box[t.full_id]}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph)  # raises on a circle


@given(st.lists(st.tuples(st.text("ab-@é.", min_size=1, max_size=4), st.sampled_from([None, "a-b", "a.b", "a"]))))
def test_ids_are_safe_and_no_two_are_alike(names):
    steps = [step(stage, dataset) for stage, dataset in dict.fromkeys(names)]
    made = tasks({"root": "/r", "steps": steps})
    full, groups = [t.full_id for t in made], {t.group for t in made if t.group}
    assert len({*full, *groups}) == len(full) + len(groups)
    assert all(re.fullmatch(r"([A-Za-z0-9_-]+\.)?[A-Za-z0-9_-]+", i) for i in full)


def test_a_dataset_that_bears_a_stages_name_keeps_apart_from_it():
    made = tasks({"root": "/r", "steps": [step("extract", "mix"), step("mix", after=["extract [mix]"])]})
    assert made[0].group.startswith("mix-")
    assert made[1].full_id.startswith("mix-")
    assert made[1].full_id != made[0].group
    assert made[1].after == (made[0].full_id,)


def test_long_names_are_cut_and_marked():
    a, b = safe_id("x" * 300), safe_id("x" * 299 + "y")
    assert len(a) == len(b) == 100
    assert a != b
    assert safe_id("select@final") == "select-final"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a", after=["b"]), step("b")], "step 'a' waits for 'b', no step before it"),
        ([step("a"), step("a")], "step 'a' stands twice"),
        ([step("a", command=["pipelines", "run", "stage", "a", "-c", "p.yaml"])], "names the config 'p.yaml'"),
        ([step("a", command=["pipelines", "run", "stage", "a", "-c"])], "names the config ''"),
        ([{"name": "a"}], "no plan, KeyError('stage') is wrong"),
        (["a"], "no plan, TypeError"),
    ],
)
def test_what_is_no_plan_is_refused(steps, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        tasks({"root": "/r", "steps": steps})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"steps": 3}', '{"root": "/r", "steps": []}', "\x00", None])
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=r"broken\.json"):
        read_plan(path)


def test_a_real_plan_becomes_tasks(tmp_path):
    write_jsonl(tmp_path / "notes", ["some words"], 1)
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=1, source=tmp_path / "notes")
    pipeline = load_pipeline(config)
    (tmp_path / "small.json").write_text(json.dumps(plan_json(pipeline, plan(pipeline, Root(pipeline.root)))))
    found = {t.full_id: t.after for t in tasks(read_plan(tmp_path / "small.json"))}
    assert found == {
        "notes.extract": (),
        "notes.signals": ("notes.extract",),
        "notes.pii": ("notes.extract",),
        "exact": ("notes.extract",),
        "minhash": ("exact",),
        "select-final": ("notes.signals", "minhash"),
    }
    made = {t.full_id: t for t in tasks(read_plan(tmp_path / "small.json"))}
    assert made["notes.signals"].parts == ("shards", "signals", "-c", str(config), "--dataset", "notes")
    assert {name for name, t in made.items() if t.parts} == {"notes.signals", "notes.pii"}
    documents = (tmp_path / "root" / "datasets" / "notes" / "documents").as_uri()
    assert {name: t.makes for name, t in made.items() if t.makes} == {"notes.extract": (documents,)}


ODD = ["it's", "a b", "$HOME", "`id`", "{{ 1 }}", "{% raw %}", "{# x #}", 'q"q', "*", "ü"]


def test_the_shell_gets_each_word_whole():
    """Through Jinja, which Airflow renders the line with, and through Bash."""
    jinja2 = pytest.importorskip("jinja2")
    line = jinja2.Template(step_line([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))"], ODD)).render()
    given = {"STEPWELL_RUN_ID": "$(id) 'x'", "STEPWELL_ENGINE": "", "STEPWELL_WORKERS": "3"}
    ran = subprocess.run(["bash", "-c", line], env=given, capture_output=True, text=True, check=True, timeout=BOUND_S)
    assert ran.stdout.strip() == ascii([*ODD, "--up-to-date-code", "99", "--run-id", "$(id) 'x'", "--workers", "3"])
    assert shlex.split(plain("a b"))[1] == "b"


def test_a_part_of_a_step_is_named_in_a_variable():
    line = step_line(["printf", "%s|"], ["run", "stage", "signals"], part=True)
    given = {"STEPWELL_RUN_ID": "r", "STEPWELL_SHARDS": "0:4 $(id)"}
    ran = subprocess.run(["bash", "-c", line], env=given, capture_output=True, text=True, check=True, timeout=BOUND_S)
    assert ran.stdout == "run|stage|signals|--shards|0:4 $(id)|--run-id|r|"


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/data/root", "file:///data/root/mixtures/anneal"),
        ("/data/a b/ü?#%/", "file:///data/a%20b/%C3%BC%3F%23%25/mixtures/anneal"),
        ("s3://bucket/root", "s3://bucket/root/mixtures/anneal"),
        ("s3://key:secret@bucket/root", "s3://bucket/root/mixtures/anneal"),
        ("hdfs://me@host:9000/root/", "hdfs://host:9000/root/mixtures/anneal"),
        ("https://host/root?token=secret", "https://host/root/mixtures/anneal"),
    ],
)
def test_what_is_made_has_a_uri_without_credentials(root, expected):
    assert uri(root, "mixtures/anneal") == expected
    made = tasks({"root": root, "steps": [step("mix", makes=["mixtures/anneal"])]})
    assert made[0].makes == (expected,)


def test_settings_without_a_file_are_the_defaults(tmp_path):
    settings = read_settings(tmp_path / "none.toml")
    assert settings == Settings()
    assert settings.command == ("pipelines",)
    assert set(settings.of("train").arguments()) == {"retries", "retry_delay"}


def test_a_stage_has_its_own_settings_over_the_files(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(
        'command = ["/v/python", "-m", "pipelines"]\nretries = 3\npool = "all"\nschedule = "@daily"\n'
        'environment = {DEMO_FOLDER = "/d"}\n[stages.train]\nqueue = "gpu"\ntimeout_s = 60\n[stages.select]\nretries = 0\n'
    )
    settings = read_settings(path)
    assert settings.command == ("/v/python", "-m", "pipelines")
    assert settings.environment == {"DEMO_FOLDER": "/d"}
    assert settings.of("signals").arguments()["retries"] == 3
    assert settings.of("train") == TaskSettings(retries=3, pool="all", queue="gpu", timeout_s=60)
    assert settings.of("train").arguments()["execution_timeout"].total_seconds() == 60
    assert settings.of("select@final").retries == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retries = ", "expected TOML"),
        ("retrys = 1", "unknown key 'retrys'; expected one of retries,"),
        ("retries = '1'", "retries: got '1', expected int"),
        ("retries = true", "retries: got True, expected int"),
        ("command = 'pipelines'", "command: got 'pipelines', expected list"),
        ("command = [1]", "command[0]: got 1, expected str"),
        ("environment = {A = 1}", "environment.A: got 1, expected str"),
        ("shard_groups = 201", "shard_groups: got 201, expected 0 to 200"),
        ("[stages.pii]\nshard_groups = -1", "stages.pii.shard_groups: got -1, expected 0 to 200"),
        ("on_failure = [1]", "on_failure[0]: got 1, expected str"),
        ("schedule = '@daily'\nschedule_on = ['file:///a']", "schedule and schedule_on: a DAG runs by the clock or"),
        ("stages = 1", "stages: got 1, expected dict"),
        ("[stages]\ntrain = 1", "stages.train: got 1, expected dict"),
        ("[stages.train]\nschedule = '@daily'", "unknown key 'stages.train.schedule'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, text, message):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(PlanError, match=re.escape(message)):
        read_settings(tmp_path / "p.toml")


def test_the_folder_stands_on_the_standard_library():
    """Without installed packages: the scheduler's environment needs Airflow and this folder only, and that when a DAG is made."""
    code = "import airflow_dags.factory, airflow_dags.notices, airflow_dags.tasks, airflow_dags.settings"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=REPO, capture_output=True, text=True, timeout=BOUND_S)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_most_groups_are_what_the_command_gives():
    assert settings_module.MOST_GROUPS == MOST_GROUPS


class Dag:
    dag_id = "small"


def test_a_command_is_told_of_the_end_of_a_run(tmp_path, caplog):
    """One line of JSON; what goes wrong with the command is said, and raises nothing."""
    context = {"dag": Dag, "run_id": "r1", "reason": "task_failure"}
    report = "file:///r/report.html"
    RunEnded("failed", report, ("tee", str(tmp_path / "told")))(context)
    told = {"dag": "small", "run": "r1", "state": "failed", "reason": "task_failure", "report": report}
    assert json.loads((tmp_path / "told").read_text()) == told
    for command, complaint in ((("false",), "returned non-zero exit status 1"), (("/absent",), "No such file")):
        caplog.clear()
        RunEnded("failed", report, command)(context)
        assert complaint in caplog.text
    caplog.clear()
    TaskFailed(report)(context)
    assert report in caplog.text


def test_the_settings_of_the_docs_can_be_read(tmp_path):
    page = (REPO / "docs" / "operations.md").read_text("utf-8")
    found = re.search(r"<!-- airflow -->\n```toml\n(.*?)```", page, re.DOTALL)
    assert found
    (tmp_path / "p.toml").write_text(found.group(1))
    settings = read_settings(tmp_path / "p.toml")
    assert settings.schedule == "@daily"
    assert settings.of("train") == TaskSettings(retries=3, pool="gpu", pool_slots=2, priority=10, timeout_s=86400)
    assert settings.of("signals").shard_groups == 50
    assert settings.of("pii").arguments() == TaskSettings().arguments()
