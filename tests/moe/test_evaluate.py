"""Held-out bits per byte against a plain sum, by document and domain, on counted numbers and on real sentences."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from moe import checkpoint
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.evaluate import by_domain, document_losses, evaluate, windows
from moe.presets import preset
from moe.trainer import train


@pytest.fixture
def folder(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> Path:
    train(train_config, source, tmp_path / "run")
    return tmp_path / "run"


def test_windows_by_hand() -> None:
    parts = list(windows(np.array([1, 2, 3, 4, 5, 6, 7, 0]), context=4, before=[0]))
    assert [w.inputs.tolist() for w in parts] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert [w.targets.tolist() for w in parts] == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert [w.scored for w in parts] == [0, 2, 2]
    assert list(windows(np.array([], dtype=np.int32), context=4, before=[0])) == []


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8, 23])
@pytest.mark.parametrize("context", [1, 2, 4, 5])
def test_windows_score_each_token_once(length: int, context: int) -> None:
    tokens = np.arange(length)
    scored = np.concatenate([w.targets[w.scored :] for w in windows(tokens, context, before=[0])])
    assert scored.tolist() == tokens.tolist()


def test_bits_per_byte_equal_a_plain_sum(folder: Path, source: ArrayTokenSource) -> None:
    model = checkpoint.load(folder)
    result = evaluate(folder, source)
    bits, count = dict.fromkeys(source.domains, 0.0), Counter[str]()
    for i in range(len(source)):
        name, tokens = source.domains[source.domain(i)], source.tokens(i)
        for w in windows(tokens, model.config.context, [source.eos]):
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
