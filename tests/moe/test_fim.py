"""Rearranged documents: by their sentinels, and that nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from moe.data import ArrayTokenSource, PackedRows
from moe.fim import FimSource

PRE, MID, SUF = 200, 201, 202


def _source(docs: int, tokens: int = 20, masks: list[np.ndarray | None] | None = None) -> ArrayTokenSource:
    return ArrayTokenSource(
        [np.append(np.arange(1, tokens), 0) for _ in range(docs)],
        vocab_size=100,
        eos=0,
        text_bytes=[tokens] * docs,
        document_domains=[i % 2 for i in range(docs)],
        domains=("web", "code"),
        masks=masks,
    )


def _fim(source: ArrayTokenSource, fraction: float = 1.0, context: int = 64, seed: int = 0) -> FimSource:
    return FimSource(
        source, fraction=fraction, domains=("code",), sentinels=(PRE, MID, SUF), context=context, seed=seed
    )


def _undone(tokens: list[int]) -> tuple[list[int], str]:
    """The document that a rearranged one was, and how it was written."""
    assert tokens[0] == PRE
    middle, suffix = tokens.index(MID), tokens.index(SUF)
    if suffix == 1:
        return tokens[middle + 1 : -1] + tokens[2:middle] + tokens[-1:], "spm"
    return tokens[1:suffix] + tokens[middle + 1 : -1] + tokens[suffix + 1 : middle] + tokens[-1:], "psm"


def test_every_rearranged_document_can_be_put_back() -> None:
    source = _source(400)
    fim = _fim(source)
    ways, cuts = [], set()
    for i in range(0, 400, 2):
        assert fim.tokens(i).tolist() == source.tokens(i).tolist(), "web stays"
    for i in range(1, 400, 2):
        tokens = fim.tokens(i).tolist()
        document, way = _undone(tokens)
        assert document == source.tokens(i).tolist()
        assert len(tokens) == fim.length(i) == 23
        ways.append(way)
        cuts.add((tokens.index(MID), tokens.index(SUF)))
    assert 70 < ways.count("spm") < 130
    assert len(cuts) > 50, "places differ from document to document"
    assert fim.lengths().tolist() == [20, 23] * 200
    assert fim.vocab_size == 203


def test_the_fraction_is_drawn_by_seed_and_entry() -> None:
    half = _fim(_source(2000), fraction=0.5)
    assert 430 < half.rearranged.sum() < 570
    assert not half.rearranged[::2].any()
    longer = _fim(_source(2400), fraction=0.5)
    assert (longer.rearranged[:2000] == half.rearranged).all(), "other entries change nothing"
    assert (_fim(_source(2000), fraction=0.5, seed=1).rearranged != half.rearranged).any()
    assert not _fim(_source(50), fraction=0.0).rearranged.any()
    assert _fim(_source(20), seed=1).content != _fim(_source(20)).content != _source(20).content


def test_only_documents_that_fit_a_row_are_rearranged() -> None:
    assert _fim(_source(4), context=23).rearranged.tolist() == [False, True] * 2
    assert not _fim(_source(4), context=22).rearranged.any()
    assert _fim(_source(2, tokens=4)).rearranged.any()
    assert not _fim(_source(2, tokens=3)).rearranged.any()


def test_the_mask_moves_with_the_tokens_and_leaves_out_the_sentinels() -> None:
    odd = np.arange(20) % 2 == 1  # token t is t + 1, EOS last: even tokens and EOS count
    fim = _fim(_source(40, masks=[odd if i % 4 == 1 else None for i in range(40)]))
    assert fim.mask(0) is None
    for i in range(1, 40, 2):
        tokens, mask = fim.tokens(i), fim.mask(i)
        assert mask is not None
        wanted = (tokens < 100) & (tokens % 2 == 0) if i % 4 == 1 else tokens < 100
        assert mask.tolist() == wanted.tolist()
        assert mask[-1]


@given(st.integers(4, 30), st.integers(0, 20))
@settings(max_examples=30)
def test_packed_rows_lose_no_token(tokens: int, seed: int) -> None:
    fim = _fim(_source(30, tokens), fraction=0.5, context=24, seed=seed)
    documents = np.concatenate([fim.tokens(i) for i in range(30)])
    stream = PackedRows(fim, context=24, rows=1)
    seen = np.concatenate([stream.batch(s).targets.ravel() for s in range(stream.steps or 0)])
    assert seen.tolist() == documents[: len(seen)].tolist()
    packed = PackedRows(fim, context=24, rows=1, packing="best_fit")
    batches = [packed.batch(s) for s in range(packed.steps or 0)]
    counted = np.concatenate([b.targets[b.mask] for b in batches])
    assert sorted(counted.tolist()) == sorted(documents[documents < 100].tolist()), "all but sentinels and padding"


def test_bad_settings_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"fim_domains: no such domain in the mixture, got \['cod'\], expected some of"
    ):
        FimSource(_source(2), fraction=1, domains=("cod",), sentinels=(PRE, MID, SUF), context=9, seed=0)
    with pytest.raises(ConfigError, match=r"three different ids other than EOS, got \(200, 0, 202\) and EOS 0"):
        FimSource(_source(2), fraction=1, domains=("code",), sentinels=(PRE, 0, SUF), context=9, seed=0)
