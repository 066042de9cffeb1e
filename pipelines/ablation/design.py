"""An ablation as a pipeline: the base's stages, and behind them each arm's own select and mix under a label, then the trials.

Nothing is computed twice and nothing of the base is touched: an arm with rules of its own gets `select@NAME_ARM`, which is the
base's last select with those rules and writes one more layer, `fate@NAME_ARM`; its mixture, `mix@NAME_ARM`, is an index over the
base's token shards that reads this fate where the base's reads its own. So the runner's locks, identities and skips hold here.
"""

import re
from dataclasses import replace
from typing import Any

from core.stage import Kind
from mixtures.phases import Component, MixConfig
from mixtures.select import fate_layer
from pipelines.ablation.config import Ablation, Arm
from pipelines.ablation.trials import STAGE, TrialsConfig
from pipelines.config import Pipeline, StageEntry


def derived(ablation: Ablation) -> Pipeline:
    """The pipeline that runs an ablation. Its last stage is the trials."""
    base = ablation.base
    last = max(i for i, e in enumerate(base.stages) if e.instance == "tokenize")
    shared = [e for i, e in enumerate(base.stages) if i <= last or e.stage.kind is not Kind.EXPORT]
    own: list[StageEntry] = []
    policy: dict[str, Any] = dict(base.policy)
    for arm in ablation.arms:
        if arm.rules is not None:
            label = f"{ablation.name}_{arm.name}"
            own.append(replace(ablation.select, instance=f"select@{label}"))
            policy[label] = arm.rules
    mixes = [
        StageEntry(mix_instance(ablation, arm), base.entry("mix").stage, arm_mix(ablation, arm))
        for arm in ablation.arms
    ]
    trials = StageEntry(trials_instance(ablation), STAGE, trials_config(ablation))
    return replace(base, stages=(*shared, *own, *mixes, trials), policy=policy)


def mix_instance(ablation: Ablation, arm: Arm) -> str:
    return f"mix@{ablation.name}_{arm.name}"


def trials_instance(ablation: Ablation) -> str:
    return f"trials@{ablation.name}"


def arm_mix(ablation: Ablation, arm: Arm) -> MixConfig:
    """The arm's mixtures as its pipeline has them, over documents by the arm's own fate."""
    return arm.mix if arm.rules is None else _under_fate(arm.mix, *_fates(ablation, arm))


def trials_config(ablation: Ablation) -> TrialsConfig:
    config = ablation.config
    tokenize: Any = ablation.base.entry("tokenize").config
    own = {arm.name: _fates(ablation, arm)[1] for arm in ablation.arms if arm.rules is not None}
    return TrialsConfig(
        mixes={arm.name: mix_instance(ablation, arm) for arm in ablation.arms},
        phase=config.phase,
        tokens=config.tokens,
        seeds=config.seeds,
        aa=config.aa,
        train=config.train,
        fates=own,
        tokenised=tokenize.where,
    )


def _fates(ablation: Ablation, arm: Arm) -> tuple[str, str]:
    """(the fate that the base decides by, the arm's own)."""
    return fate_layer(ablation.select.instance), f"fate@{ablation.name}_{arm.name}"


def _under_fate(mix: MixConfig, base: str, own: str) -> MixConfig:
    """The same mixtures over documents that the arm's fate keeps."""

    def said(where: str | None) -> str | None:
        return re.sub(rf"\b{re.escape(base)}\b", own, where) if where else None

    def component(c: Component) -> Component:
        return c.model_copy(update={"where": said(c.where)})

    phases = {
        name: phase.model_copy(update={"components": tuple(map(component, phase.components))})
        for name, phase in mix.phases.items()
    }
    where = f"{own} and ({said(mix.where)})" if mix.where else own
    return mix.model_copy(update={"phases": phases, "where": where})
