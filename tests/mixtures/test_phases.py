"""Phases beside each other: documents held for a later one, an earlier one replayed, shares that cannot be held."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from core.storage import Root
from mixtures.mix import STAGE, MixConfig, phase_path
from mixtures.reader import MixtureSource
from tests.mixtures.conftest import House
from tests.mixtures.small_mix import component, filled, ids, index, phase, report

LONG = "signals.words > 45"
PRETRAIN = phase(component("web", 0.5), component("books", 0.5, max_epochs=2.0), tokens=1200)


def midtrain(weight: float = 0.6, replayed: float = 0.0, **more: Any) -> dict[str, Any]:
    made = phase(component("web", weight, name="long", where=LONG, hold=True))
    return {**made, **({"replay": {"phase": "pretrain", "weight": replayed}} if replayed else {}), **more}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("ready")
    return filled(House(Root(str(folder / "root")), folder / "scratch", []))


def words(house: House, phase: str) -> dict[str, int]:
    """doc_id -> words of each web document of a phase."""
    known = {}
    for shard in house.dataset("web").shards:
        found = house.dataset("web").read_table(shard, ["doc_id", "signals.words"])
        known |= dict(zip(found.column(0).to_pylist(), found.column(1).to_pylist(), strict=True))
    return {doc: known[doc] for doc, _ in ids(house, phase) if doc in known}


def test_held_documents_stand_in_no_phase_before(ready: House) -> None:
    phases = {
        "pretrain": phase(component("web", 1.0)),
        "midtrain": midtrain(1.0),
        "cooldown": phase(component("web", 1.0)),
    }
    ready.run(STAGE, phases=phases)
    before, there, after = (words(ready, name) for name in phases)
    assert max(before.values()) == 45
    assert min(there.values()) == 46
    assert set(after) == set(before) | set(there), "later phases may read them again"
    row = report(ready, "pretrain")["components"][0]
    assert (row["held_docs"], report(ready, "midtrain")["components"][0]["held_docs"]) == (len(there), 0)
    assert row["held_tokens"] == report(ready, "midtrain")["actual_tokens"]


def test_a_hold_concerns_its_own_dataset_only(ready: House) -> None:
    free = phase(component("books", 1.0))
    ready.run(STAGE, phases={"alone": free})
    alone = ids(ready, "alone")
    ready.run(STAGE, phases={"pretrain": free, "midtrain": midtrain(1.0)})
    assert ids(ready, "pretrain") == alone


def test_unknown_values_are_not_held(house: House) -> None:
    filled(house)
    ready = {
        "pretrain": phase(component("web", 1.0)),
        "midtrain": phase(component("web", 1.0, where="kind is null", hold=True)),
    }
    with pytest.raises(StageError, match="phase 'midtrain' has no tokens"):
        house.run(STAGE, phases=ready)


def test_replay_gives_entries_of_the_earlier_phase_once_each(ready: House) -> None:
    ready.run(STAGE, phases={"pretrain": PRETRAIN, "midtrain": midtrain(0.7, 0.3)})
    first, second = ids(ready, "pretrain"), index(ready, "midtrain")
    replayed = [e for e, row in zip(ids(ready, "midtrain"), second, strict=True) if row["domain"] == "replay_pretrain"]
    assert replayed
    assert set(replayed) <= set(first)
    assert len(set(replayed)) == len(replayed)
    again = report(ready, "midtrain")["components"][1]
    assert (again["replay"], again["requested_fraction"]) == ("pretrain", 0.3)
    assert again["actual_tokens"] == sum(r["tokens"] for r in second if r["domain"] == "replay_pretrain")
    assert abs(again["actual_fraction"] - 0.3) < 0.08
    assert again["available_tokens"] == report(ready, "pretrain")["actual_tokens"]


def test_a_replay_keeps_the_proportions_of_its_phase(ready: House) -> None:
    """Books were read twice there, so they are half of it here, too."""
    ready.run(
        STAGE,
        phases={
            "pretrain": phase(component("web", 0.4), component("books", 0.6, max_epochs=3.0)),
            "m": midtrain(0.6, 0.4),
        },
    )
    parts = Counter()
    for row in index(ready, "m"):
        if row["domain"] == "replay_pretrain":
            parts[row["dataset"]] += row["tokens"]
    assert parts["books"] / sum(parts.values()) == pytest.approx(0.6, abs=0.15)


def test_what_a_component_claims_is_not_replayed_beside_it(ready: House) -> None:
    books = phase(component("books", 0.5))
    again = {**books, "replay": {"phase": "pretrain", "weight": 0.5, "name": "before"}}
    ready.run(STAGE, phases={"pretrain": PRETRAIN, "anneal": again})
    assert {r["dataset"] for r in index(ready, "anneal") if r["domain"] == "before"} == {"web"}
    assert len({(r["dataset"], r["shard"], r["document"]) for r in index(ready, "anneal")}) == len(
        index(ready, "anneal")
    )


def test_another_seed_replays_other_documents(ready: House) -> None:
    drawn = []
    for seed in (0, 0, 1):
        ready.run(STAGE, phases={"pretrain": PRETRAIN, "m": midtrain(0.9, 0.1, seed=seed)})
        drawn.append({e for e, r in zip(ids(ready, "m"), index(ready, "m"), strict=True) if r["domain"] != "long"})
    assert drawn[0] == drawn[1] != drawn[2]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(16, 50), st.integers(1, 9), st.integers(200, 3000), st.integers(0, 99))
def test_laws(ready: House, least: int, tenths: int, tokens: int, seed: int) -> None:
    """Held and other documents never meet; a replay lies within its phase; each share keeps its bound."""
    held = phase(
        component("web", tenths / 10, name="long", where=f"signals.words > {least}", hold=True),
        tokens=tokens,
        seed=seed,
    )
    held["replay"] = {"phase": "pretrain", "weight": 1 - tenths / 10}
    ready.run(STAGE, phases={"pretrain": {**PRETRAIN, "seed": seed}, "midtrain": held})
    first, second = ids(ready, "pretrain"), ids(ready, "midtrain")
    rows = index(ready, "midtrain")
    own = {e for e, r in zip(second, rows, strict=True) if r["domain"] == "long"}
    assert not {doc for doc, _ in own} & {doc for doc, _ in first}
    assert set(second) - own <= set(first)
    assert len(set(second)) == len(second)
    for c in report(ready, "midtrain")["components"]:
        assert c["actual_tokens"] <= c["requested_tokens"] - c["shortfall_tokens"] <= c["available_tokens"]
        assert c["entries"] == sum(r["domain"] == c["name"] for r in rows)


def test_workers_and_shard_order_change_nothing(make_house: Callable[[str], House]) -> None:
    phases = {"pretrain": PRETRAIN, "midtrain": midtrain(0.7, 0.3)}
    first = filled(make_house("a")).run(STAGE, phases=phases)
    second = filled(make_house("b"), order=-1).run(STAGE, workers=2, phases=phases)
    assert (first.outputs, first.observed) == (second.outputs, second.observed)


def test_a_share_that_cannot_be_held_says_what_would(ready: House) -> None:
    short = phase(component("web", 0.5), component("books", 0.5, max_epochs=1.5), tokens=3000)
    with pytest.raises(
        StageError, match=r"books of phase 'p' cannot hold its weight 0\.5, got \d+ tokens, expected 1500"
    ) as e:
        ready.run(STAGE, phases={"p": {**short, "max_shortfall_fraction": 0.1}})
    epochs = float(str(e.value).rpartition(": ")[2].split()[0])
    short["components"][1]["max_epochs"] = epochs + 0.01
    ready.run(STAGE, phases={"p": {**short, "max_shortfall_fraction": 0.0}})
    assert report(ready, "p")["components"][1]["shortfall_tokens"] == 0


def test_an_instance_with_a_label_writes_beside_the_others(ready: House) -> None:
    ready.run(STAGE, phases={"pretrain": PRETRAIN})
    ready.run(STAGE, instance="mix@other", phases={"pretrain": phase(component("books", 1.0))})
    assert phase_path("mix@other", "pretrain") == "other/pretrain"
    assert list(MixtureSource(ready.root, "other/pretrain").domains) == ["books"]
    assert list(MixtureSource(ready.root, "pretrain").domains) == ["web", "books"]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ({"pretrain": midtrain(1.0)}, "component 'long' of phase 'pretrain' has `hold`, and no phase stands before it"),
        (
            {"pretrain": PRETRAIN, "m": midtrain(0.6, 0.4, replay={"phase": "pretran", "weight": 0.4})},
            "phase 'm' replays 'pretran', did you mean 'pretrain'",
        ),
        ({"m": midtrain(0.6, 0.4), "pretrain": PRETRAIN}, "`hold`, and no phase stands before it"),
        ({"pretrain": PRETRAIN, "m": midtrain(0.6, 0.3)}, "weights of phase 'm' must sum to 1, got 0.9"),
        (
            {"pretrain": PRETRAIN, "m": midtrain(0.6, replay={"phase": "pretrain", "weight": 0.4, "name": "long"})},
            "components of phase 'm' need different names",
        ),
    ],
)
def test_what_no_run_could_mend_is_refused(phases: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="mix: ") as e:
        MixConfig(phases=phases)
    assert said in str(e.value)
