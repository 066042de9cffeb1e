"""Reinforcement learning on a toy, by loss and staleness: reward before and after over seeds, updates a second, what was masked.

    python -m benchmarks.gpu.reinforce [--device cpu] [--seeds 3] [--steps 40] [--task small] [--arms on_policy stale]

The toy (tests/moe/copying.py) answers `7>` by any digit. Task `small` pays for 0, 1 and 2, `copy` for the digit asked. Each seed
has a start of its own, which all arms share. Out: a JSON line an arm: the mean reward of the first and of the last four
generations by seed, their difference with its 95% interval (t, over seeds) and the least effect that so many seeds would show
(core/statistics.py), the mean share of masked tokens and trajectories, and updates a second, sampling included, checkpoints not.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.statistics import ALPHA, least_effect
from moe.rl.config import RLConfig
from moe.rl.tasks import Reward
from moe.rl.trainer import reinforce
from tests.moe.copying import CONFIG, copying_tasks, start_run

STALE = {"staleness": 2, "minibatches": 2}
ARMS: dict[str, dict[str, Any]] = {
    "on_policy": {},
    "stale": STALE,  # the report's bounds
    "stale_wide": STALE | {"trajectory_ratio": (0.5, 2.0)},
    "stale_ppo": STALE | {"loss": "ppo"},
    "stale_reinforce": STALE | {"loss": "reinforce"},
}
SPAN = 4  # generations at either end


def small(task: int, text: str) -> float:
    return float(text in {"0", "1", "2"})


def measure(name: str, config: RLConfig, starts: list[Path], task: str, folder: Path) -> dict[str, Any]:
    """One arm over all starts."""
    ends, masked, speeds = [], [], []
    for seed, start in enumerate(starts):
        tasks, copied = copying_tasks(start)
        reward: Reward = small if task == "small" else copied
        rows: list[dict[str, Any]] = []
        reinforce(dataclasses.replace(config, seed=seed), tasks, reward, folder / f"{name}-{seed}", start, rows.append)
        by_generation = list({row["generation"]: row["reward_mean"] for row in rows}.values())
        ends.append((np.mean(by_generation[:SPAN]), np.mean(by_generation[-SPAN:])))
        keys = ("masked_token_fraction", "masked_trajectory_fraction")
        masked.append([np.mean([row.get(key, 0.0) for row in rows]) for key in keys])
        speeds.append((len(rows) - 1) / sum(row["step_s"] for row in rows[1:]))
    gained = np.array([after - before for before, after in ends])
    return {
        "arm": name,
        "before": [round(float(b), 3) for b, _ in ends],
        "after": [round(float(a), 3) for _, a in ends],
        "gain": round(float(gained.mean()), 3),
        **interval(gained),
        "masked_token_fraction": round(float(np.mean([m[0] for m in masked])), 4),
        "masked_trajectory_fraction": round(float(np.mean([m[1] for m in masked])), 4),
        "updates_per_s": round(float(np.median(speeds)), 2),
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Of the mean over seeds; empty for one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return {}
    error, df = float(values.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1
    half = float(t.ppf(1 - ALPHA / 2, df)) * error
    mean = float(values.mean())
    return {
        "low": round(mean - half, 3),
        "high": round(mean + half, 3),
        "least_effect": round(least_effect(error, df), 3),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default 3)")
    parser.add_argument("--steps", type=int, default=40, help="updates of a run (default 40)")
    parser.add_argument("--task", choices=("small", "copy"), default="small", help="default: small")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as below:
        folder = Path(below)
        starts = [start_run(folder / f"start-{seed}", seed) for seed in range(given.seeds)]
        shape = {"steps": given.steps, "prompts": 10, "samples": 8, "checkpoint_steps": given.steps}
        for name in given.arms:
            changes = shape | {"device": given.device, "threads": given.threads} | ARMS[name]
            config = dataclasses.replace(CONFIG, **changes)
            sys.stdout.write(json.dumps(measure(name, config, starts, given.task, folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
