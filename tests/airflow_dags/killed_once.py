"""The command `pipelines` as Airflow's test calls it: the first run of `exact` is killed as soon as it holds its lock.

`killed_once.py ROOT ARGUMENTS`. The lock that the dead run leaves is copied to ROOT.lock, which also says that it has happened.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

TRIES = 20  # on a crowded machine the run may have let go of its lock before anybody looked


def killed(command: list[str], lock: Path) -> bool:
    """Whether the command could be killed while it held the lock."""
    run = subprocess.Popen(["nice", "-n", "10", *command])
    while not lock.exists():
        if run.poll() is not None:
            return False
        time.sleep(0.002)
    run.kill()
    run.wait()
    return lock.exists()


def main(root: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pipelines", *arguments]
    lock, copied = Path(root, "locks", "root.exact.json"), Path(f"{root}.lock")
    if "exact" not in arguments or copied.exists():
        os.execv(sys.executable, command)
    for attempt in range(TRIES):
        if killed([*command, "--force"] if attempt else command, lock):
            copied.write_bytes(lock.read_bytes())
            sys.exit(137)
    sys.exit(f"{TRIES} runs ended before they could be killed")


main(sys.argv[1], sys.argv[2:])
