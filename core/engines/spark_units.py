"""Units on Spark: one task each, supervised where a task failed before, with what a worker needs reserved on a cluster.

In: units and the function on them. Out: reports in the order of the units. The first attempt of a task runs its unit in Spark's
own Python worker (`guard.watched`), any later one in a child of it (`guard.alone`), where the row that kills is found and
rejected as on `local`. Errors of ours come back as values, or Spark would try again what can only fail again.
"""

import contextlib
import math
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from core.engines.contract import Report, Unit, UnitFn
from core.engines.guard import alone, watched
from core.engines.pool import attempted
from core.engines.spark_pieces import PLACE, ROWS, STRUCT, collected, pieces, said, settle
from core.errors import ConfigError, StageError, StepwellError
from core.stage import Resources

# Behind spark_session, which says what to do where pyspark is missing.
from py4j.protocol import Py4JError  # isort: skip
from pyspark import SparkContext, TaskContext  # isort: skip
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests  # isort: skip
from pyspark.sql import DataFrame, SparkSession  # isort: skip
from pyspark.sql import functions as F  # noqa: N812 - the name every Spark reader knows  # isort: skip

TASK = re.compile(r"Task (\d+) in stage")  # what Spark calls the task it gave up on: here, the unit's number
# a cluster without an executor for so long is given up: chosen, untested; YARN queues may need more
EXECUTORS_S = 180.0
POLL_S = 2.0


def unit_tasks(
    fn: UnitFn, units: Sequence[bytes], label: str, stall_s: float, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Of each unit whose place comes in its report, or why there is none."""
    for place, _ in pieces(batches):
        yield said(place, pickle.dumps(unit_task(fn, units[place], label, stall_s)))
    settle()


def unit_task(fn: UnitFn, pickled: bytes, label: str, stall_s: float) -> Report | StepwellError:
    unit: Unit = pickle.loads(pickled)
    context = TaskContext.get()
    again = context is not None and context.attemptNumber() > 0
    try:
        if again:
            return alone(fn, unit, label, stall_s)
        return attempted(partial(watched, fn, unit, stall_s), label, unit.name)
    except StepwellError as e:
        return e


def places(session: SparkSession, count: int) -> DataFrame:
    """Empty pieces at the places 0 to `count`, one a partition."""
    rows = session.range(0, count, 1, max(1, count))
    return rows.select(F.col("id").cast("int").alias(PLACE), F.lit(b"").alias(ROWS))


def run(
    session: SparkSession, fn: UnitFn, units: Sequence[Unit], label: str, stall_s: float, needs: Resources | None
) -> list[Any]:
    """A report or an error of ours for each unit, in order. Units are rows of a DataFrame like all else, as Spark keeps workers
    for RDDs and for DataFrames apart: what one has imported or loaded the other would not have."""
    work = partial(unit_tasks, fn, [pickle.dumps(u) for u in units], label, stall_s)
    profile = task_profile(session.sparkContext, needs, label)
    made = places(session, len(units)).mapInArrow(work, STRUCT, False, profile)
    return [pickle.loads(content) for _, content in sorted(collected(made))]


def task_profile(context: SparkContext, needs: Resources | None, label: str) -> ResourceProfile | None:
    """What Spark must reserve for each unit beyond one core. ConfigError for what no executor has.

    A local master cannot reserve: there `workers` says how many units run at once, as on `local`. Memory is not Spark's to give
    out by task: an executor's cores decide how many workers share a machine."""
    if needs is None or str(context.master).startswith("local"):
        return None
    cpus = math.ceil(needs.cpus)
    if cpus <= 1 and not needs.gpus:
        return None
    check_demand(_first_executors(context), cpus, needs.gpus, label)
    requests = TaskResourceRequests().cpus(cpus)
    if needs.gpus:
        requests = requests.resource("gpu", needs.gpus)
    return ResourceProfileBuilder().require(requests).build


def executors(context: SparkContext) -> list[tuple[int, int]]:
    """(cores, GPUs) of each live executor."""
    found = context._jsc.sc().statusStore().executorList(True)
    each = [found.apply(i) for i in range(found.size())]
    return [(e.totalCores(), _gpus(e)) for e in each if e.id() != "driver"]


def _first_executors(context: SparkContext) -> list[tuple[int, int]]:
    """The executors, once there is one: they may be starting still. After EXECUTORS_S none; the watch says so."""
    end = time.monotonic() + EXECUTORS_S
    while not (found := executors(context)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _gpus(executor: Any) -> int:
    given = executor.resources().get("gpu")
    return len(given.get().addresses()) if given.isDefined() else 0


def check_demand(have: Sequence[tuple[int, int]], cpus: int, gpus: float, label: str) -> None:
    """ConfigError unless some executor has it all; with none there is nothing to compare."""
    if not have or any(cores >= cpus and cards >= gpus for cores, cards in have):
        return
    cores, cards = max(c for c, _ in have), max(g for _, g in have)
    raise ConfigError(
        f"{label}: a unit needs {cpus} cores and {gpus:g} GPUs, the largest executor has {cores} cores and {cards} GPUs; raise "
        "spark.executor.cores, or give executors GPUs (spark.executor.resource.gpu.amount)"
    )


def lost_unit(message: str, units: Sequence[Unit], label: str) -> StageError | None:
    """The error for a unit whose task Spark gave up on."""
    found = TASK.search(message)
    if found is None or int(found[1]) >= len(units):
        return None
    return StageError(
        f"{label}: unit {units[int(found[1])].name} lost its worker at every attempt, even where it was watched; give the "
        "workers more memory, or run fewer at once (spark.executor.cores)"
    )


class Watch:
    """Ends the jobs of a context that has had no executor for `patience_s`: Spark itself would wait for ever."""

    def __init__(self, context: SparkContext, patience_s: float = EXECUTORS_S) -> None:
        self.context, self.patience_s = context, patience_s
        self.gave_up = False
        self._over = threading.Event()
        self._busy = 0
        self._thread = threading.Thread(target=self._look, name="spark-executors", daemon=True)
        if not str(context.master).startswith("local"):
            self._thread.start()

    def call(self, work: Callable[[], Any]) -> Any:
        """`work()`, which starts jobs."""
        self._busy += 1
        try:
            return work()
        finally:
            self._busy -= 1

    def lost(self, label: str) -> StageError | None:
        """Why the jobs were ended, if they were."""
        if not self.gave_up:
            return None
        self.gave_up = False
        return StageError(
            f"{label}: no executor for {self.patience_s:.0f} s; see that workers of {self.context.master} are up and have the "
            "memory and cores that spark.executor.memory and spark.executor.cores ask for, then run the same command again"
        )

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        without_s = 0.0
        while not self._over.wait(POLL_S):
            try:
                alive = not self._busy or executors(self.context)
            except (Py4JError, OSError):  # Java has ended: whoever waits for it hears of it at once
                return
            without_s = 0.0 if alive else without_s + POLL_S
            if without_s >= self.patience_s:
                self.gave_up = True
                with contextlib.suppress(Py4JError, OSError):
                    self.context.cancelAllJobs()
                without_s = 0.0
