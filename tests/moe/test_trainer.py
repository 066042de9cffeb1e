"""Training end to end: exact resume after a real kill, refusals that write nothing, metrics."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe
from core.errors import ConfigError, StageError
from moe import checkpoint
from moe.config import OptimConfig, TrainConfig
from moe.data import ArrayTokenSource
from moe.files import TEMPORARY, replace_text
from moe.metrics import METRICS, TIME_FIELDS, MetricsFile, finite, read_metrics
from moe.parallel import World
from moe.trainer import train
from tests.moe.conftest import counting_source

REPOSITORY = Path(__file__).resolve().parents[2]
# The child prints the step at which the parent is to kill it, and waits there: however slow the parent is, it is not too late.
CHILD = """
import json, sys
from pathlib import Path
from moe.config import from_json
from moe.trainer import train
from tests.moe.conftest import counting_source
config, folder = from_json(json.loads(sys.argv[1])), Path(sys.argv[2])

def said(row):
    if row["step"] >= int(sys.argv[3]):
        print(row["step"], flush=True)
        sys.stdin.read()

train(config, counting_source(), folder, said)
"""


def _without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(folder)]


def _bytes(folder: Path) -> dict[str, bytes]:
    path = checkpoint.find(folder)
    return {name: (path / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def undisturbed(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> Path:
    train(train_config, source, tmp_path / "undisturbed")
    return tmp_path / "undisturbed"


def _assert_equal_runs(folder: Path, undisturbed: Path) -> None:
    assert _bytes(folder) == _bytes(undisturbed)
    assert _without_times(folder) == _without_times(undisturbed)


def test_loss_falls_and_summary_counts(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> None:
    config = dataclasses.replace(train_config, steps=60, repeat=True, optim=OptimConfig(lr=1e-2, warmup_steps=5))
    seen: list[dict[str, Any]] = []
    summary = train(config, source, tmp_path, seen.append)
    rows = read_metrics(tmp_path)
    assert rows == seen
    assert [r["step"] for r in rows] == list(range(1, 61))
    assert rows[-1]["tokens"] == summary.tokens == 60 * 4 * 64
    assert rows[0]["loss"] > 3.9
    assert rows[-1]["loss"] == summary.loss < 2.0
    assert set(rows[-1]["domain_loss"]) == {"by_one", "by_two"}
    assert min(rows[-1]["domain_loss"].values()) <= rows[-1]["loss"] <= max(rows[-1]["domain_loss"].values())
    assert len(rows[-1]["load_violation"]) == 2
    assert summary.resumed_step is None
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000055", "step-00000060"]
    logits = moe.load(tmp_path)(torch.from_numpy(source.tokens(0)[None].astype(np.int64)))
    assert logits.shape == (1, source.length(0), source.vocab_size)


def test_same_seed_same_bytes(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    train(train_config, source, tmp_path / "again")
    _assert_equal_runs(tmp_path / "again", undisturbed)
    train(dataclasses.replace(train_config, seed=1), source, tmp_path / "other")
    assert _bytes(tmp_path / "other") != _bytes(undisturbed)


def test_resume_after_kill_9(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed by the kernel in another process: after step 3, before the first periodic checkpoint, and after step 8."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(train_config)), str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for stop in (3, 8):
        with subprocess.Popen([*command, str(stop)], cwd=REPOSITORY, env=_environment(), **pipes) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == f"{stop}\n".encode()
            child.kill()
        assert child.returncode == -signal.SIGKILL
    summary = train(train_config, source, folder)
    assert summary.resumed_step is not None
    assert 0 < summary.resumed_step < 12
    _assert_equal_runs(folder, undisturbed)


def test_resume_after_a_kill_at_each_file_operation(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """A forked child kills itself at its n-th open, mkdir, rename or removal; n grows until it outlives the run.

    Every third operation, every one under STEPWELL_SOAK.
    """
    config = dataclasses.replace(train_config, steps=2, checkpoint_steps=1, keep=1)
    train(config, source, tmp_path / "undisturbed")
    stride, operation = (1 if "STEPWELL_SOAK" in os.environ else 3), 1
    while _killed_at(operation, config, source, folder := tmp_path / f"killed-{operation}"):
        train(config, source, folder)
        _assert_equal_runs(folder, tmp_path / "undisturbed")
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
        operation += stride
    assert operation > 30, "three checkpoints of four files each, and the pointer"


def _killed_at(operation: int, config: TrainConfig, source: ArrayTokenSource, folder: Path) -> bool:
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(arguments):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = 1
        try:
            train(config, source, folder)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_a_finished_run_is_left_alone(train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path) -> None:
    before = _tree(undisturbed)
    summary = train(train_config, source, undisturbed)
    assert summary.resumed_step == summary.steps == 12
    assert summary.tokens_per_s is None
    assert _tree(undisturbed) == before


def test_leftovers_of_a_kill_are_swept(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    """A checkpoint renamed but not yet named by `latest`, a half-written one, and metrics cut within a line."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    newer, older = folder / "checkpoints" / "step-00000012", folder / "checkpoints" / "step-00000010"
    replace_text(folder / checkpoint.LATEST, older.name + "\n")
    (newer / checkpoint.WEIGHTS).write_bytes(b"half")
    (folder / "checkpoints" / ("step-00000012" + TEMPORARY)).mkdir()
    with open(folder / METRICS, "a") as f:
        f.write('{"step": 13, "lo')
    train(train_config, source, folder)
    _assert_equal_runs(folder, undisturbed)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [older.name, newer.name]


Change = Callable[[TrainConfig], TrainConfig]
CHANGES: dict[str, tuple[Change, str]] = {
    "shape": (
        lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, dim=48)),
        "model.dim: the checkpoint has 32",
    ),
    "vocabulary": (
        lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=96)),
        "model.vocab_size: the checkpoint has 64, this run 96",
    ),
    "optimiser": (
        lambda c: dataclasses.replace(c, optim=OptimConfig(lr=0.5)),
        "optim.lr: the checkpoint has 0.003, this run 0.5",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_config_is_refused(
    name: str, train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    before = _tree(undisturbed)
    change, message = CHANGES[name]
    with pytest.raises(ConfigError, match=message):
        train(change(train_config), source, undisturbed)
    assert _tree(undisturbed) == before


def test_another_mixture_or_tokenizer_is_refused(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="mixture: the documents"):
        train(train_config, counting_source(seed=1), undisturbed)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer: the checkpoint has None"):
        train(dataclasses.replace(train_config, tokenizer=str(tmp_path / "t.json")), source, undisturbed)


def test_all_is_checked_before_the_first_byte(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    small = dataclasses.replace(train_config.model, vocab_size=40, eos=1)
    with pytest.raises(ConfigError) as error:
        train(dataclasses.replace(train_config, model=small, tokenizer="absent.json"), source, tmp_path / "run")
    assert [p.split(",")[0] for p in error.value.problems] == [
        "train: the mixture's vocabulary exceeds the embedding",
        "train: the mixture ends documents differently",
        "train: no tokenizer file",
    ]
    with pytest.raises(
        ConfigError, match=r"the mixture is too short, got \d+ tokens = \d+ steps of 4 x 64, expected 10000"
    ):
        train(dataclasses.replace(train_config, steps=10_000), source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_overwrites_nothing(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    config = dataclasses.replace(train_config, optim=OptimConfig(lr=1e38, warmup_steps=0))
    with pytest.raises(StageError, match=r"update 2 is not finite, got loss \S+ .* step-00000000 stands"):
        train(config, source, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert all(p.isfinite().all() for p in moe.load(tmp_path).parameters())


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_truncated_checkpoint_is_named(
    name: str, train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    path = checkpoint.find(undisturbed) / name
    path.write_bytes(path.read_bytes()[:-20])
    before = _tree(undisturbed)
    for use in (lambda: train(train_config, source, undisturbed), lambda: moe.load(undisturbed)):
        with pytest.raises(StageError, match=rf"step-00000012/{name}.* write step-00000010 into"):
            use()
    assert _tree(undisturbed) == before
    replace_text(undisturbed / checkpoint.LATEST, "step-00000010\n")
    assert train(train_config, source, undisturbed).resumed_step == 10


def test_lost_metrics_are_noticed(train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path) -> None:
    (undisturbed / METRICS).write_text("")
    with pytest.raises(StageError, match="lost rows, got 0, expected 12"):
        train(train_config, source, undisturbed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics, got .* expected metrics.jsonl"),
        (b"\0" * 4096 + b"\n", "is damaged, got .* in line 1"),
        (b"[1]\n", r"is damaged, got b'\[1\]' in line 1"),
    ],
)
def test_metrics_that_are_none(
    content: bytes | None, message: str, train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    (undisturbed / METRICS).unlink()
    if content is not None:
        (undisturbed / METRICS).write_bytes(content)
    before = _tree(undisturbed)
    with pytest.raises(StageError, match=message):
        train(train_config, source, undisturbed)
    assert _tree(undisturbed) == before


def test_garbage_behind_the_checkpoint_is_cut_off(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    """What a power cut leaves of rows that were never synced."""
    whole = (undisturbed / METRICS).read_bytes()
    (undisturbed / METRICS).write_bytes(whole + b"\xff\0\0\n\0")
    train(train_config, source, undisturbed)
    assert (undisturbed / METRICS).read_bytes() == whole


def test_a_fresh_start_keeps_the_metrics_of_another(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    (undisturbed / checkpoint.LATEST).unlink()
    shutil.rmtree(undisturbed / checkpoint.CHECKPOINTS)
    before = _tree(undisturbed)
    with pytest.raises(StageError, match=r"metrics\.jsonl belongs to a run without checkpoints"):
        train(train_config, source, undisturbed)
    assert _tree(undisturbed) == before


def test_rows_are_json_whatever_was_measured(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 2.0, "experts": {"rms_max_median": [math.inf, 1.5], "load": [[math.nan, 1]]}}
    with MetricsFile(tmp_path, 0, tensorboard=False) as metrics:
        metrics.write(finite(row))
    said = json.loads((tmp_path / METRICS).read_text(), parse_constant=pytest.fail)
    assert said == {"step": 1, "loss": 2.0, "experts": {"rms_max_median": [None, 1.5], "load": [[None, 1]]}}


def test_a_gpu_of_its_own_is_not_for_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"train\.device: names one GPU for 2 ranks, got 'cuda:1'"):
        World.from_env(device="cuda:1")


def test_a_lost_pointer_is_not_a_fresh_run(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path
) -> None:
    (undisturbed / checkpoint.LATEST).unlink()
    before = _tree(undisturbed)
    with pytest.raises(StageError, match="latest is missing, got step-00000012"):
        train(train_config, source, undisturbed)
    assert _tree(undisturbed) == before


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint here"):
        moe.load(tmp_path)


def test_importing_moe_imports_no_torch() -> None:
    code = "import sys, moe, moe.config, moe.data; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=_environment(), check=True)


def test_a_later_phase_starts_from_the_weights_of_the_one_before(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(train_config, steps=3, init=checkpoint.weights_digest(undisturbed))
    other = counting_source(seed=9)
    summary = train(config, other, tmp_path / "later", start=undisturbed)
    fresh = train(dataclasses.replace(config, init=None), other, tmp_path / "fresh")
    rows = [read_metrics(tmp_path / name) for name in ("later", "fresh")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3]
    assert rows[0][0]["loss"] < rows[1][0]["loss"] - 0.1
    assert (summary.steps, fresh.steps) == (3, 3)
    again = train(config, other, tmp_path / "later", start=undisturbed)
    assert again.resumed_step == 3
    assert _bytes(tmp_path / "later") != _bytes(tmp_path / "fresh")


def test_the_weights_to_start_from_are_those_that_the_config_names(
    train_config: TrainConfig, source: ArrayTokenSource, undisturbed: Path, tmp_path: Path
) -> None:
    for config, start in (
        (dataclasses.replace(train_config, init="0" * 32), undisturbed),
        (dataclasses.replace(train_config, init="0" * 32), None),
        (train_config, undisturbed),
    ):
        with pytest.raises(ConfigError, match="the weights to start from are not those of the config"):
            train(config, source, tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


def test_an_order_of_its_own_keeps_the_initial_weights(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    config = dataclasses.replace(train_config, steps=1, shuffle=True)
    losses = {}
    for name, changes in {
        "plain": {},
        "same": {"order_seed": 0},
        "order": {"order_seed": 5},
        "seed": {"seed": 5},
    }.items():
        train(dataclasses.replace(config, keep=9, **changes), source, tmp_path / name)
        first = tmp_path / name / checkpoint.CHECKPOINTS / "step-00000000" / checkpoint.WEIGHTS
        losses[name] = (first.read_bytes(), read_metrics(tmp_path / name)[0]["loss"])
    assert losses["plain"] == losses["same"]
    assert losses["plain"][0] == losses["order"][0] != losses["seed"][0]
    assert losses["plain"][1] != losses["order"][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "train.device: no GPU here, got 'cuda'"),
        ("cuda:1", "train.device: no GPU here, got 'cuda:1'"),
        ("gpu", "train.device: unknown, got 'gpu', expected auto, cpu, cuda or cuda:N"),
        ("meta", "train.device: not supported, got 'meta'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused(
    name: str, message: str, train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(train_config, device=name), source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_what_to_lower(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> None:
    """A child whose address space is limited to what it has, and not half of what an update of 1,024 rows needs."""
    code = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from core.errors import StageError
from moe.config import from_json
from moe.trainer import train
from tests.moe.conftest import counting_source
torch.set_num_threads(1)
limit = psutil.Process().memory_info().vms + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    train(from_json(json.loads(sys.argv[1])), counting_source(), Path(sys.argv[2]))
except StageError as error:
    print(error)
"""
    config = dataclasses.replace(train_config, rows=1024, repeat=True)
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config)), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=240)
    assert done.stdout.startswith(
        "train: out of memory with train.micro_rows 1024 x model.context 64 tokens at once, got "
    ), done.stderr
    assert "lower train.micro_rows, which changes no result beyond rounding, or model.context" in done.stdout
    assert checkpoint.find(tmp_path / "run").name == "step-00000000"


def test_tensorboard_holds_the_rows(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> None:
    """Also of a run that went on from a checkpoint: rows behind it are told once."""
    pytest.importorskip("tensorboard", reason="the writer is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(train_config, tensorboard=True, checkpoint_steps=4)
    with pytest.raises(RuntimeError, match="as if killed"):
        train(config, source, tmp_path, _stop_at_six)
    train(config, source, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path)
    for name in ("loss", "domain_loss/by_one", "load_violation/0"):
        found = [(e.step, e.value) for e in events.Scalars(name)]
        value = {"loss": lambda r: r["loss"], "domain_loss/by_one": lambda r: r["domain_loss"]["by_one"]}
        expected = [(r["step"], value.get(name, lambda r: r["load_violation"][0])(r)) for r in rows]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert [e.step for e in events.Scalars("experts/rms_max_median/0")] == [1, 10, 12]


def _stop_at_six(row: dict[str, Any]) -> None:
    if row["step"] == 6:
        raise RuntimeError("as if killed")


def test_rows_that_the_ranks_cannot_share_and_groups_that_do_not_fit(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    config = dataclasses.replace(train_config, optim=OptimConfig(expert_groups=3))
    with pytest.raises(ConfigError, match=r"optim\.expert_groups: must divide the experts, got 3 for 4"):
        train(config, source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_batch_is_learnt_by_heart(train_config: TrainConfig, tmp_path: Path) -> None:
    """Random tokens, seen again and again, with an MTP head: both losses fall to near zero."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(1, 64, 31), 0) for _ in range(4)]
    source = ArrayTokenSource(documents, vocab_size=64, eos=0, text_bytes=[31] * 4)
    config = dataclasses.replace(
        train_config,
        model=dataclasses.replace(train_config.model, mtp_heads=1, context=32),
        optim=OptimConfig(lr=2e-2, warmup_steps=5, weight_decay=0.0),
        steps=80,
        repeat=True,
        checkpoint_steps=80,
    )
    train(config, source, tmp_path)
    row = read_metrics(tmp_path)[-1]
    assert row["loss"] < 0.05
    assert row["mtp_loss"][0] < 0.3
