"""The command that asks a model the questions of files: its figures, its files of one name, its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe import examine, hub
from tests.moe.texts import tokenizer_of, uniform

ARC = [{"query": "What is red?", "choices": ["an apple", "grass and leaves"], "gold": i % 2} for i in range(4)]
GSM = [{"question": "What is 2+2?", "answer": "2+2=4\n#### 4"}]


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model to which all tokens are equally likely, as a hub folder."""
    tokenizer = tokenizer_of(["What is red?\nAnswer: an apple", "grass and leaves"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return hub.export(uniform(tokenizer), tmp_path / "hub", tokenizer=tmp_path / "tokenizer.json")


def test_figures_by_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a/arc.jsonl", ARC), write(tmp_path / "b/arc.jsonl", ARC[:3])
    gsm = write(tmp_path / "gsm.jsonl", GSM)
    files = ["--questions", str(a), str(b), str(gsm), "--problems", str(gsm), "--max-tokens", "4"]
    assert examine.main([str(folder), *files, "--against", str(folder)]) == 2, "one question gives no difference"
    assert "two or more" in capsys.readouterr().err
    assert examine.main([str(folder), *files]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [found[str(p)]["questions"] for p in (a, b)] == [4, 3]
    assert found[str(a)]["accuracy"] == 0.5, "the shorter answer is likelier, and right every other time"
    assert found[f"{gsm.name}"]["greedy_fraction"] == 0
    assert found[f"{gsm.name} (generated)"]["right"] == 0
    assert len(found) == len(told) == 4
    assert told[0].startswith(f"{a}: ")


def test_a_model_beside_itself_differs_by_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arc = write(tmp_path / "arc.jsonl", ARC)
    asked = [str(folder), "--questions", str(arc), "--against", str(folder)]
    assert examine.main([*asked, "--limit", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["arc.jsonl"]
    assert found["questions"] == found["less_than_other"]["questions"] == 3
    assert found["less_than_other"]["gold_bpb"]["effect"] == 0
    assert found["less_than_other"]["accuracy"]["effect"] == 0


def test_one_question_has_no_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its figures are JSON, which has no infinity."""
    arc = write(tmp_path / "arc.jsonl", ARC)
    assert examine.main([str(folder), "--questions", str(arc), "--limit", "1"]) == 0
    told, last = capsys.readouterr().out.splitlines()
    assert json.loads(last, parse_constant=pytest.fail)["arc.jsonl"]["gold_bpb_error"] is None
    assert "error" not in told


@pytest.mark.parametrize(
    "options", [["--limit", "0"], ["--limit", "-1"], ["--against", "b", "--limit", "1"], ["--shots", "-1"]]
)
def test_a_limit_leaves_something_to_ask(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        examine.main(["a", "--questions", "q.jsonl", *options])
    assert stopped.value.code == 2
    assert f"{options[-2]} is too small" in capsys.readouterr().err
