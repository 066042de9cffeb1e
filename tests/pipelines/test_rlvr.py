"""`pipelines rlvr`: records of the stage `rl`, their verifiers, and a model that is trained on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.manifest import Identity, Manifest, write_manifest
from core.storage import Root
from moe.metrics import read_metrics
from pipelines.rlvr import exported, rlvr, verified
from tests.moe.copying import start_run


def record(number: int, verifier: str = "maths", **fields: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"{number}>"}]
    given = (
        {"answer": str(number), "tests": None}
        if verifier == "maths"
        else {"answer": None, "tests": ["assert f(1) == 2"]}
    )
    return {
        "id": f"task-{number}",
        "prompt": prompt,
        "verifier": verifier,
        "timeout_s": 10.0,
        "version": 1,
        **given,
        **fields,
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = start_run(tmp_path_factory.mktemp("copying"), steps=2)
    torch.set_num_threads(threads)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """An export of two datasets, one of them in two shards."""
    root = Root(str(tmp_path / "root"))
    shards = {"chats/s1": [record(3)], "chats/s0": [record(1), record(2)], "sums/s0": [record(4)], "none/s0": []}
    for name, records in shards.items():
        root.write_bytes(f"rl/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
    outputs = {name: {"content": "", "rows": len(r)} for name, r in shards.items()}
    identity = Identity(stage="rl", version=3, config={}, inputs={}, artifacts={}, libraries={})
    write_manifest(root, Manifest("rl", None, identity, outputs, {"considered": 9}))
    return root


@pytest.fixture
def config(start: Path, tmp_path: Path) -> Path:
    path = tmp_path / "rl.json"
    values = {
        "folder": "run",
        "start": str(start),
        "steps": 1,
        "prompts": 4,
        "samples": 2,
        "max_tokens": 4,
        "device": "cpu",
    }
    path.write_text(json.dumps(values))
    return path


def test_records_come_in_the_order_of_datasets_and_shards(root: Root) -> None:
    assert [r["id"] for r in exported(root, "rl")] == ["task-1", "task-2", "task-3", "task-4"]
    assert [r["id"] for r in exported(root, "rl", ["sums"])] == ["task-4"]
    for stage, datasets, message in (
        ("rl@hard", (), "has no export rl@hard; run `pipelines run stage rl@hard`"),
        ("rl", ["sum"], "--dataset sum has no records in rl, expected some of chats, none, sums"),
        ("rl", ["none"], "the export rl holds no record, got 0 of 9 conversations"),
    ):
        with pytest.raises(ConfigError, match=message):
            exported(root, stage, datasets)


def test_a_plan_and_a_run_on_verified_answers(root: Root, config: Path, tmp_path: Path) -> None:
    plan = rlvr(config, root.url, "rl", (), (), True)
    assert any(line.startswith("tasks           4, prompts of ") for line in plan)
    assert not (tmp_path / "run").exists()
    (said,) = rlvr(config, root.url, "rl", (), ["seed=1"], False)
    assert json.loads(said)["steps"] == 1
    (row,) = read_metrics(tmp_path / "run")
    assert 0 <= row["reward_mean"] <= 1
    assert row["rejected_groups"] == 0
    with pytest.raises(ConfigError, match="tasks: the prompts"):
        rlvr(config, root.url, "rl", ["sums"], ["seed=1"], False)


def test_a_reward_is_what_the_verifier_says(config: Path) -> None:
    from moe.rl.tasks import read_rl

    tasks, reward = verified([record(7), record(8, "code", tests=["assert f(1) == 2"])], read_rl(config))
    assert tasks.stop, "the transcript's next speaker ends an answer"
    assert [reward(0, text) for text in (r"\boxed{7}", "the answer is 7.0", r"\boxed{8}", "7")] == [1, 1, 0, 0]
    assert reward(1, "```python\ndef f(x):\n    return x + 1\n```") == 1
    assert reward(1, "```python\ndef f(x):\n    return x\n```") == 0


def test_what_cannot_be_verified_is_told(root: Root, config: Path, tmp_path: Path) -> None:
    from moe.rl.tasks import read_rl

    for wrong in (record(1, verifier="judge"), record(1, answer=""), record(1, "code", tests=[])):
        with pytest.raises(ConfigError, match=r"rlvr: record 2 \(task-1\) cannot be verified"):
            verified([record(0), wrong], read_rl(config))
    (tmp_path / "tasks.jsonl").write_text(json.dumps(record(1)) + "\n")
    with pytest.raises(ConfigError, match="records come from a root or from a file, got --root None and tasks None"):
        rlvr(config, None, "rl", (), (), True)
    with pytest.raises(ConfigError, match="expected one of them"):
        rlvr(config, root.url, "rl", (), ["tasks=tasks.jsonl"], True)
    assert rlvr(config, None, "rl", (), ["tasks=tasks.jsonl"], True)
