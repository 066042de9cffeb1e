"""Chunks of prompts: rounded shapes read the same, and a graph gives the bits of what it was captured from."""

import dataclasses
from typing import Any

import pytest
import torch

from moe import prompts
from moe.batching import Batcher
from moe.decode import Decode
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling

EOS, VOCAB = 0, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Sampling(temperature=0)


def _model(**changes: Any) -> Decoder:
    shape = preset("ci", vocab_size=VOCAB, eos=EOS)
    return Decoder(dataclasses.replace(shape, window=5, mtp_heads=2, **changes), seed=2).eval()


def _state(decode: Decode) -> dict[str, torch.Tensor]:
    """What a chunk may change; of the caches all but the spare slots."""
    names = ("token_B", "active_B", "made_B", "kept_B", "draft_BK", "seen_BV")
    found = {name: getattr(decode, name).clone() for name in names}
    for i, cache in enumerate([decode.trunk, *(decode.drafter.caches if decode.drafter else [])]):
        found[f"length {i}"] = cache.lengths_B.clone()
        for layer, pair in cache.buffers.items():
            found |= {f"{kind} of {layer}, {i}": t[:, :, :-1].clone() for kind, t in zip("kv", pair, strict=True)}
    return found


def _read(decode: Decode, mode: Any = "greedy") -> list[torch.Tensor]:
    """Three chunks of two rows, the second of which rests in the middle; returns the logits."""
    text = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1)).tolist()
    for row in (1, 3):
        decode.admit(row, text[0], GREEDY if mode == "greedy" else Sampling(temperature=0.9, seed=row))
    logits = [decode.prefill([3, 1], [text[0][:7], text[1][:5]], [text[0][7], text[1][5]], 7, mode)]
    logits.append(decode.prefill([3], [text[0][7:18]], [text[0][18]], 18, mode))
    logits.append(decode.prefill([3, 1], [text[0][18:], text[1][5:]], [None, None], 30, mode))
    return [x.clone() for x in logits]


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_rounded_shapes_read_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding behind a chunk and a longer reach: the same logits, tokens, drafts and keys."""
    monkeypatch.setattr(prompts, "LEAST_TOKENS", 4)
    monkeypatch.setattr(prompts, "LEAST_REACH", 8)
    model = _model().double()
    decodes = [Decode(model, rows=4, context=48, drafts=2, capture=False) for _ in range(2)]
    decodes[1].prompts.rounds = True
    logits = [_read(decode, mode) for decode in decodes]
    for plain, rounded in zip(*logits, strict=True):
        torch.testing.assert_close(plain, rounded)
    for name, value in _state(decodes[0]).items():
        torch.testing.assert_close(value, _state(decodes[1])[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_chunk_without_tokens_changes_nothing() -> None:
    """As before a capture: only rows that are being read, and so not active, are named."""
    decode = Decode(_model(), rows=4, context=48, drafts=2)
    decode.prompts.rounds = True
    _read(decode)
    decode.release(1)
    decode.release(3)
    before = _state(decode)
    decode.prefill([3, 1], [(), ()], [0, 0], 30, "greedy")
    after = _state(decode)
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} <= {"kept_B"}


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_graphs_give_the_bits_of_what_they_were_captured_from() -> None:
    model = _model(dim=64, head_dim=32, expert_dim=64, dense_dim=64, shared_dim=64).to(DEVICE, torch.bfloat16)
    decode = Decode(model, rows=4, context=48, drafts=2)
    found = []
    for _ in range(4):  # run, captured and replayed, replayed, replayed
        for row in (1, 3):
            decode.release(row)
        logits = _read(decode)
        found.append((logits, _state(decode)))
    assert all(replay.graph is not None for _, replay in decode.prompts.shapes.values())
    for logits, state in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits, found[0][0], strict=True))
        assert all(torch.equal(value, state[name]) for name, value in found[0][1].items())


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_requests_through_graphs_get_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests of a few lengths beside each other, so that captures fall between other rows' steps; few shapes kept."""
    monkeypatch.setattr(prompts, "MOST_SHAPES", 3)
    model = _model(dim=64, head_dim=32, expert_dim=64, dense_dim=64, shared_dim=64).to(DEVICE, torch.bfloat16)
    for slots in (1, 3):
        batcher = Batcher(model, slots=slots, context=48, chunk=16, fused=True)
        for n in range(24):
            batcher.submit([1 + n % 4] * (3 + 5 * (n % 4)), Sampling(temperature=0, max_tokens=6))
        made: dict[int, list[int]] = {}
        while not batcher.idle:
            for event in batcher.step():
                made.setdefault(event.id, []).extend(event.tokens)
        assert len(made) == 24
        assert len(batcher.decode.prompts.shapes) <= 3
        if slots == 1:  # beside others the shapes are others, and with them the last bits
            assert all(answer == made[n % 4] for n, answer in made.items())
