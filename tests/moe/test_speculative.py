"""Drafts against the uncached heads, verification against the distribution it promises, and the switch."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from moe.batching import Batcher, Event
from moe.decode import Decode
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import DRAFT, Sampling, choose, draws
from moe.speculative import Acceptance, Pace, verify, verify_greedy

EOS = 0


def _model(
    seed: int, *, vocab: int = 5, window: int = 4, heads: int = 3, dtype: torch.dtype = torch.float32
) -> Decoder:
    """Few tokens, so that drafts of untrained heads stand now and then; sharper logits than at the start of training."""
    config = preset("ci", vocab_size=vocab, eos=EOS)
    config = dataclasses.replace(config, layers=3, full_every=2, window=window, context=64, mtp_heads=heads)
    model = Decoder(config, seed=seed)
    with torch.no_grad():
        for weight in (model.lm_head.weight, *(h.output.weight for h in model.mtp)):
            weight *= 10
        model.lm_head.weight[EOS] = 0  # the others' logits lie above and below 0: answers of some length
    return model.to(dtype).eval()


def _free(drafts: int, window: int = 10**6, pause: int = 512) -> Pace:
    """Rounds cost next to nothing."""
    pace = Pace(drafts, window=window, pause=pause)
    for rows in (1, 2, 3, 4, 8, 64):
        pace.cost(rows, 1.0, 0.1)
    return pace


def _run(
    model: Decoder, prompts: list[list[int]], sampling: Sampling, pace: Pace | None, **settings: int
) -> list[list]:
    batcher = Batcher(
        model, slots=settings.pop("slots", 3), speculate=pace.drafts if pace else 0, pace=pace, queue=5000, **settings
    )
    for seed, prompt in enumerate(prompts):
        batcher.submit(prompt, dataclasses.replace(sampling, seed=seed))
    events: list[list[Event]] = [[] for _ in prompts]
    while not batcher.idle:
        for event in batcher.step():
            events[event.id].append(event)
    return events


def _tokens(events: list[list[Event]]) -> list[list[int]]:
    return [[t for e in part for t in e.tokens] for part in events]


@torch.no_grad()
def _reference_drafts(model: Decoder, tokens: list[int], drafts: int) -> list[int]:
    """Each head once over the whole sequence, without a cache; the last of `tokens` is not yet read by the trunk."""
    x_BTD = model.states(torch.tensor([tokens[:-1]]))
    known = list(tokens)
    for h in range(drafts):
        padded = torch.nn.functional.pad(x_BTD, (0, 0, 0, len(known) - x_BTD.shape[1]))
        state_D = model.mtp_states(padded, torch.tensor([known]))[h][0, len(tokens) - 2]
        known.append(int(model.mtp[h].logits(state_D).argmax()))
    return known[len(tokens) :]


@pytest.mark.parametrize(
    ("heads", "drafts", "chunk"), [(1, 1, 64), (2, 2, 3), (3, 3, 64), (3, 3, 3), (3, 1, 3), (3, 2, 64)]
)
def test_drafts_equal_those_of_uncached_heads_after_any_rejections(heads: int, drafts: int, chunk: int) -> None:
    """Over several turns of the heads' rings, prompts of 1 to 14 tokens, read whole or by three."""
    for seed, length in enumerate((1, 3, 14)):
        model = _model(seed, heads=heads, dtype=torch.float64)
        tokens = [EOS, *[1 + i * (seed + 3) % 4 for i in range(length - 1)]]
        answer = _greedy(model, tokens, 24 + drafts)
        decode = Decode(model, rows=2, context=64, drafts=drafts)
        row = 1  # beside an empty one
        decode.admit(row, tokens, Sampling(temperature=0))
        for at in range(0, length, chunk):
            part = tokens[at : at + chunk]
            ahead = tokens[at + chunk] if at + chunk < length else None
            decode.prefill([row], [part], [ahead], length, "greedy")
        made = [int(decode.out_BT[row, 0])]
        for right in itertools.cycle((0, 0, drafts, 1, drafts, drafts, 0, drafts - 1)):
            assert decode.draft_BK[row].tolist() == _reference_drafts(model, tokens + made, drafts)
            # How many drafts stand is the test's choice: rejections at every position, one behind the other.
            decode.draft_BK[row] = torch.tensor(answer[len(made) :][:drafts])
            if right < drafts:
                decode.draft_BK[row, right] = (decode.draft_BK[row, right] + 1) % 5
            decode.step("round", 2, "greedy")
            assert int(decode.kept_B[row]) == right + 1
            made += decode.out_BT[row, : right + 1].tolist()
            assert made == answer[: len(made)]
            if len(made) > 20:
                break


@torch.no_grad()
def _greedy(model: Decoder, tokens: list[int], count: int) -> list[int]:
    """Plain decoding that does not end at EOS."""
    decode = Decode(model, rows=1, context=64)
    decode.admit(0, tokens, Sampling(temperature=0))
    decode.prefill([0], [tokens], [None], len(tokens), "greedy")
    answer = [int(decode.out_BT[0, 0])]
    while len(answer) < count:
        decode.step("plain", 1, "greedy")
        answer.append(int(decode.out_BT[0, 0]))
    return answer


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_greedy_answers_are_those_of_plain_decoding(data: st.DataObject) -> None:
    """fp32; random models, windows and prompts of mixed lengths, in batches that change."""
    heads, window = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4, 7]))
    drafts = data.draw(st.integers(1, heads))
    model = _model(data.draw(st.integers(0, 10**6)), vocab=3, window=window, heads=heads)
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=5))
    penalty = data.draw(st.sampled_from([1.0, 1.3]))
    sampling = Sampling(temperature=0, max_tokens=20, repetition_penalty=penalty)
    chunk, lag = data.draw(st.sampled_from([4, 64])), data.draw(st.integers(0, 1))
    plain = _run(model, prompts, sampling, None)
    drafted = _run(model, prompts, sampling, _free(drafts), chunk=chunk, lag=lag)
    assert _tokens(drafted) == _tokens(plain)
    assert [e[-1].finished for e in drafted] == [e[-1].finished for e in plain]


def test_greedy_answers_survive_switching_back_and_forth() -> None:
    model = _model(3)
    sampling, prompts = Sampling(temperature=0, max_tokens=40), [[1, 2, 3], [4], [2, 2]]
    pace = Pace(3, window=2, pause=3)
    for rows in (1, 2, 3):
        pace.cost(rows, 1.0, 3.9)  # pays only where nearly every draft stands
    drafted = _run(model, prompts, sampling, pace)
    assert _tokens(drafted) == _tokens(_run(model, prompts, sampling, None))
    acceptance = drafted[0][-1].acceptance
    assert acceptance is not None
    assert 0 < acceptance.rounds < 39, "some tokens came from rounds, some from plain steps"


def test_acceptance_is_reported_by_request_and_position() -> None:
    events = _run(_model(8, vocab=3), [[1, 2], [2]], Sampling(temperature=0, max_tokens=30), _free(3))
    for part in events:
        acceptance = part[-1].acceptance
        gains = [len(e.tokens) for e in part[1:]]  # the first token comes from the prompt
        assert acceptance is not None
        assert acceptance.rounds == len(gains)
        assert all(e.acceptance is None for e in part[:-1])
        assert sum(gains) <= acceptance.rounds + sum(acceptance.accepted)  # the last round may exceed max_tokens
        assert acceptance.accepted == sorted(acceptance.accepted, reverse=True)
    acceptance = Acceptance.none(3)
    for gained in (1, 3, 4, 2):
        acceptance.add(gained)
    assert (acceptance.length, acceptance.fractions) == (2.5, [0.75, 0.5, 0.25])


def test_verification_by_hand() -> None:
    greedy = verify_greedy(torch.tensor([[4, 5, 6], [4, 5, 6], [4, 5, 6]]), torch.tensor([[4, 5], [4, 1], [1, 5]]))
    assert [part.tolist() for part in greedy] == [[3, 2, 1], [[4, 5, 6]] * 3]
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.8, 0.0]]])
    q = torch.tensor([[[0.0, 1.0, 0.0]]])
    for accept, pick, expected in (
        (0.24, 0.1, [1, 0]),  # u q < p: the draft stands; behind it 0.1 < 0.2 is token 0
        (0.24, 0.3, [1, 1]),
        (0.26, 0.6, [0]),  # it falls; max(p - q, 0) = 1/2, 0, 1/4: token 0 up to 2/3
        (0.26, 0.7, [2]),
    ):
        numbers = torch.tensor([[[pick, 0.0, accept]] * 2])
        kept, out = verify(p, torch.tensor([[1]]), q, numbers)
        assert out[0, : int(kept)].tolist() == expected


def _chi_square(seen: Counter, expected: dict, draws_total: int) -> float:
    """p value of the counts."""
    statistic = sum((seen[k] - e * draws_total) ** 2 / (e * draws_total) for k, e in expected.items())
    return float(chi2.sf(statistic, len(expected) - 1))


def test_verification_draws_from_the_model() -> None:
    """200,000 draws: what stands at each position has the model's distribution, whatever the drafts' was."""
    total, vocab, generator = 200_000, 5, torch.Generator().manual_seed(3)
    p_TV = torch.rand(3, vocab, generator=generator, dtype=torch.float64) ** 2
    q_KV = torch.rand(2, vocab, generator=generator, dtype=torch.float64) ** 2
    p_TV[1, 2] = q_KV[0, 4] = 0
    numbers = torch.from_numpy(draws(7, total * 3)).view(total, 3, 3)
    drafts = torch.stack([choose(q_KV[i].expand(total, -1), numbers[:, i, DRAFT]) for i in range(2)], 1)
    kept, out = verify(p_TV.expand(total, -1, -1), drafts, q_KV.expand(total, -1, -1), numbers)
    for position in range(3):
        reached = out[kept > position, position].tolist()
        share = {v: float(x) for v, x in enumerate(p_TV[position] / p_TV[position].sum()) if x > 0}
        assert len(reached) > 20_000
        assert set(reached) <= set(share)
        assert _chi_square(Counter(reached), share, len(reached)) > 0.01


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.8), Sampling(top_k=3, top_p=0.9, temperature=1.3, repetition_penalty=1.5)],
    ids=["temperature", "all"],
)
def test_answers_have_the_models_distribution(sampling: Sampling) -> None:
    """All answers of three tokens, against their probabilities by a full forward; and the same for plain decoding."""
    model, total = _model(5, vocab=4, heads=2), 1200
    sampling = dataclasses.replace(sampling, max_tokens=3)
    expected = _answers(model, [1, 3], sampling)
    for pace in (_free(2), None):
        events = _run(model, [[1, 3]] * total, sampling, pace, slots=64)
        seen = Counter(tuple(t) for t in _tokens(events))
        assert set(seen) <= set(expected)
        rare = {k for k, e in expected.items() if e * total < 5}  # chi-square wants five of each
        pooled = {k: e for k, e in expected.items() if k not in rare} | {"rare": sum(expected[k] for k in rare)}
        counts = Counter({k: n for k, n in seen.items() if k not in rare} | {"rare": sum(seen[k] for k in rare)})
        pooled = {k: e for k, e in pooled.items() if e > 0}
        assert len(pooled) > 8
        assert _chi_square(counts, pooled, total) > 0.01


@torch.no_grad()
def _answers(model: Decoder, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every answer, from logits of the full forward and plain loops."""
    found: dict[tuple[int, ...], float] = {}
    grow: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while grow:
        answer, p = grow.pop()
        if len(answer) == sampling.max_tokens:
            found[answer] = p
            continue
        logits = model(torch.tensor([[EOS, *prompt, *answer]]))[0, -1].double().tolist()
        for token, share in enumerate(_shares(logits, {*prompt, *answer}, sampling)):
            if share > 0:
                if token == EOS:
                    found[answer] = p * share
                else:
                    grow.append(((*answer, token), p * share))
    return found


def _shares(logits: list[float], seen: set[int], sampling: Sampling) -> list[float]:
    r = sampling.repetition_penalty
    logits = [(x / r if x > 0 else x * r) if v in seen else x for v, x in enumerate(logits)]
    weights = [float(torch.tensor(x / sampling.temperature, dtype=torch.float64).exp()) for x in logits]
    order = sorted(range(len(weights)), key=lambda v: -weights[v])[: sampling.top_k]
    total, before, kept = sum(weights[v] for v in order), 0.0, []
    for v in order:
        if before / total < sampling.top_p:
            kept.append(v)
        before += weights[v]
    return [weights[v] / sum(weights[k] for k in kept) if v in kept else 0.0 for v in range(len(weights))]


def test_pace_by_hand() -> None:
    """A round costs two steps: it must give two tokens on average over the last four rounds."""
    pace = Pace(3, window=4, pause=3)
    pace.cost(1, 1.0, 2.0)
    pace.cost(8, 1.0, 4.5)
    assert not pace.speculate(8), "four tokens at most cannot pay for 4.5 steps"
    asked: list[bool] = []
    gains = itertools.chain([2, 2, 2, 2, 2, 1], itertools.repeat(1))
    for _ in range(30):
        asked.append(pace.speculate(1))
        if asked[-1]:
            pace.saw(next(gains))
    on, off = [True], [False]
    # Loses with its sixth round; rests 3 steps, is on trial for 4 rounds, rests 6, is tried again, rests 12.
    assert asked == on * 6 + off * 3 + on * 4 + off * 6 + on * 4 + off * 7
    pace = Pace(3, window=2, pause=2)
    pace.cost(1, 1.0, 2.0)
    for gained in (3, 1, 4, 1, 3):
        assert pace.speculate(1)
        pace.saw(gained)


def test_measuring_changes_nothing_and_reads_the_clock_it_is_given() -> None:
    model = _model(1)
    decode = Decode(model, rows=2, context=30, drafts=3)
    decode.admit(0, [1, 2], Sampling())
    decode.prefill([0], [[EOS, 1, 2]], [None], 3, "sample")
    before = _state(decode)
    ticks = iter([0, 9, 9, 11, 11, 14, 14, 18, 20, 99, 99, 104, 104, 110, 110, 117])
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731
    assert decode.measure(2, "sample", clock) == (2.0, 5.0)
    after = _state(decode)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def _state(decode: Decode) -> dict[str, Tensor]:
    names = ("token_B", "active_B", "made_B", "draft_BK", "q_BKV", "seen_BV")
    assert decode.drafter is not None
    caches = [decode.trunk, *decode.drafter.caches]
    return {
        **{name: getattr(decode, name).clone() for name in names},
        **{f"length {i}": c.lengths_B.clone() for i, c in enumerate(caches)},
        **{f"keys {i}": c.buffers[layer][0][:, :, :-1].clone() for i, c in enumerate(caches) for layer in c.buffers},
        "carry": decode.drafter.carry_HBD.clone(),
    }
