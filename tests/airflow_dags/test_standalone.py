"""The whole of Airflow on loopback: scheduler, API and executor as processes, driven through REST, with a task killed."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.airflow_dags.scheduler import Scheduler
from tests.pipelines.small_pipeline import JUDGED, REPO, manifests, pipelines, state, texts, write_config, write_jsonl

pytestmark = [pytest.mark.timeout(1800), pytest.mark.airflow_standalone]  # two minutes on a quiet machine
COMMAND = f'command = {json.dumps([sys.executable, "-m", "pipelines"])}\nenvironment = {{PYTHONPATH = "{REPO}"}}\n'
OFTEN = "retries = 3\nretry_delay_s = 1\n"


class Killer(threading.Thread):
    """Kills the first process that it finds holding the lock of a part, and remembers the lock."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed, self.over = root / "locks" / "notes.signals.shards", None, False

    def run(self):
        while not (self.over or self.killed):
            for lock in self.folder.glob("*.json"):
                try:
                    owner = json.loads(lock.read_text())
                    os.kill(owner["pid"], signal.SIGKILL)
                except (FileNotFoundError, ProcessLookupError, ValueError):
                    continue
                self.killed = {**owner, "part": lock.stem}
                return
            time.sleep(0.005)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    return Scheduler(tmp_path_factory.mktemp("standalone"))


def test_a_run_with_a_killed_part_ends_as_if_undisturbed(airflow, tmp_path):
    """Started through REST, its steps in parts. The assets it makes start another DAG, and a wrong config fails at once."""
    write_jsonl(tmp_path / "notes", texts(60), 6)
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=1, source=tmp_path / "notes")
    plan = pipelines("plan", "--json", "-c", config).out
    airflow.add("small", plan, COMMAND + OFTEN + "max_active_tasks = 2\n[stages.signals]\nshard_groups = 3\n")
    made = (tmp_path / "root" / "datasets" / "notes" / "documents").as_uri()
    one = {**json.loads(plan), "steps": [{**json.loads(plan)["steps"][0], "makes": []}]}
    after = f'command = ["true"]\nreport = false\nschedule_on = ["{made}"]\n'
    airflow.add("after", json.dumps(one), after)
    refuse = ["sh", "-c", "test $1 = report || exit 2", "sh"]  # the exit code of a wrong config, for all but the report
    notice = f'command = {json.dumps(refuse)}\non_failure = ["tee", "{tmp_path / "notice"}"]\n'
    airflow.add("wrong", json.dumps(one), notice + OFTEN)

    killer = Killer(tmp_path / "root")
    with airflow.standalone() as api:
        api.login()
        api.until("the DAG after", lambda: api.call("PATCH", "dags/after", json={"is_paused": False}))
        killer.start()
        run, wrong = api.start("small"), api.start("wrong")
        assert api.ended("small", run) == "success"
        killer.over = True
        tasks = api.tasks("small", run)
        link = api.call("GET", f"dags/small/dagRuns/{run}/taskInstances/report/links")["extra_links"]["Report"]
        assert api.ended("wrong", wrong) == "failed"
        refused = api.tasks("wrong", wrong)
        api.until("word of the failed run", (tmp_path / "notice").exists)
        caused = api.until("the DAG after", lambda: api.call("GET", "dags/after/dagRuns")["dag_runs"])

    assert killer.killed is not None
    assert killer.killed["run_id"] == f"small/{run}"
    parts = {t["rendered_map_index"]: t["try_number"] for (name, _), t in tasks.items() if name == "notes.signals.part"}
    assert set(parts) == {"0:2", "2:4", "4:6"}
    assert parts[killer.killed["part"].replace("-", ":")] > 1
    assert {t["state"] for t in tasks.values()} == {"success"}
    assert link == (tmp_path / "root" / "report.html").as_uri()
    assert (tmp_path / "root" / "report.html").exists()
    assert {m["observed"]["run_id"] for m in manifests(tmp_path / "root").values()} == {f"small/{run}"}

    ended = {name: (t["state"], t["try_number"]) for (name, _), t in refused.items()}
    assert ended == {"notes.extract": ("failed", 1), "report": ("success", 1)}
    told = json.loads((tmp_path / "notice").read_text())
    assert (told["dag"], told["run"], told["state"]) == ("wrong", wrong, "failed")
    assert [r["run_type"] for r in caused] == ["asset_triggered"]

    undisturbed = write_config(
        tmp_path / "q.yaml", JUDGED, root=tmp_path / "undisturbed", workers=2, source=tmp_path / "notes"
    )
    assert pipelines("run", "all", "-c", undisturbed).code == 0
    assert state(tmp_path / "root") == state(tmp_path / "undisturbed")
