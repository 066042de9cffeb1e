"""`python -m moe.rl -c FILE`: reinforcement learning on tasks with exact answers, as a run file says (moe/rl/tasks.py).

Out: the run's folder, a live line on a terminal, and the summary as one line of JSON on stdout. Exit codes: 0 done, 1 the run
stopped, 2 usage or config. Tasks that need a verifier (mathematics by value, code by tests) are `pipelines rlvr`'s.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from core.errors import ConfigError, StepwellError
from moe.train import failed, parser

EXAMPLES = """examples:
  python -m moe.rl -c rl.yaml                                 one process, on a GPU if there is one
  python -m moe.rl -c rl.yaml --plan                          tasks, generations, tokens; samples and trains nothing
  python -m moe.rl -c rl.yaml --set steps=20 --set optim.lr=0.0001 --set "trajectory_ratio=[0.9, 1.1]"
The same command goes on from the newest checkpoint, also after kill -9. A stopped run exits with 1, a wrong config with 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser("python -m moe.rl", "Train a decoder on tasks with exact answers, by MIS-PO.", EXAMPLES)
    options.add_argument("--plan", action="store_true", help="say what the run would be, and train nothing")
    given = options.parse_args(arguments)
    try:
        sys.stdout.write(_run(given.config, given.set, given.plan) + "\n")
    except ConfigError as error:
        return failed(error, 2)
    except StepwellError as error:
        return failed(error, 1)
    return 0


def _run(path: Any, changes: Sequence[str], dry: bool) -> str:
    from core.hashing import digest
    from moe.rl.plan import plan_lines
    from moe.rl.tasks import answer_reward, read_records, read_rl, tasks_of, tokenizer_folder

    file = read_rl(path, changes)
    if file.tasks is None:
        raise ConfigError(f"{path}: tasks: missing, expected a JSONL file of prompts and answers")
    records = read_records(file.tasks)
    reward = answer_reward(records, file.match)
    content = digest(["answers", file.match, [str(r["answer"]) for r in records]])
    tasks = tasks_of(records, tokenizer_folder(file), content)
    if dry:
        return "\n".join(plan_lines(file, tasks))
    return trained(file, tasks, reward)


def trained(file: Any, tasks: Any, reward: Any) -> str:
    """Runs what a file describes, with a live line on a terminal. Returns the summary as JSON."""
    from moe.progress import live
    from moe.rl.trainer import reinforce

    with live(file.config.steps) as on_step:
        summary = reinforce(file.config, tasks, reward, file.folder, file.start, on_step, limits=file.limits)
    return json.dumps(asdict(summary), default=str)


if __name__ == "__main__":
    sys.exit(main())
