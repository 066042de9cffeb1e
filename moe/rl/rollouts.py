"""A generation of answers: sampled, judged, kept in a file, and turned into advantages.

In: the model, tasks, a reward. Out, in `generations/<number>.jsonl`, written whole or not at all: a first line with the number,
how many answers follow, the hash of the weights that sampled it, and of those of the snapshot; then a line an answer, a group's
`samples` together:

    task str, sample int        tokens [int], the one that ended it included         logprobs [float], the sampler's, one a token
    text str, without the end   truncated bool                                       reward float; null: the task cannot be judged
    old_logprobs [float]        by the weights at the generation's start; null before training comes to it

A generation is a function of weights, seed, number and tasks: draws depend on (seed, number, place of the task, sample), and
near ties on what stands beside an answer (moe/batching.py), on a GPU on the order of sums too. Log-probabilities are of the
policy that sampled, its temperature included. The file is read by a resume, so that neither sampling nor a verifier has to
repeat itself.

Legend: G groups, N answers of a group.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from core.errors import ConfigError, InputError, StageError, StepwellError
from core.hashing import seeded
from moe.device import unrepeatable
from moe.files import replace_text
from moe.generate import stream
from moe.model import Decoder
from moe.rl.config import RLConfig
from moe.rl.tasks import Reward, Tasks
from moe.sampling import Sampling

FOLDER = "generations"
DEVIATION_EPS = 1e-6  # beside a deviation of rewards that are not all equal; chosen


@dataclass(frozen=True)
class Trajectory:
    """One answer, as in the file; `task` is an index."""

    task: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool
    reward: float | None = None
    old_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """`trajectories` by group, `samples` each."""

    number: int
    weights: str
    trajectories: tuple[Trajectory, ...]
    snapshot: str | None = None

    def with_old(self, old: Sequence[Sequence[float]], snapshot: str) -> "Generation":
        pairs = zip(self.trajectories, old, strict=True)
        return replace(self, trajectories=tuple(replace(t, old_logprobs=tuple(o)) for t, o in pairs), snapshot=snapshot)


@dataclass(frozen=True)
class Advantages:
    """Of each answer, 0 where a group has nothing to tell; `used` are the answers of groups that enter the loss."""

    values: np.ndarray  # float64 [G * N]
    used: np.ndarray  # bool [G * N]
    equal_groups: int
    rejected_groups: int


def sample(
    model: Decoder, tokenizer: Any, tasks: Tasks, reward: Reward, config: RLConfig, number: int, weights: str
) -> Generation:
    """Answers to the generation's tasks, judged."""
    drawn = tasks.drawn(config.seed, number, config.prompts)
    asked = [(place, task, i) for place, task in enumerate(drawn) for i in range(config.samples)]
    stop = (*tasks.stop, *config.stop)
    settings = [
        Sampling(
            max_tokens=config.max_tokens,
            seed=_draw_seed(config.seed, number, place, i),
            stop=stop,
            stop_tokens=tasks.stop_tokens,
            logprobs=0,
        )
        for place, _, i in asked
    ]
    tokens: list[list[int]] = [[] for _ in asked]
    logprobs: list[list[float]] = [[] for _ in asked]
    texts, finished = [""] * len(asked), [""] * len(asked)
    training = model.training
    model.eval()
    with tempered(model, config.temperature), unrepeatable():
        prompts = [tasks.prompts[task] for _, task, _ in asked]
        for event in stream(model, prompts, settings, tokenizer=tokenizer, slots=config.slots):
            if event.error is not None:
                asked_for = tasks.names[asked[event.id][1]]
                raise _not_finite(number, f"logits without a next token in an answer to {asked_for}")
            tokens[event.id] += [*event.tokens, *([] if event.end is None else [event.end])]
            logprobs[event.id] += [one.logprob for one in event.logprobs or ()]
            texts[event.id] += event.text
            finished[event.id] = event.finished or ""
    model.train(training)
    made = [
        Trajectory(task, i, tuple(t), tuple(p), text, how == "length")
        for (_, task, i), t, p, text, how in zip(asked, tokens, logprobs, texts, finished, strict=True)
    ]
    return Generation(number, weights, judged(made, tasks, reward))


def judged(made: Sequence[Trajectory], tasks: Tasks, reward: Reward) -> tuple[Trajectory, ...]:
    """The answers with their rewards; of a task that cannot be judged (`InputError`) none has one.

    A reward that is no finite number, that fails in another way, or that judges none of the tasks, is a `StageError`.
    """
    rewards: list[float | None] = []
    rejected: dict[int, str] = {}
    for one in made:
        try:
            found = None if one.task in rejected else float(reward(one.task, one.text))
        except InputError as error:
            rejected[one.task], found = str(error), None
        except StepwellError:
            raise
        except Exception as error:
            raise StageError(
                f"rl: the reward of {tasks.names[one.task]} failed, got {type(error).__name__}: {_line(error)} for "
                f"{one.text[:80]!r}, expected a number, or InputError where a task cannot be judged; mend the verifier and run "
                "the same command"
            ) from error
        if found is not None and not math.isfinite(found):
            raise StageError(
                f"rl: the reward of {tasks.names[one.task]} is no number, got {found} for {one.text[:80]!r}, expected a "
                "finite one; mend the verifier and run the same command"
            )
        rewards.append(found)
    if rejected and len(rejected) == len({one.task for one in made}):
        raise StageError(
            f"rl: none of {len(rejected)} tasks can be judged, got {next(iter(rejected.values()))!r} of the first, expected "
            "rewards; mend the tasks or the verifier"
        )
    pairs = zip(made, rewards, strict=True)
    return tuple(replace(one, reward=None if one.task in rejected else r) for one, r in pairs)


def advantages(trajectories: Sequence[Trajectory], config: RLConfig) -> Advantages:
    """Reward less the mean of its group, over the group's deviation where the config says so.

    With `truncated: baseline` a cut answer has no part in mean and deviation, and the advantage 0.
    """
    shape = (-1, config.samples)
    nan = float("nan")
    reward_GN = np.array([nan if t.reward is None else t.reward for t in trajectories], np.float64).reshape(shape)
    cut_GN = np.array([t.truncated for t in trajectories]).reshape(shape)
    counted_GN = ~cut_GN if config.truncated == "baseline" else np.ones_like(cut_GN)
    values_GN = np.zeros_like(reward_GN)
    told_G = np.zeros(len(reward_GN), bool)
    for group, (reward_N, counted_N) in enumerate(zip(reward_GN, counted_GN, strict=True)):
        here_N = reward_N[counted_N]
        told_G[group] = len(here_N) > 1 and here_N.min() < here_N.max()  # False of NaN
        if told_G[group]:
            scale = here_N.std() + DEVIATION_EPS if config.advantage_scale == "deviation" else 1.0
            values_GN[group, counted_N] = (here_N - here_N.mean()) / scale
    rejected_G = np.isnan(reward_GN).any(1)
    used_G = told_G | (~rejected_G & (config.equal_groups == "keep"))
    return Advantages(
        values_GN.ravel(),
        used_G.repeat(config.samples),
        int((~told_G & ~rejected_G).sum()),
        int(rejected_G.sum()),
    )


@contextmanager
def tempered(model: Decoder, temperature: float) -> Iterator[None]:
    """Within, the model's logits are over the temperature: what samples at 1 there has the tempered policy's probabilities."""
    weight = model.lm_head.weight
    before = weight.data
    if temperature != 1:
        weight.data = before / temperature
    try:
        yield
    finally:
        weight.data = before


@torch.no_grad()
def weights_hash(model: Decoder) -> str:
    """Of all weights as they are in use."""
    h = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()


def write(folder: Path, generation: Generation, names: Sequence[str]) -> None:
    """Puts a generation into the run's folder; a full disk, or a log-probability that is no number, is a `StageError`."""
    answers, path = generation.trajectories, path_of(folder, generation.number)
    head = {
        "generation": generation.number,
        "answers": len(answers),
        "weights": generation.weights,
        "snapshot": generation.snapshot,
    }
    lines = [head, *({**vars(t), "task": names[t.task], "index": t.task} for t in answers)]
    try:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    except ValueError as error:
        raise _not_finite(generation.number, "log-probabilities that are no numbers") from error
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise StageError(
            f"rl: {path} cannot be written, got {error}; the newest checkpoint stands: make room and run the same command"
        ) from error


def read(folder: Path, number: int) -> Generation | None:
    """A generation of the folder; None where there is none. One that is damaged is a `StageError`."""
    path = path_of(folder, number)
    if not path.is_file():
        return None
    try:
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        found = tuple(_trajectory(line) for line in lines)
        if (head["generation"], head["answers"]) != (number, len(found)):
            raise ValueError(f"{len(found)} answers of generation {head['generation']}, which has {head['answers']}")
        return Generation(number, head["weights"], found, head["snapshot"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"rl: {path} cannot be read, got {type(error).__name__}: {error}, expected the file that sampling wrote; restore it, "
            "or fall back to a checkpoint before it"
        ) from error


def remove_before(folder: Path, number: int) -> None:
    """Removes generations that no checkpoint needs any more."""
    for path in (folder / FOLDER).glob("*.jsonl"):
        if path.stem.isdigit() and int(path.stem) < number:
            path.unlink()


def path_of(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:08d}.jsonl"


def task_problems(tasks: Tasks, config: RLConfig, context: int, vocab_size: int) -> list[str]:
    """Why tasks cannot be asked."""
    if not len(tasks):
        return ["rl: there are no tasks, got 0, expected at least one"]
    room = context - config.max_tokens  # EOS before the prompt; the last new token is not read
    long = [i for i, prompt in enumerate(tasks.prompts) if len(prompt) > room]
    foreign = [i for i, prompt in enumerate(tasks.prompts) if any(not 0 <= t < vocab_size for t in prompt)]
    ends = [t for t in tasks.stop_tokens if not 0 <= t < vocab_size]
    out = []
    if long:
        i = long[0]
        out.append(
            f"rl: {len(long)} prompts leave no room for {config.max_tokens} tokens within the context, got "
            f"{len(tasks.prompts[i])} tokens of {tasks.names[i]}, expected at most {room}; leave them out or lower max_tokens"
        )
    if foreign:
        out.append(
            f"rl: a token of {tasks.names[foreign[0]]} is outside the vocabulary, expected 0 to {vocab_size - 1}"
        )
    if ends:
        out.append(
            f"rl: the end of a chat's turn is outside the vocabulary, got {ends[0]}, expected 0 to {vocab_size - 1}"
        )
    return out


def check_tasks(tasks: Tasks, config: RLConfig, context: int, vocab_size: int) -> None:
    """`task_problems` as a `ConfigError`."""
    if problems := task_problems(tasks, config, context, vocab_size):
        raise ConfigError(*problems)


def _trajectory(line: dict[str, Any]) -> Trajectory:
    old = line["old_logprobs"]
    if len(line["tokens"]) != len(line["logprobs"]) or (old is not None and len(old) != len(line["tokens"])):
        raise ValueError("tokens and log-probabilities differ in number")
    return Trajectory(
        line["index"], line["sample"], tuple(line["tokens"]), tuple(line["logprobs"]), line["text"], line["truncated"],
        line["reward"], None if old is None else tuple(old),
    )  # fmt: skip


def _not_finite(number: int, found: str) -> StageError:
    return StageError(
        f"rl: generation {number} is not finite, got {found}, expected numbers; the newest checkpoint stands: lower optim.lr, "
        "in a new folder"
    )


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def _draw_seed(seed: int, number: int, place: int, index: int) -> int:
    return int(seeded(seed, f"draw/{number}/{place}/{index}") * 2**53)
