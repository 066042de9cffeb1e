"""What a run of reinforcement learning would be, before it.

In: the run file and its tasks. Out: lines of text. Everything that would stop the run before its first byte stops the plan too,
but for the device, which may be another machine's.
"""

from pathlib import Path

from moe import checkpoint, flops, hub
from moe.config import ModelConfig
from moe.rl.folder import newest
from moe.rl.rollouts import check_tasks
from moe.rl.tasks import RLFile, Tasks, tokenizer_folder


def plan_lines(file: RLFile, tasks: Tasks) -> list[str]:
    """A line for each figure; what could not run is a `ConfigError`."""
    c, model = file.config, model_config(tokenizer_folder(file))
    newest(c, tasks, file.folder)
    check_tasks(tasks, c, model.context, model.vocab_size)
    generations = -(-c.steps // c.updates)
    asked, answers = generations * c.prompts, generations * c.prompts * c.samples
    lengths = [len(prompt) for prompt in tasks.prompts]
    total, active = flops.parameters(model)
    lines = [
        ("parameters", f"{total:,}, {active:,} active"),
        ("tasks", f"{len(tasks):,}, prompts of {sum(lengths) / len(lengths):.1f} tokens, at most {max(lengths):,}"),
        (
            "generations",
            f"{generations:,} of {c.prompts} tasks x {c.samples} answers, each asked {asked / len(tasks):.2f} times",
        ),
        ("updates", f"{c.steps:,}, {c.updates} a generation, {c.prompts * c.samples // c.minibatches} answers each"),
        (
            "sampling",
            f"{answers:,} answers, at most {answers * c.max_tokens:,} tokens, {c.staleness} generations ahead",
        ),
        ("loss", f"{c.loss}, tokens kept in {_bounds(c.token_ratio)}, answers in {_bounds(c.trajectory_ratio)}"),
    ]
    return [f"{name:<16}{said}" for name, said in lines]


def model_config(folder: Path) -> ModelConfig:
    """Of a run, a checkpoint or a hub folder, without its weights."""
    if hub.is_hub_folder(folder):
        return hub.read_config(folder)
    return checkpoint.read(checkpoint.find(folder))[0].model


def _bounds(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g} to {pair[1]:g}"
