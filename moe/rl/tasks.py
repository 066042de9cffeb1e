"""Tasks of reinforcement learning: prompts in a seeded order, and the file that describes a run.

    folder: runs/rl                         # checkpoints, metrics.jsonl, generations; the same file goes on where it stopped
    start: runs/sft                         # a run, a checkpoint or a hub folder, with its tokenizer
    tasks: sums.jsonl                       # one record a line: prompt (text, or [{role, content}]) and answer (text or number)
    match: number                           # exact: the answer word for word; number: the last number in it, by value
    steps: 200
    prompts: 32
    optim: {lr: 1.0e-5}
    alarms: {blow_up_ratio: 50}             # optional: moe/alarms.py
    ...                                     # and every other field of moe.rl.config.RLConfig

Out: `RLFile`, `Tasks` and the reward of an answer. Relative paths are meant from the file's folder. Messages go through the start
folder's chat template (moe/server/chat.py), whose stops end an answer too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from core.errors import ConfigError
from core.hashing import digest, seeded
from moe import checkpoint
from moe.alarms import Limits
from moe.files import read_json_lines
from moe.generate import load_tokenizer, token_ids
from moe.rl.config import OPTIM, RLConfig
from moe.run_file import mapping, read_values
from moe.server.chat import ChatTemplate, chat_template
from moe.solve import number
from moe.typed import build

# Of a task, by its index, and an answer to it: how good it is. `InputError` says that the task cannot be judged at all.
Reward = Callable[[int, str], float]
Match = Literal["exact", "number"]
OWN = ("folder", "start", "tasks", "match", "alarms")  # keys that are no fields of RLConfig
# that stop a run by default: a policy's likelihood of its own answers may well fall for a while
WATCHED = ("expert_blow_up",)


@dataclass(frozen=True)
class Tasks:
    """Prompts as tokens. `names` stand in messages, `content` is a hash of all that a reward depends on."""

    prompts: Sequence[tuple[int, ...]]
    names: Sequence[str]
    content: str
    stop: tuple[str, ...] = ()  # that end an answer, from the chat template; tokens that do, from its folder
    stop_tokens: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        return digest([[list(p) for p in self.prompts], [*self.stop, *self.stop_tokens], self.content])

    def drawn(self, seed: int, generation: int, prompts: int) -> list[int]:
        """The tasks of a generation: all of them in a seeded order, then all again in another one."""
        places = range(generation * prompts, (generation + 1) * prompts)
        return [_order(seed, place // len(self), len(self))[place % len(self)] for place in places]


@dataclass(frozen=True)
class RLFile:
    """What `moe.rl.trainer.reinforce` is called with, but for tasks and reward."""

    config: RLConfig
    folder: Path
    start: Path
    tasks: Path | None
    match: Match
    limits: Limits


def read_rl(path: Path, changes: Iterable[str] = ()) -> RLFile:
    """The run that a file describes, after `changes` of the form `optim.lr=0.001`."""
    values, here = read_values(path, changes, "rl"), path.resolve().parent
    problems = [f"{path}: {key}: missing" for key in ("folder", "start") if not values.get(key)]
    problems += [
        f"{path}: {key}: must be a text, got {values[key]!r}"
        for key in ("folder", "start", "tasks")
        if not isinstance(values.get(key, ""), str | None)
    ]
    match = values.get("match", "exact")
    if match not in ("exact", "number"):
        problems.append(f"{path}: match: must be exact or number, got {match!r}")
    if problems:
        raise ConfigError(*problems)
    given = {key: value for key, value in values.items() if key not in OWN}
    given["optim"] = dataclasses.asdict(OPTIM) | mapping(values, "optim", "rl")
    alarms = {"stop": WATCHED} | mapping(values, "alarms", "rl")
    tasks = here / values["tasks"] if values.get("tasks") else None
    return RLFile(
        build(RLConfig, given, "rl"), here / values["folder"], here / values["start"], tasks, match,
        build(Limits, alarms, "alarms"),
    )  # fmt: skip


def tokenizer_folder(file: RLFile) -> Path:
    """Where tokenizer and chat template lie: a run that goes on has its own."""
    return file.folder if (file.folder / checkpoint.LATEST).is_file() else file.start


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, gzipped or not; one that cannot be read, or has none, is a `ConfigError`."""
    try:
        found = read_json_lines(path)
    except (OSError, ValueError, EOFError) as e:
        raise ConfigError(f"rl: tasks cannot be read, got {e} in {path}, expected JSONL, gzipped or not") from e
    if not found:
        raise ConfigError(f"rl: {path} has no task, got an empty file, expected one record a line")
    wrong = next((i for i, record in enumerate(found, 1) if not isinstance(record, dict)), None)
    if wrong is not None:
        raise ConfigError(f"rl: {path}, record {wrong} is no object, expected prompt and answer; mend the file")
    return found


def tasks_of(records: Sequence[Mapping[str, Any]], folder: Path, content: str) -> Tasks:
    """Records with a `prompt` as tasks, by the tokenizer and the chat template of a model's folder."""
    tokenizer, template = load_tokenizer(folder), chat_template(folder)
    prompts, problems = [], []
    for i, record in enumerate(records, 1):
        try:
            text = _asked(record.get("prompt"), template)
        except (ValueError, TypeError) as e:
            problems.append(f"rl: record {i} has no prompt, got {e}; mend the file")
            continue
        prompts.append(tuple(token_ids(tokenizer, text)))
    if problems:
        more = [f"rl: {len(problems) - 5} more records like these"] if len(problems) > 5 else []
        raise ConfigError(*problems[:5], *more)
    names = [str(record.get("id", f"record {i}")) for i, record in enumerate(records, 1)]
    if not any(isinstance(record.get("prompt"), list) for record in records):
        return Tasks(prompts, names, content)
    return Tasks(prompts, names, content, tuple(template.stops), template.ends(tokenizer))


def answer_reward(records: Sequence[Mapping[str, Any]], match: Match) -> Reward:
    """1 where an answer is the record's `answer`, else 0; a record without one is a `ConfigError`."""
    answers = [record.get("answer") for record in records]
    for i, answer in enumerate(answers, 1):
        fits = isinstance(answer, str | int | float) and not isinstance(answer, bool) and str(answer).strip()
        if not fits or (match == "number" and number(str(answer)) is None):
            raise ConfigError(
                f"rl: record {i} has no answer to compare with, got {answer!r}, expected "
                f"{'a number' if match == 'number' else 'a text or a number'}; mend the file or change `match`"
            )
    gold = [str(answer).strip() for answer in answers]
    values = [number(text) for text in gold] if match == "number" else []

    def reward(task: int, text: str) -> float:
        return float(number(text) == values[task]) if match == "number" else float(text.strip() == gold[task])

    return reward


def _asked(prompt: Any, template: ChatTemplate) -> str:
    """The text of a prompt; `ValueError` or `TypeError`, the template's own among them, where it has none."""
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"{message!r:.80}, expected messages with a role and a content, both text")
        prompt = template(prompt)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{prompt!r:.80}, expected a text or messages")
    prompt.encode()  # half of a surrogate pair, which JSON can spell, is no text
    return prompt


@cache
def _order(seed: int, turn: int, size: int) -> list[int]:
    return sorted(range(size), key=lambda i: (seeded(seed, f"task/{turn}/{i}"), i))
