"""Too little memory is told in one line with what to change: before a run allocates, and where a real allocation fails.

Allocations fail in children whose address space is limited to what they have, or by asking for more than any machine addresses.
"""

import asyncio
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from core.errors import ConfigError, StageError
from moe import hub, memory
from moe.batching import Batcher
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.model import Decoder
from moe.optim import build
from moe.parallel import _answered
from moe.presets import preset
from moe.sampling import Sampling
from moe.server.service import Service, StoppedError
from moe.trainer import train

REPOSITORY = Path(__file__).resolve().parents[2]
BEYOND = 1 << 50  # bytes; no machine addresses as many
# A command in a process that may map 200 MiB more than it has when the command's modules are there.
LIMITED = """
import importlib, resource, sys
import psutil, torch
torch.set_num_threads(1)
command = importlib.import_module(sys.argv[1])
for name in ("moe.batching", "moe.hub", "moe.generate", "tokenizers", *sys.argv[2].split()):
    importlib.import_module(name)
limit = psutil.Process().memory_info().vms + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(command.main(sys.argv[3:]))
"""


def _refusal(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def roomy(tmp_path: Path) -> Path:
    """A hub folder of a toy whose context of 8 million tokens wants a cache of gigabytes."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = Decoder(dataclasses.replace(preset("ci", vocab_size=8, eos=0), context=1 << 23))
    return hub.export(model, tmp_path / "hub", tokenizer=tmp_path / "tokenizer.json")


def test_generation_names_what_to_lower(roomy: Path) -> None:
    code, out, err = _refusal("moe.generate", "", str(roomy), "--prompt", "a", "--device", "cpu")
    assert (code, out) == (1, "")
    assert err.startswith("generate: out of memory with 1 prompts at once of up to 8388608 tokens each, got "), err
    assert err.endswith("; lower max_tokens or slots, decode without drafts, or in bfloat16\n")
    assert err.count("\n") == 1


def test_the_server_names_what_to_lower(roomy: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server is an extra")
    arguments = ("moe.server.__main__", "uvicorn moe.server.app", str(roomy), "--device", "cpu", "--slots", "2")
    code, _, err = _refusal(*arguments)
    assert code == 1
    assert err.startswith("serve: out of memory with --slots 2 x --context 8388608 tokens, got "), err
    assert err.endswith("; lower either, or --dtype bfloat16\n")


def _starved(model: Decoder) -> Batcher:
    """Its final norm asks for memory that nobody has."""
    model.model["norm"].register_forward_hook(lambda *_: torch.empty(BEYOND))
    return Batcher(model, slots=2)


def test_a_step_without_memory_ends_the_service_in_words(caplog: pytest.LogCaptureFixture) -> None:
    async def ask(service: Service) -> None:
        stream = await service.open([5], Sampling(max_tokens=3))
        async for _ in stream:
            pass

    service = Service(_starved(Decoder(preset("ci", vocab_size=64, eos=0)).eval()))
    service.start()
    with caplog.at_level(logging.ERROR), pytest.raises(StoppedError, match=r"the model stopped: serve: out of memory"):
        asyncio.run(ask(service))
    service.stop()
    assert "start again with less of either, or with --dtype bfloat16" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_score_without_memory_fails_alone() -> None:
    service = Service(_starved(Decoder(preset("ci", vocab_size=64, eos=0)).eval()))
    service.start()
    with pytest.raises(StageError, match=r"serve: out of memory in the score of 3 tokens .* got .*allocate"):
        asyncio.run(service.score([5, 6, 7], 2))
    assert service.failure is None
    service.stop()


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    huge = dataclasses.replace(train_config, model=dataclasses.replace(train_config.model, dim=1 << 24))
    with pytest.raises(
        ConfigError, match=r"does not fit into memory, got \S+ GiB of weights, .* on cpu; choose a small"
    ):
        train(huge, source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert memory.memory_problems(train_config, torch.device("cpu"), 1) == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("mtp_loss", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_held_is_what_training_holds(
    optimizer: str, mtp_loss: float, precision: str, train_config: TrainConfig
) -> None:
    shape = dataclasses.replace(train_config.model, mtp_heads=2)
    optim = OptimConfig(optimizer=optimizer, mtp_loss=mtp_loss)  # type: ignore[arg-type]
    config = dataclasses.replace(train_config, model=shape, optim=optim, precision=precision)
    model = Decoder(shape).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    made = build(model, optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    made.step(0.0)
    found = memory.held(config)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.optimizer == pytest.approx(made.state_bytes, rel=0.03)
    several = dataclasses.replace(config, micro_rows=1)
    more = 3 if precision == "bfloat16" else 1
    assert memory.held(several).gradients == more * found.gradients


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.memory_named("train: x", "y"):
        raise RuntimeError("shapes differ")
    with pytest.raises(FileNotFoundError), memory.memory_named("train: x", "y"):
        Path("/absent").read_text()


def test_a_rank_without_memory_is_not_one_that_is_lost() -> None:
    with pytest.raises(torch.OutOfMemoryError), _answered():
        raise torch.OutOfMemoryError("CUDA out of memory")
