"""Scores of spans: each against a forward pass of its own, whatever shares its batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe import score as scoring
from moe.config import ModelConfig
from moe.model import Decoder
from moe.score import Span, continuation, score, score_continuations


def test_a_continuation_is_cut_from_the_front() -> None:
    span = continuation([0, 5, 6, 7], [8, 9], longest=10)
    assert (span.inputs.tolist(), span.targets.tolist(), span.scored) == ([0, 5, 6, 7, 8], [5, 6, 7, 8, 9], 3)
    short = continuation([0, 5, 6, 7], [8, 9], longest=3)
    assert (short.inputs.tolist(), short.targets.tolist(), short.scored) == ([6, 7, 8], [7, 8, 9], 1)
    whole = continuation([0, 5], [7, 8, 9], longest=3)
    assert (whole.inputs.tolist(), whole.targets.tolist(), whole.scored) == ([5, 7, 8], [7, 8, 9], 0)


@pytest.mark.parametrize("tokens", [[], [1, 2, 3, 4]])
def test_a_continuation_must_fit(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        continuation([0], tokens, longest=3)


@pytest.mark.parametrize("size", [0, 1, 8, 9, 12, 29])
def test_long_continuations_count_each_token_once(model_config: ModelConfig, size: int) -> None:
    model = Decoder(replace(model_config, context=8)).double().eval()
    rng = np.random.default_rng(size)
    context, tokens = (rng.integers(1, model_config.vocab_size, n).tolist() for n in (3, size))
    whole = [model_config.eos, *context, *tokens]
    log_p = []
    for t in range(size):
        # Behind at most 8 inputs: in a piece of 4 (all of them up to 8), those before it are read too.
        first = t - t % 4 if size > 8 else 0
        last = min(first + 4, size) if size > 8 else size
        inputs = whole[: 3 + last][-8:]
        with torch.inference_mode():
            row = model(torch.tensor([inputs]))[0].log_softmax(-1)
        log_p.append(float(row[t - last, tokens[t]]))
    (found,) = score_continuations(model, [(context, tokens)])
    assert found.nats == pytest.approx(-sum(log_p), rel=1e-9, abs=1e-12)


def test_scores_equal_those_of_each_alone(model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 40)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    model = Decoder(model_config).double().eval()
    rng = np.random.default_rng(0)
    spans = []
    for n in rng.integers(1, 30, 25).tolist():
        tokens = rng.integers(0, model_config.vocab_size, n + 1)
        spans.append(Span(tokens[:-1], tokens[1:], int(rng.integers(0, n))))
    for span, found in zip(spans, score(model, spans), strict=True):
        with torch.inference_mode():
            log_p = model(torch.tensor(span.inputs[None]))[0].log_softmax(-1)
        wanted = range(span.scored, len(span.targets))
        assert found.nats == pytest.approx(-sum(float(log_p[t, span.targets[t]]) for t in wanted), rel=1e-9)
        assert found.greedy == all(int(log_p[t].argmax()) == span.targets[t] for t in wanted)


def test_a_greedy_continuation_is_told(model_config: ModelConfig) -> None:
    model, tokens = Decoder(model_config).eval(), [0, 5, 6]
    with torch.inference_mode():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    right = continuation(tokens[:3], tokens[3:], 64)
    wrong = continuation(tokens[:3], [*tokens[3:-1], (tokens[-1] + 1) % 64], 64)
    assert [s.greedy for s in score(model, [right, wrong])] == [True, False]
