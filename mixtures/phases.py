"""What a mixture is made of: phases of components, as a config states them, and which documents each component asks for.

A component is a dataset, a predicate over layers, a weight and its most epochs; more than one epoch is up-sampling. Weights of a
phase, its replay included, sum to 1, and two components of one phase never claim the same document, so every share has one owner.

Phases stand in the order in which a model meets them. A component with `hold` keeps its documents out of all phases before its
own: mid-training of Step 3.5 Flash (arXiv 2602.10604) draws natural documents beyond 32k tokens from the pre-training data. A
`replay` gives an earlier phase's documents again, as that phase mixed them (21% of the tokens there).
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

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
    hold: bool = Field(default=False, description="keep its documents out of every phase before this one")

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        return Predicate(where).text if where else None

    @property
    def domain(self) -> str:
        return self.name or self.dataset


class Replay(BaseModel):
    """A share of what an earlier phase read, without the documents that this phase's own components claim."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: str = Field(description="an earlier phase; its components keep the proportions that they had there")
    weight: float = Field(
        gt=0.0, lt=1.0, description="share of this phase's tokens; each entry is replayed once at most"
    )
    name: str | None = Field(
        default=None, pattern=NAME, description="its domain in the index; replay_PHASE if not given"
    )

    @property
    def domain(self) -> str:
        return self.name or f"replay_{self.phase}"


class Phase(BaseModel):
    """One phase of training, such as pretrain or anneal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int | None = Field(default=None, gt=0, description="length; null: as long as every weight holds")
    seed: int = Field(default=0, description="of the order, and of the choice of documents in a partial epoch")
    components: tuple[Component, ...] = Field(min_length=1, description="its parts; weights sum to 1")
    replay: Replay | None = Field(default=None, description="a share of an earlier phase, again")
    learn: Literal["all", "content", "answers"] = Field(
        default="all",
        description="what counts in the loss: of dialogues and conversations `content` leaves out the template's words, "
        "`answers` all that is not the assistant's (`levels` of tokenize)",
    )
    max_shortfall_fraction: float = Field(
        default=1.0, ge=0.0, le=1.0, description="fail if a part lacks more of its share; 1: report it only"
    )

    @property
    def parts(self) -> tuple[Component | Replay, ...]:
        return (*self.components, *([self.replay] if self.replay else []))


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
        for i, (name, phase) in enumerate(self.phases.items()):
            domains = [part.domain for part in phase.parts]
            check_weights(name, domains, [part.weight for part in phase.parts])
            if len(set(domains)) < len(domains):
                raise ConfigError(f"mix: components of phase {name!r} need different names, got {domains}; set `name`")
            if name == HELD_OUT or not re.match(NAME, name):
                raise ConfigError(
                    f"mix: {name!r} cannot name a phase; use letters, digits, - and _, and not {HELD_OUT!r}"
                )
            _check_order(name, phase, list(self.phases)[:i])
        return self


def _check_order(name: str, phase: Phase, earlier: Sequence[str]) -> None:
    """`hold` and `replay` speak of phases that stand before."""
    for c in phase.components:
        if c.hold and not earlier:
            raise ConfigError(
                f"mix: component {c.domain!r} of phase {name!r} has `hold`, and no phase stands before it; "
                "put the phase behind those that shall not see its documents, or remove `hold`"
            )
    if phase.replay and phase.replay.phase not in earlier:
        near = difflib.get_close_matches(phase.replay.phase, earlier, n=1, cutoff=0.5)
        raise ConfigError(
            f"mix: phase {name!r} replays {phase.replay.phase!r}{f', did you mean {near[0]!r}?' if near else ''}; "
            f"expected a phase before it, one of {list(earlier)}"
        )


@dataclass(frozen=True)
class Group:
    """The candidates of one component (`component` None: of the held-out index)."""

    phase: str
    dataset: str
    component: Component | None
    where: tuple[str, ...]  # all must hold
    held: tuple[tuple[str, ...], ...] = ()  # documents for which all of one of these hold are kept for a later phase

    @property
    def domain(self) -> str:
        return self.component.domain if self.component else self.dataset


def groups(config: MixConfig, datasets: Iterable[str]) -> list[Group]:
    """What every document is tested for, in a fixed order."""
    out: list[Group] = []
    later: list[Component] = []  # with `hold`, of the phases behind
    for name, phase in reversed(config.phases.items()):
        mine = [
            Group(
                name, c.dataset, c, _where(config, c), tuple(_where(config, h) for h in later if h.dataset == c.dataset)
            )
            for c in phase.components
        ]
        out = mine + out
        later += [c for c in phase.components if c.hold]
    if config.held_out:
        out += [Group(HELD_OUT, d, None, (config.held_out,)) for d in datasets]
    return out


def _where(config: MixConfig, component: Component) -> tuple[str, ...]:
    return tuple(w for w in (config.where, component.where) if w)


def reads(config: MixConfig) -> tuple[str, ...]:
    columns = {c for group in groups(config, [""]) for text in group.where for c in Predicate(text).columns}
    return (*sorted(columns), f"@{config.tokenizer}", f"@{config.tokenize}")
