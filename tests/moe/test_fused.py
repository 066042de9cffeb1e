"""Steps by fused kernels beside those by the model's own layers: the same state, tokens and drafts, on a GPU in graphs.

Without a GPU they run by Triton's interpreter where TRITON_INTERPRET=1 is set, and are skipped otherwise.
"""

import dataclasses
import itertools
import os

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from moe.backends import capturable, unserved
from moe.batching import Batcher
from moe.config import ModelConfig
from moe.decode import Decode
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling
from moe.speculative import Pace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and TRITON_INTERPRET=1 is not set"
)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GREEDY, EOS = Sampling(temperature=0), 0


def _model(heads: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """As small as kernels go, with a full, a windowed, a dense and two routed layers; few tokens, so that drafts stand."""
    config = ModelConfig(
        vocab_size=9, eos=EOS, context=40, dim=16, layers=3, full_every=2, window=5, heads=2, swa_heads=3, kv_heads=1,
        head_dim=16, dense_dim=16, experts=3, top_k=2, expert_dim=8, shared_dim=8, mtp_heads=heads,
    )  # fmt: skip
    model = Decoder(config, seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
        for weight in (model.lm_head.weight, *(h.output.weight for h in model.mtp)):
            weight *= 20
    return model.to(DEVICE, dtype).eval()


class Pair:
    """A Decode by kernels and one by layers, which are told the same."""

    def __init__(self, model: Decoder, rows: int, drafts: int) -> None:
        self.both = [Decode(model, rows=rows, context=36, drafts=drafts, fused=fused) for fused in (True, False)]
        assert self.both[0].fused is not None
        assert self.both[1].fused is None

    def admit(self, row: int, prompt: list[int]) -> None:
        for decode in self.both:
            decode.admit(row, prompt, GREEDY)
            decode.prefill([row], [[EOS, *prompt]], [None], len(prompt) + 1, "greedy")

    def step(self, kind: str, rows: int) -> None:
        """One step; afterwards all that either holds is compared, but for the spare slots."""
        logits = [decode.step(kind, rows, "greedy").clone() for decode in self.both]
        active = self.both[0].active_B[:rows] > 0
        torch.testing.assert_close(logits[0][active], logits[1][active], **CLOSE)
        for name, value in _state(self.both[0]).items():
            torch.testing.assert_close(value, _state(self.both[1])[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def _state(decode: Decode) -> dict[str, Tensor]:
    names = ("token_B", "active_B", "made_B", "kept_B", "draft_BK")
    caches = [decode.trunk, *(decode.drafter.caches if decode.drafter else [])]
    kept_B1 = decode.kept_B[:, None]
    places = torch.arange(decode.out_BT.shape[1], device=DEVICE)
    found = {name: getattr(decode, name) for name in names} | {"out": torch.where(places < kept_B1, decode.out_BT, 0)}
    for i, c in enumerate(caches):
        found |= {f"length {i}": c.lengths_B, f"start {i}": c.starts_B}
        for layer, (keys, _) in c.buffers.items():
            # What lies behind a row's length was taken back, or is padding's; rings hold the window before it.
            size = keys.shape[2] - 1
            newest_B1 = c.lengths_B[:, None] - 1
            place_BP = newest_B1 - (newest_B1 - torch.arange(size, device=DEVICE)) % size
            reach = size if size == c.capacity else c.window
            seen_BP = (place_BP >= c.starts_B[:, None]) & (place_BP > newest_B1 - reach)
            for kind, buffer in zip(("keys", "values"), c.buffers[layer], strict=True):
                found[f"{kind} {i} of {layer}"] = buffer[:, :, :-1] * seen_BP[:, None, :, None]
    for h, c in enumerate(decode.drafter.caches if decode.drafter else []):
        # Read next at the place where the cache ends; before the row's start it is nobody's state.
        counts_B = (c.lengths_B >= c.starts_B) & (c.lengths_B > 0) & (h > 0)
        found[f"carry {h}"] = torch.where(counts_B[:, None], decode.drafter.carry_HBD[h], 0)
    return {name: value.clone() for name, value in found.items()}


@KERNELS
def test_plain_steps_of_rows_that_come_and_go() -> None:
    """Prompts within and beyond the window, rings that turn, rows that rest, end and are given to another."""
    pair = Pair(_model(0), rows=4, drafts=0)
    pair.admit(0, [1, 2, 3])
    pair.admit(2, [4] * 7)
    for _ in range(3):
        pair.step("plain", 4)
    pair.admit(1, [5, 6])
    for decode in pair.both:
        decode.release(2)
    before = _state(pair.both[0])
    for _ in range(8):
        pair.step("plain", 4)
    after = _state(pair.both[0])
    for name, value in before.items():
        assert torch.equal(value[2], after[name][2]) or name in ("kept_B", "out"), f"{name} of a row that rests"
    pair.admit(2, [7])
    for _ in range(2):
        pair.step("plain", 4)
    for _ in range(2):
        pair.step("plain", 1)  # the first alone


@KERNELS
@pytest.mark.parametrize("drafts", [1, 3])
def test_rounds_whose_drafts_fall_anywhere(drafts: int) -> None:
    """Two rows beside a resting one; which drafts stand is the test's choice, plain steps lie between."""
    model = _model(drafts)
    pair = Pair(model, rows=3, drafts=drafts)
    answers = {row: _answer(model, prompt, 30) for row, prompt in ((0, [1, 2, 3]), (2, [4, 5, 6, 7, 8, 1]))}
    pair.admit(0, [1, 2, 3])
    pair.admit(2, [4, 5, 6, 7, 8, 1])
    made = {0: 1, 2: 1}
    rights = itertools.cycle((0, drafts, 1, drafts - 1, drafts))
    for number in range(7):
        wanted = {}
        for row, done in made.items():
            wanted[row] = next(rights)
            line = torch.tensor(answers[row][done:][:drafts])
            line[wanted[row] :] = (line[wanted[row] :] + 1) % 9
            for decode in pair.both:
                decode.draft_BK[row] = line.to(DEVICE)
        pair.step("round", 3)
        for row in made:
            assert int(pair.both[0].kept_B[row]) == wanted[row] + 1
            made[row] += wanted[row] + 1
        if number == 3:
            for _ in range(2):
                pair.step("plain", 3)
                made = {row: done + 1 for row, done in made.items()}
            for decode in pair.both:
                decode.restart_drafts(3)


def _answer(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, EOS among them, by whole forwards."""
    tokens = [EOS, *prompt]
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens], device=DEVICE))[0, -1].argmax()))
    return tokens[len(prompt) + 1 :]


@KERNELS
def test_rounds_give_the_bits_of_plain_steps() -> None:
    """Whatever the dtype: a round's logits are those of as many steps, alone or beside another row."""
    for dtype in (torch.float32, torch.bfloat16):
        if DEVICE == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter's sums in bfloat16 are not a GPU's
        model = _model(2, dtype)
        decodes = [Decode(model, rows=rows, context=36, drafts=2, fused=True) for rows in (1, 2)]
        for decode in decodes:
            for row in range(decode.rows):
                decode.admit(row, [1, 2], GREEDY)
                decode.prefill([row], [[EOS, 1, 2][row:]], [None], 3, "greedy")
        plain, rounds = decodes
        for _ in range(5):
            singles, tokens = [], []
            for _ in range(3):
                singles.append(plain.step("plain", 1, "greedy")[0, 0].clone())
                tokens.append(int(plain.out_BT[0, 0]))
            rounds.draft_BK[0] = torch.tensor(tokens[:2])
            assert torch.equal(rounds.step("round", 2, "greedy")[0], torch.stack(singles))
            assert rounds.out_BT[0].tolist() == tokens


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
@pytest.mark.parametrize("rows", [1, 3])
def test_chained_launches_give_the_bits_of_others(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of graphs of a model large enough that a kernel which did not wait would read what is not there yet."""
    from moe import kernels_chain

    config = dataclasses.replace(preset("30m", vocab_size=512, eos=EOS), context=512, window=64, mtp_heads=2)
    model = Decoder(config, seed=1).to(DEVICE, torch.bfloat16).eval()
    found = []
    for chains in (False, True):
        monkeypatch.setattr(kernels_chain, "CHAINS", chains)
        decode = Decode(model, rows=rows, context=500, drafts=2, fused=True)
        prompts = [[EOS, *range(1 + row, 20 + row)] for row in range(rows)]
        for row, prompt in enumerate(prompts):
            decode.admit(row, prompt, GREEDY)
        decode.prefill(range(rows), prompts, [None] * rows, 20, "greedy")
        steps = [decode.step(kind, rows, "greedy").clone() for kind in ("plain", "round", "round") * 40]
        found.append([*steps, decode.token_B.clone(), decode.trunk.lengths_B.clone(), decode.draft_BK.clone()])
    assert int(found[0][-2][0]) > 100
    for unchained, chained in zip(*found, strict=True):
        assert torch.equal(unchained, chained)


@KERNELS
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(temperature=0.8), Sampling(temperature=1.2, top_k=4, repetition_penalty=1.3)],
    ids=["greedy", "temperature", "all"],
)
def test_answers_of_a_batcher(sampling: Sampling) -> None:
    """fp32: the same tokens by kernels and by layers, with and without drafts where greedy."""
    model, answers = _model(2), {}
    for fused, speculate in itertools.product((True, False), (0, 1, 2)):
        pace = Pace(speculate, window=2, pause=2)
        for rows in (1, 2):
            pace.cost(rows, 1.0, 1.2)
        batcher = Batcher(
            model, slots=2, speculate=speculate, pace=pace, lag=0, context=30, fused=fused, prefix=(), chunk=4
        )
        for seed, prompt in enumerate(([1, 2], [3, 4, 5, 6, 7, 8], [2])):
            batcher.submit(prompt, Sampling(**vars(sampling) | {"seed": seed, "max_tokens": 8}))
        found: dict[int, list[int]] = {}
        while not batcher.idle:
            for event in batcher.step():
                found.setdefault(event.id, []).extend(event.tokens)
        answers[fused, speculate] = found
        assert not speculate or batcher.acceptance.rounds > 0
        assert answers[fused, speculate] == answers[True, speculate]
        assert sampling != GREEDY or answers[fused, speculate] == answers[fused, 0]


@KERNELS
def test_steps_of_many_tokens_are_left_to_the_layers() -> None:
    fused = Decode(_model(3), rows=40, context=30, drafts=3, fused=True).fused
    assert fused is not None
    assert [fused.takes("plain", rows) for rows in (1, 32, 33)] == [True, True, False]
    assert [fused.takes("round", rows) for rows in (1, 8, 9)] == [True, True, False]


def test_models_that_the_kernels_do_not_serve_are_named_and_decoded_by_layers() -> None:
    model = _model(0).double()
    assert unserved(model) is not None
    assert Decode(model, rows=1, context=20).fused is None
    with pytest.raises(ConfigError, match=r"fused kernels cannot serve this model, .*set fused to None or False"):
        Decode(model, rows=1, context=20, fused=True)


def test_layers_that_read_back_are_not_captured() -> None:
    """Which products can be, torch decides: on a GPU the pairs above decode in fp32 by layers, outside graphs."""
    assert capturable(_model(0, torch.bfloat16))
    assert not capturable(_model(0))
    assert not capturable(_model(0, torch.float64))
