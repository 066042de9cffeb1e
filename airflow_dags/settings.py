"""How Airflow treats the tasks of a plan: a small TOML file beside the plan, `demo.toml` for `demo.json`.

    command = ["/srv/stepwell/.venv/bin/pipelines"]
    retries = 2

    [environment]
    DEMO_FOLDER = "/data/demo"

    [stages.train]
    pool = "gpu"

    [stages.signals]
    shard_groups = 50

What stands at the top holds for all stages, `[stages.NAME]` for one: `train`, `select` for every select, or `"select@final"`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow_dags.tasks import PlanError

MOST_GROUPS = 200  # `pipelines shards` gives no more


@dataclass(frozen=True)
class TaskSettings:
    """What may differ between stages. None leaves it to Airflow's own default."""

    retries: int = 1
    retry_delay_s: int = 60
    timeout_s: int | None = None  # none is needed for hanging workers: the runner replaces those by itself
    pool: str | None = None
    pool_slots: int | None = None
    priority: int | None = None  # Airflow's priority_weight: who takes the next free place
    queue: str | None = None
    # a task for each of at most so many parts of a step, where its stage allows that; 0: one for all
    shard_groups: int = 0

    def arguments(self) -> dict[str, Any]:
        """As arguments of an operator."""
        given = {
            "retries": self.retries,
            "retry_delay": timedelta(seconds=self.retry_delay_s),
            "execution_timeout": None if self.timeout_s is None else timedelta(seconds=self.timeout_s),
            "pool": self.pool,
            "pool_slots": self.pool_slots,
            "priority_weight": self.priority,
            "queue": self.queue,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Settings(TaskSettings):
    """All that the file may hold."""

    command: tuple[str, ...] = ("pipelines",)  # this project's command as the workers see it
    schedule: str | None = None  # cron expression or preset such as @daily; None: by hand or through REST
    schedule_on: tuple[str, ...] = ()  # URIs: a run when each was made anew since the last one
    max_active_tasks: int = 1  # a task uses every core of its machine; more where a cluster does the work
    leave_out_up_to_date: bool = False  # no task for what was up to date when the plan was written
    report: bool = True  # a last task that writes the report, also of a run that failed
    report_url: str | None = None  # where a browser finds it; None: where it lies
    on_failure: tuple[str, ...] = ()  # a command that is told of a failed run as JSON on its standard input
    on_success: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # of the commands; `${X}` in a config is read there
    stages: Mapping[str, TaskSettings] = field(default_factory=dict)

    def of(self, stage: str) -> TaskSettings:
        """Those of one stage."""
        return self.stages.get(stage) or self.stages.get(stage.partition("@")[0]) or self


LISTS = ("command", "schedule_on", "on_failure", "on_success")  # of words
COUNTS = ("retries", "retry_delay_s", "timeout_s", "max_active_tasks", "pool_slots", "priority", "shard_groups")
TYPES = {
    **dict.fromkeys(COUNTS, int),
    **dict.fromkeys(("pool", "queue", "schedule", "report_url"), str),
    **dict.fromkeys(("environment", "stages"), dict),
    **dict.fromkeys(LISTS, list),
    **dict.fromkeys(("leave_out_up_to_date", "report"), bool),
}


def read_settings(path: Path) -> Settings:
    """The settings of a file, or the defaults where there is none. PlanError for what it may not hold."""
    if not path.exists():
        return Settings()
    try:
        given = tomllib.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise PlanError(f"{path}: {e}; expected TOML") from None
    stages = given.pop("stages", {})
    _check(path, "stages", stages, dict)
    settings: Settings = _filled(path, "", Settings(), given)
    shared = TaskSettings(**{f.name: getattr(settings, f.name) for f in fields(TaskSettings)})
    for name, own in stages.items():
        _check(path, f"stages.{name}", own, dict)
    return replace(settings, stages={n: _filled(path, f"stages.{n}.", shared, own) for n, own in stages.items()})


def _filled(path: Path, where: str, settings: Any, given: dict[str, Any]) -> Any:
    """`settings` with the given values in place of its own."""
    known = [f.name for f in fields(settings)]
    for name, value in given.items():
        if name not in known:
            raise PlanError(f"{path}: unknown key {where + name!r}; expected one of {', '.join(known)}")
        _check(path, where + name, value, TYPES[name])
    for name in LISTS:
        for i, word in enumerate(given.get(name, ())):
            _check(path, f"{name}[{i}]", word, str)
    for name, value in given.get("environment", {}).items():
        _check(path, f"environment.{name}", value, str)
    if not 0 <= (groups := given.get("shard_groups", 0)) <= MOST_GROUPS:
        raise PlanError(f"{path}: {where}shard_groups: got {groups}, expected 0 to {MOST_GROUPS}")
    if given.get("schedule") and given.get("schedule_on"):
        raise PlanError(
            f"{path}: schedule and schedule_on: a DAG runs by the clock or on what others made; leave one out"
        )
    return replace(settings, **{name: tuple(v) if name in LISTS else v for name, v in given.items()})


def _check(path: Path, name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise PlanError(f"{path}: {name}: got {value!r}, expected {kind.__name__}")
