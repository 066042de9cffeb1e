"""YAML with line numbers: plain data, and for every path in it the line where it stands. Duplicate keys are errors, as are
infinity and NaN, which JSON has no words for."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml

from core.errors import ConfigError

Path = tuple[str | int, ...]
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(:-[^}]*)?\}")  # ${NAME}, or ${NAME:-what stands for it}


class Lines:
    """Where each value of a document stands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at: dict[Path, int] = {}
        self.problems: list[str] = []

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line` of `path`, or of the nearest parent that exists."""
        parts = tuple(path)
        while parts and parts not in self.at:
            parts = parts[:-1]
        return f"{self.name}:{self.at.get(parts, 1)}"


def load(text: str, name: str) -> tuple[Any, Lines]:
    """Parsed data and its lines. `${NAME}` in a string is replaced from the environment; a missing variable is a problem."""
    lines = Lines(name)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return (_build(node, (), lines) if node is not None else {}), lines
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {e.problem}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{name}:1: not valid YAML: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise ConfigError(f"{name}:1: not valid YAML: an alias holds itself") from e


def _build(node: yaml.Node, path: Path, lines: Lines) -> Any:
    lines.at.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        own = [str(key.value) for key, _ in node.value]
        for i, (key_node, _) in enumerate(node.value):
            if own[i] in own[:i]:
                line = key_node.start_mark.line + 1
                lines.problems.append(f"{lines.name}:{line}: {own[i]!r} stands twice; keep one of them")
        yaml.SafeLoader("").flatten_mapping(node)  # `<<: *anchor`; merged keys come first, so the node's own win
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            lines.at[(*path, key)] = key_node.start_mark.line + 1
            out[key] = _build(value_node, (*path, key), lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), lines) for i, child in enumerate(node.value)]
    value = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, float) and not math.isfinite(value):
        line = node.start_mark.line + 1
        lines.problems.append(
            f"{lines.name}:{line}: must be a finite number, got {node.value}; where there is no limit, leave it out"
        )
    return _from_environment(value, node, lines) if isinstance(value, str) else value


def _from_environment(value: str, node: yaml.Node, lines: Lines) -> str:
    def look_up(match: re.Match[str]) -> str:
        name, instead = match.groups()
        if instead is not None:
            return os.environ.get(name) or instead[2:]
        if name not in os.environ:
            lines.problems.append(f"{lines.name}:{node.start_mark.line + 1}: environment variable {name} is not set")
        return os.environ.get(name, "")

    return _VARIABLE.sub(look_up, value)
