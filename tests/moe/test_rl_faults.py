"""What goes wrong in reinforcement learning: models without a next token, files of another run, records that are no tasks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from core.errors import ConfigError, StageError
from moe import checkpoint, hub
from moe.config import ModelConfig, OptimConfig
from moe.generate import load_tokenizer
from moe.metrics import METRICS
from moe.model import Decoder
from moe.optim import build
from moe.rl import rollouts
from moe.rl.__main__ import main
from moe.rl.config import OPTIM, RLConfig
from moe.rl.folder import RECORD
from moe.rl.rollouts import Trajectory, judged, sample, weights_hash
from moe.rl.tasks import Tasks, read_records, tasks_of
from moe.rl.trainer import reinforce
from moe.rl.update import PolicyUpdater
from tests.moe.texts import tokenizer_of, uniform

CONFIG = RLConfig(steps=2, prompts=2, samples=4, max_tokens=4, optim=replace(OPTIM, lr=1e-3), device="cpu", threads=1)
HALF = tuple(range(1, 150))  # of the vocabulary


def hub_folder(path: Path, spoil: float | None = None, stop_tokens: tuple[int, ...] = ()) -> Path:
    """A model to which every token is equally likely; a spoilt one has that number as a weight of its head."""
    tokenizer = tokenizer_of(["1>1"])
    tokenizer.save(str(path.with_suffix(".json")))
    model = uniform(tokenizer)
    if spoil is not None:
        with torch.no_grad():
            model.lm_head.weight[7] = spoil
    model.stop_tokens = stop_tokens
    return hub.export(model, path, tokenizer=path.with_suffix(".json"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return hub_folder(tmp_path_factory.mktemp("start") / "hub")


def tasks_from(start: Path) -> Tasks:
    return tasks_of([{"prompt": f"{i}>"} for i in range(4)], start, "")


def evens(task: int, text: str) -> float:
    return float(len(text) % 2)


def run(config: RLConfig, start: Path, folder: Path, reward: Any = evens, on_step: Any = None) -> Any:
    return reinforce(config, tasks_from(start), reward, folder, start, on_step)


def test_a_model_without_a_next_token_stops_before_anything_is_judged(tmp_path: Path) -> None:
    start = hub_folder(tmp_path / "hub", spoil=3e38)  # a number, but no logit that it makes is one
    with pytest.raises(StageError, match=r"^rl: generation 0 is not finite, got logits .* an answer to record \d, .*$"):
        run(CONFIG, start, tmp_path / "run", _never)
    assert not (tmp_path / "run" / rollouts.FOLDER).exists()


def _never(task: int, text: str) -> float:
    raise AssertionError


def test_a_snapshot_without_numbers_is_told(start: Path, tmp_path: Path) -> None:
    model, tasks = moe.load(start), tasks_from(start)
    made = sample(model, load_tokenizer(start), tasks, evens, CONFIG, 0, weights_hash(model))
    old = [[float("nan")] * len(t.tokens) for t in made.trajectories]
    with pytest.raises(StageError, match="rl: generation 0 is not finite, got log-probabilities that are no numbers"):
        rollouts.write(tmp_path, made.with_old(old, "0"), tasks.names)


def test_a_start_without_numbers_is_told_before_the_first_byte(tmp_path: Path) -> None:
    start = hub_folder(tmp_path / "hub", spoil=float("nan"))
    with pytest.raises(ConfigError, match=r"hub has weights that are not finite, got lm_head.weight and 0 more"):
        run(CONFIG, start, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_ends_answers_where_its_start_does(tmp_path: Path) -> None:
    """A checkpoint does not keep a hub folder's other stop tokens; the run's folder does."""
    start, config = hub_folder(tmp_path / "hub", stop_tokens=HALF), replace(CONFIG, max_tokens=8)
    run(config, start, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, start, tmp_path / "run", on_step=stop)
    assert run(config, start, tmp_path / "run").resumed_step == 1
    whole, again = (rollouts.read(tmp_path / name, 1) for name in ("whole", "run"))
    assert whole is not None
    assert whole == again
    assert any(t.tokens[-1] in HALF for t in whole.trajectories)
    assert not any(set(t.tokens[:-1]) & set(HALF) for t in whole.trajectories)


def test_answers_to_messages_end_with_the_turn(start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(start, tmp_path / "hub")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}>"
    values = {"chat_template": template, "eos_token": {"content": "1"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    told = [{"prompt": [{"role": "user", "content": "2"}]}]
    spoken, plain = tasks_of(told, folder, ""), tasks_of([{"prompt": "2>"}], folder, "")
    assert spoken.prompts == plain.prompts
    assert (spoken.stop_tokens, plain.stop_tokens) == ((tokenizer.token_to_id("1"),), ())
    assert spoken.fingerprint != plain.fingerprint
    model, config = moe.load(folder), replace(CONFIG, samples=8, max_tokens=8)
    made = sample(model, tokenizer, replace(spoken, stop_tokens=HALF), evens, config, 0, "")
    assert any(not t.truncated for t in made.trajectories)
    assert all((t.tokens[-1] in (0, *HALF)) != t.truncated for t in made.trajectories)
    assert not any(set(t.tokens[:-1]) & set(HALF) for t in made.trajectories)
    with pytest.raises(
        ConfigError, match="the end of a chat's turn is outside the vocabulary, got 10, expected 0 to 9"
    ):
        rollouts.check_tasks(replace(plain, prompts=[(1,)], stop_tokens=(10,)), CONFIG, 64, 10)


def test_answers_of_another_run_are_not_taken(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(replace(CONFIG, steps=1), start, folder)
    for name in (checkpoint.LATEST, METRICS, RECORD):
        (folder / name).unlink()
    shutil.rmtree(folder / checkpoint.CHECKPOINTS)
    with pytest.raises(
        StageError, match=r"00000000.jsonl belongs to a run without checkpoints, .*; put its checkpoints"
    ):
        run(replace(CONFIG, seed=1), start, folder)
    assert not (folder / RECORD).exists()


def test_a_generation_that_lost_answers_is_damaged(start: Path, tmp_path: Path) -> None:
    run(replace(CONFIG, steps=1), start, tmp_path)
    path = rollouts.path_of(tmp_path, 0)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))
    with pytest.raises(StageError, match="cannot be read, got ValueError: 4 answers of generation 0, which has 8"):
        rollouts.read(tmp_path, 0)


def test_a_plan_refuses_what_the_run_would(start: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "1>", "answer": 1}\n')
    values = {"folder": "run", "start": str(start), "tasks": "tasks.jsonl", "steps": 1, "prompts": 1, "samples": 2}
    (tmp_path / "rl.json").write_text(json.dumps(values | {"max_tokens": 2, "device": "cpu"}))
    arguments = ["-c", str(tmp_path / "rl.json")]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--plan", "--set", "seed=1"]) == 2
    assert capsys.readouterr().err.endswith("rl.seed: the run has 0, this config 1\n")


def test_a_folder_that_takes_no_file_and_more_than_one_rank(start: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match=r"^rl: the run's folder takes no file, got .*; make room or choose another$"):
        run(CONFIG, start, tmp_path / "file" / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="rl: runs on one rank, got 2 of torchrun"):
        run(CONFIG, start, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_is_named_by_its_own_knob(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rl.device: unknown, got 'gpu'"):
        run(replace(CONFIG, device="gpu"), start, tmp_path / "run")


def test_sampling_asks_no_repeatable_sums_of_a_gpu(start: Path) -> None:
    """CUDA has none of floats: with `deterministic` the first token of a run would be an error."""
    asked: list[bool] = []
    model = moe.load(start)
    model.lm_head.register_forward_hook(lambda *_: asked.append(torch.are_deterministic_algorithms_enabled()))
    torch.use_deterministic_algorithms(True)
    try:
        sample(model, load_tokenizer(start), tasks_from(start), evens, CONFIG, 0, "")
        assert torch.are_deterministic_algorithms_enabled(), "updates go on with it"
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked
    assert not any(asked)


def test_an_error_of_many_lines_is_told_in_one(start: Path) -> None:
    def reward(task: int, text: str) -> float:
        raise RuntimeError("\nthe judge\nsaid\nmuch")

    with pytest.raises(StageError, match=r"^rl: the reward .* got RuntimeError: the judge for 'x', expected [^\n]*$"):
        judged([Trajectory(0, 0, (1,), (0.0,), "x", False)], tasks_from(start), reward)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": oops}', "tasks cannot be read, got Expecting value in line 3, column 12 in "),
        ('{"prompt": "\\ud800>"}', "rl: record 2 has no prompt, got 'utf-8' codec can't encode character"),
        ('{"prompt": []}', r"rl: record 2 has no prompt, got \[\], expected a text or messages"),
        ('{"prompt": ["hello"]}', "record 2 has no prompt, got 'hello', expected messages with a role and a content"),
        ('{"prompt": [{"role": "user"}]}', "got {'role': 'user'}, expected messages with a role and a content"),
        (
            '{"prompt": [{"role": "user", "content": [1]}]}',
            "got {'role': 'user', 'content': .* both text; mend the file",
        ),
    ],
)
def test_records_that_are_no_tasks(line: str, message: str, start: Path, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "1>"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        tasks_of(read_records(path), start, "")


def test_micro_batches_of_bfloat16_add_up_in_float32(model_config: ModelConfig) -> None:
    """An answer that comes sixteen times has sixteen times its gradient, to more digits than bfloat16 has."""
    one = Trajectory(0, 0, (5, 6), (-1.0, -1.0), "", False, 1.0, (-1.0, -1.0))
    optim = OptimConfig(optimizer="adamw", grad_clip=1e9, warmup_steps=0, bias_rate=0.0, mtp_loss=0.0, beta1=0.5)
    config = RLConfig(samples=2, prompts=2, loss="reinforce", micro_rows=1, optim=optim)
    moments = []
    for times in (1, 3):
        model = Decoder(model_config, 1).to(torch.bfloat16).train()
        optimizer = build(model, optim)
        updater = PolicyUpdater(config, model, optimizer, [(8,)])
        updater.run([one] * times, torch.full((times,), float(times)).numpy(), 0)
        moments.append({n: t for n, t in optimizer.state_tensors().items() if n.endswith(".exp_avg")})
    assert moments[0]
    for name, single in moments[0].items():
        assert torch.allclose(moments[1][name], 3 * single, rtol=1e-6, atol=0), name
