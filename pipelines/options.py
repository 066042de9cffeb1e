"""What the options of the command line mean: the pipeline, its root and engine, ranges of shards. Errors are ConfigErrors.

Imports what it needs when it is called, as every command does.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Option("--config", "-c", help="the pipeline's YAML file", show_default=False)]
MOST_GROUPS = 200  # parts of one step: each is a task, which a scheduler draws and keeps rows of. Chosen, untested
HOST = r"[^\s/?#@:\[\]]+|[\da-f.]*(?::[\da-f.]*){2,}"  # as mixtures.policy reads it from a URL: no port, no brackets


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


def takedowns(doc_ids: Sequence[str], urls: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """The lines that `forget` records. An id or host that no document can bear is refused: it would be taken for done."""
    from core.errors import ConfigError

    if not (doc_ids or urls or hosts):
        raise ConfigError("forget: nothing named; give --doc-id, --url or --host")
    ids, names = [i.lower() for i in doc_ids], [h.lower() for h in hosts]
    for doc_id in ids:
        if not re.fullmatch("[0-9a-f]{32}", doc_id):
            raise ConfigError(f"--doc-id: got {doc_id!r}, expected 32 hex digits; `pipelines explain` shows them all")
    for name in names:
        if not re.fullmatch(HOST, name):
            raise ConfigError(f"--host: got {name!r}, expected a name alone, such as example.org; a page is --url")
    return [*ids, *urls, *names]
