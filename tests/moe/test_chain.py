"""The whole way as a person goes it, command by command: two phases, a kill, a resume, evaluation, drafts.

With one MTP head first, then from those weights with three, which are killed while they train and go on. Then questions are
answered and a text is continued with the heads' drafts and without, to the same words.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from moe import checkpoint
from moe.batching import Batcher, Event
from moe.data import ArrayTokenSource
from moe.evaluate import evaluate
from moe.metrics import TIME_FIELDS, read_metrics
from moe.run_file import read_run
from moe.sampling import Sampling
from moe.trainer import train

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 240  # bound on a child; one takes some seconds
VOCAB = 400
RUN = """
folder: one
source:
  licence: {tokens: tokens.npz}
preset: ci
model: {mtp_heads: 1, layers: 7}
optim: {lr: 0.01, warmup_steps: 5}
steps: 80
rows: 2
repeat: true
device: cpu
threads: 1
checkpoint_steps: 10
tokenizer: tokenizer.json
"""
THREE = ["folder=three", "start=one", "model.mtp_heads=3", "steps=80", "optim.lr=0.005"]
PROMPT = "Unless required by applicable"
Command = list[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run file beside a tokenizer and the tokens of the three paragraphs with which this repository's licence ends."""
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(p.split()) for p in licence.strip().split("\n\n")[-3:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        paragraphs,
        BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = np.concatenate([[*tokenizer.encode(p).ids, 0] for p in paragraphs]).astype(np.uint16)
    np.savez(tmp_path / "tokens.npz", tokens=tokens, vocab_size=VOCAB, eos=0)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def _trains(file: Path, changes: Command) -> Command:
    return ["-m", "moe.train", "-c", str(file), *(word for change in changes for word in ("--set", change))]


def _started(arguments: Command) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def _done(arguments: Command) -> tuple[str, str]:
    child = _started(arguments)
    try:
        out, err = child.communicate(timeout=WAIT_S)
    finally:
        child.kill()
    assert child.returncode == 0, err
    return out, err


def _killed_behind_a_checkpoint(file: Path, folder: Path) -> None:
    """The command, killed as soon as its first checkpoint with weights that moved is in force."""
    child, end = _started(_trains(file, THREE)), time.monotonic() + WAIT_S
    try:
        while not (folder / checkpoint.LATEST).is_file() or "00000000" in (folder / checkpoint.LATEST).read_text():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(folder)]


def _children_s() -> float:
    """Processor time of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(900)
def test_train_kill_resume_evaluate_and_draft(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, before_s = time.perf_counter(), _children_s()
    one, three = file.parent / "one", file.parent / "three"
    assert json.loads(_done(_trains(file, []))[0])["steps"] == 80

    _killed_behind_a_checkpoint(file, three)
    summary = json.loads(_done(_trains(file, THREE))[0])
    assert (summary["steps"], summary["resumed_step"] % 10) == (80, 0)
    assert 0 < summary["resumed_step"] < 80
    heads = [len(row["mtp_loss"]) for row in (read_metrics(one)[-1], read_metrics(three)[0])]
    assert heads == [1, 3]

    questions = file.parent / "questions.jsonl"
    asked = json.dumps({"context": PROMPT, "continuation": " law or agreed to in writing"}) + "\n"
    questions.write_text(2 * asked)
    out, _ = _done(["-m", "moe.examine", str(three), "--questions", str(questions)])
    assert json.loads(out.splitlines()[-1])["questions.jsonl"]["greedy_fraction"] == 1.0

    asked_for = ["-m", "moe.generate", str(three), "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0"]
    drafted, said = _done([*asked_for, "--speculate", "3"])
    plain, nothing = _done(asked_for)
    assert drafted == plain
    assert drafted.startswith(" law or agreed to in writing")
    assert nothing == ""
    assert said == "" or len(said.partition("drafts that stood: ")[2].split(", ")) == 3, (
        "drafts are switched off where they lose"
    )
    seconds, cpu_s = time.perf_counter() - began, _children_s() - before_s
    with capsys.disabled():
        print(f"\nsix commands, to the drafted text: {seconds:.0f} s, of which {cpu_s:.0f} s of one core")

    run = read_run(file, [*THREE, "folder=undisturbed"])
    train(run.config, run.source, run.folder, start=run.start)
    weights = [checkpoint.load_tensors(checkpoint.find(f))[0] for f in (three, run.folder)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert _rows(three) == _rows(run.folder)

    documents = [run.source.tokens(i) for i in range(len(run.source))]
    held = ArrayTokenSource(documents, vocab_size=VOCAB, eos=0, text_bytes=[2 * len(d) for d in documents])
    # An untrained model has log2(400) / 2 = 4.3.
    assert evaluate(one, held)["all"]["bpb"] < 1.5
    assert evaluate(three, held)["all"]["bpb"] < 1.5
    tokenizer = Tokenizer.from_file(str(file.parent / "tokenizer.json"))
    # A clock that stands still: whether rounds pay on a busy machine is not the question.
    batcher = Batcher(checkpoint.load(three), tokenizer, slots=1, speculate=3, clock=lambda: 0.0)
    batcher.submit(tokenizer.encode(PROMPT).ids, Sampling(temperature=0, max_tokens=24))
    events: list[Event] = []
    while not batcher.idle:
        events += batcher.step()
    assert "".join(event.text for event in events) == drafted.rstrip("\n")
    assert events[-1].acceptance is not None
    assert events[-1].acceptance.length > 1.5, "three heads that learnt a text by heart"
