"""Fused decode steps beside the model's own cached forward, on a GPU or by Triton's interpreter."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from moe import kernels_decode, kernels_rounds  # noqa: E402
from moe.cache import Cache  # noqa: E402
from moe.config import ModelConfig  # noqa: E402
from moe.fused import FusedDecoder  # noqa: E402
from moe.model import Decoder  # noqa: E402


def config(**changes):
    shape = {"vocab_size": 40, "eos": 0, "context": 48, "dim": 48, "layers": 3, "full_every": 2, "window": 7}
    shape |= {"heads": 2, "swa_heads": 4, "kv_heads": 2, "head_dim": 16, "dense_dim": 40}
    shape |= {"experts": 6, "top_k": 2, "expert_dim": 24, "shared_dim": 20}
    return ModelConfig(**shape | changes)


def build(shape, rows=2, slack=3):
    model = Decoder(shape, seed=1).to(DEVICE).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0, 0.2)
        for moe in model.routed:
            moe.router_bias.normal_(0, 0.1)
    caches = [
        Cache(shape, range(shape.layers + shape.mtp_heads), rows=rows, capacity=40, slack=slack, device=DEVICE)
        for _ in range(2)
    ]
    return model, caches


def tokens(*shape, seed=0):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gate": False, "routed_clip": (0.0, 0.1, 0.2), "shared_clip": (0.0, 0.0, 0.15)}, {"shared_dim": 33}],
)
def test_steps_are_those_of_the_model(changes):
    model, (ours, theirs) = build(config(**changes))
    fused = FusedDecoder(model, ours.capacity)
    prompt = tokens(2, 9)
    with torch.inference_mode():
        for cache in (ours, theirs):
            model.states(prompt, cache=cache)
            cache.rollback(torch.tensor([0, 2], device=DEVICE))  # rows of different lengths
        for count, seed in ((1, 1), (4, 2), (1, 3), (2, 4), (4, 5), (1, 6)):  # past the ring's size
            new = tokens(2, count, seed=seed)
            want_BTD = model.states(new, cache=theirs)
            got_MD = fused.states(new, ours)
            torch.testing.assert_close(got_MD, want_BTD.flatten(0, 1), rtol=2e-5, atol=2e-5)
            want_MV = model.lm_head(model.norm(want_BTD)).flatten(0, 1)
            torch.testing.assert_close(fused.logits(got_MD), want_MV, rtol=2e-5, atol=2e-5)
            assert torch.equal(ours.lengths_B, theirs.lengths_B)


def test_many_tokens_at_once_give_the_bits_of_one_at_a_time():
    """On a GPU as many as a step takes; the interpreter would take minutes."""
    rows = kernels_decode.TOKENS // 4 if DEVICE == "cuda" else 3
    model, (once, apart) = build(config(), rows=rows)
    fused, new = FusedDecoder(model, once.capacity), tokens(rows, 4)
    with torch.inference_mode():
        whole_BTD = fused.states(new, once).unflatten(0, (rows, 4))
        assert torch.equal(whole_BTD, torch.stack([fused.states(new[:, t : t + 1], apart) for t in range(4)], 1))


def test_only_the_tokens_that_count_are_kept():
    """Rows of 0 to T new tokens, some taken back, past the ring's size: what counts is the model's, the rest is finite."""
    model, (ours, theirs) = build(config(), rows=3)
    fused = FusedDecoder(model, ours.capacity)
    with torch.inference_mode():
        for seed, counts in enumerate(([4, 1, 0], [2, 4, 3], [1, 0, 4], [4, 4, 0]) * 2):
            new, counts_B = tokens(3, 4, seed=seed), torch.tensor(counts, device=DEVICE)
            want_BTD = model.states(new, cache=theirs.feed(3, counts_B))
            got_BTD = fused.states(new, ours, counts_B).unflatten(0, (3, 4))
            assert got_BTD.isfinite().all()
            for row, count in enumerate(counts):
                torch.testing.assert_close(got_BTD[row, :count], want_BTD[row, :count], rtol=2e-5, atol=2e-5)
            for cache in (ours, theirs):
                cache.rollback(counts_B // 2, 3)
            assert torch.equal(ours.lengths_B, theirs.lengths_B)


def test_a_draft_head_is_that_of_the_model():
    """The first head; those behind it, which read carries and drafts, are in test_fused.py."""
    model, (ours, theirs) = build(config(mtp_heads=1), rows=1)
    fused, read = FusedDecoder(model, ours.capacity, heads=1), tokens(1, 3)
    x_BTD = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    kept_B, none = torch.tensor([3], device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    with torch.inference_mode():
        layout = theirs.step(3)
        head, embedded = model.mtp[0], model.model["embed_tokens"](read)
        want = head(torch.cat((embedded, x_BTD), -1), model.tables(layout.position_BT), layout)
        got = fused.draft_states(0, x_BTD[0], x_BTD[:, 0], (read, kept_B), none, ours)
        torch.testing.assert_close(got, want[0], rtol=2e-5, atol=2e-5)
        last = fused.draft_logits(0, got, kept_B)
        torch.testing.assert_close(last, head.logits(want)[0, 2:], rtol=2e-5, atol=2e-5)


def test_the_likeliest_token_is_the_lowest_of_equals():
    logits = torch.zeros(3, 2500, device=DEVICE)
    logits[0, [2100, 1030]] = 2.0
    logits[1] = -torch.arange(2500.0, device=DEVICE) - 1
    into, kept = torch.full((3, 2), 7, device=DEVICE), torch.tensor([1, 0, 4], device=DEVICE)
    assert kernels_rounds.greedy(logits).tolist() == [1030, 0, 0]
    kernels_rounds.greedy(logits, into[:, 1], kept)
    assert into.tolist() == [[7, 1030], [7, 7], [7, 0]]


def test_too_many_tokens_are_refused():
    from core.errors import ConfigError

    model, (cache, _) = build(config())
    with pytest.raises(ConfigError, match="at most 32 tokens"):
        FusedDecoder(model, cache.capacity).states(tokens(2, 5), cache)
