"""Ablations: what a file may say, and whole runs on a made corpus with the smallest model, undisturbed and killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.errors import ConfigError, StageError
from core.storage import Root
from mixtures.index_file import index_name
from moe.checkpoint import find, read
from moe.trainer import read_metrics
from pipelines.ablation.config import load_ablation
from pipelines.ablation.design import derived
from pipelines.config import load_pipeline
from pipelines.report.ablation import page
from tests.pipelines.small_pipeline import REPO, command, environment, pipelines, prose, write_jsonl

BASE = """\
root: ./root
engine: {workers: 1, memory_gb: 1}
sources:
  notes: {kind: jsonl, path: ./notes}
  tales: {kind: jsonl, path: ./tales}
stages:
  extract: {}
  signals: {}
  select@early: {}
  select@final: {after: fate@early}
  split: {by: [doc_id], held_out_fraction: 0.3}
  tokenizer: {vocab_size: 512, sample_bytes: 200000}
  tokenize: {where: fate@early}
  mix:
    where: fate@final and split.split == 'train'
    held_out: fate@final and split.split == 'held_out'
    held_out_docs: 12
    phases:
      pretrain:
        components:
          - {dataset: notes, weight: 0.5, max_epochs: 3}
          - {dataset: tales, weight: 0.5, max_epochs: 3}
policy:
  final:
    - {drop: signals.words < 100, reason: too_short}
"""
ABLATION = """\
base: ./base.yaml
tokens: 4096
seeds: [0, 7]
aa: true
train: {preset: ci, rows: 8, optim: {warmup_steps: 2}}
arms:
  plain: {}
  same: {}
  loose:
    policy: {final: [{drop: signals.words < 20, reason: too_short}]}
  tales:
    mix: {phases: {pretrain: {components: [{dataset: notes, weight: 0.1}, {dataset: tales, weight: 0.9, max_epochs: 3}]}}}
"""
ARMS = ("plain", "same", "loose", "tales")


def write(folder: Path, ablation: str = ABLATION, base: str = BASE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(base)
    (folder / "weights.yaml").write_text(ablation)
    return folder / "weights.yaml"


def result(config: Path) -> dict:
    return json.loads((config.parent / "root/ablations/weights/result.json").read_text())


KILLS = 10  # tries


def losses(config: Path) -> dict[str, Path]:
    """`arm/seed` -> losses of each trial."""
    found = (config.parent / "root/ablations/weights").glob("*/*/losses.parquet")
    return {f"{p.parts[-3]}/{p.parts[-2].rpartition('-')[0]}": p for p in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An ablation that has run, and what it said."""
    folder = tmp_path_factory.mktemp("ablation")
    for k, name in enumerate(("notes", "tales")):
        write_jsonl(folder / name, [prose(1000 * k + i, 6 + i % 9) for i in range(60)], files=2)
    config = write(folder)
    ran = pipelines("run", "ablation", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    return config, ran.out


def test_every_trial_has_the_same_tokens_and_seeds_share_their_weights(made: tuple[Path, str]) -> None:
    config, _ = made
    found = result(config)
    assert (found["tokens"], found["steps"], found["baseline"], found["aa"]) == (4096, 8, "plain", "aa")
    trials = losses(config)
    assert set(trials) == {f"{arm}/seed-{seed}" for arm in (*ARMS, "aa") for seed in (0, 7)}
    for name, path in trials.items():
        plan, state = read(find(path.parent))
        assert (plan.seed, state.step) == (int(name.rpartition("-")[2]), 8)
        assert (plan.order_seed is not None) == name.startswith("aa/")
        assert read_metrics(path.parent)[-1]["tokens"] == 4096


def test_arms_differ_in_what_they_say_and_in_nothing_else(made: tuple[Path, str]) -> None:
    config, _ = made
    root, trials = Root(str(config.parent / "root")), losses(config)
    mixed = {arm: root.note(index_name(f"weights_{arm}/pretrain"))["content"] for arm in ARMS}
    assert mixed["plain"] == mixed["same"] not in (mixed["loose"], mixed["tales"])
    held = {root.note(index_name(f"weights_{arm}/held_out"))["content"] for arm in ARMS}
    assert len(held) == 1
    bits = {name: pq.read_table(path).column("bits").to_pylist() for name, path in trials.items()}
    assert bits["plain/seed-0"] == bits["same/seed-0"]
    assert bits["plain/seed-0"] != bits["aa/seed-0"] != bits["plain/seed-7"]
    shares = {arm: about["shares"] for arm, about in result(config)["arms"].items()}
    assert shares["tales"]["tales"] == pytest.approx(0.9, abs=0.05)
    assert shares["plain"]["tales"] == pytest.approx(0.5, abs=0.05)


def test_an_arm_with_rules_of_its_own_mixes_by_its_own_fate(made: tuple[Path, str]) -> None:
    config, _ = made
    root = config.parent / "root"
    words = []
    for name in sorted(p.name for p in (root / "datasets/notes/documents").glob("*.parquet")):
        layers = root / "datasets/notes/layers"
        for layer in ("fate@final", "fate@weights_loose"):
            words.append(pq.read_table(layers / layer / name).column("keep").to_pylist())
    assert sum(map(sum, words[1::2])) > sum(map(sum, words[0::2])) > 0
    report = json.loads((root / "mixtures/weights_loose/pretrain/report.json").read_text())
    plain = json.loads((root / "mixtures/weights_plain/pretrain/report.json").read_text())
    assert report["components"][0]["available_docs"] > plain["components"][0]["available_docs"]
    assert not (root / "mixtures/pretrain").exists(), "the base's own mixtures are not touched"


def test_the_table_and_the_page_say_what_the_result_says(made: tuple[Path, str]) -> None:
    config, said = made
    found = result(config)
    rows = [(c["arm"], c["domain"]) for c in found["comparisons"]]
    assert rows == [(arm, d) for arm in (*ARMS[1:], "aa") for d in ("notes", "tales")]
    for c in found["comparisons"]:
        arm = "A/A" if c["arm"] == "aa" else c["arm"]
        line = next(x for x in said.splitlines() if x.split()[1:4:2] == [arm, c["domain"]])
        assert f"{c['effect']:+.4f}" in line
        assert c["verdict"] in line
    assert {c["verdict"] for c in found["comparisons"] if c["arm"] in ("same", "aa")} == {"tie"}
    written = (config.parent / "root/ablations/weights/report.html").read_text()
    assert written == page(found)
    assert written.count("<tr>") >= len(rows)


def test_a_second_run_trains_nothing(made: tuple[Path, str]) -> None:
    config, _ = made
    before = {p: p.stat().st_mtime_ns for p in losses(config).values()}
    ran = pipelines("run", "ablation", "-c", config)
    assert "trials@weights: up to date" in ran.out
    assert {p: p.stat().st_mtime_ns for p in losses(config).values()} == before
    rehearsed = pipelines("run", "ablation", "-c", config, "--dry-run")
    assert rehearsed.code == 0
    assert rehearsed.out.startswith("nothing would run: all trials are there")
    assert "10 trials: plain, same, loose, tales, aa x seeds 0, 7" in rehearsed.out
    assert "tokens: 4,096 a trial, 40,960 in all" in rehearsed.out
    assert "(its last run)" in rehearsed.out


def _killed_after_tales(config: Path) -> None:
    """Run until some trial of the arm `tales` is done, then kill all of it; on a crowded machine that may be too late."""
    run = subprocess.Popen(
        command("run", "ablation", "-c", config), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while run.poll() is None and not any(name.startswith("tales/") for name in losses(config)):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def test_a_killed_run_goes_on_and_finished_trials_stay(made: tuple[Path, str], tmp_path: Path) -> None:
    """Two of six trials are there; a kill later more are; the rest follows, equal to those of the run before."""
    config, _ = made
    shutil.copytree(config.parent, tmp_path / "copy")
    root, copied = tmp_path / "copy/root", tmp_path / "copy" / config.name
    lines = ABLATION.splitlines(keepends=True)
    copied.write_text("".join(x for i, x in enumerate(lines) if i not in (7, 8, 9)))  # without `same` and `loose`
    (root / "manifests/trials@weights.json").unlink()
    for _ in range(KILLS):
        for arm in ("aa", "tales"):
            shutil.rmtree(root / "ablations/weights" / arm, ignore_errors=True)
        _killed_after_tales(copied)
        if "aa/seed-7" not in losses(copied):
            break
        (root / "manifests/trials@weights.json").unlink(missing_ok=True)
    else:
        pytest.fail(f"{KILLS} runs ended before they could be killed")
    done = {p: p.stat().st_mtime_ns for p in losses(copied).values()}
    ran = pipelines("run", "ablation", "-c", copied)
    assert (ran.code, ran.err) == (0, "")
    now, before = losses(copied), losses(config)
    assert {p: now[name].stat().st_mtime_ns for name, p in now.items() if p in done} == {
        p: t for p, t in done.items() if p in now.values()
    }
    assert set(now) == {f"{arm}/seed-{seed}" for arm in ("plain", "tales", "aa") for seed in (0, 7)}, (
        "others were swept"
    )
    assert {name: pq.read_table(p) for name, p in now.items()} == {name: pq.read_table(before[name]) for name in now}


# What a file may say


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("aa: true", "ab: true", "weights.yaml:4: ab: unknown key 'ab', did you mean 'aa'?"),
        ("tokens: 4096", "tokens: 0", "weights.yaml:2: tokens:"),
        ("tokens: 4096\n", "", "weights.yaml:1: tokens: 'tokens' is missing"),
        ("seeds: [0, 7]", "seeds: [1, 1]", "seeds must be distinct and not negative, got [1, 1]"),
        ("  same: {}", "  aa: {}", "weights.yaml:8: arms.aa: an arm's name holds letters"),
        ("base: ./base.yaml", "base: ./bass.yaml", "bass.yaml: no such config file"),
        ("tokens: 4096", "phase: pretrian\ntokens: 4096", "weights.yaml:2: phase: `mix` has no phase 'pretrian', did you"),
        ("optim: {warmup_steps", "optim: {warm_steps", "weights.yaml:5: optim.warm_steps: unknown key"),
        ("policy: {final:", "policy: {finale:", "weights.yaml:10: arms.loose.policy.finale: arms share all but"),
        ("policy: {final:", "policy: {early:", "arms share all but the rules of select@final; expected 'final'"),
        ("drop: signals.words <", "drop: signals.wrods <", "weights.yaml:10: policy.final.0.drop: layer 'signals' has no"),
        ("pretrain: {comp", "pretrain: {cmop", "weights.yaml:12: stages.mix.phases.pretrain.cmoponents: unknown key"),
        ("weight: 0.9", "weight: 0.8", "weights of phase 'pretrain' must sum to 1, got 0.9"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in ABLATION
    with pytest.raises(ConfigError) as e:
        load_ablation(write(tmp_path, ABLATION.replace(old, new)))
    assert said in str(e.value)


def test_all_mistakes_of_all_arms_are_told_at_once(tmp_path: Path) -> None:
    wrong = ABLATION.replace("signals.words <", "signals.wrods <").replace("weight: 0.9", "weight: 0.8")
    with pytest.raises(ConfigError) as e:
        load_ablation(write(tmp_path, wrong))
    assert len(e.value.problems) == 2


def test_a_mistake_of_the_base_is_told_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base\.yaml:11: .*held_out_fractoin"):
        load_ablation(write(tmp_path, base=BASE.replace("held_out_fraction", "held_out_fractoin")))


def test_one_seed_needs_the_aa_arm(tmp_path: Path) -> None:
    one = ABLATION.replace("[0, 7]", "[3]")
    assert load_ablation(write(tmp_path, one)).config.seeds == (3,)
    with pytest.raises(ConfigError, match="one seed without `aa` leaves the noise of training unknown"):
        load_ablation(write(tmp_path, one.replace("aa: true", "aa: false")))


def test_an_ablation_is_its_base_with_labels_behind_it(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path))
    made, base = derived(ablation), ablation.base
    names = [e.instance for e in made.stages]
    kept = [e.instance for e in base.stages if e.instance != "mix"]
    assert names == [*kept, "select@weights_loose", *(f"mix@weights_{arm}" for arm in ARMS), "trials@weights"]
    assert made.policy["final"] == base.policy["final"] != made.policy["weights_loose"]
    mixes = {e.instance: e.config for e in made.stages if e.instance.startswith("mix@")}
    assert mixes["mix@weights_plain"] == mixes["mix@weights_same"] == base.entry("mix").config
    assert mixes["mix@weights_loose"].where == "fate@weights_loose and (fate@weights_loose and split.split == 'train')"


def test_more_tokens_than_an_arm_holds_are_refused(made: tuple[Path, str], tmp_path: Path) -> None:
    config, _ = made
    other = config.with_name("long.yaml")
    other.write_text(ABLATION.replace("tokens: 4096", "tokens: 40960000"))
    ran = pipelines("run", "ablation", "-c", other)
    assert ran.code == 1
    assert "40960000 tokens are no whole updates of 512 that every arm holds" in ran.err
    assert StageError.__name__ not in ran.err


def test_the_examples_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMO_FOLDER", str(tmp_path))
    phases = load_pipeline(REPO / "configs/phases.yaml")
    assert list(phases.entry("mix").config.phases) == ["pretrain", "anneal", "midtrain", "cooldown"]
    later = phases.entry("train@anneal")
    assert "@train" in later.stage.columns(later.config)
    measured = phases.entry("evaluate@anneal")
    assert "@train@anneal" in measured.stage.columns(measured.config)
    for path in sorted((REPO / "configs/ablations").glob("*.yaml")):
        assert len(load_ablation(path).arms) == 2
