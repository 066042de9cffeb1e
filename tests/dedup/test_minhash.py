"""The stage end to end: truth by brute force, recall by theory, the traps that collapsed other people's data, invariance."""

import numpy as np
import pytest
from memory_engine import OracleEngine
from planted import all_jaccards, caught, pair, true_jaccards, words
from scipy.stats import binom
from small_corpus import documents, edges, layer, relation, run

from core.engines.local import LocalEngine
from dedup import exact, minhash
from dedup.minhash import STAGE
from dedup.survivors import elect


def ids_of(texts: dict[str, list[str]]) -> dict[str, str]:
    """text -> doc_id of the datasets that `corpus` makes of `texts` (texts must differ)."""
    found = {}
    for name, column in texts.items():
        found |= dict(zip(column, documents(name, column).column("doc_id").to_pylist(), strict=True))
    return found


def alone(texts, corpus, **config):
    """(edges by text pair, layer by text) of one dataset without `exact`."""
    datasets = corpus({"web": texts})
    run(STAGE, OracleEngine(), datasets, exact=None, **config)
    text_of = {i: t for t, i in ids_of({"web": texts}).items()}
    found = {frozenset((text_of[a], text_of[b])): j for (a, b), j in edges(datasets).items()}
    return found, {text_of[i]: row for i, row in layer(datasets, "minhash").items()}


@pytest.mark.parametrize("target", [0.55, 0.65, 0.75, 0.8, 0.85, 0.9, 0.95])
def test_recall_on_planted_pairs_lies_in_the_binomial_interval(target, corpus):
    """300 pairs at a Jaccard: the number found is within the 99.9% interval of a binomial with p = 1-(1-s^8)^14."""
    rng = np.random.default_rng(int(target * 1000))
    pairs = [pair(rng, target) for _ in range(300)]
    texts = [text for both in pairs for text in both]
    truth = true_jaccards(texts, np.arange(0, 600, 2), np.arange(1, 600, 2))
    found, _ = alone(texts, corpus, jaccard=0.4)
    assert set(found) <= {frozenset(p) for p in pairs}
    low, high = binom.interval(0.999, 300, caught(truth).mean())
    assert low <= len(found) <= high
    for both, true in zip(pairs, truth, strict=True):
        assert found.get(frozenset(both), true) == pytest.approx(true, abs=1e-6)


def test_edges_against_all_pairs(corpus):
    """2,000 documents in families, every pair measured with Python sets: no edge is wrong, as many as theory says are found."""
    rng = np.random.default_rng(5)
    texts = set()
    for _ in range(340):
        body = np.array(words(rng, int(rng.integers(30, 300))))
        for _ in range(6):
            keep = rng.random(len(body)) > rng.choice([0.0, 0.005, 0.02, 0.05])
            texts.add(" ".join([*body[keep], *words(rng, int(rng.integers(0, 12)))]))
    texts = sorted(texts)
    assert len(texts) > 1900
    near = {frozenset((texts[i], texts[j])): s for (i, j), s in all_jaccards(texts).items() if s >= 0.75}
    found, _ = alone(texts, corpus)
    assert set(found) <= set(near)
    assert all(found[p] == pytest.approx(near[p], abs=1e-6) for p in found)
    p = caught(np.array(list(near.values())))
    assert abs(len(found) - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum()) + 1


def test_templates_books_chains_and_one_giant_do_not_collapse(corpus):
    rng = np.random.default_rng(6)
    template = words(rng, 60)
    templated = [
        " ".join(template[:30] + words(rng, 40) + template[30:]) for _ in range(1000)
    ]  # J of a pair about 0.35
    books = [" ".join(words(rng, 3000)) for _ in range(500)]
    giant = " ".join(words(rng, 900_000))  # 10 M characters
    body = words(rng, 400)
    chain = [" ".join(body[i : i + 340]) for i in (0, 24, 48)]  # J(A, B) = J(B, C) = 0.87, J(A, C) = 0.75
    chain[2] = " ".join([*body[52:], "end"])
    found, rows = alone([*templated, *books, giant, *chain], corpus)
    a, b, c = true_jaccards(chain, np.array([0, 1, 0]), np.array([1, 2, 2]))
    assert min(a, b) > 0.78 > 0.75 > c
    assert set(found) <= {frozenset(chain[:2]), frozenset(chain[1:])}
    assert len(found) == 2
    assert {rows[t]["component_docs"] for t in chain} == {3}
    assert all(rows[t]["component"] is None for t in [*templated, *books, giant])


def test_copies_of_a_giant_are_found(corpus):
    rng = np.random.default_rng(7)
    body = words(rng, 200_000)
    texts = [" ".join(body), " ".join([*body[:100_000], "changed", *body[100_001:]]), " ".join(words(rng, 200_000))]
    found, _ = alone(texts, corpus)
    assert list(found) == [frozenset(texts[:2])]
    assert found[frozenset(texts[:2])] > 0.999


def test_recall_survives_a_crowd(corpus):
    """Pairs hidden among 3,000 documents that agree with them in whole bands: the window and the other bands still find them."""
    rng = np.random.default_rng(8)
    template = words(rng, 200)
    pairs = []
    for _ in range(100):
        own = words(rng, 44)
        pairs.append((" ".join(template + own), " ".join(template + own[:34] + words(rng, 10))))
    crowd = [" ".join(template + words(rng, 66)) for _ in range(2800)]
    texts = [text for both in pairs for text in both]
    truth = true_jaccards(texts, np.arange(0, 200, 2), np.arange(1, 200, 2))
    found, _ = alone(texts + crowd, corpus, jaccard=0.85)
    assert truth.min() > 0.85
    assert set(found) <= {frozenset(p) for p in pairs}
    assert len(found) >= binom.interval(0.999, 100, caught(truth).mean())[0]


def test_copies_join_the_component_of_their_clique(corpus):
    rng = np.random.default_rng(9)
    near, other, lone = pair(rng, 0.97), " ".join(words(rng, 50)), " ".join(words(rng, 50))
    texts = {
        "web": [near[0], near[0] + " ", near[1], other, lone, "", "..."],
        "books": [near[0] + "\n", other + " ", "?!"],
    }
    datasets = corpus(texts)
    run(exact.STAGE, OracleEngine(), datasets)
    outcome = run(STAGE, OracleEngine(), datasets)
    rows, ids = layer(datasets, "minhash"), ids_of(texts)
    family = [ids[t] for t in (near[0], near[0] + " ", near[1], near[0] + "\n")]
    twins = [ids[other], ids[other + " "]]
    for group in (family, twins):
        for doc in group:
            assert (rows[doc]["component"], rows[doc]["component_docs"]) == (min(group), len(group))
    for text in (lone, "", "...", "?!"):
        assert rows[ids[text]]["component"] is None
    assert list(edges(datasets)) == [tuple(sorted((min(family[0], family[1], family[3]), family[2])))]
    assert outcome.observed["edges"] == 1
    assert outcome.observed["largest_component_docs"] == 4


def test_scopes_keep_datasets_apart(corpus):
    near = pair(np.random.default_rng(10), 0.98)
    datasets = corpus({"web": [near[0]], "code": [near[1]]})
    run(STAGE, OracleEngine(), datasets, exact=None, scopes=[["web"], ["code"]])
    assert edges(datasets) == {}
    run(STAGE, OracleEngine(), datasets, exact=None)
    assert len(edges(datasets)) == 1


def test_order_partitions_batches_and_engine_change_nothing(corpus, tmp_path, monkeypatch):
    rng = np.random.default_rng(11)
    texts = {
        "web": [t for s in (0.7, 0.8, 0.9) for _ in range(15) for t in pair(rng, s, 80)],
        "books": ["same words here"] * 3,
    }
    texts["web"] += [texts["web"][0], "", "one two"]
    engines = [OracleEngine(1), OracleEngine(2, keys=3), LocalEngine(tmp_path / "a", workers=0)]
    found = []
    for seed, engine in enumerate(engines):
        monkeypatch.setattr(minhash, "BATCH_BYTES", [1 << 20, 500, 5000][seed])
        datasets = corpus(texts, shards=seed + 1, seed=seed)
        for stage in (exact.STAGE, STAGE):
            if isinstance(engine, LocalEngine):
                engine.begin(tmp_path / stage.name)
            run(stage, engine, datasets)
        found.append((edges(datasets), layer(datasets, "minhash")))
    assert len(found[0][0]) > 20
    assert found[0] == found[1] == found[2]


def test_bucket_cap_is_counted(corpus):
    near = [pair(np.random.default_rng(12), 0.9)[0] + f" {i}" for i in range(12)]
    datasets = corpus({"web": near})
    outcome = run(STAGE, OracleEngine(), datasets, exact=None, max_bucket_rows=4)
    assert outcome.observed["unpaired_bucket_rows"] >= 8 * 5


def test_giant_component_is_warned_about(corpus):
    base = words(np.random.default_rng(13), 200)
    datasets = corpus({"web": [" ".join([*base, str(i)]) for i in range(1100)]})
    observed = run(STAGE, OracleEngine(), datasets, exact=None).observed
    assert observed["largest_component_docs"] == 1100
    assert "1,100 of 1,100 documents" in observed["warnings"][0]


def test_a_large_cluster_leaves_one_survivor(corpus):
    """1,500 near-equal documents, each compared with the hub and a few others; every fallen one is truly alike its survivor."""
    rng = np.random.default_rng(14)
    base = words(rng, 200)
    texts = [" ".join([*base, *words(rng, 4)]) for _ in range(1500)]
    datasets = corpus({"web": texts})
    run(STAGE, OracleEngine(), datasets, exact=None)
    table = relation(datasets)
    assert table.num_rows < 1500 * 14 * 33 / 2
    ids, ends = np.unique(
        np.concatenate([table.column(c).to_numpy(zero_copy_only=False) for c in "ab"]), return_inverse=True
    )
    assert len(ids) == 1500
    half, like = table.num_rows, table.column("jaccard").to_numpy()
    survivor = elect(ends[:half], ends[half:], like, rng.permutation(1500), 0.75)
    assert (survivor < 0).sum() == 1
