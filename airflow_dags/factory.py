"""An Airflow DAG for each plan: one task a step, one task group a dataset, and where wanted one task for each part of a step.

In: `demo.json`, written by `pipelines plan --json`, and where wanted `demo.toml` (`airflow_dags.settings`). Out: the DAG `demo`.
The scheduler needs this folder and Airflow, nothing else of the project, which may live in another environment.

Nothing is decided here. Each task runs its step's own command, and the runner finds out then whether the step is up to date: the
task is then skipped, and updates no asset. So a plan goes stale only when sources or stages come to the config or go from it.
A step in parts is three tasks: `parts` asks which there are, `part` is mapped over them, `finish` writes the manifest.
Cost: 0.05 s for the demo's 27 steps, 1 s for 1,000, besides the 5 s in which Airflow itself is imported.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow_dags.notices import RunEnded, TaskFailed
from airflow_dags.settings import Settings, read_settings
from airflow_dags.tasks import PlanError, Task, plain, plain_line, read_plan, safe_id, step_line, tasks, uri

AFTER = "none_failed"  # trigger rule: what a step waits for ran, or was up to date and so skipped


def dags(folder: str | Path) -> dict[str, Any]:
    """{name: DAG} of every plan in a folder. One that cannot be used is an error for all: none disappears in silence."""
    made = [dag(path) for path in sorted(Path(folder).glob("*.json"))]
    if not made:
        raise PlanError(f"{folder}: no plan, expected at least one NAME.json that `pipelines plan --json` wrote")
    return {d.dag_id: d for d in made}


def dag(path: str | Path) -> Any:
    """The DAG of one plan file, which names it."""
    from airflow.sdk import TaskGroup

    path = Path(path)
    plan, settings = read_plan(path), read_settings(path.with_suffix(".toml"))
    report = settings.report_url or uri(plan["root"], "report.html")
    made = _empty_dag(safe_id(path.stem), plan, settings, report)
    groups: dict[str | None, Any] = {None: made.task_group}
    last: dict[str, Any] = {}
    for task in tasks(plan, settings.leave_out_up_to_date):
        if task.group not in groups:
            groups[task.group] = TaskGroup(task.group, dag=made)
        shared = {"dag": made, "on_failure_callback": TaskFailed(report), **_environment(settings)}
        build = _in_parts if task.parts and settings.of(task.stage).shard_groups else _whole
        first, last[task.full_id] = build(task, settings, groups[task.group], shared)
        first.set_upstream([last[before] for before in task.after])
    if settings.report:
        ends = [t for t in made.tasks if not t.downstream_task_ids]
        _report_task(plan, settings, made, report).set_upstream(ends)
    return made


def _whole(task: Task, settings: Settings, group: Any, shared: Mapping[str, Any]) -> tuple[Any, Any]:
    """(first, last) of a step that is one task."""
    from airflow_dags.operators import CommandOperator

    line = step_line(settings.command, task.arguments)
    made = CommandOperator(
        task_id=task.id, task_group=group, bash_command=line, **_lasting(task), **_about(task, settings), **shared
    )
    return made, made


def _in_parts(task: Task, settings: Settings, group: Any, shared: Mapping[str, Any]) -> tuple[Any, Any]:
    """(first, last) of a step that is cut: which parts there are is known once what it reads has been made."""
    from airflow.sdk import TaskGroup

    from airflow_dags.operators import CommandOperator

    own = {**_about(task, settings), **shared, "task_group": TaskGroup(task.id, parent_group=group, dag=shared["dag"])}
    groups = str(settings.of(task.stage).shard_groups)
    parts = CommandOperator(
        task_id="parts",
        bash_command=plain_line(settings.command, [*task.parts, "--groups", groups]),
        output_processor=json.loads,
        **own,
    )
    line = step_line(settings.command, task.arguments, part=True)
    part = CommandOperator.partial(task_id="part", bash_command=line, map_index_template="{{ task.shards }}", **own)
    finish = CommandOperator(
        task_id="finish",
        bash_command=step_line(settings.command, [*task.arguments, "--finish"]),
        **_lasting(task),
        **own,
    )
    finish.set_upstream(part.expand(shards=parts.output))
    return parts, finish


def _report_task(plan: Mapping[str, Any], settings: Settings, made: Any, report: str) -> Any:
    """The last task. A teardown: it runs however the others ended, and does not make a failed run a success."""
    from airflow_dags.operators import ReportOperator

    line = plain_line(settings.command, plan["report"][1:])
    task = ReportOperator(
        task_id="report",
        dag=made,
        bash_command=line,
        report_url=report,
        **settings.arguments(),
        **_environment(settings),
    )
    return task.as_teardown()


def _empty_dag(name: str, plan: Mapping[str, Any], settings: Settings, report: str) -> Any:
    from airflow.sdk import DAG, Asset, Param

    engine = Param(None, enum=[None, "local", "ray", "spark"], description="null: the config's")
    workers = Param(None, type=["null", "integer"], minimum=0, description="null: the config's; 0: one a core")
    return DAG(
        dag_id=name,
        description=f"stepwell: {uri(plan['root'])}",
        doc_md=f"Root: `{uri(plan['root'])}`. Report: [{report}]({report}), written by the last task.",
        schedule=[Asset(u) for u in settings.schedule_on] or settings.schedule,
        catchup=False,
        max_active_runs=1,  # a second one would only meet the locks of the first
        max_active_tasks=settings.max_active_tasks,
        params={"engine": engine, "workers": workers},
        on_success_callback=RunEnded("success", report, settings.on_success),
        on_failure_callback=RunEnded("failed", report, settings.on_failure),
        tags=["stepwell"],
    )


def _about(task: Task, settings: Settings) -> dict[str, Any]:
    """What every task of a step is told."""
    note = f"`{task.name}`; when the plan was written: {task.note}"
    return {"doc_md": note, "trigger_rule": AFTER, **settings.of(task.stage).arguments()}


def _lasting(task: Task) -> dict[str, Any]:
    """What the task is told that ends a step: the assets it then has made anew."""
    from airflow.sdk import Asset

    return {"outlets": [Asset(u) for u in task.makes]}


def _environment(settings: Settings) -> dict[str, Any]:
    """Of a task's command. Airflow fills in the templates."""
    variables = {
        **{name: plain(value) for name, value in settings.environment.items()},
        "STEPWELL_RUN_ID": "{{ dag.dag_id }}/{{ run_id }}",  # every retry bears it again, and so re-enters its own lock
        "STEPWELL_ENGINE": "{{ params.engine or '' }}",
        "STEPWELL_WORKERS": "{{ '' if params.workers is none else params.workers }}",
    }
    return {"env": variables, "append_env": True}
