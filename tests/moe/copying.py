"""A toy of reinforcement learning: a model that copies a digit now and then, and is paid for copying it always."""

from pathlib import Path

import numpy as np

from core.hashing import digest
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.presets import preset
from moe.rl.config import RLConfig
from moe.rl.tasks import Reward, Tasks, answer_reward, tasks_of
from moe.trainer import train
from tests.moe.texts import tokenizer_of

RIGHT = 0.3  # of the documents that the start is trained on; the other answers are any digit
RECORDS = [{"prompt": f"{d}>", "answer": str(d)} for d in range(10)]
OPTIM = OptimConfig(lr=2e-3, warmup_steps=2, schedule="constant", bias_rate=0.0, mtp_loss=0.0, freeze_router=True)
CONFIG = RLConfig(steps=6, prompts=4, samples=4, max_tokens=3, optim=OPTIM, threads=1, device="cpu")


def start_run(folder: Path, seed: int = 0, steps: int = 40) -> Path:
    """A run trained on `7>7` and the end, where the answer is right with probability `RIGHT` and else by chance."""
    tokenizer = tokenizer_of(f"{a}>{b}" for a in range(10) for b in range(10))
    path = folder / "copying.json"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(2000):
        digit = rng.integers(10)
        answer = digit if rng.random() < RIGHT else rng.integers(10)
        documents.append(np.array([*tokenizer.encode(f"{digit}>").ids, *tokenizer.encode(f"{answer}").ids, 0]))
    vocab = tokenizer.get_vocab_size()
    source = ArrayTokenSource(documents, vocab_size=vocab, eos=0, text_bytes=[3] * len(documents))
    config = TrainConfig(
        model=preset("ci", vocab_size=vocab, eos=0), optim=OptimConfig(lr=1e-2, warmup_steps=5), steps=steps, rows=4,
        seed=seed, repeat=True, tokenizer=str(path), threads=1, checkpoint_steps=steps, device="cpu",
    )  # fmt: skip
    train(config, source, folder / "start")
    return folder / "start"


def copying_tasks(start: Path) -> tuple[Tasks, Reward]:
    tasks = tasks_of(RECORDS, start, digest([r["answer"] for r in RECORDS]))
    return tasks, answer_reward(RECORDS, "exact")
