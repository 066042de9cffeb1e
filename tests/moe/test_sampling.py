"""Distributions worked by hand, draws, and text that waits for what may follow."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from moe.sampling import CHOOSE, MODES, Sampling, Settings, choose, distribution, draws, log_probabilities
from moe.streaming import TextStream

# p = 1/2, 1/4, 1/8, 1/8 for tokens 2, 0, 3, 1
LOGITS = torch.tensor([[1 / 4, 1 / 8, 1 / 2, 1 / 8]]).log()
NOTHING_SEEN = torch.zeros(1, 4, dtype=torch.bool)


def _shares(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor = NOTHING_SEEN) -> list[float]:
    settings = Settings(1, 4, "cpu")
    settings.put(0, sampling)
    p = distribution(logits, settings, seen, sampling.mode)[0]
    return (p / p.sum()).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {2: 1 / 2, 0: 1 / 4, 1: 1 / 8, 3: 1 / 8}),
        (Sampling(top_k=2), {2: 2 / 3, 0: 1 / 3}),
        (Sampling(top_k=3), {2: 4 / 7, 0: 2 / 7, 1: 1 / 7}),  # of the two at 1/8 the lower id
        (Sampling(top_k=9), {2: 1 / 2, 0: 1 / 4, 1: 1 / 8, 3: 1 / 8}),
        (Sampling(top_p=0.6), {2: 2 / 3, 0: 1 / 3}),
        (Sampling(top_p=0.5), {2: 1.0}),
        (Sampling(top_k=2, top_p=0.6), {2: 1.0}),  # 1/2 is two thirds of what top-k left
        (Sampling(top_k=2, top_p=0.7), {2: 2 / 3, 0: 1 / 3}),
        (Sampling(temperature=0.5), {2: 16 / 22, 0: 4 / 22, 1: 1 / 22, 3: 1 / 22}),
        (Sampling(temperature=0.5, top_p=0.7), {2: 1.0}),  # 16 / 22 after the temperature
        (Sampling(temperature=0), {2: 1.0}),
        (Sampling(temperature=0, top_k=3, top_p=0.9), {2: 1.0}),
    ],
)
def test_distribution_by_hand(sampling: Sampling, expected: dict[int, float]) -> None:
    shares = {v: p for v, p in enumerate(_shares(LOGITS, sampling)) if p > 0}
    assert shares == pytest.approx(expected)


def test_repetition_penalty_by_hand() -> None:
    seen = torch.tensor([[True, True, False, False]])
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    weights = [math.exp(x) for x in (1.0, -2.0, 1.0, 0.5)]  # 2 / 2, -1 * 2
    expected = [w / sum(weights) for w in weights]
    assert _shares(logits, Sampling(repetition_penalty=2.0), seen) == pytest.approx(expected)
    likeliest = Sampling(temperature=0, repetition_penalty=4.0)
    assert (likeliest.mode, Sampling(temperature=0).mode) == ("sample", "greedy")
    assert _shares(logits, likeliest, seen) == [0, 0, 1, 0]
    assert _shares(torch.ones(1, 4), Sampling(temperature=0)) == [1, 0, 0, 0], "the lower id of equals"


def test_a_row_is_the_same_in_every_mode_and_company() -> None:
    each = [Sampling(temperature=0), Sampling(temperature=0.7), Sampling(top_k=5, top_p=0.8, temperature=1.5)]
    generator = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(3, 50, generator=generator), torch.rand(3, 50, generator=generator) < 0.3
    together = Settings(3, 50, "cpu")
    for row, sampling in enumerate(each):
        together.put(row, sampling)
    mixed = distribution(logits, together, seen, "filter")
    for row, sampling in enumerate(each):
        alone = Settings(1, 50, "cpu")
        alone.put(0, sampling)
        for mode in MODES[MODES.index(sampling.mode) :]:
            got = distribution(logits[row : row + 1], alone, seen[row : row + 1], mode)
            assert torch.equal(got[0], mixed[row])


def test_choice_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    last = 1 - 2.0**-53
    for draw, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (last, 3)):
        assert choose(p, torch.tensor([draw], dtype=torch.float64)).tolist() == [token]
    numbers = torch.from_numpy(draws(1, 4000))[:, CHOOSE]
    counts = Counter(choose(LOGITS.exp().expand(4000, -1), numbers).tolist())
    for token, share in enumerate((1 / 4, 1 / 8, 1 / 2, 1 / 8)):
        assert abs(counts[token] / 4000 - share) <= 4 * math.sqrt(share * (1 - share) / 4000)  # four standard errors


def test_streams_of_draws_are_keyed_and_extendable() -> None:
    assert np.array_equal(draws(5, 10), draws(5, 30)[:10])
    assert not np.array_equal(draws(5, 10), draws(6, 10))
    assert draws(-1, 2).shape == draws(2**70, 2).shape == (2, 3), "any integer is a seed"
    assert draws(5, 1)[0].tolist() == pytest.approx([0.73375, 0.59052, 0.20781], abs=1e-5), "on every machine"


def test_log_probabilities_by_hand() -> None:
    chosen, top, ids = log_probabilities(LOGITS, torch.tensor([3]))
    assert chosen.tolist() == pytest.approx([math.log(1 / 8)])
    assert (ids[0, :2].tolist(), top[0, :2].tolist()) == ([2, 0], pytest.approx([math.log(1 / 2), math.log(1 / 4)]))


def test_settings_out_of_range_are_named_together() -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1, top_k=0, top_p=0, repetition_penalty=0, stop=("",), max_tokens=0, logprobs=21)
    assert [p.split(":")[0].removeprefix("sampling.") for p in error.value.problems] == [
        *("temperature", "top_k", "top_p", "repetition_penalty", "stop", "max_tokens", "logprobs"),
    ]
    for value in (float("nan"), float("inf"), 1e-38):
        with pytest.raises(ConfigError, match="temperature"):
            Sampling(temperature=value)
    for value in (1e-40, 1e40):
        with pytest.raises(ConfigError, match="repetition_penalty"):
            Sampling(repetition_penalty=value)


def test_a_row_that_is_no_distribution_still_gives_a_token() -> None:
    for row in (float("nan"), 0.0, float("inf")):
        p = torch.tensor([[row] * 4, [0.0, 1.0, 0.0, 0.0]])
        token, other = choose(p, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
        assert (0 <= token < 4, other) == (True, 1)


@pytest.mark.parametrize("temperature", [1e-4, 2.0])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_settings_at_their_bounds_leave_a_distribution(temperature: float, penalty: float) -> None:
    logits = torch.tensor([[500.0, -500.0, 1.0, 0.0]])
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    assert sum(_shares(logits, sampling, torch.ones(1, 4, dtype=torch.bool))) == pytest.approx(1)


def _decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def _pieces(text: str, cuts: list[int], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """The released pieces where tokens are runs of bytes between the cuts."""
    raw, borders = text.encode(), sorted({0, *cuts, len(text.encode())})
    tokens = [raw[a:b] for a, b in pairwise(borders)]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"), stop)
    pieces = [stream.push(i) for i in range(len(tokens))]
    return [*pieces, stream.end()], stream.stopped


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("ab\né許🙂\ufffd"), max_size=12),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.text(st.sampled_from("abé🙂"), min_size=1, max_size=3), max_size=3).map(tuple),
)
@example("aabab", [1, 2, 3, 4], ("bab",))
def test_text_does_not_depend_on_token_borders(text: str, cuts: list[int], stop: tuple[str, ...]) -> None:
    pieces, stopped = _pieces(text, cuts, stop)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)


def test_text_is_held_back_no_longer_than_needed() -> None:
    stream = TextStream(_decode_bytes, ("<end>",))
    assert [stream.push(b) for b in b"a<e<end"] == ["a", "", "", "<e", "", "", ""]
    assert (stream.push(ord("x")), stream.stopped) == ("<endx", False)
    assert [stream.push(b) for b in "é许".encode()] == ["", "é", "", "", "许"]
    assert [stream.push(b) for b in b"\xff\xff\xff\xff\xffz"] == ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3 + "z"]
    assert [stream.push(b) for b in b"<end>more"] == [""] * 9
    assert (stream.stopped, stream.end()) == (True, "")
    stream = TextStream(_decode_bytes, ("<end>",))
    assert stream.push(ord("<")) + stream.push(0xC3) == ""
    assert stream.end() == "<\ufffd", "nothing follows: all of it is text"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0xFF, 0x80, 0xF0, 0x9F, 0x98, 0xC3, 0xA9, ord("a")]), max_size=60))
@example([*b"\xff" * 20, *"🙂".encode() * 20, *b"\xf0\x9f" * 20])
def test_bytes_that_are_no_text_come_out_as_they_are_decoded(ids: list[int]) -> None:
    stream = TextStream(_decode_bytes)
    assert "".join([*(stream.push(i) for i in ids), stream.end()]) == _decode_bytes(ids)


@pytest.mark.parametrize("raw", [b"\xff", b"\x80", b"\xf0\x9f", b"\xf0\x9f\x98\xff"])
def test_bytes_that_are_no_text_are_not_decoded_ever_again(raw: bytes) -> None:
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return _decode_bytes(ids)

    stream = TextStream(decode)
    text = "".join(stream.push(b) for b in raw * 200)
    assert text + stream.end() == _decode_bytes(list(raw * 200))
    assert max(lengths) < 40


def test_a_stop_string_is_compared_no_further_than_the_text() -> None:
    compared = []

    class Counted(str):
        def __getitem__(self, key: object) -> str:
            compared.append(key)
            return super().__getitem__(key)  # type: ignore[index]

    stream = TextStream(_decode_bytes, (Counted("x" * 100_000),))
    assert "".join(stream.push(b) for b in b"abcx") == "abc"
    assert len(compared) < 20
