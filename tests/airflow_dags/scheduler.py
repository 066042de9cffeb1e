"""An Airflow of its own for a test: a home, a folder of plans, and where wanted the whole of `airflow standalone` on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.bounds import BOUND_S
from tests.pipelines.small_pipeline import REPO

AIRFLOW = REPO / ".venv-airflow" / "bin"
PATIENCE_S = 600  # for what takes a minute on a quiet machine


class Scheduler:
    """An AIRFLOW_HOME in a folder, with `plans/` beside it."""

    def __init__(self, folder: Path) -> None:
        if not (AIRFLOW / "airflow").exists():
            message = f"no Airflow in {AIRFLOW.parent.name}; `make airflow` installs it"
            pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
        self.home, self.plans = folder / "airflow", folder / "plans"
        self.plans.mkdir()
        self.environment = {
            "PATH": f"{AIRFLOW}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(REPO),
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "airflow_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "STEPWELL_PLANS": str(self.plans),
        }

    def add(self, name: str, plan: str, settings: str) -> None:
        (self.plans / f"{name}.json").write_text(plan)
        (self.plans / f"{name}.toml").write_text(settings)

    def run(self, *arguments: str) -> str:
        """What a command of Airflow's environment said; the test fails where it failed."""
        ran = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, timeout=BOUND_S)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
        return ran.stdout

    @contextlib.contextmanager
    def standalone(self) -> Iterator["Api"]:
        """API server, scheduler, DAG processor and triggerer, until the block ends; then none of their processes is left."""
        api, logs, triggers = free_ports(3)
        url = f"http://127.0.0.1:{api}"
        environment = {
            **self.environment,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(api),
            "AIRFLOW__API__BASE_URL": url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "AIRFLOW__CORE__PARALLELISM": "2",
            # Airflow's own patience (5, 30 and 50 s) ends on a crowded machine, and it then blames the task.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "120",
            "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "300",
            "AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "600",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(logs),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(triggers),
        }
        said = self.home.with_suffix(".log")
        with said.open("wb") as out:
            process = subprocess.Popen(
                ["airflow", "standalone"], env=environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            yield Api(url, self.home / "simple_auth_manager_passwords.json.generated", process)
        except BaseException:
            print(said.read_text("utf-8", "replace")[-8000:])
            raise
        finally:
            end(process, self.home)


def end(process: subprocess.Popen[bytes], home: Path) -> None:
    """Stop Airflow, and kill what is left of it: its own processes, and those of tasks, which are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        kill([p for p in tree if p.is_running()])
    process.kill()
    process.wait()
    while found := [p for p in psutil.process_iter() if started_by(p, home)]:
        kill(found)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 10)


def started_by(process: psutil.Process, home: Path) -> bool:
    """Whether a process has this AIRFLOW_HOME. Those of Airflow that call themselves by a title have lost their environment."""
    try:
        return process.environ().get("AIRFLOW_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Api:
    """Airflow's REST API as its administrator."""

    def __init__(self, url: str, passwords: Path, process: subprocess.Popen[bytes]) -> None:
        self.client, self.passwords, self.process = httpx.Client(base_url=url, timeout=60), passwords, process

    def login(self) -> None:
        """Wait until all is up, and get a token with the generated password."""
        self.until("a password", self.passwords.exists)
        self.until("a healthy scheduler", self._healthy)
        (name, password) = next(iter(json.loads(self.passwords.read_text()).items()))
        answer = self.client.post("/auth/token", json={"username": name, "password": password})
        self.client.headers["Authorization"] = f"Bearer {answer.raise_for_status().json()['access_token']}"

    def call(self, method: str, path: str, **options: Any) -> Any:
        return self.client.request(method, f"/api/v2/{path}", **options).raise_for_status().json()

    def until(self, what: str, holds: Callable[[], Any]) -> Any:
        """What `holds` says once it says something."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.process.poll() is None, f"airflow standalone ended with {self.process.returncode}"
            with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
                if found := holds():
                    return found
            time.sleep(0.5)
        pytest.fail(f"waited {PATIENCE_S} s for {what}")

    def start(self, dag: str) -> str:
        """Wait for the DAG, let it run, and give the id of a new run."""
        self.until(f"the DAG {dag}", lambda: self.call("GET", f"dags/{dag}"))
        self.call("PATCH", f"dags/{dag}", json={"is_paused": False})
        return str(self.call("POST", f"dags/{dag}/dagRuns", json={"logical_date": None})["dag_run_id"])

    def ended(self, dag: str, run: str) -> str:
        """The state in which a run ended."""

        def state() -> str | None:
            found = str(self.call("GET", f"dags/{dag}/dagRuns/{run}")["state"])
            return found if found in ("success", "failed") else None

        return str(self.until(f"the end of {dag}", state))

    def tasks(self, dag: str, run: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The tasks of a run by id and number within their map (-1: not mapped)."""
        found = self.call("GET", f"dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {(t["task_id"], t["map_index"]): t for t in found}

    def _healthy(self) -> bool:
        health = self.call("GET", "monitor/health")
        return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))
