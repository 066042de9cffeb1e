"""What the ranks of tests/moe/test_parallel.py run: spawned processes on loopback that leave their findings in a file."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from moe import optim, slab
from moe.config import OptimConfig, TrainConfig
from moe.data import Batch
from moe.exchange import split_experts, whole_weights
from moe.loss import next_token_loss
from moe.model import Decoder
from moe.parallel import World
from moe.presets import preset
from moe.update import Updater, placed

CONFIG = preset("ci", vocab_size=64, eos=0)
OPTIM = OptimConfig(grad_clip=0.3, bias_rate=0.1)
STEPS, ROWS, TOKENS = 3, 4, 24
LR = 2e-3


def run_ranks(size: int, work: Callable[..., None], folder: Path, timeout_s: float = 150.0) -> list[int | None]:
    """Runs `work(folder, rank)` in that many processes and returns their exit codes, None for one that hung."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, size, port, work, folder)) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, size: int, port: int, work: Callable[..., None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(folder / f"error-{rank}", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    work(folder, rank)


def train_steps(world: World, dtype: torch.dtype, config: OptimConfig = OPTIM, start: Any = None) -> dict[str, Any]:
    """`STEPS` updates of a decoder on seeded rows, this rank taking its slice, with uneven masks; `start` goes on."""
    model = Decoder(CONFIG).to(dtype).train()
    if start:
        model.load_state_dict(start["weights"])
    split_experts(model, world)
    optimizer = optim.build(model, config, world)
    if start:
        optimizer.load_state_tensors(start["state"])
    losses, norms = [], []
    first = start["step"] if start else 0
    for step in range(first, first + STEPS):
        tokens, mask = _batch(step)
        share = len(tokens) // world.size
        mine = slice(world.rank * share, (world.rank + 1) * share)
        total = world.sum(mask[mine].sum())
        optimizer.zero_grad()
        for low in range(mine.start, mine.stop, max(1, share // 2)):  # two micro-batches where there are rows for two
            here = slice(low, low + max(1, share // 2))
            hidden = model.hidden(tokens[here, :-1]).flatten(0, 1)
            targets = tokens[here, 1:].flatten()
            loss, _ = next_token_loss(hidden, model.lm_head.weight, targets, mask[here].flatten(), total=total)
            loss.backward()
            losses.append((step, loss.detach()))
        norms.append(optimizer.reduce())
        optimizer.step(LR)
        world.sum_loads(model.routed)
        for layer in model.routed:
            layer.rebalance(config.bias_rate)
    sums = [sum(v for s, v in losses if s == step) for step in range(first, first + STEPS)]
    return {
        "weights": whole_weights(model, world),
        "state": optimizer.state_tensors(),
        "losses": world.sum(torch.stack(sums)),
        "norms": torch.stack(norms),
        "state_bytes": world.gather(optimizer.state_bytes),
        "bias": [layer.router_bias.clone() for layer in model.routed],
        "step": first + STEPS,
    }


def one_update(world: World) -> dict[str, Any]:
    """The metrics of one update of a model with a starved expert and one that blows up."""
    config = TrainConfig(model=CONFIG, optim=OPTIM, steps=STEPS, rows=ROWS, threads=1)
    model = Decoder(CONFIG)
    with torch.no_grad():
        model.routed[0].router_bias[:] = torch.tensor([9.0, 0.0, 0.0, -9.0])  # the last expert starves
        model.routed[1].gate_up_proj.weight[-1] *= 5.0  # the last expert blows up
    model = placed(model, config, world)
    tokens, mask = _batch(0)
    share = ROWS // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    zeros = torch.zeros(share, TOKENS, dtype=torch.int64).numpy()
    batch = Batch(tokens[mine, :-1].numpy(), tokens[mine, 1:].numpy(), zeros, zeros, mask[mine].numpy())
    updater = Updater(config, model, optim.build(model, OPTIM, world), world, ("all",))
    return updater.run(batch, 0, watch=True).read()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(1, 64, (ROWS, TOKENS + 1), generator=generator)
    mask = torch.rand(ROWS, TOKENS, generator=generator) < torch.linspace(0.1, 1.0, ROWS)[:, None]
    return tokens, mask


def two_ranks(folder: Path, rank: int) -> None:
    """Data parallel in fp32, fp64 and bf16, and a resume of one rank's run; then the same two split the experts."""
    slab.SLAB_ELEMENTS = 5000
    split = World.from_env(expert_ranks=2, timeout_s=60)
    world = World(split.device, split.everyone)
    found = {
        "fp32": train_steps(world, torch.float32),
        "fp64": train_steps(world, torch.float64),
        "bf16": train_steps(world, torch.bfloat16),
        "adamw": train_steps(world, torch.float64, OptimConfig(optimizer="adamw", grad_clip=0.3)),
    }
    found["resumed"] = train_steps(world, torch.float64, start=torch.load(folder / "one.pt"))
    found["split"] = train_steps(split, torch.float32)
    found["updates"] = [one_update(world), one_update(split)]
    found["values"] = world.gather(rank * 10)
    world.wait()
    world.close()
    if rank == 0:
        torch.save(found, folder / "two.pt")


def four_ranks(folder: Path, rank: int) -> None:
    """Two teams of two ranks that split the experts, resumed from one rank's file; and four plain replicas."""
    world = World.from_env(expert_ranks=2, timeout_s=60)
    found = {"places": world.gather((world.experts.rank, world.replicas.rank))}
    found["fp64"] = train_steps(world, torch.float64)
    found["resumed"] = train_steps(world, torch.float64, start=torch.load(folder / "one.pt"))
    plain = World(world.device, world.everyone)
    found["plain"] = train_steps(plain, torch.float64)
    found["swap"] = world.gather(_uneven_swap(world))
    world.close()
    if rank == 0:
        torch.save(found, folder / "four.pt")


def _uneven_swap(world: World) -> tuple[list[float], list[float]]:
    """All rows of a team go to its second member: the first receives nothing, and its gradient still arrives."""
    from moe.exchange import Exchange

    rows = torch.arange(3.0, dtype=torch.float64)[:, None] + 10 * world.rank
    rows.requires_grad_()
    scale = torch.tensor(2.0 + world.experts.rank, dtype=torch.float64)
    out = Exchange(world.experts)(rows, torch.tensor([0, 0, 1, 2]), lambda x, load: x * scale + load.sum())
    out.sum().backward()
    assert rows.grad is not None
    return out.detach()[:, 0].tolist(), rows.grad[:, 0].tolist()


def a_rank_dies(folder: Path, rank: int) -> None:
    """Rank 1 is killed between two sums; the others' error must come by itself."""
    world = World.from_env(timeout_s=60)
    world.wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.wait()
