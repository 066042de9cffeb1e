"""Vectors of texts: tables and sums by hand, both kinds of vectors, the two stages, and input that has no words."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError, StageError
from core.schema import TEXT
from mixtures import embed, embedder
from mixtures.hashed_vectors import DAMPED, features, hashed_vectors
from mixtures.static_vectors import StaticVectors, make_table, to_int8, token_probabilities, token_ranks
from tests.mixtures.conftest import documents
from tests.mixtures.encoders import VOCABULARY, tokenizer, write_encoder

TEXTS = [
    "The river under the stone bridge.",
    "the RIVER, under the: stone bridge",
    "Seven cats; a captain!",
    "... 。 --- \x00",
    "",
    "zebra quagga",
    "Река под каменным мостом, и вода холодна.",
    "河上的石桥有七级台阶。",
    "the " * 3000 + "captain",
    "a\ud7ff\U0010ffff river\U0001f600stone",
]


def test_ranks_follow_the_vocabulary():
    rank = token_ranks(["[PAD]", "[unused7]", "a", "é", "##b", "the", "of", "##ing", "[", "river"])
    assert rank.tolist() == [np.inf, np.inf, 1, 2, 1, 1, 2, 3, 1, 4]
    np.testing.assert_allclose(token_probabilities(np.array([1.0, 2.0, np.inf])), [0.6, 0.4, 0])


def test_a_table_by_hand():
    # p = .6, .4; mean .2; centred .8, -1.2; weights .4 / (.4 + p) = .4, .5; products .32, -.6; largest .6 -> 32767
    table = make_table(np.array([[1.0, 0], [-1, 0], [9, 9]]), np.array([1, 2, np.inf]), 1, 0.4)
    assert table.tolist() == [[17476], [-32767], [0]]
    assert table.dtype == np.int16


def test_a_table_of_equal_vectors_is_refused():
    with pytest.raises(StageError, match="every token the same vector"):
        make_table(np.ones((3, 4)), np.arange(1.0, 4), 2, 1e-3)


def test_sums_count_known_words():
    table = np.zeros((len(VOCABULARY), 3), np.int16)
    for word, row in (("river", [1, 0, 5]), ("cat", [0, 7, 0]), ("##s", [0, 0, -2])):
        table[VOCABULARY.index(word)] = row
    vectors = StaticVectors(tokenizer(), table)
    got = vectors.sums(["River river, RIVER", "cats_river xyz", "", "xyz"])
    assert got.tolist() == [[3, 0, 15], [1, 7, 3], [0, 0, 0], [0, 0, 0]]


def test_a_table_that_is_too_short_is_refused():
    with pytest.raises(StageError, match="19 tokens, the table 5"):
        StaticVectors(tokenizer(), np.ones((5, 3), np.int16))


def test_int8_keeps_the_direction():
    assert to_int8(np.array([[1, -4, 0], [0, 0, 0], [1 << 40, 1 << 40, 0]])).tolist() == [
        [32, -127, 0],
        [0, 0, 0],
        [127, 127, 0],
    ]


def test_features_are_words_runs_of_four_and_pairs():
    document, found = features(pa.array(["abcde ab", "你好吗", "", "abcd"], TEXT))
    assert np.bincount(document, minlength=4).tolist() == [4, 5, 0, 1]
    assert len(set(found.tolist())) == 10


def test_damped_counts():
    assert DAMPED[[0, 2]].tolist() == [32, 67]  # 32 (1 + ln 3) = 67.2
    one, three = hashed_vectors(pa.array(["ab", "ab Ab, AB!"], TEXT), 16)
    assert np.count_nonzero(one) == 1
    assert np.abs(one).sum() == 32
    assert three.tolist() == (np.sign(one) * 67).tolist()


def test_shared_spelling_is_likeness():
    texts = ["вода течёт под каменным мостом", "каменный мост над водой", "sept marches sous la terre"]
    v = hashed_vectors(pa.array(texts, TEXT), 512).astype(float)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    assert v[0] @ v[1] > 0.2
    assert abs(v[0] @ v[2]) < 0.15


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Both kinds of state, without a root."""
    rng = np.random.default_rng(1)
    table = rng.integers(-32767, 32768, (len(VOCABULARY), 24)).astype(np.int16)
    table[:5] = 0
    config = embed.EmbedConfig(max_chars=2000, language="language.language")
    static = StaticVectors(tokenizer(), table)
    return [embed.EmbedState(config, 24, ("en",), s) for s in (static, None)]


def batch(texts, languages):
    columns = [pa.array(texts, TEXT), pa.array(languages, TEXT)]
    return pa.RecordBatch.from_arrays(columns, names=["text", "language.language"])


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(max_size=60) | st.sampled_from(TEXTS), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    turn=st.randoms(use_true_random=False),
)
def test_neither_batch_nor_order_moves_a_vector(states, texts, cut, turn):
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    languages = [turn.choice(["en", "ru", None]) for _ in texts]
    order = turn.sample(range(len(texts)), len(texts))
    for state in states:
        whole = embed.embed(state, batch(texts, languages))[0].to_pylist()
        parts = []
        for at in (order[:cut], order[cut:]):
            made, rejects = embed.embed(state, batch([texts[i] for i in at], [languages[i] for i in at]))
            parts += made.to_pylist()
            assert not rejects
        assert parts == [whole[i] for i in order]


def test_who_is_hashed(states):
    languages = ["en", "ru", None, "en"]
    rows = embed.embed(states[0], batch(["river"] * 3 + ["..."], languages))[0].column("model").to_pylist()
    assert rows == ["distilled", "hashed", "distilled", None]
    rows = embed.embed(states[1], batch(["river"] * 3 + ["..."], languages))[0].column("model").to_pylist()
    assert rows == ["hashed", "hashed", "hashed", None]


def test_only_the_start_is_read(states):
    long = "river stone " * 1000
    a, b = embed.embed(states[0], batch([long, long + "captain" * 50], ["en", "en"]))[0].column("vector").to_pylist()
    assert a == b


def encoder_house(house, folder, shards):
    house.add("web", shards)
    house.run(embedder.STAGE, model=str(folder), dims=8)
    return house


def vectors_of(house, name="web"):
    dataset = house.dataset(name)
    out = {}
    for shard in dataset.shards:
        ids = house.root.read_table(dataset.documents_name(shard), ["doc_id"]).column("doc_id").to_pylist()
        out |= dict(zip(ids, dataset.read_layer("embed", shard).to_pylist(), strict=True))
    return out


def test_stages_over_shards_and_workers(make_house, tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    table = documents("web", [t.encode("utf-8", "replace").decode() for t in TEXTS])
    one = encoder_house(make_house("one"), folder, {"a": table})
    two = encoder_house(make_house("two"), folder, {"b": table.slice(6), "c": table.slice(0, 6)})
    one.run(embed.STAGE)
    outcome = two.run(embed.STAGE, workers=2)
    assert outcome.accounts == {"rows": len(TEXTS), "computed": len(TEXTS), "rejected": 0}
    found = vectors_of(one)
    assert found == vectors_of(two)
    rows = list(found.values())
    assert rows[0]["vector"] == rows[1]["vector"]
    assert [r["vector"] is None for r in rows] == [i in (3, 4, 5, 6, 7) for i in range(len(TEXTS))]
    assert {len(r["vector"]) for r in rows if r["vector"]} == {8}
    for name in ("table.npy", "embedder.json", "tokenizer.json"):
        assert one.root.read_bytes(f"models/embedder/{name}") == two.root.read_bytes(f"models/embedder/{name}")


def test_the_table_is_the_encoder_through_make_table(house, tmp_path):
    from mixtures.bert import load_bert

    folder = write_encoder(tmp_path / "encoder")
    encoder_house(house, folder, {"a": documents("web", ["river"])})
    ids = np.array([[2, i, 3] for i in range(len(VOCABULARY))])
    expected = make_table(load_bert(str(folder)).encode(ids).mean(axis=1), token_ranks(VOCABULARY), 8, 1e-3)
    made = np.load(house.root.local_path("models/embedder/table.npy"))
    assert np.abs(made.astype(int) - expected).max() <= 2  # other batches, other roundings


def test_hashed_needs_no_model(house):
    house.add("web", {"a": documents("web", ["вода под мостом", "..."])})
    house.run(embedder.STAGE, kind="hashed", dims=64)
    house.run(embed.STAGE)
    assert [r["model"] for r in vectors_of(house).values()] == ["hashed", None]


def test_a_missing_model_says_what_to_do(tmp_path, house):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json.*correct `model`"):
        embedder.find_model(embedder.EmbedderConfig(model=str(tmp_path / "empty")))
    house.add("web", {"a": documents("web", ["river"])})
    with pytest.raises(StageError, match="run stage embedder first"):
        house.run(embed.STAGE)
    with pytest.raises(ConfigError, match="dims is too large, got 64, expected at most 16"):
        house.run(embedder.STAGE, model=str(write_encoder(tmp_path / "encoder")), dims=64)


def test_knobs_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="mean nothing for kind hashed"):
        embedder.EmbedderConfig(kind="hashed", layers=0)


def test_english_words_of_like_meaning_are_near(house):
    """The package's encoder, without its layers: seconds in place of minutes."""
    try:
        embedder.find_model(embedder.EmbedderConfig())
    except ConfigError as e:
        pytest.skip(str(e))
    texts = [
        "The court found the defendant guilty of fraud.",
        "A judge sentenced the lawyer for a crime.",
        "Boil the rice with onions, garlic and butter.",
        "Bake bread from flour, yeast, salt and oil.",
    ]
    house.add("web", {"a": documents("web", texts)})
    house.run(embedder.STAGE, layers=0)
    house.run(embed.STAGE)
    rows = [np.frombuffer(r["vector"], np.int8).astype(float) for r in vectors_of(house).values()]
    v = np.array([r / np.linalg.norm(r) for r in rows])
    near = v @ v.T
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3])
