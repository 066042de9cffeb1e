"""The folder of a run of reinforcement learning: what lies in it beside checkpoints, and whether it is the run that is meant.

    rl.json                                   the settings and tasks that a resume must share
    tokenizer.json, chat_template.jinja, tokenizer_config.json     copies of the start's, the last two where it has them
    special.json                              moe/checkpoint.py
    generations/<number>.jsonl                moe/rl/rollouts.py
    metrics.jsonl, latest, checkpoints/       as every run's (moe/checkpoint.py)

In: config, tasks, folder. Out: the newest checkpoint if it is this run's, or a `ConfigError` that names every difference.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError, StageError
from moe import checkpoint
from moe.files import copy_file, replace_text
from moe.metrics import METRICS
from moe.model import Decoder
from moe.rl.config import RLConfig, identity_digest, rl_differences
from moe.rl.rollouts import FOLDER
from moe.rl.tasks import Tasks
from moe.server import chat

RECORD, FORMAT = "rl.json", 1


def newest(config: RLConfig, tasks: Tasks, folder: Path) -> tuple[Path, checkpoint.State] | None:
    """The folder's newest checkpoint and its state; None where a run would begin."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"rl: the run's folder is a file, got {folder}, expected a folder or nothing there")
    if not (folder / checkpoint.LATEST).is_file():
        checkpoint.check_empty(folder)
        for left in (folder / METRICS, *sorted((folder / FOLDER).glob("*.jsonl"))):
            if left.is_file() and left.stat().st_size:
                raise StageError(
                    f"rl: {left} belongs to a run without checkpoints, got {left.stat().st_size} bytes, expected none; "
                    f"put its checkpoints and {checkpoint.LATEST} back, or use a new folder"
                )
        return None
    path = checkpoint.find(folder)
    _, state = checkpoint.read(path)
    try:
        record = json.loads((folder / RECORD).read_text())
        stored, known = dict(record["config"]), record["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"rl: {folder} is no run of reinforcement learning, got {type(error).__name__} of {RECORD}, expected the file that "
            "one writes; use a new folder, with this one as its start"
        ) from error
    problems = rl_differences(stored, config)
    if known != tasks.fingerprint:
        problems.append("tasks: the prompts, their order, their answers or the stops are not those of the run")
    if not problems and state.mixture != identity_digest(config, tasks.fingerprint):
        problems.append(f"checkpoint: {path.name} was written by another run than {RECORD} tells of")
    if problems:
        raise ConfigError(f"rl: {folder} holds another run, expected equal settings; use a new folder", *problems)
    return path, state


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made if need be, is this process's alone within."""
    with _written(folder):
        fd = checkpoint.lock(folder)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def begin(config: RLConfig, tasks: Tasks, folder: Path, start: Path, model: Decoder) -> None:
    """Makes the folder a run's, but for its first checkpoint."""
    record = {"format": FORMAT, "tasks": tasks.fingerprint, "config": config.identity}
    with _written(folder):
        copy_file(tokenizer_file(start), folder / checkpoint.TOKENIZER)
        for name in (chat.FILE, chat.CONFIG):
            if (start / name).is_file():
                copy_file(start / name, folder / name)
        checkpoint.write_special(folder, model)
        replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
        replace_text(folder / METRICS, "")


def tokenizer_file(start: Path) -> Path:
    """The tokenizer.json that belongs to a run, a checkpoint or a hub folder."""
    if (start / checkpoint.TOKENIZER).is_file():
        return start / checkpoint.TOKENIZER
    return checkpoint.find(start).parent.parent / checkpoint.TOKENIZER


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageError(
            f"rl: the run's folder takes no file, got {error}, expected to write into {folder}; make room or choose another"
        ) from error


def oldest_step(folder: Path) -> int:
    """Of the checkpoints that are there."""
    names = (p.name for p in (folder / checkpoint.CHECKPOINTS).iterdir() if checkpoint.OURS.fullmatch(p.name))
    return min(int(name.removeprefix("step-").removesuffix(checkpoint.TEMPORARY)) for name in names)
