"""Bash's operator as the tasks of a plan use it: what an exit code of the project's command means, and the link to the report.

0: done. 99: there was nothing to do, the task is skipped. 2: the config is wrong, no retry would mend it, the task fails at once.
Anything else is a failure that is tried again as the settings say. Imports Airflow, and only the factory's functions import this.
"""

from collections.abc import Sequence
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import BaseOperatorLink
from airflow.sdk.exceptions import AirflowFailException

WRONG_CONFIG = 2


class CommandOperator(BashOperator):
    """A command of the project. `shards`: the part of a step that a mapped task does, for the command in STEPWELL_SHARDS."""

    template_fields: Sequence[str] = (*BashOperator.template_fields, "shards")

    def __init__(self, *, shards: str = "", **arguments: Any) -> None:  # Airflow hands its own on by name
        super().__init__(**arguments)
        self.shards = shards

    def get_env(self, context: Any) -> dict[str, str]:
        return {**super().get_env(context), "STEPWELL_SHARDS": self.shards}

    def execute(self, context: Any) -> Any:
        try:
            return super().execute(context)
        except Exception as e:
            process = self.subprocess_hook.sub_process
            if process is not None and process.returncode == WRONG_CONFIG:
                raise AirflowFailException("the config or the command is wrong, see above; not tried again") from e
            raise


class ReportLink(BaseOperatorLink):
    """The button on a task's page."""

    name = "Report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return str(operator.report_url)


class ReportOperator(CommandOperator):
    """Writes the report, and shows where it is."""

    operator_extra_links = (ReportLink(),)

    def __init__(self, *, report_url: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.report_url = report_url
