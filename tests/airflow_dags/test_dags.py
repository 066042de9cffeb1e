"""A small pipeline through Airflow itself: `airflow dags test` on sqlite, offline, in the environment of `make airflow`."""

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.airflow_dags.scheduler import Scheduler
from tests.pipelines.small_pipeline import (
    JUDGED,
    REPO,
    manifests,
    pipelines,
    state,
    texts,
    write_config,
    write_jsonl,
)

pytestmark = pytest.mark.timeout(900)  # a minute of CPU time, and several on a machine that is shared

# What a DAG holds, as Airflow's own Python says it.
SHOW = """
import json, sys
from airflow_dags.factory import dags
made = dags(sys.argv[1])["small"]
print(json.dumps({
    "tasks": {t.task_id: sorted(t.upstream_task_ids) for t in made.tasks},
    "groups": sorted(g for g in made.task_group_dict if g),
    "retries": {t.task_id: t.retries for t in made.tasks},
    "mapped": [t.task_id for t in made.tasks if t.is_mapped],
    "slots": {t.task_id: t.pool_slots for t in made.tasks},
    "priority": {t.task_id: t.priority_weight for t in made.tasks},
    "outlets": {t.task_id: [o.uri for o in t.outlets] for t in made.tasks if t.outlets},
    "timeout_s": [t.execution_timeout.total_seconds() for t in made.tasks if t.execution_timeout],
    "params": dict(made.params),
    "runs": made.max_active_runs,
    "schedule": made.schedule,
}))
"""
# The modules that a DAG file brings with it once Airflow is there.
IMPORTED = """
import json, os, sys
import airflow.sdk, airflow.sdk.exceptions, airflow.providers.standard.operators.bash
before = set(sys.modules)
os.environ["STEPWELL_PLANS"] = sys.argv[1]
import airflow_dags.plans
print(json.dumps(sorted(set(sys.modules) - before)))
"""
OTHERS = {
    "core",
    "classifiers",
    "crawl",
    "dedup",
    "mixtures",
    "moe",
    "pipelines",
    "numpy",
    "pandas",
    "pyarrow",
    "torch",
}


class Small:
    """A scheduler with the plan of a small pipeline, whose stage `signals` is done in parts."""

    def __init__(self, folder: Path) -> None:
        self.scheduler, self.root = Scheduler(folder), folder / "root"
        write_jsonl(folder / "notes", texts(60), 4)
        # The line that Bash runs is a template, and this a path that it must leave alone.
        odd = folder / "a {{ b }} 'c'"
        self.config = write_config(odd / "p.yaml", JUDGED, root=self.root, workers=2, source=folder / "notes")
        command = [sys.executable, str(Path(__file__).with_name("killed_once.py")), str(self.root)]
        settings = f"command = {json.dumps(command)}\nretries = 2\nretry_delay_s = 1\npriority = 3\n"
        settings += f'environment = {{PYTHONPATH = "{REPO}"}}\n[stages.minhash]\nretries = 0\ntimeout_s = 600\n'
        settings += "pool_slots = 2\n[stages.signals]\nshard_groups = 2\n"
        self.scheduler.add("small", pipelines("plan", "--json", "-c", self.config).out, settings)
        self.run, self.home = self.scheduler.run, self.scheduler.home

    def ended(self) -> dict[str, str]:
        """The state in which each task of the newest run ended; those of a map as `task 0`, `task 1`."""
        last = "select max(id) from dag_run"
        query = "select ti.task_id, ti.map_index, ti.state from task_instance ti join dag_run r on r.run_id = ti.run_id"
        with contextlib.closing(sqlite3.connect(self.home / "airflow.db")) as db:
            rows = db.execute(f"{query} where r.id = ({last})").fetchall()
        return {name if index < 0 else f"{name} {index}": ended for name, index, ended in rows}

    def updates(self) -> list[str]:
        """The assets that were made anew so far."""
        query = "select a.uri from asset_event e join asset a on a.id = e.asset_id order by e.id"
        with contextlib.closing(sqlite3.connect(self.home / "airflow.db")) as db:
            return [uri for (uri,) in db.execute(query)]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    made = Small(tmp_path_factory.mktemp("airflow"))
    made.run("airflow", "db", "migrate")
    return made


def test_the_dag_holds_what_plan_and_settings_say(airflow):
    shown = json.loads(airflow.run("python", "-c", SHOW, str(airflow.scheduler.plans)).splitlines()[-1])
    assert shown["tasks"] == {
        "notes.extract": [],
        "notes.signals.parts": ["notes.extract"],
        "notes.signals.part": ["notes.signals.parts"],
        "notes.signals.finish": ["notes.signals.part"],
        "notes.pii": ["notes.extract"],
        "exact": ["notes.extract"],
        "minhash": ["exact"],
        "select-final": ["minhash", "notes.signals.finish"],
        "report": ["notes.pii", "select-final"],
    }
    assert shown["groups"] == ["notes", "notes.signals"]
    assert shown["mapped"] == ["notes.signals.part"]
    assert shown["retries"] == {name: 0 if name == "minhash" else 2 for name in shown["tasks"]}
    assert shown["timeout_s"] == [600]
    assert shown["slots"] == {name: 2 if name == "minhash" else 1 for name in shown["tasks"]}
    assert set(shown["priority"].values()) == {3}
    assert shown["outlets"] == {"notes.extract": [(airflow.root / "datasets" / "notes" / "documents").as_uri()]}
    assert shown["params"] == {"engine": None, "workers": None}
    assert (shown["runs"], shown["schedule"]) == (1, None)


def test_making_dags_imports_nothing_that_is_heavy_beside_airflow(airflow):
    """In the worst case, where all of it is installed beside Airflow: the DAG file's own imports are this folder's."""
    shown = json.loads(airflow.run("python", "-c", IMPORTED, str(airflow.scheduler.plans)).splitlines()[-1])
    ours = {"factory", "notices", "operators", "plans", "settings", "tasks"}
    assert {name for name in shown if name.startswith("airflow_dags.")} == {f"airflow_dags.{name}" for name in ours}
    packages = {name.partition(".")[0] for name in shown}
    assert packages & OTHERS == set()


def test_a_dag_runs_the_pipeline_and_then_finds_nothing_to_do(airflow, tmp_path):
    """With a task killed in the middle: the same bytes as an undisturbed `run all`. A second run of the DAG skips every step."""
    airflow.run("airflow", "dags", "test", "small", "-c", '{"workers": 1}')
    stored = manifests(airflow.root)
    (run_id,) = {m["observed"]["run_id"] for m in stored.values()}
    assert run_id.startswith("small/manual__")
    assert json.loads(Path(f"{airflow.root}.lock").read_text())["run_id"] == run_id  # the retry re-entered this one
    steps = ["notes.extract", "notes.signals.finish", "notes.pii", "exact", "minhash", "select-final"]
    parts = {"notes.signals.part 0": "success", "notes.signals.part 1": "success"}
    lasting = {"notes.signals.parts": "success", "report": "success"}
    assert airflow.ended() == {**lasting, **parts, **dict.fromkeys(steps, "success")}
    assert (airflow.root / "report.html").exists()
    made = [(airflow.root / "datasets" / "notes" / "documents").as_uri()]
    assert airflow.updates() == made

    source = airflow.scheduler.plans.parent / "notes"
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=2, source=source)
    assert pipelines("run", "all", "-c", config).code == 0
    assert state(airflow.root) == state(tmp_path / "root")

    said = airflow.run("airflow", "dags", "test", "small")
    assert said.count(": up to date") == len(steps)
    assert airflow.ended() == {**lasting, "notes.signals.part": "skipped", **dict.fromkeys(steps, "skipped")}
    assert airflow.updates() == made  # none was made anew
    assert manifests(airflow.root) == stored
