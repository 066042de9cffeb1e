"""How Airflow treats the tasks of a plan: a small TOML file beside the plan, `demo.toml` for `demo.json`.

    command = ["/srv/stepwell/.venv/bin/pipelines"]
    retries = 2

    [environment]
    DEMO_FOLDER = "/data/demo"

    [stages.train]
    pool = "gpu"

What stands at the top holds for all stages, `[stages.NAME]` for one: `train`, `select` for every select, or `"select@final"`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow_dags.tasks import PlanError


@dataclass(frozen=True)
class TaskSettings:
    """What may differ between stages. None leaves it to Airflow's own default."""

    retries: int = 1
    retry_delay_s: int = 60
    timeout_s: int | None = None  # none is needed for hanging workers: the runner replaces those by itself
    pool: str | None = None
    queue: str | None = None

    def arguments(self) -> dict[str, Any]:
        """As arguments of an operator."""
        given = {
            "retries": self.retries,
            "retry_delay": timedelta(seconds=self.retry_delay_s),
            "execution_timeout": None if self.timeout_s is None else timedelta(seconds=self.timeout_s),
            "pool": self.pool,
            "queue": self.queue,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Settings(TaskSettings):
    """All that the file may hold."""

    command: tuple[str, ...] = ("pipelines",)  # this project's command as the workers see it
    schedule: str | None = None  # cron expression or preset such as @daily; None: by hand or through REST
    max_active_tasks: int = 1  # a task uses every core of its machine; more where a cluster does the work
    leave_out_up_to_date: bool = False  # no task for what was up to date when the plan was written
    environment: Mapping[str, str] = field(default_factory=dict)  # of the commands; `${X}` in a config is read there
    stages: Mapping[str, TaskSettings] = field(default_factory=dict)

    def of(self, stage: str) -> TaskSettings:
        """Those of one stage."""
        return self.stages.get(stage) or self.stages.get(stage.partition("@")[0]) or self


TYPES = {
    **dict.fromkeys(("retries", "retry_delay_s", "timeout_s", "max_active_tasks"), int),
    **dict.fromkeys(("pool", "queue", "schedule"), str),
    **dict.fromkeys(("environment", "stages"), dict),
    "command": list,
    "leave_out_up_to_date": bool,
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
    for i, word in enumerate(given.get("command", ())):
        _check(path, f"command[{i}]", word, str)
    for name, value in given.get("environment", {}).items():
        _check(path, f"environment.{name}", value, str)
    return replace(settings, **{name: tuple(v) if name == "command" else v for name, v in given.items()})


def _check(path: Path, name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise PlanError(f"{path}: {name}: got {value!r}, expected {kind.__name__}")
