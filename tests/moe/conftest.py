"""Small sources and configs. One thread: tests compare bits, and two cores are often busy."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moe.config import ModelConfig, OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.presets import preset

VOCAB, EOS = 64, 0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_config() -> ModelConfig:
    return preset("ci", vocab_size=VOCAB, eos=EOS)


@pytest.fixture
def source() -> ArrayTokenSource:
    return counting_source()


@pytest.fixture
def train_config(model_config: ModelConfig) -> TrainConfig:
    return TrainConfig(
        model=model_config, optim=OptimConfig(warmup_steps=3), steps=12, rows=4, threads=1, checkpoint_steps=5
    )


def counting_source(docs: int = 120, seed: int = 0) -> ArrayTokenSource:
    """Documents of two domains that count upwards, by 1 and by 2, from a random start: learnable, and told apart."""
    rng = np.random.default_rng(seed)
    lengths, starts = rng.integers(5, 90, docs), rng.integers(0, VOCAB, docs)
    documents = [
        np.append((s + np.arange(n) * (1 + i % 2)) % (VOCAB - 1) + 1, EOS)
        for i, (n, s) in enumerate(zip(lengths, starts, strict=True))
    ]
    return ArrayTokenSource(
        documents,
        vocab_size=VOCAB,
        eos=EOS,
        text_bytes=[2 * (len(d) - 1) for d in documents],
        document_domains=[i % 2 for i in range(docs)],
        domains=("by_one", "by_two"),
    )
