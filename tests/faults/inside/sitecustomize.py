"""Loaded by every Python process of a disturbed run: counts what is done to files below the root, and kills at the drawn event.

In, from the environment: STRIKE_FOLDER (this round's folder), STRIKE_ROOT, and STRIKE = `STEP EVENT VICTIM DELAY_S` or
nothing. Out, in the folder: `STEP.events`, one byte for each event of all processes together; `struck`, one line: who was
killed, and where.

An audit hook is called before its event: a process that dies in it has not yet renamed, linked, removed or opened the file.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

BETWEEN = "between steps"
SEEN = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
WRITES = os.O_WRONLY | os.O_RDWR
# What a victim's command line holds; `driver`, `all` and `self` (the process of the event) need none.
VICTIMS = {
    "worker": "spawn_main",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs_server",
    "ray worker": "ray::",
    "java": "SparkSubmit",
    "daemon": "pyspark.daemon",
    "forked": "pyspark.daemon",
}


def family(folder: str) -> list[int]:
    """Every living process of the round: those that have its folder in their environment."""
    mark = f"STRIKE_FOLDER={folder}".encode()
    found = []
    for name in os.listdir("/proc"):
        try:
            ours = name.isdigit() and mark in Path("/proc", name, "environ").read_bytes().split(b"\0")
            if ours and stat(int(name))[0] not in "ZX":
                found.append(int(name))
        except OSError:
            continue  # it has ended in between, or is another's
    return sorted(found)


def stat(pid: int) -> list[str]:
    """State, parent and the other fields behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def called(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def victims(kind: str) -> list[int]:
    """The processes of a kind, oldest first."""
    driver = int(os.environ["STRIKE_DRIVER"])
    if kind in ("driver", "self"):
        return [driver if kind == "driver" else os.getpid()]
    everyone = family(os.environ["STRIKE_FOLDER"])
    if kind == "all":
        return everyone
    found = []
    for pid in everyone:
        try:
            if (
                pid != driver and VICTIMS[kind] in called(pid) and "Agent" not in called(pid)
            ):  # Ray's agents are no workers
                forked = "pyspark.daemon" in called(int(stat(pid)[1]))
                if kind not in ("daemon", "forked") or forked == (kind == "forked"):
                    found.append(pid)
        except OSError:
            continue
    return found


def steps_now(root: str) -> str:
    """The steps that hold a lock, as a step is named in its lock."""
    try:
        return ",".join(sorted(n[:-5] for n in os.listdir(f"{root}/locks") if n.endswith(".json"))) or BETWEEN
    except OSError:
        return BETWEEN


def strike(kind: str, event: str) -> None:
    folder, steps = os.environ["STRIKE_FOLDER"], steps_now(os.environ["STRIKE_ROOT"])
    chosen = victims(kind)
    if kind not in ("all", "self", "driver"):
        chosen = chosen[os.getpid() % len(chosen) :][:1] if chosen else []
    Path(folder, "struck").write_text(f"{kind if chosen else 'nobody'}\t{steps}\t{event}\n")
    for pid in sorted(chosen, key=lambda pid: pid == os.getpid()):  # itself last
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def install(folder: str, root: str) -> None:
    drawn = os.environ.get("STRIKE", "").split("\t")
    logs: dict[str, int] = {}
    inside = threading.local()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in SEEN or getattr(inside, "on", False) or not str(arguments[0]).startswith(root):
            return
        if event == "open" and not int(str(arguments[2])) & WRITES:
            return
        inside.on = True
        try:
            step = steps_now(root)
            if step not in logs:
                logs[step] = os.open(f"{folder}/{step}.events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(logs[step], b".")
            number = os.lseek(logs[step], 0, os.SEEK_CUR)  # behind this very append
            if [step, str(number)] == drawn[:2]:
                if float(drawn[3]):
                    threading.Thread(target=late, args=(drawn[2], float(drawn[3]), event), daemon=True).start()
                else:
                    strike(drawn[2], event)
        finally:
            inside.on = False

    def late(kind: str, delay_s: float, event: str) -> None:
        inside.on = True
        time.sleep(delay_s)
        strike(kind, f"{event} + {delay_s:.3f} s")

    sys.addaudithook(hook)


if "STRIKE_FOLDER" in os.environ:
    os.environ.setdefault("STRIKE_DRIVER", str(os.getpid()))
    install(os.environ["STRIKE_FOLDER"], os.environ["STRIKE_ROOT"])
