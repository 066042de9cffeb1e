"""Prompts are continued: tokens, texts through a real tokenizer, batches, and the command line."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from core.errors import ConfigError
from moe import checkpoint
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.generate import generate, generate_batch, generate_text, main, stream
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling
from moe.trainer import read_metrics, train

GREEDY = Sampling(temperature=0)


@pytest.fixture
def folder(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> Path:
    train(train_config, source, tmp_path / "run")
    return tmp_path / "run"


def test_generate_stops_at_eos_and_at_its_limits() -> None:
    config = preset("ci", vocab_size=8, eos=3)
    model = Decoder(config).eval()
    assert len(list(generate(model, [1, 2], Sampling(max_tokens=5, seed=1)))) <= 5
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits: greedy takes token 0
    assert list(generate(model, [1, 2], Sampling(max_tokens=5, temperature=0))) == [0] * 5
    assert list(generate(model, [1] * 60, GREEDY)) == [0] * 4, "EOS, 60 and all but the last new token fill 64"
    eos_first = Decoder(dataclasses.replace(config, eos=0)).eval()
    with torch.no_grad():
        eos_first.lm_head.weight.zero_()
    assert list(generate(eos_first, [1], GREEDY)) == []


def test_generate_equals_a_full_forward_for_each_token(folder: Path) -> None:
    model = checkpoint.load(folder)
    tokens = [0, 5, 6, 7]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    expected = tokens[4:]
    if 0 in expected:
        expected = expected[: expected.index(0)]
    assert list(generate(model, [5, 6, 7], Sampling(max_tokens=20, temperature=0))) == expected


def test_generate_is_seeded(folder: Path) -> None:
    model = checkpoint.load(folder)
    answers = [tuple(generate(model, [5], Sampling(max_tokens=30, seed=s))) for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_many_prompts_are_answered_in_their_order() -> None:
    """More prompts than slots; each answer is the one it has alone, with settings of its own."""
    model = Decoder(dataclasses.replace(preset("ci", vocab_size=64, eos=0), mtp_heads=1)).double().eval()
    prompts = [[5], list(range(1, 30)), [], [7, 7]]
    each = [Sampling(temperature=0.5 * (i % 2), seed=i, max_tokens=6 + i) for i in range(4)]
    answers = generate_batch(model, prompts, each, slots=3)
    for prompt, sampling, answer in zip(prompts, each, answers, strict=True):
        alone = generate(model, prompt, sampling)
        assert answer.tokens == tuple(alone)
        assert answer.finished == ("length" if len(answer.tokens) == sampling.max_tokens else "stop")
        assert (answer.text, answer.logprobs) == ("", None)
    events = list(stream(model, prompts, each, slots=3))
    assert [tuple(t for e in events if e.id == i for t in e.tokens) for i in range(4)] == [a.tokens for a in answers]
    drafted = list(generate(model, [5], Sampling(max_tokens=6, temperature=0), speculate=3))
    assert drafted == list(answers[0].tokens)
    scored = generate_batch(model, [[5]], Sampling(temperature=0, max_tokens=6, logprobs=1))[0]
    assert scored.logprobs is not None
    assert tuple(lp.top[0][0] for lp in scored.logprobs) == scored.tokens == answers[0].tokens
    assert generate_batch(model, []) == []
    with pytest.raises(ConfigError, match=r"got 63 \+ 2 tokens"):
        generate_batch(model, [[1], [1] * 63], Sampling(max_tokens=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": [1] * 64}, "exceed the context, got 64"),
        ({"prompt": [1] * 10, "max_tokens": 55}, r"got 10 \+ 55 tokens, expected 1 to 54"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens: out of range, got 0"),
        ({"prompt": [64]}, "outside the vocabulary"),
        ({"prompt": [1], "temperature": -1.0}, "sampling.temperature: out of range"),
        ({"prompt": [1], "top_p": 0.0}, "sampling.top_p: out of range"),
        ({"prompt": [1], "top_k": 0}, "sampling.top_k: out of range"),
    ],
)
def test_generate_refuses(settings: dict, message: str) -> None:
    given = dict(settings)
    with pytest.raises(ConfigError, match=message):
        generate(Decoder(preset("ci", vocab_size=64, eos=0)), given.pop("prompt"), Sampling(**given))


@pytest.fixture
def text_run(tmp_path: Path) -> tuple[Path, Tokenizer]:
    """A run that has learnt the three paragraphs by heart with which this repository's licence ends."""
    licence = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(p.split()) for p in licence.strip().split("\n\n")[-3:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [np.array([*tokenizer.encode(p).ids, 0]) for p in paragraphs]
    source = ArrayTokenSource(
        ids, vocab_size=400, eos=0, text_bytes=[len(p.encode()) for p in paragraphs], domains=("licence",)
    )
    config = TrainConfig(
        model=preset("ci", vocab_size=400, eos=0),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        steps=100,
        rows=2,
        repeat=True,
        threads=1,
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    train(config, source, tmp_path / "run")
    return tmp_path / "run", tokenizer


def test_text_is_continued(text_run: tuple[Path, Tokenizer], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = text_run
    (tokenizer_json := folder.parent / "tokenizer.json").unlink()
    answer = generate_text(folder, "Unless required by applicable", Sampling(max_tokens=8, temperature=0))
    assert answer.startswith(" law or agreed")
    assert read_metrics(folder)[-1]["loss"] < 0.5
    assert generate_text(
        folder, "Unless required by", Sampling(max_tokens=20, temperature=0, stop=("agreed",))
    ).endswith(" or ")
    assert generate_text(folder, "Licensé 許 \x00", Sampling(max_tokens=3, temperature=0)) is not None
    arguments = [str(folder), "--prompt", "Unless required by applicable", "--max-tokens", "8", "--temperature", "0"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == answer + "\n"
    assert main([*arguments, "--top-p", "2"]) == 2
    assert "sampling.top_p: out of range, got 2.0" in capsys.readouterr().err
    tokenizer_json.write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not the one of training"):
        generate_text(folder, "x")


def test_a_run_without_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no tokenizer"):
        generate_text(folder, "x")
