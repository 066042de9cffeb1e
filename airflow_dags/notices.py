"""What is said when a run ends or a task fails: where the report is, in the log, and to a command of the user's.

The command gets one line of JSON on its standard input: `dag`, `run`, `state` (`success` or `failed`), `reason`, `report`. So
`["curl", "-fsS", "--json", "@-", "https://hooks.example/stepwell"]` is a webhook. Standard library only.
"""

import json
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("stepwell")

COMMAND_S = 60  # Airflow runs the callbacks of runs one after the other: chosen, untested


@dataclass(frozen=True)
class RunEnded:
    """Callback of a DAG. A command that fails is logged and changes nothing: the run is over."""

    state: str
    report: str
    command: tuple[str, ...]

    def __call__(self, context: Mapping[str, Any]) -> None:
        about = {"dag": context["dag"].dag_id, "run": context["run_id"], "state": self.state}
        line = json.dumps({**about, "reason": str(context.get("reason")), "report": self.report})
        log.info("run ended: %s", line)
        if not self.command:
            return
        try:
            said = subprocess.run(
                self.command, input=line + "\n", timeout=COMMAND_S, check=True, capture_output=True, text=True
            )
            log.info("%s: %s", self.command[0], said.stdout.strip())
        except (OSError, subprocess.SubprocessError) as e:
            log.error("%s: could not be told of the run: %s %s", self.command[0], e, getattr(e, "stderr", None) or "")


@dataclass(frozen=True)
class TaskFailed:
    """Callback of a task that is not tried again: the last line of its log leads on."""

    report: str

    def __call__(self, context: Mapping[str, Any]) -> None:
        log.error("what stands in the root, and what is missing: %s", self.report)
