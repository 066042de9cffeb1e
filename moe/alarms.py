"""Alarms: rules over the metrics of a run that warn of a doomed one, or stop it.

In: rows of `metrics.jsonl`, in order. Out: for each row the alarms that hold there, by name with what was found. They depend on
the rows alone, so a resumed run, which reads its rows again, raises the same alarms at the same updates.

    loss_spike         the loss lies above its running mean by more than `spike_nats`, `spike_updates` updates in a row
    expert_blow_up     RMS of the greatest expert of a layer over the median one (Step 3.5 Flash, Fig. 4: the loss hides it)
    dead_expert        RMS of the least expert of a layer over the median one (the same paper: loads hide it)
    load_collapse      the most loaded expert of a layer stays near all that one can get
    attention_logit    what the gains of q/k norm allow a layer's greatest attention logit to be

A loss that is not finite is no alarm: it stops every run at once (moe/trainer.py). A run in which a rule that stops is beyond
its limit writes no periodic checkpoint until the rule is calm again, so the newest one is of a good state. Cost: nothing beside
an update.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

NAMES = ("loss_spike", "expert_blow_up", "dead_expert", "load_collapse", "attention_logit")
LEVEL_UPDATES = 50  # span of the running mean that a spike is measured against; chosen, untested
KNOWN_UPDATES = 20  # of a domain before its level means anything; chosen, untested


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an alarm holds, and which of them stop the run (the others warn). All values chosen, untested, except where said."""

    spike_nats: float = 1.0
    spike_updates: int = 50  # a spike that has not gone back by then is one of those the paper calls unrecoverable
    blow_up_ratio: float = 30.0
    dead_ratio: float = 0.02
    readings: int = 3  # of expert statistics in a row beyond either ratio
    collapse_fraction: float = 0.95  # of experts / top_k - 1, the violation where all tokens go to the same experts
    collapse_updates: int = 200  # `tiny` collapses for its first 50 or so (moe/config.py, bias_rate)
    attention_logit: float = 100.0  # MuonClip's tau (Kimi K2): with q/k norm it should never come near
    stop: tuple[str, ...] = ("loss_spike", "expert_blow_up")

    def __post_init__(self) -> None:
        unknown = [name for name in self.stop if name not in NAMES]
        problems = [
            f"alarms.stop: unknown alarm, got {name!r}, expected some of {', '.join(NAMES)}" for name in unknown
        ]
        problems += [
            f"alarms.{name}: must be positive, got {value}"
            for name, value in vars(self).items()
            if name != "stop" and not value > 0
        ]
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Alarm:
    """One rule that holds at one update."""

    name: str
    found: str  # what was measured, and where
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"alarm {self.name}, got {self.found}, expected {self.expected}; {self.advice}"


ADVICE = {
    "loss_spike": "lower optim.lr or optim.grad_clip",
    "expert_blow_up": "set model.routed_clip for that layer (7 in the paper's last two), or lower optim.lr",
    "dead_expert": "raise optim.bias_rate, or start again: dead experts do not come back by themselves",
    "load_collapse": "raise optim.bias_rate or set optim.group_loss",
    "attention_logit": "lower optim.lr; q/k norm gains have grown",
}


class Alarms:
    """`see` takes each row in turn; `calm` says whether the state after the last one is worth a checkpoint."""

    def __init__(self, limits: Limits, worst_violation: float) -> None:
        """`worst_violation` is experts / top_k - 1 of the model (moe/experts.py, `rebalance`)."""
        self.limits, self.worst_violation = limits, worst_violation
        self._beyond = dict.fromkeys(NAMES, 0)  # readings in a row
        self._levels: dict[str, tuple[int, float]] = {}  # domain -> updates seen, running mean of its loss

    @property
    def calm(self) -> bool:
        """No rule that stops is beyond its limit."""
        return not any(self._beyond[name] for name in self.limits.stop)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> set[str]:
        """Takes the rows of a run that is resumed; names the alarms that were raised there."""
        return {alarm.name for row in rows for alarm in self.see(row)}

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that hold at this row."""
        limits, experts, found = self.limits, row.get("experts") or {}, []
        collapse = limits.collapse_fraction * self.worst_violation or math.inf  # 0: each token takes all experts
        for name, reading, patience in (
            ("loss_spike", self._spike(row), limits.spike_updates),
            ("expert_blow_up", _above(experts, "rms_max_median", limits.blow_up_ratio), limits.readings),
            ("dead_expert", _below(experts, "rms_min_median", limits.dead_ratio), limits.readings),
            ("load_collapse", _above(row, "load_violation", collapse), limits.collapse_updates),
            ("attention_logit", _above(row, "attention_logit_bound", limits.attention_logit), 1),
        ):
            if reading is None:  # not measured at this update
                continue
            got, expected = reading
            self._beyond[name] = self._beyond[name] + 1 if got else 0
            if got and self._beyond[name] >= patience:
                found.append(Alarm(name, f"{got} ({self._beyond[name]} readings in a row)", expected, ADVICE[name]))
        return found

    def stops(self, alarms: Iterable[Alarm]) -> Alarm | None:
        """The first of the alarms that stops the run."""
        return next((a for a in alarms if a.name in self.limits.stop), None)

    def _spike(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """How far the middle domain lies above its own level.

        By domain, so that a mixture in an order of its own, where one hard domain follows another, is no spike. Levels stand
        still while a spike lasts: going back means back to where it began.
        """
        losses = row.get("domain_loss") or {"all": row["loss"]}
        known = {d: loss - self._levels[d][1] for d, loss in losses.items() if self._seen(d) >= KNOWN_UPDATES}
        excess = statistics.median(known.values()) if known else 0.0
        limit = self.limits.spike_nats
        if excess > limit:
            return f"a loss {excess:.3g} nats above its running mean", f"at most {limit:g}"
        for domain, loss in losses.items():
            seen, level = self._levels.get(domain, (0, 0.0))
            span = min(seen + 1, LEVEL_UPDATES)
            self._levels[domain] = seen + 1, level + (loss - level) / span
        return "", ""

    def _seen(self, domain: str) -> int:
        return self._levels.get(domain, (0, 0.0))[0]


def _above(readings: Mapping[str, Any], name: str, limit: float) -> tuple[str, str] | None:
    """What the greatest layer reads if that is above the limit, "" if not, None where nothing was read.

    A null in a row was not finite, and counts as above every limit.
    """
    values = [math.inf if value is None else value for value in readings.get(name) or ()]
    if not values:
        return None
    place, value = max(enumerate(values), key=lambda pair: pair[1])
    return f"{name} {value:.3g} in entry {place}" if value > limit else "", f"at most {limit:.3g}"


def _below(readings: Mapping[str, Any], name: str, limit: float) -> tuple[str, str] | None:
    """As `_above`, for the least layer and a limit that it may not fall under; a null, as of a layer at rest, is no reading."""
    values = [(place, value) for place, value in enumerate(readings.get(name) or ()) if value is not None]
    if not values:
        return None
    place, value = min(values, key=lambda pair: pair[1])
    return f"{name} {value:.3g} in entry {place}" if value < limit else "", f"at least {limit:.3g}"
