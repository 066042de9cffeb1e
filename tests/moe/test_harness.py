"""Our model in lm-evaluation-harness: its requests answered by hand-checked rules, and a task of local files run whole."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from moe import choices, harness, hub, solve
from moe.files import read_json_lines
from moe.harness import Harness
from moe.use import Use
from tests.moe.texts import tokenizer_of, uniform

TEXTS = ["Question: What is red?\nAnswer: an apple", "Question: What is green?\nAnswer: grass and leaves"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Harness:
    tokenizer = tokenizer_of(TEXTS)
    monkeypatch.setattr(Use, "load", lambda self, folder: uniform(tokenizer, context=32))
    monkeypatch.setattr(harness, "load_tokenizer", lambda folder: tokenizer)
    return Harness("unused")


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_likelihoods_count_the_continuation_alone(model: Harness) -> None:
    per_token = -math.log(model.model.config.vocab_size)
    found = model.loglikelihood([request("What is red?", " an apple"), request("", "grass")], disable_tqdm=True)
    for (log_p, greedy), text in zip(found, (" an apple", "grass"), strict=True):
        assert log_p == pytest.approx(per_token * len(model.tok_encode(text)), rel=1e-6)
        assert not greedy


def test_a_continuation_beyond_the_context_is_scored_whole_and_an_empty_one_is_certain(model: Harness) -> None:
    long = " grass and leaves" * 30
    found = model.loglikelihood([request("What?", long), request("What?", ""), request("", "")], disable_tqdm=True)
    size = len(model.tok_encode("What?" + long)) - len(model.tok_encode("What?"))
    assert size > 32
    assert found[0][0] == pytest.approx(-math.log(model.model.config.vocab_size) * size, rel=1e-6)
    assert found[1:] == [(0.0, True), (0.0, True)]


def test_an_answer_may_take_half_the_context(model: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = model.tok_encode("grass and leaves " * 30)
    seen: list[tuple[int, int | None]] = []
    plain = harness.generate_batch

    def recorded(decoder: Any, prompts: Any, asked: Any, **options: Any) -> Any:
        seen.extend((len(p), s.max_tokens) for p, s in zip(prompts, asked, strict=True))
        return plain(decoder, prompts, asked, **options)

    monkeypatch.setattr(harness, "generate_batch", recorded)
    assert model.generate_until([request("grass and leaves " * 30, {"until": []}), request("", {})]) == ["", ""]
    assert len(tokens) > 32
    assert seen == [(16, 16), (0, 16)]


def test_a_text_beyond_the_context_is_scored_whole(model: Harness) -> None:
    text = "grass and leaves " * 30
    (found,) = model.loglikelihood_rolling([request(text)])
    assert len(model.tok_encode(text)) > 32
    assert found == pytest.approx(-math.log(model.model.config.vocab_size) * len(model.tok_encode(text)), rel=1e-6)


def test_generated_text_ends_at_eos(model: Harness) -> None:
    asked = [request("What is red?", {"until": ["\n"], "max_gen_toks": 5}), request("x", {"max_gen_toks": 3})]
    assert model.generate_until(asked) == ["", ""], "equal logits: greedy takes EOS, the first token"


def test_a_task_of_the_harness_runs(model: Harness, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    rows = [{"q": "What is red?", "options": ["an apple", "grass and leaves"], "gold": i % 2} for i in range(4)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(model=model, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    assert found["results"]["colours"]["acc,none"] == 0.5, "the shorter answer is likelier, and right every other time"


def test_the_command_runs_tasks_of_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network: a task that is a YAML file over a JSONL file, scored and written; and tasks that nobody knows."""
    tokenizer = tokenizer_of(TEXTS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = hub.export(uniform(tokenizer), tmp_path / "hub", tokenizer=tmp_path / "tokenizer.json")
    rows = [{"q": "What is red?", "options": ["an apple", "grass and leaves"], "gold": i % 2} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    files = {"data_files": {"test": str(tmp_path / "test.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "colours", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}"}
    task |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "colours.yaml").write_text(json.dumps(task))  # JSON is YAML
    asked = [str(folder), "--include", str(tmp_path / "tasks"), "--device", "cpu"]
    assert harness.main([*asked, "--tasks", "colours", "--output", str(tmp_path / "out.json")]) == 0
    assert "colours" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["colours"]["acc,none"] == 0.5
    assert harness.main([str(folder), "--include", str(tmp_path / "none"), "--tasks", "colours"]) == 2
    assert "--include: no folder" in capsys.readouterr().err
    nowhere = str(tmp_path / "none" / "out.json")
    assert harness.main([*asked, "--tasks", "colours", "--output", nowhere]) == 2, "before the work"
    assert "--output: no folder" in capsys.readouterr().err


# Real questions as tasks of one's own: three kinds of request, in the words of our own evaluation.
REAL: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",  # as the harness's own task has it: no delimiter is added here
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "gsm8k_test": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\nQuestion:"], "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ASKED = 24  # questions of each file


def test_real_questions_get_the_answers_of_our_own_evaluation(shared_data: Path, tmp_path: Path) -> None:
    """By a model of random weights, whose preferences are as good as any to be compared."""
    from lm_eval import simple_evaluate

    rows = {
        name: read_json_lines(shared_data / "benchmarks" / f"{name}.jsonl.gz")[:ASKED] for name in REAL
    }  # the harness's own reading of gzipped files is not what is tested
    tokenizer = tokenizer_of((str(row) for part in rows.values() for row in part), 400)
    made = uniform(tokenizer, context=512)
    with torch.no_grad():
        made.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = hub.export(made, tmp_path / "hub", tokenizer=tmp_path / "tokenizer.json")
    (tmp_path / "tasks").mkdir()
    for name, about in REAL.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | about
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    model = Harness(folder, Use(device="cpu"))
    known = harness._known(list(REAL), tmp_path / "tasks")
    found = simple_evaluate(model=model, tasks=list(REAL), task_manager=known, log_samples=True, bootstrap_iters=0)
    assert found is not None
    theirs = {name: sorted(samples, key=lambda s: s["doc_id"]) for name, samples in found["samples"].items()}

    arc = choices.answer(model.model, tokenizer, choices.read_questions(tmp_path / "arc_easy.jsonl"))
    for ours, sample in zip(arc, theirs["arc_easy"], strict=True):
        nats = [-float(reply[0]) for reply in sample["filtered_resps"]]
        assert nats == pytest.approx([bits * math.log(2) for bits in ours.bits], rel=1e-5)
    summary = choices.summary(arc)
    assert found["results"]["arc_easy"]["acc,none"] == summary.accuracy
    assert 0 < (summary.accuracy or 0) < 1

    last_words = choices.answer(model.model, tokenizer, choices.read_questions(tmp_path / "lambada_openai.jsonl"))
    nats_each = [one.bits[0] * math.log(2) for one in last_words]
    wanted = math.exp(sum(nats_each) / len(nats_each))
    assert found["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(wanted, rel=1e-4)
    assert found["results"]["lambada_openai"]["acc,none"] == choices.summary(last_words).greedy_fraction

    problems = solve.read_problems(tmp_path / "gsm8k_test.jsonl")
    written = solve.solve(model.model, tokenizer, problems, [], max_tokens=12)
    assert [sample["resps"][0][0] for sample in theirs["gsm8k_test"]] == [one.text for one in written]
