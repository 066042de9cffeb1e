"""Kernels of the raters against values worked out by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.raters import corrupt, labels, linear
from classifiers.raters.features import features, token_pieces
from classifiers.raters.ngrams import FIXED, Scorer, characters, train
from core.errors import ConfigError
from core.schema import TEXT
from core.text import code_points

TEXTS = st.lists(st.text(alphabet="ab A9.,\n日é-", max_size=40), min_size=1, max_size=6)


def column(*texts):
    return pa.array(texts, TEXT)


def tokens_of(*texts):
    text = code_points(column(*texts))
    found = token_pieces(text)
    chars = text.points.tobytes().decode("utf-32-le")
    words = [chars[s:e] for s, e in zip(found.start, found.end, strict=True)]
    return [words[a:b] for a, b in zip(found.first[:-1], found.first[1:], strict=True)]


def ids_of(*texts, bits=18):
    families = features(column(*texts), bits)
    return [[f.ids[f.first[d] : f.first[d + 1]].tolist() for f in families] for d in range(len(texts))]


def test_tokens_by_hand():
    assert tokens_of("Hello, World!! 2024\n\nab", "", "日本 a--b", "\n", "x\n") == [
        ["Hello", ",", "World", "!!", "2024", "\n\n", "ab"],
        [],
        ["日", "本", "a", "--", "b"],
        ["\n"],
        ["x", "\n"],
    ]


def test_features_fold_case_and_digits_and_count_ngrams_within_a_document():
    upper, lower, other = ids_of("Run 17 x", "run 42 X", "walk 42 x")
    assert [len(family) for family in upper] == [3, 2, 2, 1]
    assert upper[:2] == lower[:2]  # words alike, shapes not: a capital stands elsewhere
    assert upper[2] != lower[2]
    assert other[0][1:] == lower[0][1:]
    assert other[0][0] != lower[0][0]
    assert ids_of("Run 17 x", "y")[0] == upper  # nothing reaches across documents


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_features_of_a_document_do_not_depend_on_its_neighbours(texts):
    together = ids_of(*texts)
    assert together == [ids_of(t)[0] for t in texts]


def test_language_model_of_five_characters_by_hand():
    """` ab a `: bigrams ' a' 2, 'ab' 1, 'b ' 1, 'a ' 1. D2 = 3/(3+2) = .6; continuations a 1, b 1, ' ' 2, D1 = 2/(2+2) = .5."""
    model = train(column("ab a"), 2)
    assert model.alphabet == 4
    assert model.base == pytest.approx(0.5 * 3 / 4)
    unigram = {"a": 0.5 / 4 + 0.375 / 4, "b": 0.5 / 4 + 0.375 / 4, " ": 1.5 / 4 + 0.375 / 4, "z": 0.375 / 4}
    a_after_space = 1.4 / 2 + 0.6 / 2 * unigram["a"]
    space_after_a = 0.4 / 2 + 0.6 * 2 / 2 * unigram[" "]
    z_after_space, space_after_z = 0.6 / 2 * unigram["z"], unigram[" "]
    bits, count = Scorer(model).bits(column("a", "z", "", " A\n"))
    assert count.tolist() == [2, 2, 0, 2]
    expected = [-math.log2(a_after_space * space_after_a), -math.log2(z_after_space * space_after_z), 0]
    assert (bits[:3] / FIXED).tolist() == pytest.approx(expected, abs=2 / FIXED)
    assert bits[3] == bits[0]  # folded and trimmed


@pytest.mark.parametrize("start", ["the ca", "zz", "t"])
def test_language_model_probabilities_add_up_to_one(start):
    """Over every character seen, the space, and one for all others: the last step of a text's cost, character by character."""
    text = "the cat sat on the mat and a hat"
    scorer = Scorer(train(column(text, text[::-1]), 3))
    ended = {c: cost_of_last(scorer, start, c) for c in [*sorted(set(text) - {" "}), "\u4e00"]}
    ended[" "] = int(scorer.bits(column(start))[0][0]) - cost_until(scorer, start)
    assert sum(2 ** (-cost / FIXED) for cost in ended.values()) == pytest.approx(1, abs=0.01)


def cost_until(scorer, text):
    """The cost of a text up to its last character, without the space behind it."""
    found = characters(column(text))
    cut = found._replace(at=found.at[:-1], room=found.room[:-1], first=np.array([0, len(found.at) - 1]))
    return int(scorer.costs(cut).sum())


def cost_of_last(scorer, start, char):
    return cost_until(scorer, start + char) - cost_until(scorer, start)


@given(TEXTS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_language_model_does_not_depend_on_the_order_of_texts(texts, order):
    one, other = train(column(*texts), order), train(column(*reversed(texts)), order)
    assert one.base == other.base
    for a, b in zip(one.levels, other.levels, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    together, _ = Scorer(one).bits(column(*texts))
    assert together.tolist() == [int(Scorer(one).bits(column(t))[0][0]) for t in texts]
    assert np.isfinite(together).all()


def test_auc_by_hand():
    score = np.array([3.0, 1.0, 2.0, 2.0, np.nan])
    label = np.array([1, 0, 1, 0, 1])
    assert linear.auc(score, label, ["x"] * 5) == pytest.approx(3.5 / 4)  # of four pairs one is a tie
    assert linear.auc(score, label, ["x", "x", "y", "y", "y"]) == pytest.approx(1.5 / 2)  # pairs within a stratum only
    assert linear.auc(score, label, ["a", "b", "c", "d", "e"]) is None


def test_cells_weigh_labels_of_a_language_alike_and_leave_one_sided_languages_out():
    label = np.array([1] * 20 + [0] * 60 + [1] * 40)
    weight = linear.cell_weights(label, ["en"] * 80 + ["fr"] * 40)
    assert weight[:20].sum() == pytest.approx(weight[20:80].sum())
    assert weight[80:].sum() == 0


def test_folds_hold_groups_of_both_labels():
    group = ["a"] * 5 + ["b"] * 3 + ["c"] * 4 + ["d"] * 2 + ["e"]
    label = np.array([1] * 8 + [0] * 7)
    fold = linear.folds(group, label)
    assert [sorted({group[i] for i in np.flatnonzero(fold == f)}) for f in (0, 1)] == [["a", "c", "e"], ["b", "d"]]
    assert len({(g, f) for g, f in zip(group, fold.tolist(), strict=True)}) == 5  # no group is torn


def test_fitting_twice_gives_equal_weights_and_signs_are_right():
    texts = column(*[f"good apple {i}" for i in range(30)], *[f"bad stone {i}" for i in range(30)])
    X = linear.matrix(texts, 12)
    label = np.array([1] * 30 + [0] * 30, dtype=np.int8)
    one, two = (linear.fit(X, label, np.ones(60), 1.0) for _ in range(2))
    assert np.array_equal(one.weight, two.weight)
    assert one.bias == two.bias
    assert linear.logits(linear.matrix(column("good apple 7"), 12), one)[0] > 0
    families = features(texts, 12)
    total, count = linear.sums(families, one.weight[:, None])
    by_hand = (total[:, 0] / np.sqrt(count) + one.bias) / linear.FIXED
    assert np.allclose(by_hand, linear.logits(X, one), atol=1e-9)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://docs.flask.example/a?b", "flask.example"),
        ("http://user@www.bbc.co.uk:80/x", "bbc.co.uk"),
        ("https://example.org", "example.org"),
        (None, ""),
        ("no url", ""),
    ],
)
def test_site(url, expected):
    assert labels.site(url) == expected


def test_density_counts_only_what_is_stated_in_sentences():
    listed = "Anna Berg 12 Basel 1999\nfrom 300 Bern"
    stated = "The lantern is an old lamp that Anna Berg built in 1999."
    low, high = labels.density(column(listed, stated))
    assert low == 0
    assert high == pytest.approx((1 + 1 + 3 * 1) / 12)  # 1999; `that Anna`; `is an`


def test_spoiling_depends_on_doc_id_only_and_changes_the_text():
    text = "Where the river bends, a mill stands. It was built long ago.\nNobody works there now, they say.\n" * 5
    ways = {corrupt.spoil(text, f"doc {i}")[1] for i in range(60)}
    assert ways == set(corrupt.SPOILED)
    assert corrupt.spoil(text, "doc 1") == corrupt.spoil(text, "doc 1")
    for way, spoil in corrupt.SPOILED.items():
        assert spoil(text, corrupt.Chance(way)) != text
    advert, theme = corrupt.advertise(text, "doc 3", "de")
    assert labels.lexicon_hits(advert, "de") > 0
    assert theme in corrupt.lexicon()["de"]
    assert sorted(corrupt.scramble(text, "doc 4")[0].replace("\n", " ").split()) != text.split()


@pytest.mark.parametrize("text", ["", "\n", "a", " ", "\u65e5\u672c"])
def test_spoiling_survives_short_texts(text):
    for i in range(20):
        made = [corrupt.spoil(text, str(i)), corrupt.advertise(text, str(i), "zh"), corrupt.scramble(text, str(i))]
        assert all(isinstance(spoilt, str) and how for spoilt, how in made)


def test_a_labelled_file_with_a_bad_line_names_it(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .*label"):
        labels.read_labelled(str(path), "train_raters")
    with pytest.raises(ConfigError, match="cannot be read"):
        labels.read_labelled(str(tmp_path / "absent.jsonl"), "train_raters")
