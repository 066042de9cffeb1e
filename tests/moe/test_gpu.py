"""What only a GPU shows: bitwise resume in deterministic mode, the pieces that `auto` takes, an allocator that has no more."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from core.errors import ConfigError, StageError
from moe import checkpoint, experts
from moe.config import ModelConfig, OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.experts import MoE
from moe.generate import generate_batch
from moe.metrics import TIME_FIELDS, read_metrics
from moe.model import Decoder
from moe.sampling import Sampling
from moe.trainer import train
from tests.moe.test_trainer import CHILD, REPOSITORY, _environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
KILLED_AT = (3, 8)  # updates: before the first periodic checkpoint and behind it


@pytest.fixture
def gpu_config(train_config: TrainConfig) -> TrainConfig:
    """Heads, groups, several micro-batches of two sizes, and widths and rows from which on every kernel is used."""
    model = dataclasses.replace(train_config.model, context=256, dim=64, head_dim=32, expert_dim=64, mtp_heads=2)
    optim = OptimConfig(warmup_steps=3, group_loss=1e-2, expert_groups=2, z_loss=1e-4)
    return dataclasses.replace(
        train_config, model=model, optim=optim, micro_rows=3, device="cuda", deterministic=True, packing="best_fit",
        repeat=True,
    )  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16 compiled": {"precision": "bfloat16", "compile": True, "micro_rows": 2},
    "bfloat16 adamw": {"precision": "bfloat16", "optim": OptimConfig(optimizer="adamw", warmup_steps=3)},
    "bfloat16 varlen": {"precision": "bfloat16", "attention_backend": "varlen"},
    "bfloat16 sdpa, plain experts": {
        "precision": "bfloat16", "attention_backend": "sdpa", "experts_backend": "grouped"
    },
}  # fmt: skip


def _variant(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    model = dataclasses.replace(config.model, **{k: v for k, v in changes.items() if k in fields})
    return dataclasses.replace(config, model=model, **{k: v for k, v in changes.items() if k not in fields})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_ends_with_the_same_bits(
    name: str, gpu_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """Killed by the kernel in other processes, after updates 3 and 8 of 12; this process, which ran the whole, goes on."""
    config = _variant(gpu_config, VARIANTS[name])
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(config, source, whole)
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(config)), str(folder)]
    for stop in KILLED_AT:
        with subprocess.Popen(
            [*command, str(stop)], cwd=REPOSITORY, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == f"{stop}\n".encode()
            child.kill()
        assert child.returncode == -signal.SIGKILL
    assert train(config, source, folder).resumed_step == 5
    parts = [checkpoint.load_tensors(checkpoint.find(f)) for f in (whole, folder)]
    for ours, theirs in zip(*parts, strict=True):
        assert ours.keys() == theirs.keys()
        differ = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not differ, f"{len(differ)} of {len(ours)}"
    rows = [
        [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(f)] for f in (whole, folder)
    ]
    assert rows[0] == rows[1]


def _moe(backend: Literal["auto", "grouped", "triton"], dtype: torch.dtype, count: int = 8) -> MoE:
    config = ModelConfig(
        vocab_size=64, eos=0, dim=64, experts=count, top_k=2, expert_dim=64, experts_backend=backend, layers=2
    )
    layer = MoE(config, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.1, generator=generator)
    return layer.to("cuda", dtype)


def _results(layer: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def test_auto_takes_the_fused_pieces_where_they_fit() -> None:
    pytest.importorskip("triton")
    fused = _moe("triton", torch.bfloat16).pieces
    assert fused != experts.PLAIN
    layer = _moe("auto", torch.bfloat16)
    assert layer.pieces == fused
    assert layer.to(torch.float32).pieces == experts.PLAIN
    assert layer.to("cpu", torch.bfloat16).pieces == experts.PLAIN
    assert layer.to("cuda").pieces == fused
    assert _moe("auto", torch.bfloat16, experts.FUSED_EXPERTS + 1).pieces == experts.PLAIN
    assert _moe("grouped", torch.bfloat16).pieces == experts.PLAIN


def test_fused_pieces_repeat_themselves_and_are_near_the_plain_ones() -> None:
    pytest.importorskip("triton")
    x = torch.randn(4, 500, 64, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    fused, plain = _moe("auto", torch.bfloat16), _moe("grouped", torch.bfloat16)
    first = _results(fused, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, _results(fused, x), strict=True))
    for a, b in zip(first, _results(plain, x), strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()


def test_the_fused_pieces_of_float64_are_exact() -> None:
    """The kernels work in fp32; in fp64 their operators run in torch."""
    pytest.importorskip("triton")
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1)).to("cuda", torch.float64)
    for a, b in zip(
        _results(_moe("triton", torch.float64), x), _results(_moe("grouped", torch.float64), x), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """torch's allocator stops 64 MiB above what is there."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_too_many_rows_are_named(
    gpu_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path, little_memory: None
) -> None:
    config = dataclasses.replace(gpu_config, rows=4096, micro_rows=None)
    with pytest.raises(
        StageError, match=r"train: out of memory with train.micro_rows 4096 x .* got CUDA out of memory"
    ):
        train(config, source, tmp_path)
    assert checkpoint.find(tmp_path).name == "step-00000000"


def test_a_cache_that_is_too_large_is_named(model_config: ModelConfig, little_memory: None) -> None:
    model = Decoder(dataclasses.replace(model_config, context=1 << 21)).to("cuda").eval()
    with pytest.raises(StageError, match=r"generate: out of memory .* got CUDA out of memory"):
        generate_batch(model, [[5]], Sampling())


def test_a_model_beyond_the_gpu_is_refused_before_it_is_made(
    gpu_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    huge = dataclasses.replace(gpu_config.model, dim=1 << 20)
    with pytest.raises(ConfigError, match=r"does not fit into memory, got \S+ GiB .* on cuda"):
        train(dataclasses.replace(gpu_config, model=huge), source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
