"""An Airflow DAG for each plan: one task a step, one task group a dataset.

In: `demo.json`, written by `pipelines plan --json`, and where wanted `demo.toml` (`airflow_dags.settings`). Out: the DAG `demo`.
The scheduler needs this folder and Airflow, nothing else of the project, which may live in another environment.

Nothing is decided here. Each task runs its step's own command, and the runner finds out then whether the step is up to date. So a
plan goes stale only when sources or stages are added to the config or taken from it.
Cost: 0.05 s for the demo's 27 steps, 1 s for 1,000, besides the 5 s in which Airflow itself is imported.
"""

from pathlib import Path
from typing import Any

from airflow_dags.settings import Settings, read_settings
from airflow_dags.tasks import PlanError, plain, read_plan, safe_id, shell_line, tasks


def dags(folder: str | Path) -> dict[str, Any]:
    """{name: DAG} of every plan in a folder. One that cannot be used is an error for all: none disappears in silence."""
    made = [dag(path) for path in sorted(Path(folder).glob("*.json"))]
    if not made:
        raise PlanError(f"{folder}: no plan, expected at least one NAME.json that `pipelines plan --json` wrote")
    return {d.dag_id: d for d in made}


def dag(path: str | Path) -> Any:
    """The DAG of one plan file, which names it."""
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import TaskGroup

    path = Path(path)
    plan, settings = read_plan(path), read_settings(path.with_suffix(".toml"))
    made = _empty_dag(safe_id(path.stem), f"stepwell: {plan.get('root')}", settings)
    groups: dict[str | None, Any] = {None: None}
    operators: dict[str, Any] = {}
    for task in tasks(plan, settings.leave_out_up_to_date):
        if task.group not in groups:
            groups[task.group] = TaskGroup(task.group, dag=made)
        operators[task.full_id] = BashOperator(
            task_id=task.id,
            task_group=groups[task.group],
            dag=made,
            bash_command=shell_line(settings.command, task.arguments),
            env=_variables(settings),
            append_env=True,
            doc_md=f"`{task.name}`; when the plan was written: {task.note}",
            **settings.of(task.stage).arguments(),
        )
        operators[task.full_id].set_upstream([operators[before] for before in task.after])
    return made


def _empty_dag(name: str, description: str, settings: Settings) -> Any:
    from airflow.sdk import DAG, Param

    engine = Param(None, enum=[None, "local", "ray", "spark"], description="null: the config's")
    workers = Param(None, type=["null", "integer"], minimum=0, description="null: the config's; 0: one a core")
    return DAG(
        dag_id=name,
        description=description,
        schedule=settings.schedule,
        catchup=False,
        max_active_runs=1,  # a second one would only meet the locks of the first
        max_active_tasks=settings.max_active_tasks,
        params={"engine": engine, "workers": workers},
        tags=["stepwell"],
    )


def _variables(settings: Settings) -> dict[str, str]:
    """Of a task's command. Airflow fills in the templates."""
    return {
        **{name: plain(value) for name, value in settings.environment.items()},
        "STEPWELL_RUN_ID": "{{ dag.dag_id }}/{{ run_id }}",  # every retry bears it again, and so re-enters its own lock
        "STEPWELL_ENGINE": "{{ params.engine or '' }}",
        "STEPWELL_WORKERS": "{{ '' if params.workers is none else params.workers }}",
    }
