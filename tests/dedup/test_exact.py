"""Exact duplicates: cliques by hand, scopes, and independence of order and partitions."""

import pytest
from memory_engine import OracleEngine
from small_corpus import layer, run

from core.engines.local import LocalEngine
from core.errors import ConfigError
from dedup.exact import STAGE

TEXTS = {
    "web": ["alpha beta", "alpha  beta\n", "gamma", "", "Alpha beta", "caf\u00e9", "delta", "delta", "delta"],
    "books": ["cafe\u0301", "delta", "unique"],
}


def by_text(datasets, found):
    """layer rows of each text, in doc_id order."""
    texts = {}
    for d in datasets:
        for shard in d.shards:
            table = d.read_table(shard, ["doc_id", "text"])
            for doc_id, text in zip(table.column("doc_id").to_pylist(), table.column("text").to_pylist(), strict=True):
                texts.setdefault(text, []).append(doc_id)
    return {text: [(i, found[i]["clique"], found[i]["copies"]) for i in sorted(ids)] for text, ids in texts.items()}


def test_cliques_by_hand(corpus):
    datasets = corpus(TEXTS)
    outcome = run(STAGE, OracleEngine(), datasets)
    rows = by_text(datasets, layer(datasets, "exact"))
    smallest = rows["delta"][0][0]
    assert rows["delta"] == [(i, smallest, 4) for i, _, _ in rows["delta"]]
    assert rows["alpha beta"][0][1:] == rows["alpha  beta\n"][0][1:]
    assert rows["alpha beta"][0][1] == min(rows["alpha beta"][0][0], rows["alpha  beta\n"][0][0])
    assert rows["caf\u00e9"][0][1:] == (min(rows["caf\u00e9"][0][0], rows["cafe\u0301"][0][0]), 2)
    for text in ("gamma", "", "Alpha beta", "unique"):
        assert rows[text][0][1:] == (None, None)
    assert outcome.observed == {
        "docs": 12, "copied_docs": 8, "cliques": 3, "largest_clique_docs": 4, "redundant_docs": 5,
    }  # fmt: skip


def test_scopes_keep_datasets_apart(corpus):
    datasets = corpus(TEXTS)
    run(STAGE, OracleEngine(), datasets, scopes=[["web"], ["books"]])
    rows = by_text(datasets, layer(datasets, "exact"))
    assert sorted(copies or 1 for _, _, copies in rows["delta"]) == [1, 3, 3, 3]
    assert rows["caf\u00e9"][0][1] is None


def test_where_leaves_rows_out(corpus):
    datasets = corpus(TEXTS)
    run(STAGE, OracleEngine(), datasets, where="source == 'web'")
    rows = by_text(datasets, layer(datasets, "exact"))
    assert sorted(copies or 0 for _, _, copies in rows["delta"]) == [0, 3, 3, 3]


def test_scopes_are_checked(corpus):
    with pytest.raises(ConfigError) as e:
        run(STAGE, OracleEngine(), corpus(TEXTS), scopes=[["web", "papers"], ["web"]])
    assert len(e.value.problems) == 2


def test_order_partitions_and_engine_change_nothing(corpus, tmp_path):
    found = []
    for seed, engine in enumerate(
        [OracleEngine(1), OracleEngine(2, keys=1), LocalEngine(tmp_path / "exchange", workers=0)]
    ):
        datasets = corpus(TEXTS, shards=seed + 1, seed=seed)
        run(STAGE, engine, datasets)
        found.append(layer(datasets, "exact"))
    assert found[0] == found[1] == found[2]
