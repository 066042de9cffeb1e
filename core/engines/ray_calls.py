"""The tasks of one verb on Ray, the driver's side: asked for a few at a time, awaited, told from each other when they fail.

In: calls of one function. Out: references to the tables that each call made, and its `Fact`. What a task raises, and what Ray
says of a worker, a node or an object that it lost, arrives in the contract's form.
"""

from collections.abc import Callable, Iterable
from typing import Any

from core.engines.ray_cluster import Room, ray
from core.engines.ray_tasks import Fact, streamed
from core.engines.ray_units import WAKE_S, failure_of, reason_of
from core.errors import StageError, StepwellError

STREAM = "streaming"  # Ray's word for a task that gives as many objects as it likes, one by one
IN_FLIGHT = 4  # tasks asked for per worker: enough to hide scheduling, few enough to bound what waits for one; untested
# of a task whose worker or node was lost, and of making lost tables again; our own exceptions are not retried
RETRIES = 3


def called(
    root: Any,
    calls: Iterable[tuple[str, tuple[Any, ...]]],
    label: str,
    room: Room,
    progress: Callable[[Fact], None],
    returns: int | str,
) -> list[tuple[list[Any], Fact]]:
    """The function at `root` called with each (name, arguments), in order: references to the tables it made, and its fact.

    `calls` is read as tasks are asked for, so arguments that only it holds are freed when their task has ended. After a failure
    the tasks that were asked for come to their end before it is raised."""
    task = ray.remote(streamed).options(num_returns=returns, max_retries=RETRIES)
    done: list[Any] = []
    waiting: dict[Any, tuple[int, str, Any]] = {}  # last reference of a call -> its place in `done`, name, references
    named = iter(calls)
    try:
        while True:
            while len(waiting) < IN_FLIGHT * max(1, room.count()) and (todo := next(named, None)) is not None:
                made = task.remote(root, label, todo[0], *todo[1])
                waiting[_last(made)] = (len(done), todo[0], made)
                done.append(None)
                del todo
            if not waiting:
                return done
            for ref in ray.wait(list(waiting), timeout=WAKE_S)[0]:
                i, name, made = waiting.pop(ref)
                *tables, fact = made
                done[i] = (tables, fetched(fact, label, name))
                progress(done[i][1])
    except StepwellError:
        _let_end(list(waiting), room)
        raise


def _let_end(waiting: list[Any], room: Room) -> None:
    while waiting:
        waiting = ray.wait(waiting, timeout=WAKE_S)[1]
        room.count()


def _last(made: Any) -> Any:
    """What is there when the task has ended."""
    return made.completed() if isinstance(made, ray.ObjectRefGenerator) else made[-1]


def fetched(ref: Any, label: str, name: str) -> Any:
    """The object, or what went wrong, as one line."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        raise failure_of(e, label, name) from e
    except ray.exceptions.RayError as e:
        raise StageError(
            f"{label}: unit {name} was lost {RETRIES + 1} times, or what it reads was: {reason_of(e)}; give workers more memory "
            "and run again"
        ) from e
