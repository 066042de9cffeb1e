"""`run_units` on Ray, the driver's side: units on tasks or actors, tried again when their worker or node is lost.

Actors serve stages that load a model or need a GPU: at most one for each place that the nodes have, made when a unit waits for
it, and given a unit only once it has its place, so that no unit waits for an actor that the cluster has no room for yet. Ray
itself tries nothing again here: a unit whose worker was lost goes `alone` into a task of its own (see `core.engines.guard`), in
the place that the worker left.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.engines.contract import Report, Unit, UnitFn
from core.engines.ray_cluster import Place, Room, ray
from core.engines.ray_tasks import Actor, run_unit
from core.errors import StageError, StepwellError

# of the workers of one unit; rows that kill are found in the second try, so a third is a node's or the memory's
DEATHS = 3
QUEUED = 2  # tasks asked for per place: the second one's worker is ready when the first ends; untested
FALSE_STARTS = 3  # actors in a row that ended before they began
WAKE_S = 2.0  # the longest time without a look at signals and nodes: chosen, untested
IDLE_S = 0.2

log = logging.getLogger("stepwell")


class Crew:
    """Actors of one size. They live until their place is wanted for something else."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.busy = 0

    def __len__(self) -> int:
        return len(self.idle) + len(self.starting) + self.busy

    def hire(self) -> None:
        made: Any = ray.remote(Actor)
        actor = made.options(max_restarts=0, **self.place.options()).remote()
        self.starting[actor.ready.remote()] = actor

    def dismiss(self) -> None:
        """End one idle actor."""
        ray.kill(self.idle.pop())

    def release(self) -> None:
        """End all actors but those at work."""
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)
        self.idle, self.starting = [], {}


@dataclass
class _Task:
    unit: Unit
    index: int
    deaths: int = 0


class UnitRun:
    """One call of `run_units`. Without a crew every unit is a task."""

    def __init__(
        self,
        fn: UnitFn,
        units: Sequence[Unit],
        label: str,
        stall_s: float,
        place: Place,
        crew: Crew | None,
        progress: Callable[[int, int, int], None],
    ) -> None:
        self.label, self.stall_s, self.crew, self.progress = label, stall_s, crew, progress
        self.shared = ray.put(fn)  # once, and not with every unit
        self.task: Any = ray.remote(run_unit).options(max_retries=0, **place.options())
        self.room = Room(place, label)
        self.waiting = deque(_Task(unit, i) for i, unit in enumerate(units))
        self.running: dict[Any, tuple[_Task, Any]] = {}  # reference to the report -> the task, and its actor or None
        self.reports: list[Report | None] = [None] * len(units)
        self.failure: StepwellError | None = None
        self.false_starts = 0

    def finish(self) -> list[Report]:
        """Reports in order. The first failure is raised after running units have ended."""
        while self.waiting or self.running:
            if self.failure is not None:
                self.waiting.clear()
            self._assign()
            self._make_way()
            expected = [*self.running, *(self.crew.starting if self.crew else ())]
            if not expected:
                time.sleep(IDLE_S)  # no worker is there or on its way: until `room` has lost its patience
            for ref in ray.wait(expected, timeout=WAKE_S)[0] if expected else ():
                if ref in self.running:
                    self._ended(ref)
                else:
                    self._started(ref)
            self.room.count()
        if self.failure is not None:
            raise self.failure
        return [r for r in self.reports if r is not None]

    def _assign(self) -> None:
        while self.waiting:
            task = self.waiting[0]
            if self.crew is None or task.deaths:
                if not self._may_ask(task):
                    return
                self._sent(self.task.remote(self.shared, task.unit, self.label, self.stall_s, task.deaths > 0), None)
            elif self.crew.idle:
                actor = self.crew.idle.pop()
                self.crew.busy += 1
                self._sent(actor.run.remote(self.shared, task.unit, self.label, self.stall_s), actor)
            else:
                alone = sum(actor is None for _, actor in self.running.values())
                room = min(len(self.waiting), self.room.count() - alone - self.crew.busy)
                while len(self.crew.starting) < room:
                    self.crew.hire()
                return

    def _may_ask(self, task: _Task) -> bool:
        """Whether a task can be asked for. Beside a crew one idle actor makes way, for it may hold the last place."""
        if self.crew is None:
            return len(self.running) < QUEUED * max(1, self.room.count())
        if len(self.crew) + sum(actor is None for _, actor in self.running.values()) < self.room.count():
            return True
        if self.crew.idle:
            self.crew.dismiss()
            return True
        return False

    def _make_way(self) -> None:
        """With no unit left for them idle actors end, where a task was asked for: nodes that are gone but not yet known to be
        gone made the places look more than they are, and it would wait for ever."""
        if self.crew is not None and not self.waiting and any(actor is None for _, actor in self.running.values()):
            while self.crew.idle:
                self.crew.dismiss()

    def _sent(self, ref: Any, actor: Any) -> None:
        self.running[ref] = (self.waiting.popleft(), actor)

    def _started(self, ref: Any) -> None:
        assert self.crew is not None
        actor = self.crew.starting.pop(ref)
        try:
            ray.get(ref)
            self.crew.idle.append(actor)
            self.false_starts = 0
        except ray.exceptions.RayError as e:
            self.false_starts += 1
            if self.false_starts > FALSE_STARTS:
                self.failure = self.failure or StageError(f"{self.label}: no worker could be started: {reason_of(e)}")

    def _ended(self, ref: Any) -> None:
        task, actor = self.running.pop(ref)
        if self.crew is not None and actor is not None:
            self.crew.busy -= 1
        try:
            report: Report = ray.get(ref)
        except ray.exceptions.RayTaskError as e:
            self.failure = self.failure or failure_of(e, self.label, task.unit.name)
        except ray.exceptions.RayError as e:
            if actor is not None:
                ray.kill(actor)  # what only cannot be reached must not go on beside its successor
            self._lost(task, reason_of(e))
            return
        else:
            self.reports[task.index] = report
            self.progress(report.docs, report.bytes, 1)
        if self.crew is not None and actor is not None:
            self.crew.idle.append(actor)

    def _lost(self, task: _Task, reason: str) -> None:
        task.deaths += 1
        if task.deaths > DEATHS:
            self.failure = self.failure or StageError(
                f"{self.label}: the workers of unit {task.unit.name} were lost {task.deaths} times, the last one because "
                f"{reason}; give workers more memory, or see what Ray's logs say of them"
            )
            return
        log.warning("%s: unit %s lost its worker: %s; trying it again alone", self.label, task.unit.name, reason)
        self.waiting.appendleft(task)


def failure_of(error: Any, label: str, unit: str) -> StepwellError:
    """What an exception of our own code becomes when it comes back through Ray."""
    if isinstance(error.cause, StepwellError):
        return error.cause
    return StageError(f"{label}: unit {unit} failed: {type(error.cause).__name__}: {error.cause}")


def reason_of(error: Exception) -> str:
    """Why Ray lost a worker or an object, in a few words of one line."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "Ray ended it, as its node ran out of memory"
    if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.ActorDiedError):
        return "it died"
    if isinstance(error, ray.exceptions.NodeDiedError):
        return "its node died"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].strip().rstrip(".")
