"""A small pipeline through Airflow itself: `airflow dags test` on sqlite, offline, in the environment of `make airflow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
AIRFLOW = REPO / ".venv-airflow" / "bin"
TASKS = ["notes.extract", "notes.signals", "notes.pii", "exact", "minhash", "select-final"]

# What a DAG holds, as Airflow's own Python says it.
SHOW = """
import json, sys
from airflow_dags.factory import dags
made = dags(sys.argv[1])["small"]
print(json.dumps({
    "tasks": {t.task_id: sorted(t.upstream_task_ids) for t in made.tasks},
    "groups": sorted(g for g in made.task_group_dict if g),
    "retries": {t.task_id: t.retries for t in made.tasks},
    "timeout_s": [t.execution_timeout.total_seconds() for t in made.tasks if t.execution_timeout],
    "params": dict(made.params),
    "runs": made.max_active_runs,
    "schedule": made.schedule,
}))
"""


class Scheduler:
    """An AIRFLOW_HOME of its own with the plan of a small pipeline."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        write_jsonl(folder / "notes", texts(60), 2)
        # The line that Bash runs is a template, and this a path that it must leave alone.
        odd = folder / "a {{ b }} 'c'"
        self.config = write_config(odd / "p.yaml", JUDGED, root=self.root, workers=2, source=folder / "notes")
        self.plans = folder / "plans"
        self.plans.mkdir()
        (self.plans / "small.json").write_text(pipelines("plan", "--json", "-c", self.config).out)
        command = [sys.executable, str(Path(__file__).with_name("killed_once.py")), str(self.root)]
        settings = f"command = {json.dumps(command)}\nretries = 2\nretry_delay_s = 1\n"
        settings += f'environment = {{PYTHONPATH = "{REPO}"}}\n[stages.minhash]\nretries = 0\ntimeout_s = 600\n'
        (self.plans / "small.toml").write_text(settings)
        self.environment = {
            "PATH": f"{AIRFLOW}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(REPO),
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "airflow_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "STEPWELL_PLANS": str(self.plans),
        }

    def run(self, *arguments: str) -> str:
        """What a command of Airflow's environment said; the test fails where it failed."""
        ran = subprocess.run(arguments, env=self.environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
        return ran.stdout


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    if not (AIRFLOW / "airflow").exists():
        message = f"no Airflow in {AIRFLOW.parent.name}; `make airflow` installs it"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    made = Scheduler(tmp_path_factory.mktemp("airflow"))
    made.run("airflow", "db", "migrate")
    return made


def test_the_dag_holds_what_plan_and_settings_say(airflow):
    shown = json.loads(airflow.run("python", "-c", SHOW, str(airflow.plans)).splitlines()[-1])
    assert shown["tasks"] == {
        "notes.extract": [],
        "notes.signals": ["notes.extract"],
        "notes.pii": ["notes.extract"],
        "exact": ["notes.extract"],
        "minhash": ["exact"],
        "select-final": ["minhash", "notes.signals"],
    }
    assert shown["groups"] == ["notes"]
    assert shown["retries"] == {name: 0 if name == "minhash" else 2 for name in TASKS}
    assert shown["timeout_s"] == [600]
    assert shown["params"] == {"engine": None, "workers": None}
    assert (shown["runs"], shown["schedule"]) == (1, None)


def test_a_dag_runs_the_pipeline_and_then_finds_nothing_to_do(airflow, tmp_path):
    """With a task killed in the middle: the same bytes as an undisturbed `run all`. A second run of the DAG skips every step."""
    said = airflow.run("airflow", "dags", "test", "small", "-c", '{"workers": 1}')
    assert "up to date" not in said
    stored = manifests(airflow.root)
    (run_id,) = {m["observed"]["run_id"] for m in stored.values()}
    assert run_id.startswith("small/manual__")
    assert json.loads(Path(f"{airflow.root}.lock").read_text())["run_id"] == run_id  # the retry re-entered this one

    source = airflow.plans.parent / "notes"
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=2, source=source)
    assert pipelines("run", "all", "-c", config).code == 0
    assert state(airflow.root) == state(tmp_path / "root")

    said = airflow.run("airflow", "dags", "test", "small")
    assert said.count(": up to date") == len(TASKS)
    assert manifests(airflow.root) == stored
