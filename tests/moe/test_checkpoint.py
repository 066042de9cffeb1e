"""Checkpoints: kills in the middle of a save, what the files say, and runs that start from another run's."""

import dataclasses
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.errors import ConfigError, StageError
from core.hashing import file_digest
from moe import checkpoint
from moe.config import OptimConfig, RopeScaling, TrainConfig
from moe.data import ArrayTokenSource
from moe.files import TEMPORARY
from moe.metrics import METRICS, TIME_FIELDS, read_metrics
from moe.model import Decoder
from moe.trainer import train

WAIT_S = 120


def _bytes(folder: Path) -> dict[str, bytes]:
    path = checkpoint.find(folder)
    return {name: (path / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)}


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(folder)]


def _weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.CHECKPOINTS / f"step-{step:08d}" / checkpoint.WEIGHTS)


def _moments(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.CHECKPOINTS / f"step-{step:08d}" / checkpoint.OPTIMIZER)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_kill_while_a_file_of_a_save_is_written(
    name: str, train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """Files of some megabytes, and a kill as soon as one of them appears under the temporary name.

    The kill is another process's, so it may come a little late; the save of one of some steps is caught in its middle.
    """
    wide = dataclasses.replace(train_config.model, vocab_size=16_384)
    config = dataclasses.replace(train_config, model=wide, steps=4, checkpoint_steps=1)
    train(config, source, tmp_path / "undisturbed")
    caught = 0
    for step in (1, 2, 3):
        folder = tmp_path / f"killed-{step}"
        temporary = folder / checkpoint.CHECKPOINTS / (f"step-{step:08d}" + TEMPORARY)
        _killed_when(temporary / name, config, source, folder)
        caught += temporary.is_dir()
        assert checkpoint.find(folder).is_dir()
        train(config, source, folder)
        assert _bytes(folder) == _bytes(tmp_path / "undisturbed")
        assert _rows(folder) == _rows(tmp_path / "undisturbed")
        assert not temporary.exists()
    assert caught, "no kill fell into a save"


def test_weights_that_are_not_finite_are_never_written(train_config: TrainConfig, tmp_path: Path) -> None:
    """By whoever trains: the check is that of `save`."""
    model = Decoder(train_config.model)

    def save(step: int) -> None:
        checkpoint.save(
            tmp_path, step=step, weights=model.state_dict(), moments={}, config=train_config, mixture="", tokenizer=None
        )

    def broken() -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = torch.inf

    broken()
    with pytest.raises(
        StageError, match=r"weights after update 0 are not finite, got lm_head\.weight .* nothing stands"
    ):
        save(0)
    assert not (tmp_path / checkpoint.CHECKPOINTS).exists()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save(1)
    broken()
    with pytest.raises(StageError, match="step-00000001 stands"):
        save(2)
    assert [p.name for p in (tmp_path / checkpoint.CHECKPOINTS).iterdir()] == ["step-00000001"]


def _killed_when(file: Path, config: TrainConfig, source: ArrayTokenSource, folder: Path) -> None:
    """Trains in a forked child that is killed when `file` is there."""
    child = os.fork()
    if child == 0:
        try:
            train(config, source, folder)
        finally:
            os._exit(0)
    end = time.monotonic() + WAIT_S
    lives = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not file.exists() and time.monotonic() < end and os.waitid(os.P_PID, child, lives) is None:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_no_path_of_the_machine_is_in_a_checkpoint(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """Two copies of one tokenizer at different places give the same files."""
    folders = []
    for name in ("here", "there"):
        tokenizer = tmp_path / name / "tokenizer.json"
        tokenizer.parent.mkdir()
        tokenizer.write_text('{"version": "1.0"}')
        folders.append(tmp_path / f"run-{name}")
        train(dataclasses.replace(train_config, steps=1, tokenizer=str(tokenizer)), source, folders[-1])
    first, second = (
        {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file() and p.name != METRICS}
        for f in folders
    )
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())
    config, state = checkpoint.read(checkpoint.find(folders[0]))
    assert config.tokenizer == state.tokenizer == file_digest(tmp_path / "here" / "tokenizer.json")


def test_other_shapes_are_refused_with_one_message(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    train(dataclasses.replace(train_config, steps=1), source, tmp_path)
    path = checkpoint.find(tmp_path)
    weights, _ = checkpoint.load_tensors(path)
    other = Decoder(dataclasses.replace(train_config.model, dim=48, mtp_heads=1))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StageError, match=r"holds another model, got \S+ .* and \d+ more, expected the shapes"):
        checkpoint.put_weights(path.name, other, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.fixture
def earlier(train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> tuple[TrainConfig, Path]:
    """A run with one MTP head, and its folder."""
    config = dataclasses.replace(train_config, model=dataclasses.replace(train_config.model, mtp_heads=1), steps=4)
    train(config, source, tmp_path / "earlier")
    return config, tmp_path / "earlier"


def _later(config: TrainConfig, start: Path, **shape: Any) -> TrainConfig:
    model = dataclasses.replace(config.model, **shape)
    return dataclasses.replace(config, model=model, steps=2, keep=9, init=checkpoint.weights_digest(start), repeat=True)


def test_heads_two_and_three_begin_as_the_first(
    earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, start = earlier
    train(_later(config, start, mtp_heads=3), source, tmp_path / "later", start=start)
    for old, new in (
        (_weights(start, 4), _weights(tmp_path / "later", 0)),
        (_moments(start, 4), _moments(tmp_path / "later", 0)),
    ):
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
        heads = {name: tensor for name, tensor in old.items() if name.startswith("mtp.0.")}
        assert heads
        for name, tensor in heads.items():
            for head in ("mtp.1.", "mtp.2."):
                assert torch.equal(new[head + name.removeprefix("mtp.0.")], tensor)
        assert len(new) == len(old) + 2 * len(heads)
    after = _weights(tmp_path / "later", 2)
    assert not torch.equal(after["mtp.1.output.weight"], after["mtp.2.output.weight"]), "each learns its own token"
    assert len(read_metrics(tmp_path / "later")[0]["mtp_loss"]) == 3


def test_heads_of_a_run_without_any_begin_fresh(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    train(dataclasses.replace(train_config, steps=2), source, tmp_path / "earlier")
    config = _later(train_config, tmp_path / "earlier", mtp_heads=2)
    train(config, source, tmp_path / "later", start=tmp_path / "earlier")
    got, fresh = _weights(tmp_path / "later", 0), Decoder(config.model, config.seed).state_dict()
    assert all(torch.equal(got[name], fresh[name]) for name in got if name.startswith("mtp."))
    old = _weights(tmp_path / "earlier", 2)
    assert all(torch.equal(got[name], old[name]) for name in old)
    moments = _moments(tmp_path / "later", 0)
    assert not any(tensor.any() for name, tensor in moments.items() if name.startswith("mtp."))


def test_a_later_stage_may_have_a_longer_context(
    earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, start = earlier
    scaling = RopeScaling(factor=4.0, original_context=64, high_frequency_factor=4.0)
    later = _later(config, start, context=256, rope_theta=1e6, rope_scaling=scaling, routed_clip=(0.0, 7.0, 7.0))
    train(later, source, tmp_path / "later", start=start)
    old, new = _weights(start, 4), _weights(tmp_path / "later", 0)
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    model = checkpoint.load(tmp_path / "later")
    assert (model.config.context, model.config.rope_scaling) == (256, scaling)
    tokens = torch.arange(250)[None] % 63 + 1
    assert not torch.equal(model(tokens), checkpoint.load(start)(tokens))


def test_all_other_shapes_are_refused_together(
    earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, start = earlier
    with pytest.raises(ConfigError) as error:
        train(
            _later(config, start, mtp_heads=0, top_k=1, window=8, context=128), source, tmp_path / "later", start=start
        )
    assert [problem.split(",")[0] for problem in error.value.problems] == [
        "train: model.window may not change between runs",
        "train: model.top_k may not change between runs",
        "train: model.mtp_heads may not fall between runs",
    ]
    assert not (tmp_path / "later").exists()


def test_another_optimiser_leaves_the_moments_behind(
    earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, start = earlier
    later = dataclasses.replace(_later(config, start), optim=OptimConfig(optimizer="adamw"))
    train(later, source, tmp_path / "later", start=start)
    assert _moments(tmp_path / "later", 0) == {}
    moments = _moments(tmp_path / "later", 2)
    assert int(moments["updates"]) == 2
    assert any(name.endswith("q_proj.weight.exp_avg") for name in moments)


def test_exact_weights_cross_a_change_of_precision(
    earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path
) -> None:
    config, start = earlier
    half = dataclasses.replace(_later(config, start), precision="bfloat16", steps=1)
    train(half, source, tmp_path / "half", start=start)
    old, begun, masters = _weights(start, 4), _weights(tmp_path / "half", 0), _moments(tmp_path / "half", 0)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert begun[name].dtype == torch.bfloat16
    assert torch.equal(masters[f"{name}.master"], old[name])
    assert torch.equal(begun[name], old[name].bfloat16())
    full = dataclasses.replace(_later(config, tmp_path / "half"), steps=1)
    train(full, source, tmp_path / "full", start=tmp_path / "half")
    assert torch.equal(_weights(tmp_path / "full", 0)[name], _moments(tmp_path / "half", 1)[f"{name}.master"])
    logits = checkpoint.load(tmp_path / "half")(torch.tensor([[0, 5, 6]]))
    assert logits.isfinite().all()


def test_a_frozen_router_stays(earlier: tuple[TrainConfig, Path], source: ArrayTokenSource, tmp_path: Path) -> None:
    config, start = earlier
    frozen = dataclasses.replace(_later(config, start), optim=OptimConfig(freeze_router=True))
    train(frozen, source, tmp_path / "frozen", start=start)
    before, after = _weights(tmp_path / "frozen", 0), _weights(tmp_path / "frozen", 2)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.endswith((".moe.gate.weight", ".moe.router_bias"))}
    thawed = dataclasses.replace(_later(config, tmp_path / "frozen"), steps=1)
    train(thawed, source, tmp_path / "thawed", start=tmp_path / "frozen")
    name = "model.layers.1.moe.gate.weight"
    assert not torch.equal(_weights(tmp_path / "thawed", 1)[name], after[name])


def test_rows_may_grow_and_a_resumed_run_grows_alike(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    config = dataclasses.replace(train_config, steps=6, row_growth=((2, 6), (4, 8)), checkpoint_steps=3, repeat=True)
    train(config, source, tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole")
    assert [row["tokens"] // 64 for row in rows] == [4, 8, 14, 20, 28, 36]
    assert [row["targets"] // 64 for row in rows] == [4, 4, 6, 6, 8, 8]
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        train(config, source, folder, _interrupt_at(5))
    assert train(config, source, folder).resumed_step == 3
    assert (_bytes(folder), _rows(folder)) == (_bytes(tmp_path / "whole"), _rows(tmp_path / "whole"))
    assert json.loads((checkpoint.find(folder) / checkpoint.CONFIG).read_text())["row_growth"] == [[2, 6], [4, 8]]


def _interrupt_at(step: int) -> Any:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return on_step


def test_old_checkpoints_go_and_what_others_put_there_stays(tmp_path: Path) -> None:
    """Copies kept by hand, files and links lie beside them; only folders of training's own names are its to remove."""
    below = tmp_path / checkpoint.CHECKPOINTS
    others = ("best", "step-00000003-kept", "step-3", "notes.txt.d")
    for name in (*others, *(f"step-{i:08d}" for i in (1, 2, 3, 9)), "step-00000004.writing"):
        (below / name).mkdir(parents=True)
    (below / ".DS_Store").write_text("")
    (below / "step-00000007").write_text("a file of that name")
    checkpoint.remove_old(tmp_path, "step-00000003", keep=2)
    stay = {"step-00000002", "step-00000003", "step-00000007", ".DS_Store", *others}
    assert {p.name for p in below.iterdir()} == stay


def test_a_folder_is_trained_in_by_one_process(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """While it trains another call is refused, with the process that has it; the lock leaves no file and ends with the run."""
    refused = []

    def again(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            with pytest.raises(StageError, match="another process trains in") as error:
                train(train_config, source, tmp_path)
            refused.append(str(error.value))

    train(train_config, source, tmp_path, again)
    assert f"got a lock of process {os.getpid()}," in refused[0] or not Path("/proc/locks").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "latest", METRICS]
    assert train(train_config, source, tmp_path).resumed_step == 12


def test_a_full_disk_leaves_the_checkpoint_before(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """The kernel takes no more than some bytes a file; the same command goes on when it does again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(StageError, match=r"step-00000010 cannot be written.* step-00000005 stands, free .* GiB"):
            train(train_config, source, tmp_path, fill)
        assert not (tmp_path / checkpoint.CHECKPOINTS / "step-00000010.writing").exists()
        five = sum(map(len, (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[:5]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (five, hard))
        with pytest.raises(
            StageError, match=r"takes no row, got .* expected to append update 6; the newest checkpoint stands"
        ):
            train(train_config, source, tmp_path, lambda row: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train(train_config, source, tmp_path).resumed_step == 5
    train(train_config, source, tmp_path.parent / "undisturbed")
    assert _bytes(tmp_path) == _bytes(tmp_path.parent / "undisturbed")


def test_a_folder_that_takes_no_file_is_named(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    """One that cannot be made, as a file is in its way; and a disk that is full at the first file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StageError, match=r"the run's folder takes no file, got .*Not a directory.* make room or choose"
    ):
        train(train_config, source, tmp_path / "file" / "run")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(" " * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(StageError, match=r"takes no file, got .*File too large.* expected to write into"):
            train(dataclasses.replace(train_config, tokenizer=str(tokenizer)), source, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["step-00000099", "", "..", "step-00000005/config.json", "\udcff"])
def test_a_pointer_to_nothing(name: str, train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path) -> None:
    train(dataclasses.replace(train_config, steps=1), source, tmp_path)
    (tmp_path / checkpoint.LATEST).write_bytes(name.encode(errors="surrogateescape"))
    for use in (checkpoint.load, checkpoint.weights_digest, lambda folder: train(train_config, source, folder)):
        with pytest.raises(StageError, match=r"latest names no checkpoint, got .* write step-00000001 into"):
            use(tmp_path)


def test_a_run_goes_on_without_the_weights_that_it_began_from(
    train_config: TrainConfig, source: ArrayTokenSource, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    train(dataclasses.replace(train_config, steps=1), source, before)
    config = dataclasses.replace(train_config, steps=2, init=checkpoint.begun_from(after, before))
    train(config, source, after, start=before)
    train(dataclasses.replace(train_config, steps=1, seed=1), source, tmp_path / "other")
    for start in (tmp_path / "other", tmp_path / "gone"):
        assert checkpoint.begun_from(after, start) == config.init
        assert train(config, source, after, start=start).resumed_step == 2
    with pytest.raises(ConfigError, match="the weights to start from are not those of the config"):
        train(config, source, tmp_path / "new", start=tmp_path / "other")
    assert checkpoint.begun_from(before, after) == checkpoint.weights_digest(after), "it began from none"
