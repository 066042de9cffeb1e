"""One YAML file describes one pipeline: `root`, `engine`, `sources`, `stages`, `policy`. All mistakes are told at once.

root: ./data                      # any fsspec URL; relative paths are meant from this file's folder
engine: {name: local, workers: 2, memory_gb: 4}
sources:
  web: {kind: warc, path: ./warcs}
stages:                           # in the order in which they run; `select` may stand several times, as select@NAME
  extract: {}
  language: {}
  select@final: {}
policy:
  final: [{drop: language.score < 0.65, reason: language_score}]
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from core.errors import ConfigError
from core.predicate import Predicate
from core.stage import ConfigPath, Kind, Stage, StageConfig
from pipelines.knobs import EngineConfig, Rule
from pipelines.stages import BY_NAME, STAGES, load
from pipelines.yaml_lines import Lines
from pipelines.yaml_lines import load as load_yaml

LABELLED = {"select"}  # stages that always bear a label, as NAME@LABEL: the policy has rules for each
REPEATABLE = {"exact", "minhash", "decontaminate", "train", "evaluate"}  # stages that may bear one, to run again later


@dataclass(frozen=True)
class StageEntry:
    """One stage of the pipeline with its validated knobs."""

    instance: str
    stage: Stage
    config: StageConfig


@dataclass(frozen=True)
class Pipeline:
    """A whole validated config."""

    path: Path
    root: str
    engine: EngineConfig
    sources: dict[str, Any]  # name -> source config (crawl.sources)
    stages: tuple[StageEntry, ...]
    policy: dict[str, Any]  # priority, withdrawn, and rules by select label

    def entry(self, instance: str) -> StageEntry:
        for e in self.stages:
            if e.instance == instance:
                return e
        names = [e.instance for e in self.stages]
        raise ConfigError(
            f"{self.path}: no stage {instance!r} in this pipeline{nearest(instance, names)}; it has {', '.join(names)}"
        )


def nearest(word: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest name, or nothing."""
    found = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""


def load_pipeline(path: str | Path) -> Pipeline:
    """Read and check a config file. Raises ConfigError with one line a problem."""
    path = Path(path)
    return checked(path, *read_yaml(path))


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a config file, and its lines."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    data, lines = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a mapping with root, sources and stages, got {type(data).__name__}")
    return data, lines


def checked(path: Path, data: dict[str, Any], lines: Lines) -> Pipeline:
    """The pipeline that `data` describes. Raises ConfigError with one line a problem."""
    return _Checker(path, data, lines).pipeline()


def checked_as(kind: Any, path: Path, data: dict[str, Any], lines: Lines) -> Any:
    """`data` of another kind of config file as its pydantic model. Raises ConfigError with one line a problem."""
    checker = _Checker(path, data, lines)
    value = checker._validate((), kind, data)
    if checker.problems:
        raise ConfigError(*dict.fromkeys(checker.problems))
    return value


class _Checker:
    """Walks the parts of a config and collects every problem."""

    def __init__(self, path: Path, data: dict[str, Any], lines: Lines) -> None:
        self.path, self.data, self.lines = path, data, lines
        self.problems = list(lines.problems)
        self.context = {"folder": str(path.resolve().parent)}

    def pipeline(self) -> Pipeline:
        self._known_keys((), self.data, ["root", "engine", "sources", "stages", "policy"])
        root = self._validate(("root",), ConfigPath, self.data.get("root")) if "root" in self.data else None
        if self.data.get("root") in (None, ""):
            self.problems.append(
                f"{self.lines.where(())}: `root` is missing; name the folder or URL that holds the data"
            )
        engine = self._validate(("engine",), EngineConfig, self.data.get("engine") or {})
        sources = self._sources()
        stages = self._stages()
        names = list(self._mapping(("sources",)))  # those with mistakes too: each mistake is told once
        policy = self._policy(stages, names)
        if not sources and "sources" not in self.data:
            self.problems.append(f"{self.lines.where(())}: `sources` is missing; name at least one")
        self._check_datasets(stages, names)
        self._check_made(stages, sources)
        self._check_columns(stages, policy)
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))
        return Pipeline(self.path, str(root), engine or EngineConfig(), sources, tuple(stages), policy)

    def _sources(self) -> dict[str, Any]:
        from crawl.sources import Source

        out = {}
        for name, value in self._mapping(("sources",)).items():
            if not name.replace("_", "").replace("-", "").isalnum():
                self._problem(("sources", name), f"source name {name!r} may hold letters, digits, - and _ only")
            source = self._validate(("sources", name), Source, value)
            if source is not None:
                out[name] = source
        return out

    def _stages(self) -> list[StageEntry]:
        entries = []
        for instance, value in self._mapping(("stages",)).items():
            name, _, label = instance.partition("@")
            if name not in BY_NAME:
                known = [line.name for line in STAGES]
                self._problem(
                    ("stages", instance), f"unknown stage {name!r}{nearest(name, known)}; `pipelines stages` lists all"
                )
                continue
            if wrong := _label_problem(name, label):
                self._problem(("stages", instance), wrong)
                continue
            try:
                stage = load(instance)
            except ConfigError as e:
                self._problem(("stages", instance), str(e))
                continue
            config = self._validate(("stages", instance), stage.config, value or {})
            if config is not None:
                entries.append(StageEntry(instance, stage, config))
                self._predicate(("stages", instance, "where"), config.where)
                if config.where is not None and not stage.where:
                    self._problem(("stages", instance, "where"), f"{name} chooses no rows; leave `where` out")
        if not entries and not self.problems:
            self.problems.append(
                f"{self.lines.where(())}: `stages` is empty; name at least one, `pipelines stages` lists all"
            )
        return entries

    def _policy(self, stages: list[StageEntry], sources: list[str]) -> dict[str, Any]:
        given = self._mapping(("policy",))
        labels = [e.instance.partition("@")[2] for e in stages if e.stage.kind is Kind.DECIDE]
        named = [i.partition("@")[2] for i in self._mapping(("stages",)) if i.partition("@")[0] in LABELLED]
        self._known_keys(("policy",), given, ["priority", "withdrawn", *named])
        out: dict[str, Any] = {
            "priority": self._validate(("policy", "priority"), tuple[str, ...], given.get("priority", []))
        }
        out["withdrawn"] = self._validate(("policy", "withdrawn"), ConfigPath | None, given.get("withdrawn"))
        for name in out["priority"] or ():
            if name not in sources:
                self._problem(("policy", "priority"), f"no source {name!r}{nearest(name, sources)}")
        for label in labels:
            given_rules = self._validate(("policy", label), tuple[Any, ...], given.get(label) or [])
            rules = [self._validate(("policy", label, i), Rule, rule) for i, rule in enumerate(given_rules or ())]
            for i, rule in enumerate(rules):
                if rule is not None:
                    self._rule(("policy", label, i), rule, sources)
            out[label] = tuple(rules)
        return out

    def _rule(self, path: tuple[str | int, ...], rule: Rule, sources: list[str]) -> None:
        from classifiers.rules import preset

        for name in rule.datasets or ():
            if name not in sources:
                self._problem((*path, "datasets"), f"no source {name!r}{nearest(name, sources)}")
        if (rule.drop is None) == (rule.use is None):
            self._problem(path, "a rule needs either `drop` (with `reason`) or `use`")
        elif rule.drop is not None:
            self._predicate((*path, "drop"), rule.drop)
            if not rule.reason:
                self._problem(path, "a `drop` needs a `reason`: it is counted and shown in the report")
        else:
            try:
                preset(str(rule.use), rule.thresholds)
            except ConfigError as e:
                self._problem((*path, "use"), str(e))

    def _check_datasets(self, stages: list[StageEntry], sources: list[str]) -> None:
        for e in stages:
            for name in e.config.datasets or ():
                if name not in sources:
                    self._problem(("stages", e.instance, "datasets"), f"no source {name!r}{nearest(name, sources)}")

    def _check_made(self, stages: list[StageEntry], sources: dict[str, Any]) -> None:
        """A made dataset has a maker, and a maker has a dataset to make."""
        makers = [e.instance for e in stages if e.stage.kind is Kind.MAKE]
        made = {name: s.stage for name, s in sources.items() if s.kind == "made"}
        for name, stage in made.items():
            if stage not in makers:
                near = nearest(stage, makers) or "; name one of the stages that make documents, and list it in `stages`"
                self._problem(("sources", name, "stage"), f"no stage {stage!r} makes documents here{near}")
        for stage in makers:
            if stage not in made.values():
                self._problem(
                    ("stages", stage), f"makes a dataset; add a source `NAME: {{kind: made, stage: {stage}}}`"
                )

    def _check_columns(self, stages: list[StageEntry], policy: dict[str, Any]) -> None:
        """Columns that a config names in layers of its own stages exist there: known before anything has run."""
        from core.layer import layer_schema

        layers = {e.instance: layer_schema(e.stage.layer).names for e in stages if e.stage.layer is not None}
        named: list[tuple[tuple[str | int, ...], Iterable[str]]] = []
        for e in stages:
            if e.config.where and self._parses(e.config.where):
                named.append((("stages", e.instance, "where"), Predicate(e.config.where).columns))
            prefer = getattr(e.config, "prefer", ())
            named.append((("stages", e.instance, "prefer"), [p.lstrip("-") for p in prefer]))
            for i, rule in enumerate(policy.get(e.instance.partition("@")[2]) or ()):
                if rule is not None and rule.drop is not None and self._parses(rule.drop):
                    named.append((("policy", e.instance.partition("@")[2], i, "drop"), Predicate(rule.drop).columns))
        for path, columns in named:
            for column in columns:
                layer, _, name = column.rpartition(".")
                if layer in layers and name not in layers[layer]:
                    near = nearest(name, layers[layer])
                    self._problem(path, f"layer {layer!r} has no column {name!r}{near}")

    @staticmethod
    def _parses(text: str) -> bool:
        try:
            return Predicate(text).columns is not None
        except ConfigError:  # noted where the predicate stands
            return False

    def _predicate(self, path: tuple[str | int, ...], text: str | None) -> None:
        if text is None:
            return
        try:
            assert Predicate(text).columns is not None
        except ConfigError as e:
            self._problem(path, str(e))

    def _mapping(self, path: tuple[str | int, ...]) -> dict[str, Any]:
        value = self.data.get(str(path[0]))
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._problem(path, f"`{path[-1]}` must be a mapping, got {type(value).__name__}")
            return {}
        return value

    def _known_keys(self, path: tuple[str | int, ...], value: dict[str, Any], known: list[str]) -> None:
        for key in value:
            if key not in known:
                self._problem(
                    (*path, key), f"unknown key {key!r}{nearest(key, known)}; expected one of {', '.join(known)}"
                )

    def _validate(self, path: tuple[str | int, ...], kind: Any, value: Any) -> Any:
        """`value` as `kind`, or None after noting each of its problems with its line."""
        adapter = TypeAdapter(kind)
        try:
            return adapter.validate_python(value, context=self.context)
        except ValidationError as e:
            for error in e.errors():
                loc = [part for part in error["loc"] if isinstance(part, int) or _in_data(value, error["loc"], part)]
                self._problem((*path, *loc), self._explain(kind, value, error))
            return None
        except ConfigError as e:
            self._problem(path, str(e))
            return None

    def _explain(self, kind: Any, value: Any, error: Any) -> str:
        name = str(error["loc"][-1]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            return f"unknown key {name!r}{nearest(name, _fields(kind, value))}"
        if error["type"] == "missing":
            return f"{name!r} is missing"
        return f"{name + ': ' if name else ''}{error['msg']}, got {str(error['input'])[:60]!r}"

    def _problem(self, path: tuple[str | int, ...], message: str) -> None:
        dotted = ".".join(str(p) for p in path)
        self.problems.append(f"{self.lines.where(path)}: {dotted}: {message}")


def _label_problem(name: str, label: str) -> str | None:
    """What is wrong with an instance name, if anything."""
    takes = name in LABELLED or name in REPEATABLE
    if label if not takes else (name in LABELLED and not label) or not re.fullmatch(r"\w*", label):
        return f"{name!r} takes {'a label, as in ' + name + '@final' if takes else 'no label'}"
    return None


def _in_data(value: Any, loc: tuple[Any, ...], part: Any) -> bool:
    """Pydantic names union members in `loc`; only keys that the user wrote are kept."""
    seen = [value]
    while seen:
        current = seen.pop()
        if isinstance(current, dict):
            if part in current:
                return True
            seen += list(current.values())
        elif isinstance(current, list):
            seen += current
    return part == loc[-1]


def _fields(kind: Any, value: Any) -> list[str]:
    """Field names that were possible: of the model, or of the union member that the value's `kind` names."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    import typing

    names: list[str] = []
    for part in typing.get_args(kind):
        names += _fields(part, value)
    return names
