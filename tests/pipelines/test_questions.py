"""The stage `evaluate` asks what its knobs name: figures by name, beside another model, and what enters the identity."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import mixtures.reader
from core.errors import ConfigError
from core.hashing import digest
from core.job import Job
from core.manifest import Identity, Manifest, write_manifest
from core.storage import Root
from moe import hub
from moe.data import ArrayTokenSource
from pipelines.model import EVALUATE, EvaluateStageConfig
from pipelines.questions import ProblemSet, QuestionSet, question_artifacts
from tests.moe.texts import tokenizer_of, uniform

ARC = [{"query": "What is red?", "choices": ["an apple", "grass and leaves"], "gold": i % 2} for i in range(4)]
GSM = [{"question": f"What is {n}+2?", "answer": f"{n}+2={n + 2}\n#### {n + 2}"} for n in range(3)]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Two models: to the first all tokens are equally likely, the second prefers or shuns those of an apple."""
    tokenizer = tokenizer_of(["What is red?\nAnswer: an apple", "grass and leaves"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = uniform(tokenizer)
    hub.export(model, tmp_path / "root/models/first", tokenizer=tmp_path / "tokenizer.json")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.encode(" an apple").ids] = 1
    hub.export(model, tmp_path / "root/models/second", tokenizer=tmp_path / "tokenizer.json")
    root = Root(str(tmp_path / "root"))
    for name, folder in (("train", "models/first"), ("train@anneal", "models/second")):
        outputs: dict[str, dict[str, Any]] = {"weights": {"content": folder, "folder": folder}}
        write_manifest(root, Manifest(name, None, Identity(name, 1, {}, {}), outputs, {}))
    held_out = ArrayTokenSource(
        [torch.tensor([5, 6, 0]).numpy()], vocab_size=tokenizer.get_vocab_size(), eos=0, text_bytes=[2], domains=("web",)
    )  # fmt: skip
    monkeypatch.setattr(mixtures.reader, "MixtureSource", lambda root, phase: held_out)
    return root


def evaluated(root: Root, config: EvaluateStageConfig) -> dict[str, Any]:
    found: dict[str, Any] = root.read_json(file_of(root, config))
    return found


def file_of(root: Root, config: EvaluateStageConfig) -> str:
    """Where the stage leaves what it found; the identity of its job is that of the config, as the runner makes it."""
    identity = digest(config.model_dump(mode="json"))
    job = Job(EVALUATE, "evaluate", config, root, engine=None, datasets=(), identity=identity)  # type: ignore[arg-type]
    name: str = EVALUATE.fn(job).outputs["evaluation"]["file"]
    return name


def test_nothing_is_asked_by_default(root: Root) -> None:
    found = evaluated(root, EvaluateStageConfig(prompts=("What",), max_tokens=2))
    assert set(found) == {"held_out", "samples"}
    assert found["samples"][0]["prompt"] == "What"


def test_figures_by_name_beside_another_model(root: Root, tmp_path: Path) -> None:
    arc, gsm = write(tmp_path / "arc.jsonl", ARC), write(tmp_path / "gsm.jsonl", GSM)
    config = EvaluateStageConfig(
        questions={"arc": QuestionSet(path=arc), "solutions": QuestionSet(path=gsm, layout="solution", limit=2)},
        problems={"gsm": ProblemSet(path=gsm, examples=gsm, shots=1, max_tokens=4)},
    )
    alone = evaluated(root, config)
    assert [alone["questions"][name]["questions"] for name in ("arc", "solutions")] == [4, 2]
    assert alone["questions"]["arc"]["accuracy"] == 0.5, "the shorter answer is likelier, and right every other time"
    assert "less_than_other" not in alone["questions"]["arc"]
    assert (alone["problems"]["gsm"]["questions"], alone["problems"]["gsm"]["right"]) == (3, 0)
    beside = evaluated(root, config.model_copy(update={"against": "train@anneal"}))
    assert beside["against"] == "train@anneal"
    found = beside["questions"]["arc"]
    assert found["gold_bpb"] == alone["questions"]["arc"]["gold_bpb"]
    paired = found["less_than_other"]["gold_bpb"]
    assert paired["low"] < paired["effect"] < paired["high"]
    assert paired["least_effect"] > 0
    assert beside["problems"]["gsm"]["less_than_other"]["effect"] == 0


def test_what_was_found_before_is_never_written_over(root: Root, tmp_path: Path) -> None:
    """One model asked twice, by two instances or by one whose knobs changed: other questions, then another model beside it."""
    arc = write(tmp_path / "arc.jsonl", ARC)
    few = EvaluateStageConfig(questions={"arc": QuestionSet(path=arc, limit=2)})
    many = EvaluateStageConfig(questions={"arc": QuestionSet(path=arc)})
    beside = many.model_copy(update={"against": "train@anneal"})
    files = [file_of(root, config) for config in (few, many, beside)]
    assert len(set(files)) == 3
    assert {Path(name).parent for name in files} == {Path("models/first")}
    found = [root.read_json(name)["questions"]["arc"] for name in files]
    assert [f["questions"] for f in found] == [2, 4, 4]
    assert ["less_than_other" in f for f in found] == [False, False, True]
    assert file_of(root, many) == files[1], "asked again, the same file"


def test_domains_without_text_have_no_bits_per_byte(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ArrayTokenSource([torch.tensor([0]).numpy()], vocab_size=9, eos=0, text_bytes=[0], domains=("web",))
    monkeypatch.setattr(mixtures.reader, "MixtureSource", lambda root, phase: empty)
    written = root.read_bytes(file_of(root, EvaluateStageConfig())).decode()
    found = json.loads(written, parse_constant=pytest.fail)
    assert found["held_out"] == {"web": {"bpb": None, "bytes": 0, "docs": 1, "tokens": 1}}


def test_files_enter_the_identity_by_content_and_reading(tmp_path: Path) -> None:
    arc, gsm = write(tmp_path / "arc.jsonl", ARC), write(tmp_path / "gsm.jsonl", GSM)
    questions, problems = {"arc": QuestionSet(path=arc)}, {"gsm": ProblemSet(path=gsm, examples=arc)}
    named = question_artifacts(questions, problems)
    assert sorted(named.values()) == [arc, arc, gsm]
    assert question_artifacts({"arc": QuestionSet(path=arc, limit=2)}, problems).keys() != named.keys()
    assert question_artifacts(questions, {"gsm": ProblemSet(path=gsm, examples=arc, shots=2)}).keys() != named.keys()
    with pytest.raises(ConfigError) as told:
        question_artifacts({"a": QuestionSet(path="/none")}, {"b": ProblemSet(path=gsm, examples="/nor this")})
    assert len(told.value.problems) == 2, "all at once"
    assert EVALUATE.artifacts is not None
    assert EVALUATE.artifacts(EvaluateStageConfig()) == {}
    compared = EvaluateStageConfig(questions=questions, against="train@anneal")
    assert EVALUATE.columns(compared) == ("@train", "@mix", "@tokenize", "@train@anneal")


def test_a_comparison_needs_questions() -> None:
    with pytest.raises((ConfigError, ValidationError), match="without questions or problems"):
        EvaluateStageConfig(against="train@anneal")
