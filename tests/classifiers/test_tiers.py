"""Tiers: percentiles, ensemble and veto by hand; laws of the stage; calibration."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rated import corpus, layer, rows, run

from classifiers.ensemble import FINE, ensemble, vetoed
from classifiers.percentiles import buckets, histogram, strata, tiers
from classifiers.raters.labels import RATERS
from classifiers.raters.score import LAYER as SCORES
from classifiers.raters.score import STAGE as SCORE
from classifiers.raters.train import STAGE as TRAIN
from classifiers.rules import preset
from classifiers.tiers import STAGE, TIERS
from core.errors import ConfigError, StageError
from core.schema import DOCUMENTS, TEXT
from core.storage import Root
from tests.builders import document, make_dataset, make_layer
from tests.dedup.memory_engine import OracleEngine


def test_buckets_weigh_by_bytes():
    h = histogram(np.array([3, 1, 1, 7]), np.array([10, 10, 10, 70]))
    assert (h.value.tolist(), h.mass.tolist()) == ([1, 3, 7], [20, 10, 70])
    # middles at 10, 25 and 65 of 100
    assert buckets(h).tolist() == [2, 5, 13]
    assert tiers(h, (0.15, 0.25, 0.40, 0.10, 0.10)).tolist() == [0, 1, 2]


def test_twenty_equal_documents_fill_twenty_buckets():
    h = histogram(np.arange(20), np.full(20, 5))
    assert buckets(h).tolist() == list(range(20))
    assert np.bincount(tiers(h, (0.15, 0.25, 0.40, 0.10, 0.10))).tolist() == [3, 5, 8, 2, 2]


def test_a_rater_that_says_the_same_of_all_is_in_the_middle():
    assert buckets(histogram(np.array([4, 4]), np.array([1, 9]))).tolist() == [10]
    assert buckets(histogram(np.array([4]), np.array([0]))).tolist() == [10]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=40))
def test_buckets_rise_with_the_score(pairs):
    value, mass = np.array(pairs).T
    found = buckets(histogram(value, mass)).astype(int)
    assert (np.diff(found) >= 0).all()
    assert found.min() >= 0
    assert found.max() <= 19


def test_small_languages_are_ranked_together():
    assert strata({"en": 500, "fr": 200, "fi": 199, "": 1}, 200, "*") == {"": "*", "en": "en", "fi": "*", "fr": "fr"}


def test_ensemble_and_veto_by_hand():
    """Columns: educational, knowledge, reference, fluency, commercial, integrity."""
    bucket = np.array(
        [
            [19, 0, 0, 10, 10, 10],  # one rater that is sure: 19; mean 49/6
            [5, 6, 7, 10, 10, 10],  # 7
            [5, 6, 7, 1, 10, 10],  # fluency vetoes: 1
            [5, 6, 7, 2, 10, 10],  # just not
            [-1, -1, -1, 4, 8, -1],  # no positive rater: the mean of the others
            [-1, -1, -1, -1, -1, -1],  # nobody says anything
        ],
        dtype=np.int8,
    )
    scores = np.full((6, 6), 4000)
    worst = vetoed(scores, bucket, 2)
    assert worst.tolist() == [20, 20, 1, 20, 20, 20]
    found = ensemble(bucket, worst)
    assert (found // FINE).tolist() == [19, 7, 1, 7, 5, 0]
    means = [49 / 120, 48 / 120, 39 / 120, 40 / 120, 12 / 40, 0]
    assert (found % FINE).tolist() == [int(m * FINE) for m in means]
    assert vetoed(scores, bucket, 0).tolist() == [20] * 6


def test_a_rater_vetoes_only_what_it_holds_for_bad():
    bucket = np.full((4, 6), 10, dtype=np.int8)
    bucket[0, 4] = bucket[1, 4] = bucket[2, 5] = bucket[3, 3] = 0
    scores = np.full((4, 6), 9000)
    scores[1, 4] = 4999  # commercial below one half
    assert vetoed(scores, bucket, 1).tolist() == [20, 0, 20, 0]  # perplexity has no half


def scored(root, docs, shards=2, seed=0):
    """A dataset of (language, bytes, six scores or None), rows spread over shards."""
    order = np.random.default_rng(seed).permutation(len(docs)) if seed else np.arange(len(docs))
    parts = [[int(i) for i in order[k::shards]] for k in range(shards)]
    tables = [pa.Table.from_pylist([document("web", f"{i}", f"text {i}") for i in part]) for part in parts]
    dataset = make_dataset(root, "web", [t.cast(DOCUMENTS) if t.num_rows else DOCUMENTS.empty_table() for t in tables])
    rows_ = [docs[i] for part in parts for i in part]
    columns = {r: pa.array([d[2][k] for d in rows_], pa.float32()) for k, r in enumerate(RATERS)}
    make_layer(dataset, "raters", {**columns, "bytes": pa.array([d[1] for d in rows_], pa.int64())})
    make_layer(dataset, "language", {"language": pa.array([d[0] for d in rows_], TEXT)})
    return (dataset,)


def random_docs(count, seed):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        scores = [None if rng.random() < 0.1 else round(float(x), 4) for x in rng.random(6)]
        out.append((("en", "en", "fr", "fr", "fi")[i % 5], int(rng.integers(1, 5000)), scores))
    return out


def test_tiers_have_the_mass_they_claim(tmp_path):
    root = Root(str(tmp_path / "root"))
    docs = random_docs(3000, 3)
    datasets = scored(root, docs)
    outcome = run(STAGE, root, datasets, floor_docs=700)
    assert outcome.accounts == {"docs": 3000, "unjudged_docs": 0, "strata": 3, "pooled_languages": 1}
    for mass in outcome.observed["mass"].values():
        total = sum(mass.values())
        for tier, share in zip(TIERS, (0.15, 0.25, 0.40, 0.10, 0.10), strict=True):
            assert mass[tier] / total == pytest.approx(share, abs=0.01)
    found = layer(datasets, "tiers")
    assert all(row["tier"] == TIERS[row["rank"]] for row in found.values())
    best = [row for row in found.values() if row["rank"] == 4]
    assert min(row["score"] for row in best) > 0.85
    assert all(max(row[f"{r}_bucket"] or 0 for r in RATERS) >= 15 for row in best)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 1000))
def test_order_shards_and_engine_change_nothing(tmp_path_factory, seed):
    docs = random_docs(200, 5)
    base = tmp_path_factory.mktemp("tiers")
    made = []
    for i, (shards, engine) in enumerate(((2, None), (5, None), (3, OracleEngine(seed)))):
        root = Root(str(base / f"root-{i}"))
        datasets = scored(root, docs, shards, seed * i)
        run(STAGE, root, datasets, engine, floor_docs=50)
        made.append(layer(datasets, "tiers"))
    assert made[0] == made[1] == made[2]


def test_one_document_languages_empty_texts_and_unrated_documents(tmp_path):
    root = Root(str(tmp_path / "root"))
    nobody = [None] * 6
    docs = [("en", 100, [0.5] * 6)] * 3 + [
        ("is", 10, [0.9] * 6),
        ("en", 0, nobody),
        (None, 5, [None, None, None, 0.3, None, None]),
    ]
    docs.append(("en", None, nobody))  # outside `where` of raters
    docs.append(("ja", 9, nobody))  # a language that no rater knows
    datasets = scored(root, docs, shards=1)
    outcome = run(STAGE, root, datasets, floor_docs=3)
    assert outcome.accounts == {"docs": 5, "unjudged_docs": 2, "strata": 2, "pooled_languages": 2}
    found = list(layer(datasets, "tiers").values())
    assert [row["tier"] for row in found[:3]] == ["medium"] * 3  # equal documents are never parted
    assert found[3]["rank"] is not None
    assert found[4]["tier"] is None  # an empty text: no rater applies, and none is held against it
    assert found[5]["fluency_bucket"] is not None
    assert found[6]["tier"] is None
    assert found[6]["score"] is None
    assert found[7]["tier"] is None


def test_where_leaves_documents_out_of_the_percentiles(tmp_path):
    root = Root(str(tmp_path / "root"))
    docs = [("en", 10, [i / 100] * 6) for i in range(100)]
    datasets = scored(root, docs)
    outcome = run(STAGE, root, datasets, where="raters.fluency >= 0.5", floor_docs=1)
    assert outcome.accounts["docs"] == 50
    found = layer(datasets, "tiers")
    assert sum(row["tier"] is None for row in found.values()) == 50
    with pytest.raises(StageError, match="no rated documents"):
        run(STAGE, root, datasets, where="raters.fluency > 2")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    root = Root(str(tmp_path_factory.mktemp("rated") / "root"))
    datasets = corpus(root)
    run(TRAIN, root, datasets, bits=14, order=3, lm_least_bytes=2000)
    run(SCORE, root, datasets)
    return root, datasets


@pytest.mark.parametrize("method", ["maximum", "stacked"])
def test_calibration_to_labelled_documents(rated, tmp_path, method):
    root, datasets = rated
    path = tmp_path / "labels.jsonl"
    lines = [
        {"text": d["text"] + " More.", "label": int(name == "reference")}
        for name, docs in rows(90).items()
        for d in docs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(STAGE, root, datasets, labelled=str(path), method=method)
    found = layer(datasets, "tiers")
    chance = np.array([row["probability"] for row in found.values()])
    score = np.array([row["score"] for row in found.values()])
    assert ((chance >= 0) & (chance <= 1)).all()
    order = np.argsort(score, kind="stable")
    assert (np.diff(chance[order]) >= -1e-6).all()  # isotonic in the ensemble
    if method == "stacked":
        curated = [found[d["doc_id"]]["probability"] for d in rows()["reference"]]
        assert np.mean(curated) > np.mean(chance) + 0.1


def test_config_and_labelled_files_are_checked(rated, tmp_path):
    root, datasets = rated
    with pytest.raises(ConfigError, match="add up to 1"):
        STAGE.config(shares=(0.5, 0.5, 0.5, 0, 0))
    with pytest.raises(ConfigError, match="labelled"):
        STAGE.config(method="stacked")
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(ConfigError, match="too few labelled documents"):
        run(STAGE, root, datasets, labelled=str(path))


def test_the_preset_keeps_from_a_tier_up():
    assert [(r.reason, r.when) for r in preset("tiers")] == [("low_tier", "tiers.rank < 2")]
    assert preset("tiers", {"least": "medium_high"})[0].when == "tiers.rank < 3"
    with pytest.raises(ConfigError):
        preset("tiers", {"least": "best"})
    assert SCORES.names[-1] == "bytes"
