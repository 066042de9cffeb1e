"""The file of a training run outside the pipelines: YAML or JSON, with `--set key=value` laid over it.

    folder: runs/first                      # checkpoints and metrics.jsonl; the same file goes on where it stopped
    source:                                 # token files by domain (moe/token_files.py)
      web: {megatron: data/web_text_document}
      code: {tokens: data/code.npz}
    preset: 30m                             # a named shape; `model` overrides single values
    model: {vocab_size: 32768, eos: 0}      # where the files do not say them
    optim: {lr: 1.0e-3}
    steps: 2000
    rows: 64
    start: runs/before                      # optional: begin from its weights
    alarms: {blow_up_ratio: 50}             # optional: moe/alarms.py
    ...                                     # and every other field of moe.config.TrainConfig

Out: a `RunFile`. Relative paths are meant from the file's folder. All mistakes are one `ConfigError`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from moe.alarms import Limits
from moe.config import TrainConfig
from moe.presets import preset
from moe.token_files import JoinedSources, open_source
from moe.typed import build

OWN = ("folder", "source", "preset", "start", "alarms")  # keys that are no fields of TrainConfig
TEXTS = ("folder", "start", "tokenizer", "preset")


@dataclass(frozen=True)
class RunFile:
    """What `moe.trainer.train` is called with."""

    config: TrainConfig
    source: JoinedSources
    folder: Path
    start: Path | None
    limits: Limits


def read_run(path: Path, changes: Iterable[str] = ()) -> RunFile:
    """The run that a file describes, after `changes` of the form `optim.lr=0.001`."""
    values = read_values(path, changes)
    if missing := [key for key in ("folder", "source") if not values.get(key)]:
        raise ConfigError(*(f"{path}: {key}: missing; moe/run_file.py shows a run file" for key in missing))
    if wrong := [key for key in TEXTS if not isinstance(values.get(key, ""), str | None)]:
        raise ConfigError(*(f"{path}: {key}: must be a text, got {values[key]!r}" for key in wrong))
    here = path.resolve().parent
    shape = mapping(values, "model")
    source = open_source(mapping(values, "source"), here, shape.get("vocab_size"), shape.get("eos"))
    named = {"vocab_size": source.vocab_size, "eos": source.eos}
    if (name := values.get("preset")) is not None:
        shape = asdict(preset(name, **named)) | shape
    start = here / values["start"] if values.get("start") else None
    train = {key: value for key, value in values.items() if key not in OWN} | {"model": named | shape}
    if train.get("tokenizer"):
        train["tokenizer"] = str(here / train["tokenizer"])
    if start is not None and train.get("init") is None:
        from moe.checkpoint import begun_from

        train["init"] = begun_from(here / values["folder"], start)
    config = build(TrainConfig, train, "train")
    limits = build(Limits, mapping(values, "alarms"), "alarms")
    return RunFile(config, source, here / values["folder"], start, limits)


def read_values(path: Path, changes: Iterable[str] = (), stage: str = "train") -> dict[str, Any]:
    """Keys and values of a file with `changes` laid over them; messages begin with `stage`."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _yaml(path, text, stage)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{stage}: no run file, got {error}, expected YAML or JSON in {path}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{stage}: {path} must hold keys and values, got {type(values).__name__}")
    for change in changes:
        _lay_over(values, change, stage)
    return values


def mapping(values: Mapping[str, Any], key: str, stage: str = "train") -> dict[str, Any]:
    """The keys and values below a key; none where it is absent."""
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{stage}: {key}: must hold keys and values, got {found!r}")
    return dict(found)


def _yaml(path: Path, text: str, stage: str) -> Any:
    """The machines that train may have no PyYAML: those take JSON."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"{stage}: {path} needs PyYAML, got {error}; install it, or write the file as .json"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{stage}: {path} is not YAML, got {error}") from error


def _lay_over(values: dict[str, Any], change: str, stage: str) -> None:
    """Puts `a.b=VALUE` into nested mappings; VALUE is JSON, or else a text."""
    name, found, text = change.partition("=")
    if not found or not name:
        raise ConfigError(f"{stage}: --set takes key=value, got {change!r}, such as --set optim.lr=0.001")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *above, last = name.split(".")
    for key in above:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{stage}: --set {name}: {key} holds a value, not keys")
    values[last] = value
