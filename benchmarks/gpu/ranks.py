"""Two ranks of one host: training throughput beside one rank, and expert parallelism's loss beside one rank's.

`python -m benchmarks.gpu.ranks --out FOLDER` starts torchrun for 1 rank and for 2; each rank takes 8 rows of 4,096 tokens
of the preset `1b`, so twice the ranks should do nearly twice the tokens. Then, small and in fp32, three updates on the same
rows: one rank, two with whole experts, two that share the experts (EP = 2). Ranks add the same numbers in another order; what
the optimiser makes of the last bits differs, so there are three:

    losses_linear   AdamW with an eps of 1, which is nearly momentum alone: losses must agree to 1e-5
    losses_adamw    its own eps: the first updates are signs of gradients, also of those that are nothing but rounding
    losses_muon     fp16 products, which round by their shapes
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.train_step import CONTEXT, step_shape
from moe import optim
from moe.config import OptimConfig
from moe.exchange import split_experts
from moe.loss import next_token_loss
from moe.model import Decoder
from moe.parallel import World

ROWS, UPDATES = 8, 3
# Optimiser and rate of each.
LOSSES = {
    "losses_linear": (OptimConfig(optimizer="adamw", eps=1.0, weight_decay=0.0), 2.0),
    "losses_adamw": (OptimConfig(optimizer="adamw"), 1e-3),
    "losses_muon": (OptimConfig(), 1e-3),
}


def throughput(world: World) -> dict[str, Any]:
    """Milliseconds of a whole update, Muon and all, and tokens a second of all ranks."""
    torch.manual_seed(0)  # the same weights on all ranks
    model = timing.drawn(dataclasses.replace(step_shape(32_768), experts_backend="triton")).train()
    for layer in model.model["layers"]:  # type: ignore[arg-type, union-attr]
        layer.compile(fullgraph=True, dynamic=False)
    for moe in model.routed:
        moe.watch = False
    optimizer = optim.build(model, OptimConfig(), world, compiled=True)
    tokens_BT = torch.randint(1, 32_768, (ROWS, CONTEXT), device="cuda")
    target_S = tokens_BT.roll(-1, 1).flatten()

    def step() -> None:
        x_SD = model.hidden(tokens_BT).flatten(0, 1)
        total = len(target_S) * world.size
        loss, _ = next_token_loss(x_SD, model.lm_head.weight, target_S, total=total, compiled=True)
        loss.backward()
        optimizer.step(1e-4)
        optimizer.zero_grad()

    ms = timing.median_ms(step, 12, 4)
    return {"ranks": world.size, "ms": ms, "tokens_per_s": world.size * len(target_S) / ms * 1000}


def losses(world: World, expert_ranks: int, config: OptimConfig, lr: float) -> dict[str, Any]:
    """Loss of each update in fp32, on the same four rows whatever the ranks."""
    shape = dataclasses.replace(
        step_shape(512), layers=5, context=512, window=128, attention_backend="sdpa", experts_backend="loop"
    )
    model = Decoder(shape, seed=0).to(world.device).train()
    if expert_ranks > 1:
        split_experts(model, world)
    update = optim.build(model, config, world)
    rows = torch.randint(1, 512, (4, 513), generator=torch.Generator().manual_seed(0)).to(world.device)
    mine = rows.chunk(world.size)[world.rank]
    values = []
    for _ in range(UPDATES):
        x_SD = model.hidden(mine[:, :-1]).flatten(0, 1)
        target_S = mine[:, 1:].flatten()
        loss, _ = next_token_loss(x_SD, model.lm_head.weight, target_S, total=4 * 512)
        loss.backward()
        update.step(lr)
        update.zero_grad()
        values.append(float(world.sum(loss.detach())))
    return {"ranks": world.size, "expert_ranks": expert_ranks, "losses": values}


def rank(part: str, out: Path, expert_ranks: int) -> None:
    """What torchrun starts; rank 0 writes the figures."""
    world = World.from_env(expert_ranks=expert_ranks)
    try:
        if part == "throughput":
            figures = throughput(world)
        else:
            figures = losses(world, expert_ranks, *LOSSES[part])
        if world.rank == 0:
            timing.Results("ranks", out).add(part, **figures)
    finally:
        world.close()


def _started(out: Path, part: str, ranks: int, experts: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["benchmarks.gpu.ranks", "--out", str(out), "--part", part, "--experts", str(experts)]
    return subprocess.Popen(command, env=os.environ)


def _finished(runs: list[subprocess.Popen[bytes]]) -> None:
    for run in runs:
        if run.wait(timeout=240):
            raise subprocess.CalledProcessError(run.returncode, run.args)


def main() -> None:
    """Starts the ranks, then compares."""
    args = timing.arguments(
        "ranks",
        __doc__,
        part={"default": "", "help": "what each rank runs; given by this script to those it starts"},
        experts={"type": int, "default": 1, "help": "ranks that share the experts; likewise"},
    )
    if args.part:
        rank(args.part, args.out, args.experts)
        return
    (args.out / "ranks.jsonl").unlink(missing_ok=True)  # lines of an earlier call are no part of this comparison
    for ranks in (1, 2):  # one after the other, since they are timed
        _finished([_started(args.out, "throughput", ranks, 1)])
    for part in LOSSES:
        _finished([_started(args.out, part, ranks, experts) for ranks, experts in ((1, 1), (2, 1), (2, 2))])
    lines = [json.loads(line) for line in (args.out / "ranks.jsonl").read_text("utf-8").splitlines()]
    rates = {x["ranks"]: x["tokens_per_s"] for x in lines if x["what"] == "throughput"}
    apart = {part: _apart([x for x in lines if x["what"] == part]) for part in LOSSES}
    timing.Results("ranks", args.out).add("compared", speed_up=rates[2] / rates[1], apart=apart)


def _apart(lines: list[dict[str, Any]]) -> float:
    """The greatest relative distance of a loss from one rank's."""
    values = {(x["ranks"], x["expert_ranks"]): x["losses"] for x in lines}
    alone = values.pop((1, 1))
    return max(abs(a - b) / abs(a) for other in values.values() for a, b in zip(alone, other, strict=True))


if __name__ == "__main__":
    main()
