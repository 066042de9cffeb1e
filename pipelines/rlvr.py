"""`pipelines rlvr`: reinforcement learning with verifiable rewards on the records of the stage `rl`.

In: a run file of `moe.rl` (moe/rl/tasks.py; `match` has no meaning here), and records, from a root's export or from the JSONL
file that the run file's `tasks` names. Out: the run's folder. A reward is what `pipelines verify` says of an answer: mathematics
by value (1 or 0), code by its tests in the sandbox. A task whose gold answer turns out to be unreadable loses its group, which is
counted (`rejected_groups`). Answers are verified one after the other; one of code takes `timeout_s` at most.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.hashing import digest
from core.manifest import read_manifest
from core.storage import Root

if TYPE_CHECKING:
    from moe.rl.tasks import Reward, RLFile, Tasks

JUDGED_BY = ("verifier", "answer", "tests", "timeout_s", "version")  # fields of a record that its reward depends on
NEEDS = {"maths": ("answer", str), "code": ("tests", list)}


def rlvr(
    config: Path, root: str | None, stage: str, datasets: Sequence[str], changes: Sequence[str], dry_run: bool
) -> list[str]:
    """What the command prints: a plan, or the summary of the run as JSON."""
    from moe.rl.__main__ import trained
    from moe.rl.plan import plan_lines
    from moe.rl.tasks import read_records, read_rl

    file = read_rl(config, changes)
    if (root is None) == (file.tasks is None):
        raise ConfigError(
            f"rlvr: records come from a root or from a file, got --root {root} and tasks {file.tasks}, expected one of them; "
            f"give --root, or `tasks` in {config}"
        )
    records = exported(Root(root), stage, datasets) if root is not None else read_records(Path(str(file.tasks)))
    tasks, reward = verified(records, file)
    return plan_lines(file, tasks) if dry_run else [trained(file, tasks, reward)]


def exported(root: Root, stage: str, datasets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of an instance of the stage `rl`, by dataset and shard; of all datasets where none is named."""
    manifest = read_manifest(root, stage, None)
    if manifest is None:
        raise ConfigError(
            f"rlvr: {root.url} has no export {stage}; run `pipelines run stage {stage}`, or name it by --stage"
        )
    known = sorted({name.partition("/")[0] for name in manifest.outputs})
    if absent := [name for name in datasets if name not in known]:
        raise ConfigError(f"rlvr: --dataset {absent[0]} has no records in {stage}, expected some of {', '.join(known)}")
    wanted = [n for n in sorted(manifest.outputs) if not datasets or n.partition("/")[0] in datasets]
    lines = (line for name in wanted for line in root.read_bytes(f"{stage}/{name}.jsonl").splitlines() if line.strip())
    records = [json.loads(line) for line in lines]
    if not records:
        raise ConfigError(
            f"rlvr: the export {stage} holds no record, got 0 of {manifest.accounts.get('considered', 0)} conversations; "
            "its accounts say why"
        )
    return records


def verified(records: Sequence[dict[str, Any]], file: "RLFile") -> "tuple[Tasks, Reward]":
    """Tasks and their reward; a record that no verifier can take is a `ConfigError`."""
    from mixtures.posttrain.verify import reward
    from moe.rl.tasks import tasks_of, tokenizer_folder

    for i, record in enumerate(records, 1):
        field, kind = NEEDS.get(str(record.get("verifier")), ("verifier", type(None)))
        if not isinstance(record.get(field), kind) or not record.get(field):
            raise ConfigError(
                f"rlvr: record {i} ({record.get('id')}) cannot be verified, got verifier {record.get('verifier')!r} and "
                f"{field} {record.get(field)!r}, expected maths with an answer or code with tests; mend or leave it out"
            )
    content = digest(["verifiers", [[record.get(name) for name in JUDGED_BY] for record in records]])
    tasks = tasks_of(records, tokenizer_folder(file), content)
    return tasks, lambda task, text: reward(records[task], text)[0]
