"""Runs of the command that are struck at a drawn moment: who is killed, where, that nothing hangs, and that nothing stays."""

import os
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.hashing import digest, file_digest, seeded
from tests.faults.inside.sitecustomize import BETWEEN, called, family, stat
from tests.pipelines.small_pipeline import REPO, command, environment, state

BOUND_S = 400.0  # for a command that takes 10 to 60 s here: a hang, not slowness, is what meets it
GONE_S = 60.0  # for the last process of a run to end after its command has
# That Ray's agents may take longer. Five times, 0.4 s apart, they look whether their raylet lives (process_watcher.py),
# then give the head 60 s to hear of its death (publish_error_to_driver). A killed driver takes the head with it: 63 s measured.
AGENTS_S = 62.0
INSIDE = Path(__file__).parent / "inside"
LONGEST_DELAY_S = 0.3  # between the event and the blow: into what comes after it


@dataclass(frozen=True)
class Blow:
    """At which event of which step whom to kill, and how long after."""

    step: str
    event: int
    victim: str
    delay_s: float = 0.0


@dataclass(frozen=True)
class Struck:
    """How a command ended, and what the blow met: ('nobody', ...) where the drawn victim did not exist, None where the run
    ended before."""

    code: int
    out: str
    err: str
    met: tuple[str, str, str] | None
    events: dict[str, int]  # step, in the order in which they ended -> what all processes did to files


def struck_run(folder: Path, root: Path, arguments: Sequence[object], blow: Blow | None = None) -> Struck:
    """The command with its files counted; it, and all it started, has ended when this returns."""
    place = folder / uuid.uuid4().hex[:8]
    place.mkdir(parents=True)
    variables = {
        "STRIKE_FOLDER": str(place),
        "STRIKE_ROOT": str(root),
        "STRIKE": f"{blow.step}\t{blow.event}\t{blow.victim}\t{blow.delay_s}" if blow else "",
        "PYTHONPATH": os.pathsep.join([str(INSIDE), str(REPO)]),
        "SPT_NOENV": "1",  # Ray's workers rename themselves, and would do so over their environment
    }
    with (place / "out").open("w") as out, (place / "err").open("w") as err:
        process = subprocess.Popen(
            command(*arguments), stdout=out, stderr=err, env=environment(variables), start_new_session=True
        )
        try:
            code = process.wait(BOUND_S)
            gone = ended(place, GONE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {arguments} struck by {blow}\n{stacks(place)}") from None
        finally:
            end(place)
            process.wait()
    said, wrong = ((place / name).read_text(errors="replace") for name in ("out", "err"))
    assert gone is None, f"outlive {arguments} struck by {blow}: {gone}\n{wrong}"
    met = (place / "struck").read_text().rstrip("\n").split("\t") if (place / "struck").exists() else None
    logs = sorted(place.glob("*.events"), key=lambda path: path.stat().st_mtime_ns)
    events = {path.stem: path.stat().st_size for path in logs}
    return Struck(code, said, wrong, (met[0], met[1], met[2]) if met else None, events)


def ended(place: Path, bound_s: float) -> list[str] | None:
    """None once no process of the round lives, else what lives after `bound_s`; Ray's agents after AGENTS_S more."""
    last = time.monotonic() + bound_s
    while living := family(str(place)):
        over_s = time.monotonic() - last
        names = {pid: _called(pid) for pid in living}
        if late := [pid for pid in living if over_s > (AGENTS_S if "Agent" in names[pid] else 0)]:
            return [f"{pid} {names[pid][:200]}" for pid in late]
        time.sleep(0.1)
    return None


def end(place: Path) -> None:
    for pid in family(str(place)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def stacks(place: Path) -> str:
    """Where every process of the round is: its state, what it waits for in the kernel, and the Python stacks."""
    lines = []
    for pid in family(str(place)):
        lines.append(f"{pid} {_called(pid)[:200]}")
        for name in ("wchan", "stack"):
            try:
                lines.append(f"  {name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
            except OSError as e:
                lines.append(f"  {name}: {e}")
        try:
            lines.append(f"  state: {stat(pid)[0]}")
            if "pipelines" in _called(pid) or "spawn_main" in _called(pid):
                os.kill(pid, signal.SIGUSR1)  # they print every thread's stack to `err`
        except OSError:
            continue
    time.sleep(1.0)
    return "\n".join([*lines, (place / "out").read_text(), (place / "err").read_text()])


def _called(pid: int) -> str:
    try:
        return called(pid)
    except OSError:
        return "has ended"


def drawn_blow(seed: int, draw: str, events: Mapping[str, int], victims: Sequence[str], after: str = BETWEEN) -> Blow:
    """A moment of a run that does `events` and has come to step `after` already: a step is drawn first, so that short ones are
    met as often as long ones."""
    steps = [step for step in events if step != BETWEEN]
    steps = [BETWEEN, *(steps[steps.index(after) :] if after in steps else steps)]
    step = steps[int(len(steps) * seeded(seed, f"{draw} step"))]
    late = seeded(seed, f"{draw} late")
    return Blow(
        step,
        1 + int(events[step] * seeded(seed, f"{draw} event")),
        victims[int(len(victims) * seeded(seed, f"{draw} victim"))],
        0.0 if late < 0.5 else LONGEST_DELAY_S * (2 * late - 1),
    )


def tree(root: Path) -> dict[str, str]:
    """What a root holds: every file but locks, scratch and half-written ones, and of manifests what decides and comes out."""
    files = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
    kept = {
        name: file_digest(path)
        for name, path in files.items()
        if not name.startswith(("locks/", "exchange/")) and "manifests/" not in name and not name.endswith(".tmp")
    }
    return {**kept, "manifests": digest(state(root))}


def different(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def counted(blows: Sequence[tuple[str, str, str]]) -> str:
    """A table of who was killed in which step."""
    by = Counter((victim, step) for victim, step, _ in blows)
    return "\n".join(f"{n:5d}  {victim:<12}{step}" for (victim, step), n in sorted(by.items()))
