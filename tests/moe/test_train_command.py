"""`python -m moe.train` as a person uses it: run files, two ranks killed and gone on with by one, errors and their codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from core.errors import ConfigError, InputError
from moe import checkpoint
from moe.config import TrainConfig
from moe.evaluate import evaluate
from moe.generate import generate
from moe.metrics import read_metrics
from moe.model import Decoder
from moe.optim import build
from moe.plan import plan
from moe.progress import line, live, load_line
from moe.run_file import read_run
from moe.sampling import Sampling
from moe.token_files import open_source
from moe.train import main
from moe.trainer import train
from tests.moe.conftest import EOS, VOCAB, counting_source

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAIT_S = 240  # bound on a child; one takes a few seconds
RUN = """
folder: run
source:
  counts: {tokens: tokens.npz}
preset: ci
model: {mtp_heads: 1}
optim: {warmup_steps: 3, schedule: constant, bias_stop_fraction: 0.0}
steps: 10
rows: 4
device: cpu
threads: 1
shuffle: true
checkpoint_steps: 3
"""
# Rank 0 stays in `on_step` of one update, the others wait for it in the next.
HELD = """
import sys, time
from pathlib import Path
from moe.parallel import World
from moe.run_file import read_run
from moe.trainer import train
run = read_run(Path(sys.argv[1]), [sys.argv[2]])

def held(row):
    if row["step"] == int(sys.argv[3]):
        time.sleep(3600)

train(run.config, run.source, run.folder, held, run.start, World.from_env(device="cpu"))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run file beside its tokens."""
    source = counting_source()
    tokens = np.concatenate([source.tokens(i) for i in range(len(source))]).astype(np.uint16)
    np.savez(tmp_path / "tokens.npz", tokens=tokens, vocab_size=VOCAB, eos=EOS)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


@contextmanager
def _started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process and all its children, gone when the block ends."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, start_new_session=True, **pipes
    )
    try:
        yield child
    finally:
        # torchrun gives each rank a session of its own.
        with suppress(psutil.NoSuchProcess):
            for process in (*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        child.communicate()


def _finished(arguments: Sequence[str]) -> tuple[int, str, str]:
    with _started(arguments) as child:
        out, err = child.communicate(timeout=WAIT_S)
        return child.returncode, out, err


def _killed_in_update(step: int, file: Path, folder: Path) -> None:
    """Two ranks of `HELD`, killed with torchrun when that update's row is written, however slow this process is to see it."""
    script = file.parent / "held.py"
    script.write_text(HELD)
    with _started([*RANKS, str(script), str(file), f"folder={folder.name}", str(step)]) as child:
        end = time.monotonic() + WAIT_S
        while not (folder / "metrics.jsonl").is_file() or len(read_metrics(folder)) < step:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def alone(file: Path) -> Path:
    """The run on one rank, undisturbed, in this process."""
    run = read_run(file, ["folder=alone"])
    train(run.config, run.source, run.folder)
    return run.folder


def _assert_same(folder: Path, alone: Path) -> None:
    """Metrics of another number of ranks: equal where they count, within rounding where they are sums."""
    rows, same = read_metrics(folder), read_metrics(alone)
    for row, other in zip(rows, same, strict=False):
        assert row.keys() == other.keys()
        assert (row["step"], row["tokens"], row["targets"]) == (other["step"], other["tokens"], other["targets"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["domain_loss"] == pytest.approx(other["domain_loss"], rel=1e-6)
        assert row["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-6)


def test_two_ranks_are_killed_and_one_goes_on(file: Path, alone: Path) -> None:
    """The losses are those of one rank that nobody disturbed; so is what evaluation and generation make of the weights."""
    folder = file.parent / "together"
    _killed_in_update(5, file, folder)
    assert checkpoint.find(folder).name == "step-00000003"
    code, out, err = _finished(["-m", "moe.train", "-c", str(file), "--set", "folder=together"])
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["steps"], summary["ranks"], summary["resumed_step"]) == (10, 1, 3)
    assert len(read_metrics(folder)) == 10
    _assert_same(folder, alone)
    held = counting_source(docs=10, seed=5)
    bpb = [[d["bpb"] for d in evaluate(f, held).values()] for f in (folder, alone)]
    assert bpb[0] == pytest.approx(bpb[1], rel=1e-5)
    models = [checkpoint.load(f) for f in (folder, alone)]
    texts = [list(generate(model, [5, 6, 7], Sampling(max_tokens=8, temperature=0))) for model in models]
    assert texts[0] == texts[1]


def test_torchrun_trains_one_run(file: Path, alone: Path) -> None:
    changes = ["--set", "folder=together", "--set", "steps=4", "--set", "micro_rows=1", "--set", "expert_ranks=2"]
    code, out, err = _finished([*RANKS, "-m", "moe.train", "-c", str(file), *changes])
    assert code == 0, err
    summary = json.loads(out)  # of rank 0 alone
    assert (summary["steps"], summary["ranks"], summary["device"]) == (4, 2, "cpu")
    assert len(read_metrics(file.parent / "together")) == 4
    rows = read_metrics(file.parent / "together")[:3]  # the last reads the experts
    (file.parent / "together" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _assert_same(file.parent / "together", alone)


def test_a_stopped_run_exits_with_1_and_a_wrong_one_with_2(file: Path) -> None:
    code, _, err = _finished(
        ["-m", "moe.train", "-c", str(file), "--set", "optim.lr=1e38", "--set", "optim.warmup_steps=0"]
    )
    assert code == 1
    assert err.splitlines()[-1].startswith("train: update 2 is not finite, got loss ")
    assert "Traceback" not in err
    code, _, err = _finished(["-m", "moe.train", "-c", str(file), "--set", "device=cuda", "--set", "folder=gpu"])
    assert (code, err.count("\n")) == (2, 1)
    assert "train.device: no GPU here, got 'cuda'" in err
    assert not (file.parent / "gpu").exists()


def test_a_plan_counts_what_the_run_would_make(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_run(file)
    found = plan(run.config, run.source, ranks=2)
    model = Decoder(run.config.model)
    assert (found.parameters, found.active_parameters) == model.parameter_counts()
    assert (found.steps, found.tokens) == (10, 10 * 4 * 64)
    assert found.weight_bytes == found.gradient_bytes == 4 * found.parameters
    optimizer = build(model, run.config.optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.0)
    assert 2 * found.optimizer_bytes == pytest.approx(optimizer.state_bytes, rel=0.02)
    half = plan(replace(run.config, precision="bfloat16"), run.source)
    assert half.weight_bytes == 2 * found.parameters
    assert half.optimizer_bytes == pytest.approx(2 * found.optimizer_bytes + 4 * found.parameters, rel=0.01)
    assert main(["-c", str(file), "--plan"]) == 0
    out = capsys.readouterr().out
    assert f"parameters      {found.parameters:,}, {found.active_parameters:,} active\n" in out
    assert "updates         10, 2,560 tokens\n" in out
    assert not (file.parent / "run").exists()


def test_a_profile_names_the_costly_operations(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe.profile import main as profile

    trace = file.parent / "trace.json"
    assert profile(["-c", str(file), "--steps", "1", "--lines", "8", "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "aten::mm" in out
    assert json.loads(out.splitlines()[-1])["updates"] == 1
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert profile(["-c", str(file), "--steps", "0"]) == 2
    assert not (file.parent / "run").exists()


def test_changes_are_laid_over_the_file(file: Path) -> None:
    run = read_run(file, ["optim.lr=0.5", "model.dim=48", "alarms.stop=[]", "steps=7", "row_growth=[[2, 8]]"])
    assert (run.config.optim.lr, run.config.model.dim, run.config.steps) == (0.5, 48, 7)
    assert run.config.row_growth == ((2, 8),)
    assert run.limits.stop == ()
    assert (run.config.model.vocab_size, run.config.model.eos, run.config.model.layers) == (VOCAB, EOS, 3)
    assert run.folder == file.parent / "run"
    assert isinstance(run.config, TrainConfig)


def test_json_is_read_without_yaml(file: Path) -> None:
    import yaml

    other = file.with_suffix(".json")
    other.write_text(json.dumps(yaml.safe_load(file.read_text())))
    assert read_run(other).config == read_run(file).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz=3", "train.stepz: unknown key"),
        ("model.dimm=3", "unknown key"),
        ("alarms.spike=3", "alarms.spike: unknown key"),
        ("preset=huge", "moe.preset: unknown name, got 'huge'"),
        ("source.counts.tokens=absent.npz", "absent.npz cannot be read"),
        ("source.counts=3", "source.counts: must name `tokens: FILE`"),
        ("source={}", "source: missing"),
        ("folder=5", "folder: must be a text, got 5"),
        ("start=[]", r"start: must be a text, got \[\]"),
        ("tokenizer=1.5", "tokenizer: must be a text, got 1.5"),
        ("preset={}", "preset: must be a text, got {}"),
        ("optim.group_loss=0.1", "optim.group_loss: balances several groups, got 0.1 with expert_groups 1"),
        ("model.eos=a", "model.eos must be whole numbers|model.eos: must be a whole number, got 'a'"),
        ("source.counts.tokens=5", "source.counts: its values must be texts, got {'tokens': 5}"),
        ("steps=many", "train.steps: must be a whole number, got 'many'"),
        ("steps=20.5", "train.steps: must be a whole number, got 20.5"),
        ("optim.schedule=cosin", "optim.schedule: must be one of cosine, wsd, constant, got 'cosin'"),
        ("packing=bestfit", "train.packing: must be one of stream, best_fit, got 'bestfit'"),
        ("precision=fp16", "train.precision: must be one of float32, bfloat16, got 'fp16'"),
        ("shuffle=False", "train.shuffle: must be true or false, got 'False'"),
        ('optim.lr="3e-3"', r"optim.lr: must be a number, got '3e-3'; write 0.003, which YAML reads as a number"),
        ("optim.weight_decay=NaN", "optim.weight_decay: must be a number, got nan"),
        ("optim.grad_clip=Infinity", "optim.grad_clip: must be a number, got inf"),
        ("threads=true", "train.threads: must be a whole number or null, got True"),
        (
            "row_growth=[[2, 8, 3]]",
            r"train.row_growth: must be a list, each entry a list of 2 \(a whole number, a whole",
        ),
        ("model.rope_scaling=2", "model.rope_scaling: must be keys and values or null, got 2"),
        ("alarms.stop=loss_spike", "alarms.stop: must be a list, each entry a text, got 'loss_spike'"),
        ("steps", "--set takes key=value, got 'steps'"),
        ("steps.more=1", "--set steps.more: steps holds a value"),
    ],
)
def test_mistakes_in_a_run_file(change: str, message: str, file: Path) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        read_run(file, [change])


def test_wrong_kinds_are_told_together(file: Path) -> None:
    changes = ["steps=1.5", "precision=fp16", "optim.schedule=cosin", "optim.beta3=1", "model.dim=-1"]
    with pytest.raises(ConfigError) as error:
        read_run(file, changes)
    named = ["moe.dim", "optim.beta3", "optim.schedule", "train.precision", "train.steps"]
    assert sorted(p.split(":")[0] for p in error.value.problems) == named


def test_flat_files_give_the_documents_between_eos(tmp_path: Path) -> None:
    np.array([5, 6, 0, 7, 0, 8], np.uint16).tofile(tmp_path / "a.bin")
    np.array([1, 0, 0], np.uint32).tofile(tmp_path / "b.bin")
    entries = {"a": {"tokens": "a.bin"}, "b": {"tokens": "b.bin", "dtype": "uint32"}}
    source = open_source(entries, tmp_path, vocab_size=9, eos=0)
    assert [source.tokens(i).tolist() for i in range(len(source))] == [[5, 6, 0], [7, 0], [8, 0], [1, 0], [0]]
    assert source.lengths().tolist() == [source.length(i) for i in range(5)] == [3, 2, 2, 2, 1]
    assert [source.domain(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert source.domains == ("a", "b")
    renamed = open_source({"c": entries["a"], "b": entries["b"]}, tmp_path, vocab_size=9, eos=0)
    assert renamed.content != source.content
    with pytest.raises(ConfigError, match=r"source.a: the file does not say its vocabulary"):
        open_source(entries, tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[1, 0], [2, 0]]), r"source.a: no token ids, got int64 of shape \(2, 2\)"),
        (np.array([1.0, 0.0]), "source.a: no token ids, got float64"),
        (np.array([1, 2**32 + 3, 0]), "token ids outside the vocabulary, got 0 to 4294967299, expected 0 to 8"),
        (np.array([1, -1, 0]), "token ids outside the vocabulary, got -1 to 1"),
        (np.ones(1_000_001, np.uint16), "source.a: no document ends, got 1000001 tokens without EOS 0"),
    ],
)
def test_files_that_hold_no_documents(tokens: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", tokens=tokens)
    with pytest.raises(InputError, match=message):
        open_source({"a": {"tokens": "a.npz"}}, tmp_path, vocab_size=9, eos=0)


def test_a_plan_knows_the_ranks(file: Path) -> None:
    run = read_run(file, ["expert_ranks=2"])
    c = run.config.model
    whole, split = plan(replace(run.config, expert_ranks=1), run.source, 2), plan(run.config, run.source, 2)
    experts = 2 * c.experts * 3 * c.dim * c.expert_dim  # of two routed layers, half of them elsewhere
    assert whole.weight_bytes - split.weight_bytes == 4 * experts // 2
    assert whole.optimizer_bytes == split.optimizer_bytes
    for ranks, message in ((3, "4 rows for 3 ranks"), (0, "at least one rank, got 0"), (1, "got 2 for 1 ranks")):
        with pytest.raises(ConfigError, match=message):
            plan(run.config, run.source, ranks)


def test_without_rich_alarms_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = _Terminal()
    with live(5, stream) as on_step:
        on_step({"step": 1, "alarms": [{"name": "dead_expert", "found": "rms 0"}]})
    assert stream.getvalue() == "update 1: alarm dead_expert: rms 0\n"


def test_the_live_line_says_what_a_row_holds() -> None:
    row = {"loss": 2.5, "tokens_per_s": 1234.0, "mfu": 0.314, "grad_norm": 0.5}
    assert line(row) == "loss 2.500, 1,234 tokens/s, MFU 31.4 %, |g| 0.5"
    assert load_line([[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]) == "\nload of routed layer 1: ██▁▁"
    assert load_line([[0.25] * 4]) == "\nload of routed layer 0: ▅▅▅▅"
    assert load_line([]) == ""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_an_alarm_is_told_when_it_begins(stream: io.StringIO) -> None:
    """Once while it lasts, again when it comes back; the live line is drawn on a terminal only."""
    row = {"loss": 2.5, "tokens_per_s": 1.0, "grad_norm": 0.5, "experts": {"load": [[0.5, 0.5]]}}
    alarms = [{"name": "dead_expert", "found": "rms 0"}]
    with live(5, stream, "here") as on_step:
        for step, held in enumerate(([], alarms, alarms, [], alarms), 1):
            on_step(row | {"step": step, "alarms": held})
    said = stream.getvalue()
    assert [f"update {i}: alarm dead_expert: rms 0" in said for i in range(1, 6)] == [False, True, False, False, True]
    assert ("here: loss 2.500" in said) == stream.isatty()
