"""The questions that the stage `evaluate` asks of a model: local files, as knobs, and the figures that come of them.

In: named files in the layouts of `moe.choices` (answers that are given) and `moe.solve` (problems answered by generation). Out:
by name, what `moe.examine` tells: bits per byte of the right answer, accuracy, share solved, each with its interval; beside
another model the paired difference on the same questions, and the least effect that so many could show. A file enters the
identity by its content and by how it is read, not by its path. Name the same files under `decontaminate.benchmarks`, or what is
measured may have been trained on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.errors import ConfigError
from core.stage import Artifacts, ConfigPath

if TYPE_CHECKING:
    from moe.examine import Asked


class QuestionSet(BaseModel):
    """Questions whose answers are given: the model says how likely each is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath = Field(description="JSONL file, also gzipped")
    layout: Literal["choices", "continuation", "solution"] | None = Field(
        default=None, description="choices (ARC), continuation (LAMBADA) or solution (GSM8K); null: by the first record"
    )
    limit: int | None = Field(default=None, ge=2, description="the file's first so many; null: all")


class ProblemSet(BaseModel):
    """Problems with a number as their answer, which the model writes out: GSM8K's layout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath = Field(description="JSONL file, also gzipped: `question`, `answer` with the number behind ####")
    examples: ConfigPath | None = Field(default=None, description="file of solved problems to show first")
    shots: int = Field(default=4, ge=1, description="how many of `examples` to show")
    max_tokens: int = Field(default=256, ge=1, description="length of an answer at most")
    limit: int | None = Field(default=None, ge=2, description="the file's first so many; null: all")


def question_artifacts(questions: Mapping[str, QuestionSet], problems: Mapping[str, ProblemSet]) -> Artifacts:
    """The files by what is asked of them. All missing ones are told at once."""
    named = {f"questions {name} {_reading(s, 'layout', 'limit')}": s.path for name, s in sorted(questions.items())}
    for name, s in sorted(problems.items()):
        named[f"problems {name} {_reading(s, 'shots', 'max_tokens', 'limit')}"] = s.path
        if s.examples is not None:
            named[f"examples {name}"] = s.examples
    absent = [
        f"evaluate: {key.split()[0]} {key.split()[1]}: no file {path}; correct its path"
        for key, path in named.items()
        if not Path(path).is_file()
    ]
    if absent:
        raise ConfigError(*absent)
    return named


def ask_all(
    who: "Asked", other: "Asked | None", questions: Mapping[str, QuestionSet], problems: Mapping[str, ProblemSet]
) -> dict[str, Any]:
    """Figures of `questions` and of `problems` by name; a kind that nobody asked for is absent."""
    from moe.examine import ask, pose

    asked = {name: ask(who, other, Path(s.path), s.layout, s.limit) for name, s in questions.items()}
    posed = {
        name: pose(
            who, other, Path(s.path), Path(s.examples) if s.examples else None, shots=s.shots, max_tokens=s.max_tokens,
            limit=s.limit,
        )
        for name, s in problems.items()
    }  # fmt: skip
    return {kind: found for kind, found in (("questions", asked), ("problems", posed)) if found}


def _reading(chosen: BaseModel, *names: str) -> str:
    return " ".join(f"{name}={getattr(chosen, name)}" for name in names)
