"""What can be known before the first byte: the root can be written and has room, models and benchmarks are there."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, StageError
from core.hashing import digest
from core.storage import Root
from pipelines.config import Pipeline
from pipelines.plan import artifacts_of
from pipelines.scope import Step

FREE_BYTES = 1 << 30  # a run does not begin with less: chosen, untested


def preflight(root: Root) -> None:
    """Everything that can be known before the first byte: the root can be written and has room."""
    try:
        root.probe()
    except (OSError, StageError) as e:
        if isinstance(e, StageError) and not root.is_local:
            raise  # a store that cannot be reached now may be later: schedulers try again what is no mistake in the config
        raise ConfigError(
            f"root: cannot write below {root.url}: {e}; name another root or change its permissions"
        ) from e
    free = root.free_bytes()
    if free is not None and free < FREE_BYTES:
        raise ConfigError(
            f"root: {free / 1e9:.1f} GB free below {root.url}, expected at least {FREE_BYTES / 1e9:.1f}; make room"
        )


def find_artifacts(todo: Sequence[Step]) -> None:
    """Every model and benchmark that the steps name is there: one ConfigError for all that are not."""
    problems: list[str] = []
    for entry in {step.entry.instance: step.entry for step in todo}.values():
        try:
            artifacts_of(entry)
        except ConfigError as e:
            problems += e.problems
    if problems:
        raise ConfigError(*problems)


def scratch_folder(pipeline: Pipeline, root: Root) -> Path:
    """Where a local engine spills: below the root if that is local, so that a resumed run finds its parts. Elsewhere in a
    folder for each root, as two roots may run stages of equal identity at once."""
    if root.is_local and not pipeline.engine.scratch:
        return Path(root.path("exchange"))
    below = pipeline.engine.scratch or Path(tempfile.gettempdir(), "stepwell-exchange")
    return Path(below, digest(root.url)[:12])
