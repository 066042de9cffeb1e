"""What the options of the command line mean: the pipeline, its root and engine, ranges of shards. Errors are ConfigErrors.

Imports what it needs when it is called, as every command does.
"""

from pathlib import Path
from typing import Any

MOST_GROUPS = 200  # parts of one step: each is a task, which a scheduler draws and keeps rows of. Chosen, untested


def load(config: Path, engine: str | None, workers: int | None) -> Any:
    from pipelines.config import load_pipeline

    return with_engine(load_pipeline(config), engine, workers)


def with_engine(pipeline: Any, engine: str | None, workers: int | None) -> Any:
    """The pipeline with what the command line says of its engine."""
    from dataclasses import replace

    from core.errors import ConfigError
    from pipelines.knobs import EngineConfig

    changes: dict[str, Any] = {}
    if engine is not None:
        if engine not in ("local", "ray", "spark"):
            raise ConfigError(f"--engine: got {engine!r}, expected local, ray or spark")
        changes["name"] = engine
    if workers is not None:
        changes["workers"] = workers
    return (
        replace(pipeline, engine=EngineConfig(**{**pipeline.engine.model_dump(), **changes})) if changes else pipeline
    )


def root_of(pipeline: Any) -> Any:
    from core.storage import Root

    return Root(pipeline.root)


def new_run_id() -> str:
    from pipelines.runner import new_run_id

    return new_run_id()


def known_dataset(pipeline: Any, name: str) -> None:
    from core.errors import ConfigError

    if name not in pipeline.sources:
        raise ConfigError(f"--dataset: no source {name!r}; the config has {', '.join(pipeline.sources)}")


def shard_range(text: str | None) -> tuple[int, int] | None:
    from core.errors import ConfigError

    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--shards: got {text!r}, expected A:B with A < B, such as 0:4")
    return int(first), int(last)
