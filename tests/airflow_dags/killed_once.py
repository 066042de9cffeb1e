"""The command `pipelines` as Airflow's test calls it: the first run of `exact` is killed as soon as it holds its lock.

`killed_once.py ROOT ARGUMENTS`. The lock that the dead run leaves is copied to ROOT.lock, which also says that it has happened.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

root, *arguments = sys.argv[1:]
command = [sys.executable, "-m", "pipelines", *arguments]
lock, copied = Path(root, "locks", "root.exact.json"), Path(f"{root}.lock")
if "exact" not in arguments or copied.exists():
    os.execv(sys.executable, command)
run = subprocess.Popen(command)
while not lock.exists():
    if run.poll() is not None:
        sys.exit(f"the run ended with {run.returncode} before it could be killed")
    time.sleep(0.002)
run.kill()
run.wait()
copied.write_bytes(lock.read_bytes())
sys.exit(137)
