"""Ranks and quotas against a reference in plain Python, on engines that hand out rows in any order."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from core.predicate import Predicate
from mixtures import rebalance
from mixtures.rebalance import MEMBERS, RebalanceConfig, before_blocks, rank_members, sizes_of
from tests.dedup.memory_engine import OracleEngine
from tests.mixtures.conftest import documents

CLUSTERS = pa.schema([("cluster", pa.int32())])
TIERS = pa.schema([("rank", pa.int64()), ("score", pa.float32()), ("chars", pa.int64())])

members_of = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-1, 1), st.integers(0, (1 << 53) - 1), st.integers(0, 9)),
    min_size=1,
    max_size=60,
)


def members_table(found):
    rows = [(c, t, d, f"{i:032x}", i, a) for i, (c, t, d, a) in enumerate(found)]
    columns = [pa.array(values, f.type) for values, f in zip(zip(*rows, strict=True), MEMBERS, strict=True)]
    return pa.Table.from_arrays(columns, schema=MEMBERS)


def reference(found, quotas):
    """row -> (within, rank, documents of the cluster): the definition, one cluster at a time."""
    out = {}
    for cluster in {c for c, *_ in found}:
        mine = sorted((t, d, i, a) for i, (c, t, d, a) in enumerate(found) if c == cluster)
        run = 0
        for rank, (_, _, row, amount) in enumerate(mine):
            run += amount
            out[row] = (run <= quotas[cluster], rank, len(mine))
    return out


@settings(max_examples=40)
@given(members_of, st.integers(0, 200), st.integers(1, 20), st.integers(0, 5), st.integers(1, 9))
def test_ranks_are_the_definition_whatever_the_blocks(found, target, block_docs, seed, keys):
    table = members_table(found)
    sizes = sizes_of(5, table)
    config = RebalanceConfig(target=target, block_docs=block_docs, amount="signals.chars")
    quotas = config.quotas(sizes[:, 1])
    engine = OracleEngine(seed, keys)
    ranked = engine.collect(rank_members(engine, engine.table(table), sizes[:, 0], quotas, config))
    got = {r["row"]: (r["within_quota"], r["rank_in_cluster"], r["cluster_docs"]) for r in ranked.to_pylist()}
    assert got == reference(found, quotas)
    kept = sum(found[row][3] for row, (within, _, _) in got.items() if within)
    assert kept <= max(target, 0)


@settings(max_examples=30)
@given(members_of, st.integers(0, 100), st.integers(0, 60), st.sampled_from(["water", "power"]))
def test_a_larger_target_drops_no_document_that_was_kept(found, target, more, rule):
    table = members_table(found)
    sizes = sizes_of(5, table)
    kept = []
    for wanted in (target, target + more):
        config = RebalanceConfig(target=wanted, rule=rule)
        engine = OracleEngine()
        quotas = config.quotas(sizes[:, 1])
        ranked = engine.collect(rank_members(engine, engine.table(table), sizes[:, 0], quotas, config))
        kept.append({r["row"] for r in ranked.to_pylist() if r["within_quota"]})
    assert kept[0] <= kept[1]


def test_before_blocks_by_hand():
    columns = [[3, 3, 3, 8], [0, 0, 1, 0], [0, 2, 0, 1], [10, 5, 1, 4], [100, 50, 9, 7]]
    sizes = pa.table(dict(zip(rebalance.SIZES.names, columns, strict=True)), schema=rebalance.SIZES)
    assert before_blocks(sizes) == {(3, 0, 0): (0, 0), (3, 0, 2): (10, 100), (3, 1, 0): (15, 150), (8, 0, 1): (0, 0)}


def clustered(house, clusters, shards=1, name="web"):
    """Documents `t0`, `t1` ... with the given clusters, and a layer `tiers`: rank i % 3, score, chars 100 + i."""
    texts = [f"t{i} about {c}" for i, c in enumerate(clusters)]
    table = documents(name, texts)
    at = np.array_split(np.arange(len(texts)), shards)
    house.add(name, {f"s{k}": table.take(pa.array(part)) for k, part in enumerate(at)})
    number = {t: i for i, t in enumerate(texts)}
    house.layer(name, "cluster", CLUSTERS, lambda d: {"cluster": clusters[number[d["text"]]]})
    tier = lambda d: {"rank": number[d["text"]] % 3, "score": 0.5, "chars": 100 + number[d["text"]]}  # noqa: E731
    house.layer(name, "tiers", TIERS, tier)
    return house


def found_in(house, name="web"):
    """Rows of the layer by number of the document."""
    dataset, out = house.dataset(name), {}
    for shard in dataset.shards:
        texts = house.root.read_table(dataset.documents_name(shard), ["text"]).column("text").to_pylist()
        rows = dataset.read_layer("rebalance", shard).to_pylist()
        out |= {int(t.split()[0][1:]): r for t, r in zip(texts, rows, strict=True)}
    return [out[i] for i in range(len(out))]


SKEWED = [0] * 30 + [1] * 6 + [2] * 4 + [None] * 2 + [7] * 1


def test_the_stage_fills_clusters_like_water(house):
    clustered(house, SKEWED, shards=3)
    outcome = house.run(rebalance.STAGE, target=20)
    rows = found_in(house)
    kept = np.bincount([c for c, r in zip(SKEWED, rows, strict=True) if r["within_quota"]], minlength=8)
    assert kept[[0, 1, 2, 7]].tolist() == [9, 6, 4, 1]
    assert [r["within_quota"] for r in rows[40:42]] == [None, None]
    assert outcome.accounts == {"docs": 43, "clustered": 41, "within_quota": 20}
    assert outcome.observed["unclustered_docs"] == 2
    for cluster, size in ((0, 30), (1, 6), (7, 1)):
        mine = [r for c, r in zip(SKEWED, rows, strict=True) if c == cluster]
        assert sorted(r["rank_in_cluster"] for r in mine) == list(range(size))
        assert {r["cluster_docs"] for r in mine} == {size}


def test_select_can_apply_it(house):
    clustered(house, SKEWED)
    house.run(rebalance.STAGE, target=20)
    dataset = house.dataset("web")
    column = dataset.read_table(dataset.shards[0], ["rebalance.within_quota"])
    assert Predicate("rebalance.within_quota == false").holds(column).sum() == 21  # documents without a cluster stay


def test_better_tiers_come_first(house):
    clustered(house, SKEWED)
    for knob, sign in (("tiers.rank", 1), ("-tiers.rank", -1)):
        house.run(rebalance.STAGE, target=20, tier=knob)
        rows = found_in(house)[:30]
        order = sorted(range(30), key=lambda i: rows[i]["rank_in_cluster"])
        assert [sign * (i % 3) for i in order] == sorted(sign * (i % 3) for i in range(30))


def test_amounts_and_power_law(house):
    clustered(house, SKEWED)
    house.run(rebalance.STAGE, rule="power", alpha=0.5, amount="tiers.chars", keep_fraction=0.5)
    amounts = [100 + i for i in range(len(SKEWED))]
    total = sum(a for a, c in zip(amounts, SKEWED, strict=True) if c is not None)
    rows = found_in(house)
    kept = sum(a for a, r in zip(amounts, rows, strict=True) if r["within_quota"])
    assert total * 0.5 - 4 * 143 < kept <= total * 0.5  # a document that does not fit leaves room in each cluster
    table = house.root.read_table("relations/rebalance/clusters.parquet").to_pylist()
    assert [r["cluster"] for r in table] == [0, 1, 2, 7]
    assert sum(r["kept_amount"] for r in table) == kept
    assert all(r["kept_amount"] <= r["quota"] <= r["amount"] for r in table)


def test_shards_workers_and_blocks_change_nothing(make_house):
    one, two = (clustered(make_house(name), SKEWED, shards) for name, shards in (("one", 1), ("two", 4)))
    a = one.run(rebalance.STAGE, keep_fraction=0.4, tier="tiers.rank")
    b = two.run(rebalance.STAGE, workers=2, keep_fraction=0.4, tier="tiers.rank", block_docs=3)
    assert found_in(one) == found_in(two)
    assert a.outputs == b.outputs


def test_the_report_says_what_was_trimmed(house):
    clustered(house, SKEWED, name="web")
    clustered(house, [0] * 5 + [9], name="books")
    house.run(rebalance.STAGE, target=20)
    report = json.loads(house.root.read_bytes("relations/rebalance/report.json"))
    sizes = [35, 6, 4, 1, 1]
    assert (report["clusters"], report["docs"], report["kept_docs"]) == (5, 47, 20)
    assert report["gini"] > report["kept_gini"]
    assert report["effective"] < report["kept_effective"]
    assert [c["docs"] for c in report["largest"]] == sizes
    top = report["largest"][0]
    assert {name: d["docs"] for name, d in top["datasets"].items()} == {"web": 30, "books": 5}
    assert sum(d["kept_docs"] for d in top["datasets"].values()) == top["kept_docs"] == top["quota"]
    assert len(top["samples"]) == 5
    assert all(s["title"].endswith("about 0") for s in top["samples"])
    assert report["datasets"]["books"]["docs"] == 6


def test_nothing_to_balance(house):
    clustered(house, [None, None])
    outcome = house.run(rebalance.STAGE)
    assert outcome.accounts == {"docs": 2, "clustered": 0, "within_quota": 0}
    assert [r["within_quota"] for r in found_in(house)] == [None, None]
    assert json.loads(house.root.read_bytes("relations/rebalance/report.json"))["largest"] == []


def test_columns_of_other_types_are_refused(house):
    clustered(house, SKEWED)
    with pytest.raises(StageError, match=r"tiers\.score is of type float, expected integers"):
        house.run(rebalance.STAGE, tier="tiers.score")
    with pytest.raises(ConfigError, match="floor means nothing for rule water"):
        RebalanceConfig(floor=3)
