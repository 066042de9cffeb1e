"""Configs from JSON or YAML values: every field is checked against its annotation before the config is made.

In: a dataclass, a mapping of what a person or a file gave, the name to call it by. Out: the dataclass, nested ones made too and
lists made tuples, or one `ConfigError` of all problems: unknown and missing keys, values of the wrong kind, words that a
`Literal` does not have. Known annotations: bool, int, float (takes whole numbers; finite), str, `Literal`, tuples of these,
nested dataclasses, and any of them with `| None`. What a config says of its values itself (`__post_init__`) comes with the rest
where its kinds are right.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from core.errors import ConfigError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
Config = TypeVar("Config")


def build(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A config from JSON values; problems name their fields under `where`, those of a nested config under its own name."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must hold keys and values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    problems = [
        f"{where}.{name}: unknown key, expected one of {', '.join(fields)}" for name in values if name not in fields
    ]
    problems += [f"{where}.{name}: missing" for name in sorted(required - values.keys())]
    hints, made = get_type_hints(cls), {}
    for name in fields.keys() & values.keys():
        made[name] = _tuples(values[name])
    for name, hint in hints.items():
        if name not in made:
            continue
        nested = next((h for h in (hint, *get_args(hint)) if isinstance(h, type) and dataclasses.is_dataclass(h)), None)
        if nested is not None and isinstance(made[name], Mapping):
            try:
                made[name] = build(nested, made[name], name)
            except ConfigError as error:
                problems += error.problems
        elif not _fits(hint, made[name]):
            problems.append(
                f"{where}.{name}: must be {_named(hint)}, got {values[name]!r}{_advice(hint, values[name])}"
            )
    if problems:
        raise ConfigError(*problems)
    return cls(**made)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotation's kind."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(parts[0], v) for v in value)
        return len(value) == len(parts) and all(map(_fits, parts, value))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _named(hint: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_named, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        return f"a list, each entry {_named(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)} ({', '.join(map(_named, parts))})"
    return KINDS.get(hint, "keys and values")


def _advice(hint: Any, value: Any) -> str:
    """What to do about a number that YAML read as a text, as it does with 3e-3."""
    if not isinstance(value, str) or not {hint, *get_args(hint)} & {int, float}:
        return ""
    try:
        return f"; write {float(value)!r}, which YAML reads as a number"
    except ValueError:
        return ""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
