"""Requests come and go in any order: each gets the answer it would get alone, or an error that says why not."""

import copy
import dataclasses
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import ConfigError
from moe.batching import Batcher, Full, bucket
from moe.events import Event
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling
from moe.speculative import Pace

EOS = 0


@pytest.fixture(scope="module")
def model() -> Decoder:
    """fp64: what stands beside a request changes its logits by 1e-15, and no test has seen a token change by it."""
    config = preset("ci", vocab_size=40, eos=EOS)
    model = Decoder(dataclasses.replace(config, window=5, mtp_heads=2), seed=2).double().eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.weight[EOS] = 0
    return model


def _pace(drafts: int = 2) -> Pace:
    pace = Pace(drafts, window=3, pause=2)
    for rows in range(1, 9):
        pace.cost(rows, 1.0, 1.2)
    return pace


def _drain(batcher: Batcher) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    while not batcher.idle:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
    return found


def _tokens(events: list[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


def _alone(model: Decoder, prompt: list[int], sampling: Sampling) -> tuple[list[int], str | None]:
    batcher = Batcher(model, slots=1)
    (events,) = _drain_one(batcher, prompt, sampling)
    return _tokens(events), events[-1].finished


def _drain_one(batcher: Batcher, prompt: list[int], sampling: Sampling) -> list[list[Event]]:
    batcher.submit(prompt, sampling)
    return list(_drain(batcher).values())


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    max_tokens=st.integers(1, 12),
    seed=st.integers(0, 5),
)


@settings(max_examples=7, deadline=None, derandomize=True)
@given(st.data())
def test_company_changes_no_answer(model: Decoder, data: st.DataObject) -> None:
    """Any slots, chunks and lag; requests arrive and are cancelled between steps; rows are used again."""
    batcher = Batcher(
        model, slots=data.draw(st.integers(1, 3)), chunk=data.draw(st.sampled_from([2, 7, 64])),
        lag=data.draw(st.integers(0, 1)),
    )  # fmt: skip
    asked: dict[int, tuple[list[int], Sampling]] = {}
    found: dict[int, list[Event]] = {}
    cancelled: set[int] = set()
    for _ in range(data.draw(st.integers(1, 7))):
        for _ in range(data.draw(st.integers(0, 2))):
            prompt = data.draw(st.lists(st.integers(0, 39), max_size=20))
            sampling = data.draw(SAMPLINGS)
            asked[batcher.submit(prompt, sampling)] = prompt, sampling
        if asked and data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(sorted(asked)))
            batcher.cancel(gone)
            cancelled.add(gone)
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
    for request, events in _drain(batcher).items():
        found.setdefault(request, []).extend(events)
    assert found.keys() == asked.keys()
    for request, (prompt, sampling) in asked.items():
        assert [e.finished is not None for e in found[request]] == [False] * (len(found[request]) - 1) + [True]
        expected, how = _alone(model, prompt, sampling)
        got = _tokens(found[request])
        if found[request][-1].finished == "cancelled":
            assert request in cancelled
            assert got == expected[: len(got)]
        else:
            assert (got, found[request][-1].finished) == (expected, how)


def test_one_batch_of_speculating_requests_beside_sampled_ones(model: Decoder) -> None:
    """Greedy answers stay those of plain decoding where rounds and steps alternate; sampled ones stay themselves."""
    asked = [
        ([1, 2], Sampling(temperature=0, max_tokens=20)),
        ([3] * 9, Sampling(seed=4, max_tokens=20)),
        ([], Sampling(temperature=0, repetition_penalty=1.3, max_tokens=20)),
    ]
    runs = []
    for order in (asked, asked[::-1], asked):
        batcher = Batcher(model, slots=3, speculate=2, pace=_pace(), chunk=4, lag=1)
        ids = [batcher.submit(*request) for request in order]
        events = _drain(batcher)
        assert batcher.acceptance.rounds > 0
        runs.append([_tokens(events[i]) for i in ids])
    assert runs[0] == runs[2]
    for run in (runs[0], runs[1][::-1]):
        assert [run[0], run[2]] == [_alone(model, *asked[i])[0] for i in (0, 2)]


def test_a_long_prompt_does_not_stall_the_others(model: Decoder) -> None:
    batcher = Batcher(model, slots=2, chunk=4)
    short = batcher.submit([1], Sampling(temperature=0, max_tokens=30))
    first = batcher.step()
    assert [(e.id, len(e.tokens)) for e in first] == [(short, 1), (short, 1)]  # its prompt, and a step
    long = batcher.submit(list(range(1, 36)), Sampling(temperature=0, max_tokens=3))
    steps = [batcher.step() for _ in range(9)]  # 36 tokens with EOS
    assert [[e.id for e in events] for events in steps] == [[short]] * 8 + [[long, short, long]]


def test_short_prompts_are_read_together(model: Decoder) -> None:
    batcher = Batcher(model, slots=4, chunk=8)
    ids = [batcher.submit([5] * n, Sampling(temperature=0, max_tokens=1)) for n in (1, 3, 1, 1)]
    seen = [[e.id for e in batcher.step()] for _ in range(3)]
    # 8 // 2 rows of two tokens each: the first, third and fourth are done, the second reads the rest then
    assert seen == [[ids[0], ids[2], ids[3]], [ids[1]], []]
    assert batcher.idle


def test_full_queue_and_cancellation(model: Decoder) -> None:
    batcher = Batcher(model, slots=1, queue=2)
    ids = [batcher.submit([1], Sampling(max_tokens=9)) for _ in range(2)]
    with pytest.raises(Full, match="the queue is full, got 2 requests waiting; try again later"):
        batcher.submit([1])
    batcher.cancel(ids[1])
    (event,) = [e for e in batcher.step() if e.id == ids[1]]
    assert (event.tokens, event.finished) == ((), "cancelled")
    batcher.cancel(ids[0])
    assert [(e.id, e.finished) for e in batcher.step()] == [(ids[0], "cancelled")]
    batcher.cancel(ids[0])
    assert batcher.step() == []
    assert batcher.idle
    assert not batcher.wait(0)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([1] * 64, Sampling(), r"exceed the context, got 64 \+ 1 tokens, expected 63 in the prompt; shorten"),
        ([1] * 10, Sampling(max_tokens=55), r"got 10 \+ 55 tokens, expected 1 to 54 new ones within 64; shorten"),
        ([40], Sampling(), "outside the vocabulary, expected 0 to 39"),
        ([1], Sampling(stop_tokens=(-1,)), "outside the vocabulary"),
        ([1], Sampling(stop=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served(model: Decoder, prompt: list[int], sampling: Sampling, message: str) -> None:
    batcher = Batcher(model, slots=1)
    with pytest.raises(ConfigError, match=message):
        batcher.submit(prompt, sampling)
    assert batcher.idle
    with pytest.raises(ConfigError, match="nothing to continue"):
        Batcher(model, slots=1, prefix=()).submit([])
    with pytest.raises(ConfigError, match="must be positive, got 0"):
        Batcher(model, slots=0)
    with pytest.raises(ConfigError, match="must be positive, got 1, 64, 256, 0"):
        Batcher(model, slots=1, context=0)


def test_answers_fill_the_context_to_its_last_place(model: Decoder) -> None:
    for speculate in (0, 2):
        batcher = Batcher(model, slots=2, speculate=speculate, pace=_pace() if speculate else None, context=20)
        events = _drain_one(batcher, [7, 8, 9], Sampling(temperature=0))[0]
        assert (len(_tokens(events)), events[-1].finished) == (17, "length")
        assert _tokens(events) == _alone(model, [7, 8, 9], Sampling(temperature=0, max_tokens=17))[0]


def test_threads_submit_and_cancel_while_one_steps(model: Decoder) -> None:
    batcher = Batcher(model, slots=2, queue=100)
    ids: list[int] = []

    def ask(number: int) -> None:
        for i in range(5):
            ids.append(batcher.submit([number, i], Sampling(max_tokens=3, seed=number)))
        batcher.cancel(ids[-1])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    assert batcher.wait(30)
    found: dict[int, list[Event]] = {}
    while any(t.is_alive() for t in threads) or not batcher.idle:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(ids) == list(range(20))
    assert all(events[-1].finished for events in found.values())


@torch.no_grad()
@pytest.mark.parametrize("speculate", [0, 2])
def test_log_probabilities_are_the_models_own(model: Decoder, speculate: int) -> None:
    batcher = Batcher(model, slots=2, speculate=speculate, pace=_pace() if speculate else None)
    prompt = [4, 5]
    batcher.submit([9], Sampling(max_tokens=10))
    wanted = batcher.submit(prompt, Sampling(temperature=0.5, top_k=4, seed=3, max_tokens=8, logprobs=2))
    events = _drain(batcher)
    answer, reported = _tokens(events[wanted]), [lp for e in events[wanted] for lp in e.logprobs or ()]
    assert all(e.logprobs is None for e in events[0])
    assert len(answer) == len(reported)
    log_p = model(torch.tensor([[EOS, *prompt, *answer]]))[0].log_softmax(-1)
    for i, (token, found) in enumerate(zip(answer, reported, strict=True)):
        row = log_p[len(prompt) + i]
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        top = row.topk(2)
        assert [t for t, _ in found.top] == top.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Token n + 1 is the n-th of some bytes, so that characters and stop strings fall across tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:39]
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("speculate", [0, 2])
def test_stop_strings_across_tokens(model: Decoder, tokenizer: Tokenizer, speculate: int) -> None:
    def run(sampling: Sampling) -> list[Event]:
        batcher = Batcher(model, tokenizer, slots=1, speculate=speculate, pace=_pace() if speculate else None)
        return _drain_one(batcher, [1, 2], sampling)[0]

    free = run(Sampling(temperature=0, max_tokens=20))
    text = "".join(e.text for e in free)
    assert text == tokenizer.decode(_tokens(free))
    assert len(text) == 20
    stop = text[7:10]
    end = text.index(stop)
    events = run(Sampling(temperature=0, max_tokens=20, stop=("unseen", stop)))
    assert "".join(e.text for e in events) == text[:end]
    assert events[-1].finished == "stop"
    assert _tokens(events) == _tokens(free)[: end + 3], "tokens up to the one that completed the stop string"
    held = run(Sampling(temperature=0, max_tokens=end + 2, stop=(stop,)))
    assert ("".join(e.text for e in held), held[-1].finished) == (text[: end + 2], "length"), "held back, then released"


def test_stop_tokens_and_eos_end_an_answer_and_are_not_part_of_it(model: Decoder) -> None:
    free, how = _alone(model, [3, 1], Sampling(temperature=0, max_tokens=20))
    assert how == "length"
    token = free[6]
    first = free.index(token)
    stopped = _alone(model, [3, 1], Sampling(temperature=0, max_tokens=20, stop_tokens=(token, 39)))
    assert stopped == (free[:first], "stop")


def test_the_token_that_ends_an_answer_has_its_log_probability() -> None:
    """As other servers report it: a client that asks for one token of a finished text gets one row."""
    vocab = 50
    config = preset("ci", vocab_size=vocab, eos=0)
    model = Decoder(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # of equals the lowest, EOS, is taken
    batcher = Batcher(model, slots=1)
    batcher.submit([5, 6], Sampling(temperature=0, max_tokens=3, logprobs=1))
    last = [event for _ in range(4) for event in batcher.step()][-1]
    assert (last.tokens, last.end, last.finished) == ((), 0, "stop")
    assert last.logprobs is not None
    assert [lp.logprob for lp in last.logprobs] == pytest.approx([-math.log(vocab)])


def test_buckets() -> None:
    assert [bucket(n, 12) for n in (1, 2, 3, 4, 5, 9, 12)] == [1, 2, 4, 4, 8, 12, 12]


BAD = 13  # the token behind which a broken model gives no numbers


@pytest.fixture
def broken(model: Decoder) -> Decoder:
    """The model with one entry of its embedding lost: whoever reads that token gets NaN, nobody else."""
    lost = copy.deepcopy(model)
    with torch.no_grad():
        lost.model["embed_tokens"].weight[BAD] = math.nan
    return lost


@pytest.mark.parametrize(("speculate", "lag"), [(0, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_their_request_alone(
    model: Decoder, broken: Decoder, speculate: int, lag: int, temperature: float
) -> None:
    batcher = Batcher(
        broken, slots=2, speculate=speculate, pace=_pace() if speculate else None, lag=lag, chunk=4
    )  # fmt: skip
    settings = Sampling(temperature=temperature, top_k=1, max_tokens=12)  # of one token, so that drafts change nothing
    good = batcher.submit([1, 2], settings)
    bad = [batcher.submit(prompt, settings) for prompt in ([BAD], [5] * 9 + [BAD, 7], [BAD])]
    gone = batcher.submit([BAD] * 30, settings)
    behind = [batcher.submit([3, 4], settings) for _ in range(2)]
    found: dict[int, list[Event]] = {}
    while not batcher.idle:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
        if any(r.id == gone and r.fed for r in batcher._running.values()):
            batcher.cancel(gone)  # before anybody could tell: its row holds what it has read
    for request in bad:
        (event,) = found[request]
        assert (event.tokens, event.finished) == ((), "failed")
        assert event.error is not None
        assert "got logits that are not finite behind" in event.error
    assert found[gone][-1].finished == "cancelled"
    for request, prompt in ((good, [1, 2]), *((b, [3, 4]) for b in behind)):
        assert (_tokens(found[request]), found[request][-1].finished) == _alone(model, prompt, settings)


def test_what_was_written_before_the_logits_were_lost_stays(model: Decoder, broken: Decoder) -> None:
    """And an infinite logit is as lost as a NaN."""
    free, _ = _alone(model, [3, 1], Sampling(temperature=0, max_tokens=20))
    token = next(t for t in free if t not in (3, 1))
    with torch.no_grad():
        broken.model["embed_tokens"].weight.copy_(model.model["embed_tokens"].weight)
        broken.model["embed_tokens"].weight[token] = math.nan
    (events,) = _drain_one(Batcher(broken, slots=1), [3, 1], Sampling(temperature=0, max_tokens=20))
    assert (_tokens(events), events[-1].finished) == (free[: free.index(token) + 1], "failed")
    with torch.no_grad():
        broken.model["embed_tokens"].weight.copy_(model.model["embed_tokens"].weight)
        broken.lm_head.weight[:] = math.inf
    (events,) = _drain_one(Batcher(broken, slots=1), [3, 1], Sampling(temperature=0, max_tokens=20))
    assert (_tokens(events), events[-1].finished) == ([], "failed")
