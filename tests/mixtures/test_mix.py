"""Mixtures: shares, epochs, order, the held-out index, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from core.hashing import seeded
from mixtures import tokenize, tokenizer
from mixtures.mix import STAGE, MixConfig
from tests.mixtures.conftest import House, documents, sentence
from tests.mixtures.small_mix import component, filled, ids, index, phase, report

HALVES = phase(component("web", 0.5), component("books", 0.5, max_epochs=4.0), tokens=1400)


def test_requested_beside_actual(house: House) -> None:
    outcome = filled(house).run(STAGE, phases={"pretrain": HALVES})
    rows, said = index(house, "pretrain"), report(house, "pretrain")
    for c in said["components"]:
        mine = [r for r in rows if r["domain"] == c["name"]]
        assert c["actual_tokens"] == sum(r["tokens"] for r in mine)
        assert c["entries"] == len(mine)
        assert c["used_docs"] == len({(r["shard"], r["document"]) for r in mine})
        assert c["requested_tokens"] == 700
        assert 700 - max(r["tokens"] for r in rows) < c["actual_tokens"] <= 700
        assert c["epochs"] == c["actual_tokens"] / c["available_tokens"]
        assert c["actual_fraction"] == c["actual_tokens"] / sum(r["tokens"] for r in rows)
    assert said["actual_tokens"] == outcome.accounts["pretrain_tokens"] == sum(r["tokens"] for r in rows)
    assert said["components"][1]["epochs"] > 1


def test_only_kept_train_documents_that_match(house: House) -> None:
    filled(house)
    where = "signals.words > 20 and signals.words < 50"
    house.run(STAGE, phases={"anneal": phase(component("web", 1.0, where=where))})
    wanted = set()
    for shard in house.dataset("web").shards:
        table = house.root.read_table(house.dataset("web").documents_name(shard))
        for doc, text in zip(table.column("doc_id").to_pylist(), table.column("text").to_pylist(), strict=True):
            out = any(w in text for w in ("page 7 ", "page 3 ", "page 5 ", "page 9 "))
            if 20 < len(text.split()) < 50 and not out:
                wanted.add((doc, 0))
    found = ids(house, "anneal")
    assert len(found) == len(wanted) > 10
    assert set(found) == wanted


def test_order_is_by_hash_of_document_and_epoch(house: House) -> None:
    filled(house).run(STAGE, phases={"p": {**HALVES, "seed": 5}, "q": {**HALVES, "seed": 6}})
    for name, seed in (("p", 5), ("q", 6)):
        found = ids(house, name)
        assert found == sorted(found, key=lambda e, seed=seed: seeded(seed, f"{e[0]}#{e[1]}"))
    assert ids(house, "p") != ids(house, "q")


def test_a_partial_epoch_is_spread_over_the_phase(house: House) -> None:
    filled(house).run(STAGE, phases={"p": phase(component("books", 1.0, max_epochs=2.0), tokens=300)})
    last = [epoch for _, epoch in ids(house, "p")]
    assert 0 < last.count(1) < len(last) / 2
    assert last != sorted(last)
    assert last != sorted(last, reverse=True)


def test_a_longer_phase_keeps_what_a_shorter_one_has(house: House) -> None:
    filled(house)
    made = []
    for tokens in (500, 900, 2600):
        house.run(STAGE, phases={"p": phase(component("web", 1.0, max_epochs=9.0), tokens=tokens)})
        made.append(set(ids(house, "p")))
    assert made[0] < made[1] < made[2]


def test_a_capped_component_is_reported_and_nothing_is_rescaled(house: House) -> None:
    filled(house).run(
        STAGE, phases={"p": phase(component("web", 0.5), component("books", 0.5, max_epochs=1.5), tokens=3000)}
    )
    web, books = report(house, "p")["components"]
    assert web["shortfall_tokens"] == 0
    assert books["shortfall_tokens"] == 1500 - int(1.5 * books["available_tokens"]) > 0
    assert books["epochs"] <= 1.5
    assert books["actual_fraction"] < 0.5 < web["actual_fraction"]
    repeats = Counter((r["shard"], r["document"]) for r in index(house, "p") if r["domain"] == "books")
    assert max(repeats.values()) == 2


def test_null_tokens_is_the_longest_phase_that_holds_the_weights(house: House) -> None:
    filled(house).run(STAGE, phases={"p": phase(component("web", 0.25), component("books", 0.75, max_epochs=2.0))})
    web, books = report(house, "p")["components"]
    assert web["shortfall_tokens"] == books["shortfall_tokens"] == 0
    assert abs(books["requested_tokens"] / (web["requested_tokens"] + books["requested_tokens"]) - 0.75) < 0.01
    assert books["epochs"] == 2.0 or web["epochs"] == 1.0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6000), st.integers(1, 9), st.floats(0.3, 5.0), st.floats(0.3, 5.0), st.integers(0, 99))
def test_laws(ready: House, tokens: int, tenths: int, most_web: float, most_books: float, seed: int) -> None:
    parts = [
        component("web", tenths / 10, max_epochs=most_web),
        component("books", 1 - tenths / 10, max_epochs=most_books),
    ]
    ready.run(STAGE, phases={"p": phase(*parts, tokens=tokens, seed=seed)})
    rows = index(ready, "p")
    longest = 200
    assert max((r["tokens"] for r in rows), default=0) < longest
    for c, most in zip(report(ready, "p")["components"], (most_web, most_books), strict=True):
        mine = [r for r in rows if r["domain"] == c["name"]]
        assert c["actual_tokens"] == sum(r["tokens"] for r in mine) <= most * c["available_tokens"]
        assert c["requested_tokens"] - c["shortfall_tokens"] - longest < c["actual_tokens"] <= c["requested_tokens"]
        repeats = Counter((r["dataset"], r["shard"], r["document"]) for r in mine)
        assert max(repeats.values(), default=0) <= most + 1
        assert max(repeats.values(), default=0) - min(repeats.values(), default=0) <= 1
    assert len({(r["dataset"], r["shard"], r["document"], r["epoch"]) for r in rows}) == len(rows)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> House:
    from core.storage import Root

    folder = tmp_path_factory.mktemp("ready")
    return filled(House(Root(str(folder / "root")), folder / "scratch", []))


def test_shard_order_and_workers_change_nothing(make_house: Callable[[str], House]) -> None:
    config = {"phases": {"p": HALVES, "q": phase(component("books", 1.0, where="signals.words > 12"))}}
    first = filled(make_house("a")).run(STAGE, **config)
    second = filled(make_house("b"), order=-1).run(STAGE, workers=2, **config)
    assert first.outputs == second.outputs
    assert first.observed == second.observed


def test_a_document_of_another_shard_layout_keeps_its_place(make_house: Callable[[str], House]) -> None:
    a, b = make_house("a"), make_house("b")
    table = documents("web", [sentence(i, 20) for i in range(30)])
    for house, shards in ((a, {"s": table}), (b, {"x": table.slice(10), "y": table.slice(0, 10)})):
        house.add("web", shards)
        house.judge("web")
        house.run(tokenizer.STAGE, vocab_size=400)
        house.run(tokenize.STAGE)
        house.run(STAGE, phases={"p": phase(component("web", 1.0, max_epochs=3.0), tokens=1500)})
    assert ids(a, "p") == ids(b, "p")


def test_held_out_is_capped_by_dataset_in_hash_order(house: House) -> None:
    filled(house).run(STAGE, phases={"p": HALVES}, held_out_docs=2)
    rows, said = index(house, "held_out"), report(house, "held_out")
    assert Counter(r["domain"] for r in rows) == {"web": 2, "books": 2}
    assert [c["available_docs"] for c in said["components"]] == [3, 3]
    held = {}
    for dataset in ("web", "books"):
        found = [d for r, (d, _) in zip(rows, ids(house, "held_out"), strict=True) if r["domain"] == dataset]
        every = []
        for shard in house.dataset(dataset).shards:
            table = house.root.read_table(house.dataset(dataset).documents_name(shard))
            pairs = zip(table.column("doc_id").to_pylist(), table.column("text").to_pylist(), strict=True)
            every += [d for d, t in pairs if any(w in t for w in ("page 3 ", "page 5 ", "page 9 "))]
        assert set(found) == set(sorted(every, key=lambda d: seeded(0, d))[:2])
        held[dataset] = found
    assert not {d for d, _ in ids(house, "p")} & {d for found in held.values() for d in found}


def test_components_that_share_documents_are_refused(house: House) -> None:
    parts = [component("web", 0.5, name="short", where="signals.words < 40"), component("web", 0.5, name="all")]
    with pytest.raises(StageError, match=r"\['short', 'all'\] of phase 'p' share documents of dataset web"):
        filled(house).run(STAGE, phases={"p": phase(*parts, tokens=100)})


def test_components_of_one_dataset(house: House) -> None:
    parts = [
        component("web", 0.2, name="short", where="signals.words < 40"),
        component("web", 0.8, name="long", where="signals.words >= 40"),
    ]
    filled(house).run(STAGE, phases={"p": phase(*parts, tokens=1000)})
    assert [c["name"] for c in report(house, "p")["components"]] == ["short", "long"]
    assert {r["domain"] for r in index(house, "p")} == {"short", "long"}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"p": phase(component("web", 0.5), component("books", 0.4))}, "must sum to 1, got 0.9 "),
        ({"p": phase(component("web", 0.5), component("web", 0.5, where="kind == 'web'"))}, "need different names"),
        ({"held_out": phase(component("web", 1.0))}, "'held_out' cannot name a phase"),
        ({"../p": phase(component("web", 1.0))}, "cannot name a phase"),
        ({"p": phase(component("web", 1.0, where="signals.words <"))}, "predicate"),
    ],
)
def test_config_errors(phases: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixConfig(phases=phases)


def test_unknown_dataset_and_missing_tokens(house: House) -> None:
    filled(house)
    with pytest.raises(ConfigError, match=r"no dataset 'mail', expected one of \['web', 'books'\]"):
        house.run(STAGE, phases={"p": phase(component("mail", 1.0))})
    with pytest.raises(StageError, match=r"has no tokens.*tokens available: web 0"):
        house.run(STAGE, phases={"p": phase(component("web", 1.0, where="signals.words > 999"))})
    house.run(tokenizer.STAGE, vocab_size=300)
    with pytest.raises(StageError, match="by another tokenizer; run tokenize first"):
        house.run(STAGE, phases={"p": HALVES})
    house.root.remove("tokens/tokenizer/books/s0.docs.parquet")
    house.run(tokenize.STAGE, where="kind == 'web'")
    house.root.remove("tokens/tokenizer/books/s0.docs.parquet")
    with pytest.raises(StageError, match="is missing; run tokenize first"):
        house.run(STAGE, phases={"p": HALVES})


def test_reads_names_every_column(house: House) -> None:
    config = MixConfig(phases={"p": phase(component("web", 1.0, where="signals.words > 3 and source == 'x'"))})
    assert STAGE.columns(config) == ("signals.words", "source", "split.split", "@tokenizer", "@tokenize")


def test_an_empty_component_of_a_phase_of_given_length_falls_short(house: House) -> None:
    parts = [component("web", 0.5), component("books", 0.5, where="signals.words > 999")]
    filled(house).run(STAGE, phases={"p": phase(*parts, tokens=1000)})
    books = report(house, "p")["components"][1]
    assert (books["actual_tokens"], books["shortfall_tokens"], books["epochs"]) == (0, 500, 0.0)
    assert json.dumps(report(house, "p"))
