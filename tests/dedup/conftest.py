"""Corpora and the shared data for the tests of this folder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from small_corpus import documents, write_dataset

from core.dataset import Dataset
from core.storage import Root

settings.register_profile("dedup", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("dedup")


@pytest.fixture
def shared_data() -> Path:
    path = Path(os.environ.get("STEPWELL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


Corpus = Callable[..., tuple[Dataset, ...]]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """`corpus({"web": texts}, shards=3, seed=0)`: datasets in a fresh root, rows spread over shards in a random order."""
    made = 0

    def make(texts: dict[str, Sequence[str]], shards: int = 2, seed: int = 0) -> tuple[Dataset, ...]:
        nonlocal made
        made += 1
        root = Root(str(tmp_path / f"root-{made}"))
        rng = np.random.default_rng(seed)
        return tuple(
            write_dataset(root, name, i, documents(name, t), shards, rng) for i, (name, t) in enumerate(texts.items())
        )

    return make
