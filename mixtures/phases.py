"""What a mixture is made of: phases of components, as a config states them, and which documents each component asks for.

A component is a dataset, a predicate over layers, a weight and its most epochs. Weights of a phase sum to 1, and two components
of one phase never claim the same document, so every share has one owner.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from core.errors import ConfigError
from core.predicate import Predicate
from core.stage import StageConfig
from mixtures.shares import check_weights

HELD_OUT = "held_out"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_\-]*$"


class Component(BaseModel):
    """One part of a phase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="name of a source")
    name: str | None = Field(
        default=None, pattern=NAME, description="its domain in the index; the dataset if not given"
    )
    where: str | None = Field(default=None, description="which of the dataset's tokenised training documents")
    weight: float = Field(gt=0.0, le=1.0, description="share of the phase's tokens")
    max_epochs: float = Field(
        default=1.0, gt=0.0, description="most times a document may be repeated; 1.5 repeats half of them"
    )

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @property
    def domain(self) -> str:
        return self.name or self.dataset


class Phase(BaseModel):
    """One phase of training, such as pretrain or anneal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int | None = Field(default=None, gt=0, description="length; null: as long as every weight holds")
    seed: int = Field(default=0, description="of the order, and of the choice of documents in a partial epoch")
    components: tuple[Component, ...] = Field(min_length=1, description="its parts; weights sum to 1")


class MixConfig(StageConfig):
    """The mixtures to make."""

    where: str | None = Field(default="split.split == 'train'", description="documents that any component may use")
    held_out: str | None = Field(
        default="split.split == 'held_out'", description="documents of the held-out index; null: none"
    )
    held_out_docs: int = Field(
        default=1000, gt=0, description="most held-out documents of a dataset, by hash of doc_id"
    )
    tokenizer: str = Field(default="tokenizer", description="whose token shards are mixed")
    tokenize: str = Field(default="tokenize", description="instance of the stage `tokenize` that made them")
    phases: dict[str, Phase] = Field(min_length=1, description="name of a mixture -> its components")

    @field_validator("where", "held_out")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @model_validator(mode="after")
    def _adds_up(self) -> "MixConfig":
        for name, phase in self.phases.items():
            domains = [c.domain for c in phase.components]
            check_weights(name, domains, [c.weight for c in phase.components])
            if len(set(domains)) < len(domains):
                raise ConfigError(f"mix: components of phase {name!r} need different names, got {domains}; set `name`")
            if name == HELD_OUT or not re.match(NAME, name):
                raise ConfigError(
                    f"mix: {name!r} cannot name a phase; use letters, digits, - and _, and not {HELD_OUT!r}"
                )
        return self


@dataclass(frozen=True)
class Group:
    """The candidates of one component (`component` None: of the held-out index)."""

    phase: str
    dataset: str
    component: Component | None
    where: tuple[str, ...]  # all must hold

    @property
    def domain(self) -> str:
        return self.component.domain if self.component else self.dataset


def groups(config: MixConfig, datasets: Iterable[str]) -> list[Group]:
    """What every document is tested for, in a fixed order."""
    out = []
    for name, phase in config.phases.items():
        for c in phase.components:
            out.append(Group(name, c.dataset, c, tuple(w for w in (config.where, c.where) if w)))
    if config.held_out:
        out += [Group(HELD_OUT, d, None, (config.held_out,)) for d in datasets]
    return out


def reads(config: MixConfig) -> tuple[str, ...]:
    columns = {c for group in groups(config, [""]) for text in group.where for c in Predicate(text).columns}
    return (*sorted(columns), f"@{config.tokenizer}", f"@{config.tokenize}")
