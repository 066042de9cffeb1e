"""Reinforcement learning end to end on a toy: what is sampled, what a kill leaves, what is refused, and that it learns."""

import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from core.errors import ConfigError, InputError, StageError
from core.statistics import wilson
from moe import checkpoint
from moe.generate import generate_text, load_tokenizer
from moe.metrics import read_metrics
from moe.optim import build
from moe.rl import rollouts
from moe.rl.__main__ import main
from moe.rl.config import RLConfig
from moe.rl.rollouts import Generation, sample, tempered, weights_hash
from moe.rl.tasks import Tasks, answer_reward, tasks_of
from moe.rl.trainer import TIMES, RLSummary, reinforce
from moe.rl.update import PolicyUpdater
from moe.sampling import Sampling
from tests.moe.copying import CONFIG, OPTIM, RECORDS, copying_tasks, start_run

# Two updates a generation, sampled one generation ahead, in two micro-batches.
OFF_POLICY = dataclasses.replace(CONFIG, minibatches=2, staleness=1, micro_rows=3, trajectory_ratio=(0.2, 5.0))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return start_run(tmp_path_factory.mktemp("copying"))


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(OFF_POLICY, start, folder)
    return folder


def run(config: RLConfig, start: Path, folder: Path, reward: Any = None, on_step: Any = None) -> RLSummary:
    tasks, exact = copying_tasks(start)
    return reinforce(config, tasks, reward or exact, folder, start, on_step)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


def left_by(folder: Path) -> dict[str, Any]:
    """All that two equal runs have in common."""
    newest = checkpoint.find(folder)
    files = [newest / checkpoint.WEIGHTS, newest / checkpoint.OPTIMIZER, *sorted((folder / rollouts.FOLDER).iterdir())]
    return {p.name: p.read_bytes() for p in files} | {"rows": rows_of(folder)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sampled(start: Path, config: RLConfig = CONFIG, number: int = 0) -> Generation:
    tasks, reward = copying_tasks(start)
    model = moe.load(start)
    return sample(model, load_tokenizer(start), tasks, reward, config, number, weights_hash(model))


def test_a_generation_is_a_function_of_weights_seed_and_number(start: Path) -> None:
    made = sampled(start)
    assert made == sampled(start)
    assert [(t.task, t.sample) for t in made.trajectories] == [
        (task, i) for task in copying_tasks(start)[0].drawn(0, 0, 4) for i in range(4)
    ]
    apart = sampled(start, dataclasses.replace(CONFIG, slots=3))
    assert [t.tokens for t in apart.trajectories] == [t.tokens for t in made.trajectories]
    for other in (sampled(start, number=1), sampled(start, dataclasses.replace(CONFIG, seed=1))):
        assert [t.tokens for t in other.trajectories] != [t.tokens for t in made.trajectories]
    assert len({t.tokens for t in made.trajectories[:4]}) > 1, "each answer has its own draws"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_the_policy_that_sampled(start: Path, temperature: float) -> None:
    """Of every token, the end too, by the model over the whole text at once."""
    config = dataclasses.replace(CONFIG, temperature=temperature, prompts=10)
    made, model, tasks = sampled(start, config), moe.load(start), copying_tasks(start)[0]
    assert any(t.truncated for t in made.trajectories) or all(t.tokens[-1] == 0 for t in made.trajectories)
    updater = PolicyUpdater(config, model, build(model, config.optim), tasks.prompts)
    again = updater.logprobs(made.trajectories)
    for one, logprobs in zip(made.trajectories, again, strict=True):
        assert logprobs == pytest.approx(one.logprobs, abs=1e-5)
        log_p = (model(torch.tensor([[0, *tasks.prompts[one.task], *one.tokens]]))[0] / temperature).log_softmax(-1)
        first = len(tasks.prompts[one.task])
        plain = [log_p[first + j, t].item() for j, t in enumerate(one.tokens)]
        assert plain == pytest.approx(one.logprobs, abs=1e-5)
        assert one.truncated == (one.tokens[-1] != 0)
        assert one.reward == float(one.text.strip() == RECORDS[one.task]["answer"])


def test_tempering_leaves_the_weights(start: Path) -> None:
    model = moe.load(start)
    before, tokens = weights_hash(model), torch.tensor([[0, 5, 6]])
    logits = model(tokens)
    with tempered(model, 0.5):
        assert torch.allclose(model(tokens), 2 * logits, rtol=1e-5)
    assert weights_hash(model) == before


def test_every_task_comes_once_a_pass_in_another_order() -> None:
    tasks = Tasks([(1,)] * 7, ["t"] * 7, "")
    seen = [tasks.drawn(5, g, 3) for g in range(7)]
    flat = [t for drawn in seen for t in drawn]
    passes = [flat[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert passes[0] != passes[1]
    assert tasks.drawn(6, 0, 7) != passes[0]


def test_the_first_update_is_on_policy_and_later_ones_are_not(start: Path, tmp_path: Path) -> None:
    """Two passes over each generation: with the snapshot's ratio nothing moves but rounding, with the policy's own it does."""
    rows = {}
    for name in ("snapshot", "current"):
        config = dataclasses.replace(CONFIG, steps=2, epochs=2, ratio_of=name, checkpoint_steps=2, prompts=10)
        run(config, start, tmp_path / name)
        rows[name] = rows_of(tmp_path / name)
    for first in (rows["snapshot"][0], rows["snapshot"][1], rows["current"][0]):
        assert first["token_ratio"]["min"] == pytest.approx(1, abs=1e-5)
        assert first["token_ratio"]["max"] == pytest.approx(1, abs=1e-5)
        assert first["masked_token_fraction"] == first["masked_trajectory_fraction"] == 0
        assert first["kept_token_fraction"] == 1
        assert first["mismatch"]["max"] < 1e-5
    second = rows["current"][1]
    assert second["token_ratio"]["max"] - second["token_ratio"]["min"] > 1e-3
    assert second["masked_trajectory_fraction"] > 0.1
    assert 0 < rows["snapshot"][0]["entropy"] < math.log(300)
    assert all(0 < share < 1 for share in rows["snapshot"][0]["routing_confidence"])
    assert len(rows["snapshot"][0]["routing_confidence"]) == 2


def test_stale_answers_are_told_by_their_ratio(undisturbed: Path) -> None:
    rows = rows_of(undisturbed)
    assert [row["generation"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["mismatch"]["max"] < 1e-5
    assert rows[2]["mismatch"]["mean"] > 1e-4, "generation 1 was sampled by the weights of generation 0"
    heads = [json.loads(p.read_text().partition("\n")[0]) for p in sorted((undisturbed / rollouts.FOLDER).iterdir())]
    assert [h["generation"] for h in heads] == [2], "those before serve no checkpoint any more"
    assert heads[0]["weights"] != heads[0]["snapshot"]


def forked(work: Callable[[], Any]) -> int:
    """The wait status of a child that does it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def test_killed_and_gone_on_with_it_is_the_undisturbed_run(start: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Killed at the border of generations, within one, and while a generation is judged."""
    folder, calls = tmp_path / "run", 0
    _, exact = copying_tasks(start)

    def deadly(task: int, text: str) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return exact(task, text)

    for work in (
        lambda: run(OFF_POLICY, start, folder, deadly),
        lambda: run(OFF_POLICY, start, folder, on_step=kill_at(2)),
        lambda: run(OFF_POLICY, start, folder, deadly),
        lambda: run(OFF_POLICY, start, folder, on_step=kill_at(3)),
    ):
        assert os.WTERMSIG(forked(work)) == signal.SIGKILL
    summary = run(OFF_POLICY, start, folder)
    assert summary.resumed_step == 3
    assert left_by(folder) == left_by(undisturbed)
    before = tree(folder)
    assert run(OFF_POLICY, start, folder).resumed_step == 6
    assert tree(folder) == before, "a finished run is left alone"


def test_a_reward_that_fails_stops_the_run_and_the_same_command_goes_on(
    start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    calls = 0
    _, exact = copying_tasks(start)

    def failing(how: Any) -> Callable[[int, str], float]:
        def reward(task: int, text: str) -> float:
            nonlocal calls
            calls += 1
            if calls > 40:  # in the third generation that is sampled
                if isinstance(how, Exception):
                    raise how
                return float(how)
            return exact(task, text)

        return reward

    for how, message in (
        (ZeroDivisionError("no tests"), "the reward of record .* failed, got ZeroDivisionError: no tests"),
        (math.nan, "the reward of record .* is no number, got nan"),
        (math.inf, "is no number, got inf"),
    ):
        calls = 0 if not (tmp_path / "run").exists() else 40
        with pytest.raises(StageError, match=message):
            run(OFF_POLICY, start, tmp_path / "run", failing(how))
        assert checkpoint.find(tmp_path / "run").name == "step-00000002"
    run(OFF_POLICY, start, tmp_path / "run")
    assert left_by(tmp_path / "run") == left_by(undisturbed)


def test_a_task_that_cannot_be_judged_loses_its_group(start: Path, tmp_path: Path) -> None:
    _, exact = copying_tasks(start)

    def picky(task: int, text: str) -> float:
        if task < 5:
            raise InputError("the gold answer cannot be read")
        return exact(task, text)

    config = dataclasses.replace(CONFIG, steps=1, prompts=10)
    run(config, start, tmp_path / "some", picky)
    row = rows_of(tmp_path / "some")[0]
    assert row["rejected_groups"] == 5
    assert row["equal_groups"] <= 5
    made = rollouts.read(tmp_path / "some", 0)
    assert made is not None
    assert {t.task for t in made.trajectories if t.reward is None} == set(range(5))
    with pytest.raises(StageError, match="none of 10 tasks can be judged, got 'never'"):
        run(config, start, tmp_path / "none", _never)


def _never(task: int, text: str) -> float:
    raise InputError("never")


def test_rewards_that_tell_nothing_change_nothing(start: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=2, keep=9)
    for name, groups in (("drop", "drop"), ("keep", "keep")):
        summary = run(dataclasses.replace(config, equal_groups=groups), start, tmp_path / name, lambda task, text: 0.5)
        assert summary.skipped_updates == 2
        rows = rows_of(tmp_path / name)
        assert [(r["skipped"], r["equal_groups"], r["loss"]) for r in rows] == [(True, 4, 0.0)] * 2
        assert ("entropy" in rows[0]) == (name == "keep")
        weights = [p.read_bytes() for p in sorted((tmp_path / name / "checkpoints").glob("*/model.safetensors"))]
        assert len(weights) == 3
        assert len(set(weights)) == 1


def test_numbers_that_are_not_finite_stop_and_overwrite_nothing(start: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, prompts=10, optim=dataclasses.replace(OPTIM, lr=1e38, warmup_steps=0))
    with pytest.raises(StageError, match=r"weights after update 1 are not finite, .* step-00000000 stands"):
        run(config, start, tmp_path)
    assert all(p.isfinite().all() for p in moe.load(tmp_path).parameters())


def test_a_run_is_a_model_like_any_other(start: Path, undisturbed: Path) -> None:
    assert len(generate_text(undisturbed, "4>", Sampling(max_tokens=3, temperature=0))) <= 3
    stored, state = checkpoint.read(checkpoint.find(undisturbed))
    assert stored.init == weights_hash(moe.load(start))
    assert state.step == 6
    first, last = moe.load(start), moe.load(undisturbed)
    moved = {n for (n, a), b in zip(first.named_parameters(), last.parameters(), strict=True) if not torch.equal(a, b)}
    assert not any("moe.gate.weight" in name for name in moved)
    assert any("self_attn" in name for name in moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": dataclasses.replace(OPTIM, lr=1.0)}, "rl.optim.lr: the run has 0.002, this config 1.0"),
        ({"token_ratio": (0.1, 10.0)}, r"rl.token_ratio: the run has \[0.5, 2.0\], this config \[0.1, 10.0\]"),
        ({"samples": 8}, "rl.samples: the run has 4, this config 8"),
    ],
)
def test_another_config_is_refused(changes: dict[str, Any], message: str, start: Path, undisturbed: Path) -> None:
    before = tree(undisturbed)
    with pytest.raises(ConfigError, match=message):
        run(dataclasses.replace(OFF_POLICY, **changes), start, undisturbed)
    tasks = tasks_of(RECORDS[:9], start, "")
    with pytest.raises(ConfigError, match="tasks: the prompts, their order, their answers or the stops"):
        reinforce(OFF_POLICY, tasks, lambda task, text: 0.0, undisturbed, start)
    assert tree(undisturbed) == before


def test_what_cannot_run_is_told_before_the_first_byte(start: Path, tmp_path: Path) -> None:
    tasks, reward = copying_tasks(start)
    for config, asked, begin, message in (
        (CONFIG, Tasks([], [], ""), start, "there are no tasks, got 0"),
        (dataclasses.replace(CONFIG, max_tokens=63), tasks, start, "10 prompts leave no room for 63 tokens"),
        (CONFIG, Tasks([(999,)], ["far"], ""), start, "a token of far is outside the vocabulary"),
        (CONFIG, tasks, tmp_path / "absent", "nothing to start from, got .*absent"),
        (CONFIG, tasks, tmp_path, "no checkpoint here"),
    ):
        with pytest.raises(ConfigError, match=message):
            reinforce(config, asked, reward, tmp_path / "run", begin)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is no run of reinforcement learning"):
        run(CONFIG, start, start)


def test_a_damaged_generation_is_named(start: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    forked(lambda: run(OFF_POLICY, start, folder, on_step=kill_at(3)))
    path = rollouts.path_of(folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(StageError, match=r"00000001.jsonl cannot be read, got JSONDecodeError"):
        run(OFF_POLICY, start, folder)
    path.unlink()
    with pytest.raises(StageError, match=r"a generation is missing, got no .*00000001.jsonl with what update 4 needs"):
        run(OFF_POLICY, start, folder)
    path.write_bytes(whole)
    run(OFF_POLICY, start, folder)
    assert left_by(folder) == left_by(undisturbed)


def small(task: int, text: str) -> float:
    return float(text in {"0", "1", "2"})


def test_it_learns_what_is_rewarded(start: Path, tmp_path: Path) -> None:
    """Small digits, some 30% of the answers at first: intervals of the first and the last 160 answers lie far apart."""
    config = dataclasses.replace(CONFIG, steps=20, prompts=10, samples=8, checkpoint_steps=20, seed=1)
    summary = run(config, start, tmp_path, small)
    rows = rows_of(tmp_path)
    answers = 2 * config.prompts * config.samples
    right = [round(sum(r["reward_mean"] for r in some) * answers / 2) for some in (rows[:2], rows[-2:])]
    (_, before), (after, _) = (wilson(n, answers) for n in right)
    assert after > before + 0.2, [r["reward_mean"] for r in rows]
    assert summary.last_reward == rows[-1]["reward_mean"]
    assert all(r["kept_token_fraction"] == 1 for r in rows if not r["skipped"]), "on policy nothing is masked"


def command(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_command_plans_runs_and_goes_on(start: Path, tmp_path: Path, capsys: Any) -> None:
    file, tasks = tmp_path / "rl.json", tmp_path / "tasks.jsonl"
    lines(tasks, [{"prompt": r["prompt"], "answer": int(r["answer"])} for r in RECORDS])
    optim = {k: getattr(OPTIM, k) for k in ("lr", "warmup_steps")}
    values = {"folder": "run", "start": str(start), "tasks": "tasks.jsonl", "match": "number", "optim": optim}
    file.write_text(json.dumps(values | {"steps": 2, "prompts": 4, "samples": 4, "max_tokens": 3, "device": "cpu"}))
    code, out, err = command(capsys, "-c", file, "--plan")
    assert (code, err) == (0, "")
    assert "tasks           10, prompts of 2.0 tokens, at most 2\n" in out
    assert "generations     2 of 4 tasks x 4 answers, each asked 0.80 times\n" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = command(capsys, "-c", file)
    assert code == 0
    assert json.loads(out)["steps"] == 2
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    code, out, _ = command(capsys, "-c", file, "--set", f"start={tmp_path / 'gone'}")
    assert (code, json.loads(out)["resumed_step"]) == (0, 2), "a run that goes on needs nothing of its start"

    lines(tasks, [])
    assert command(capsys, "-c", file)[::2] == (
        2,
        f"rl: {tasks} has no task, got an empty file, expected one record a line\n",
    )
    lines(tasks, [{"prompt": "1>"}])
    assert "record 1 has no answer to compare with, got None, expected a number" in command(capsys, "-c", file)[2]
    lines(tasks, [{"prompt": "", "answer": 1}, {"prompt": [{"role": "user", "content": "1>"}], "answer": 1}])
    assert "rl: record 1 has no prompt, got ''" in command(capsys, "-c", file)[2]
    lines(tasks, [{"prompt": [{"role": "user", "content": "1>"}], "answer": 1}])
    assert "prompts of" in command(capsys, "-c", file, "--plan", "--set", "folder=chat")[1]


def test_exact_answers_and_numbers() -> None:
    exact, by_value = (answer_reward([{"answer": "1,000"}], match) for match in ("exact", "number"))  # type: ignore[arg-type]
    assert [exact(0, text) for text in (" 1,000\n", "1000", "is 1,000")] == [1, 0, 0]
    assert [by_value(0, text) for text in ("7, or 1000.0", "1000 or 7", "none")] == [1, 0, 0]
