"""Evaluation against a plain sum, sampling against hand-worked distributions, and text through a real tokenizer."""

import dataclasses
import json
import math
import os
from collections import Counter
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
from moe.evaluate import by_domain, document_losses, evaluate, windows
from moe.generate import generate, generate_text, sample
from moe.model import Decoder
from moe.presets import preset
from moe.trainer import read_metrics, train


@pytest.fixture
def folder(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> Path:
    train(train_config, source, tmp_path / "run")
    return tmp_path / "run"


def test_windows_by_hand() -> None:
    parts = list(windows(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3, context=4, eos=0))
    assert [w.inputs.tolist() for w in parts] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert [w.targets.tolist() for w in parts] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert [w.scored for w in parts] == [0, 2, 2]
    assert list(windows(np.array([], dtype=np.int32), 0, context=4, eos=0)) == []


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8, 23])
@pytest.mark.parametrize("context", [1, 2, 4, 5])
def test_windows_score_each_token_once(length: int, context: int) -> None:
    tokens = np.arange(length)
    scored = np.concatenate([w.targets[w.scored :] for w in windows(tokens, 0, context, eos=0)])
    assert scored.tolist() == tokens.tolist()


def test_bits_per_byte_equal_a_plain_sum(folder: Path, source: ArrayTokenSource) -> None:
    model = checkpoint.load(folder)
    result = evaluate(folder, source)
    bits, count = dict.fromkeys(source.domains, 0.0), Counter[str]()
    for i in range(len(source)):
        name, tokens = source.domains[source.domain(i)], source.tokens(i)
        for w in windows(tokens, 0, model.config.context, source.eos):
            with torch.inference_mode():
                log_p = model(torch.tensor(w.inputs[None].astype(np.int64)))[0].log_softmax(-1)
            bits[name] -= sum(float(log_p[t, w.targets[t]]) for t in range(w.scored, len(w.targets))) / math.log(2)
        count[name] += len(tokens)
    for name, got in result.items():
        domain = source.domains.index(name)
        text_bytes = sum(source.bytes(i) for i in range(len(source)) if source.domain(i) == domain)
        assert got["bpb"] == pytest.approx(bits[name] / text_bytes, rel=1e-5)
        assert (got["tokens"], got["bytes"], got["docs"]) == (count[name], text_bytes, 60)


def test_losses_by_document_are_those_of_each_alone(folder: Path, source: ArrayTokenSource) -> None:
    """Whatever documents share its batch; and domains are their sums."""
    found = document_losses(folder, source)
    assert by_domain(found, source.domains) == evaluate(folder, source)
    for i in (0, 1, 57):
        alone = ArrayTokenSource(
            [source.tokens(i)], vocab_size=source.vocab_size, eos=source.eos, text_bytes=[source.bytes(i)]
        )
        one = document_losses(folder, alone)
        assert one.bits[0] == pytest.approx(found.bits[i], rel=1e-5)
        assert (one.tokens[0], one.bytes[0]) == (found.tokens[i], found.bytes[i])
        assert found.domain[i] == source.domain(i)


def test_evaluate_refuses_another_vocabulary(folder: Path) -> None:
    with pytest.raises(ConfigError, match="another vocabulary, got 65 tokens and EOS 0, expected at most 64"):
        evaluate(folder, ArrayTokenSource([np.array([64, 0])], vocab_size=65, eos=0, text_bytes=[1]))


def test_generate_stops_at_eos_and_at_its_limits() -> None:
    config = preset("ci", vocab_size=8, eos=3)
    model = Decoder(config).eval()
    assert len(list(generate(model, [1, 2], max_tokens=5, seed=1))) <= 5
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits: greedy takes token 0
    assert list(generate(model, [1, 2], max_tokens=5, temperature=0)) == [0] * 5
    assert list(generate(model, [1] * 60, temperature=0)) == [0] * 4, "EOS, 60 and all but the last new token fill 64"
    eos_first = Decoder(dataclasses.replace(config, eos=0)).eval()
    with torch.no_grad():
        eos_first.lm_head.weight.zero_()
    assert list(generate(eos_first, [1], temperature=0)) == []


def test_generate_equals_a_full_forward_for_each_token(folder: Path) -> None:
    model = checkpoint.load(folder)
    tokens = [0, 5, 6, 7]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    expected = tokens[4:]
    if 0 in expected:
        expected = expected[: expected.index(0)]
    assert list(generate(model, [5, 6, 7], max_tokens=20, temperature=0)) == expected


def test_generate_is_seeded(folder: Path) -> None:
    model = checkpoint.load(folder)
    answers = [tuple(generate(model, [5], max_tokens=30, seed=s)) for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": [1] * 64}, "exceed the context, got 64"),
        ({"prompt": [1] * 10, "max_tokens": 55}, r"got 10 \+ 55 tokens, expected 1 to 54"),
        ({"prompt": [1], "max_tokens": 0}, "exceed the context"),
        ({"prompt": [64]}, "outside the vocabulary"),
        ({"prompt": [1], "temperature": -1.0}, "sampling setting"),
        ({"prompt": [1], "top_p": 0.0}, "sampling setting"),
        ({"prompt": [1], "top_k": 0}, "sampling setting"),
    ],
)
def test_generate_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(Decoder(preset("ci", vocab_size=64, eos=0)), **settings)


# p = 1/2, 1/4, 1/8, 1/8 for tokens 2, 0, 3, 1
LOGITS = torch.tensor([1 / 4, 1 / 8, 1 / 2, 1 / 8]).log()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, 1.0, {2: 1 / 2, 0: 1 / 4, 1: 1 / 8, 3: 1 / 8}),
        (1.0, 2, 1.0, {2: 2 / 3, 0: 1 / 3}),
        (1.0, None, 0.6, {2: 2 / 3, 0: 1 / 3}),
        (1.0, None, 0.5, {2: 1.0}),
        (0.5, None, 1.0, {2: 16 / 22, 0: 4 / 22, 1: 1 / 22, 3: 1 / 22}),
        (0.0, None, 1.0, {2: 1.0}),
    ],
)
def test_sampling(temperature: float, top_k: int | None, top_p: float, expected: dict[int, float]) -> None:
    generator, draws = torch.Generator().manual_seed(0), 4000
    seen = Counter(sample(LOGITS, temperature, top_k, top_p, generator) for _ in range(draws))
    assert seen.keys() == expected.keys()
    for token, p in expected.items():
        assert abs(seen[token] / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)  # four standard errors


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


def test_text_is_continued(text_run: tuple[Path, Tokenizer]) -> None:
    folder, _ = text_run
    (tokenizer_json := folder.parent / "tokenizer.json").unlink()
    answer = generate_text(folder, "Unless required by applicable", max_tokens=8, temperature=0)
    assert answer.startswith(" law or agreed")
    assert read_metrics(folder)[-1]["loss"] < 0.5
    assert generate_text(folder, "Licensé 許 \x00", max_tokens=3, temperature=0) is not None
    tokenizer_json.write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not the one of training"):
        generate_text(folder, "x")


def test_a_run_without_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no tokenizer"):
        generate_text(folder, "x")


def test_real_sentences_lower_their_bits_per_byte(tmp_path: Path) -> None:
    data = Path(os.environ.get("STEPWELL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    if not (data / "language").is_dir():
        pytest.skip(f"no real data in {data}; set STEPWELL_DATA")
    texts = [
        (lang, t)
        for lang in ("en", "hi")
        for t in (data / "language" / f"{lang}.txt").read_text().split("\n")[:400]
        if t
    ]
    held_out, kept = texts[::10], [t for i, t in enumerate(texts) if i % 10]

    def tokens(docs: list[tuple[str, str]]) -> ArrayTokenSource:
        raw = [t.encode() for _, t in docs]
        ids = [np.append(np.frombuffer(b, dtype=np.uint8).astype(np.int32) + 1, 0) for b in raw]
        domains = [("en", "hi").index(lang) for lang, _ in docs]
        return ArrayTokenSource(
            ids, vocab_size=257, eos=0, text_bytes=[len(b) for b in raw], document_domains=domains, domains=("en", "hi")
        )

    config = TrainConfig(
        model=preset("ci", vocab_size=257, eos=0),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        steps=80,
        rows=8,
        shuffle=True,  # the file of one language follows the other's
        repeat=True,
        threads=1,
        checkpoint_steps=80,
    )
    train(config, tokens(kept), tmp_path)
    result = evaluate(tmp_path, tokens(held_out))
    start = evaluate(tmp_path / "checkpoints" / "step-00000000", tokens(held_out))
    assert json.loads(json.dumps(result)) == result
    for lang in ("en", "hi"):
        assert start[lang]["bpb"] == pytest.approx(8.0, abs=0.3), "log2(257), and EOS on top"
        assert result[lang]["bpb"] < 0.6 * start[lang]["bpb"]
