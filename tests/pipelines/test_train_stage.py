"""What the knobs of `train` become: the plan of a run over a phase's tokens."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from core.errors import ConfigError
from moe.data import ArrayTokenSource
from pipelines.model import TrainStageConfig, passes, train_plan

TOKENS = ["<|eos|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", *"abcd"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="a"))
    made.add_special_tokens(TOKENS[:4])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def source() -> ArrayTokenSource:
    """100 documents of 64 tokens: 100 rows of the preset `ci`."""
    documents = [np.append(np.full(63, 5 + i % 3), 0) for i in range(100)]
    return ArrayTokenSource(
        documents, vocab_size=8, eos=0, text_bytes=[63] * 100, document_domains=[i % 2 for i in range(100)],
        domains=("web", "code"),
    )  # fmt: skip


def test_steps_are_those_that_the_phase_holds(source: ArrayTokenSource, tokenizer: Path) -> None:
    plan = train_plan(TrainStageConfig(preset="ci", rows=8), source, tokenizer, "0" * 32)
    assert (plan.steps, plan.repeat, plan.init, plan.shuffle) == (12, False, "0" * 32, True)
    assert (plan.model.vocab_size, plan.model.eos, plan.tokenizer) == (8, 0, str(tokenizer))
    capped = train_plan(TrainStageConfig(preset="ci", rows=8, max_steps=5), source, tokenizer, None)
    assert (capped.steps, capped.repeat) == (5, False)
    longer = train_plan(TrainStageConfig(preset="ci", rows=8, steps=40), source, tokenizer, None)
    assert (longer.steps, longer.repeat) == (40, True)
    growing = train_plan(TrainStageConfig(preset="ci", rows=8, row_growth=((2, 16), (4, 26))), source, tokenizer, None)
    assert growing.steps == 2 + 2 + 2, "16 + 32 + 52 of 100 rows"


def test_knobs_reach_the_run(source: ArrayTokenSource, tokenizer: Path) -> None:
    config = TrainStageConfig(
        preset="ci", rows=4, packing="best_fit", precision="bfloat16", micro_rows=2, device="cpu", keep=3,
        model={"mtp_heads": 1, "context": 32}, optim={"optimizer": "adamw", "lr": 0.1}, fim_fraction=0.5,
        fim_domains=("code",), fim_tokens=("<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"),
    )  # fmt: skip
    plan = train_plan(config, source, tokenizer, None)
    assert (plan.packing, plan.precision, plan.micro_rows, plan.device, plan.keep) == (
        "best_fit",
        "bfloat16",
        2,
        "cpu",
        3,
    )
    assert (plan.model.mtp_heads, plan.model.context, plan.model.dim) == (1, 32, 32)
    assert (plan.optim.optimizer, plan.optim.lr) == ("adamw", 0.1)
    assert (plan.fim_fraction, plan.fim_domains, plan.fim_tokens) == (0.5, ("code",), (1, 2, 3))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fim_tokens": ("<|reserved_0|>", "<|pre|>", "<|suf|>")}, r"not in the tokenizer, got <\|pre\|>, <\|suf\|>"),
        ({"model": {"dimm": 3}}, "model.dimm: unknown key"),
        ({"rows": 101}, r"the mixture is too short, got 6400 tokens = 0 steps of 101 x 64"),
    ],
)
def test_knobs_that_fit_nothing(knobs: dict, message: str, source: ArrayTokenSource, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_plan(TrainStageConfig(preset="ci", **knobs), source, tokenizer, None)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"model": {"dimm": 3}}, "model.dimm: unknown key"),
        ({"model": {"heads": 3, "kv_heads": 2}}, "moe.heads: must be a multiple of kv_heads"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule: must be one of cosine, wsd, constant, got 'cosin'"),
        ({"optim": {"lr": "3e-3"}}, "optim.lr: must be a number, got '3e-3'"),
        ({"alarms": {"stop": ["fire"]}}, "alarms.stop: unknown alarm, got 'fire'"),
        ({"keep": 0}, "train.keep: must be positive, got 0"),
        ({"fim_fraction": 0.5}, "train.fim_fraction: lies in 0 to 1 and needs fim_domains and fim_tokens"),
    ],
)
def test_knobs_of_moe_are_checked_with_the_config(knobs: dict, message: str) -> None:
    """Before any stage runs, and with no tokenizer there."""
    with pytest.raises(ConfigError, match=message):
        TrainStageConfig(**knobs)
    with pytest.raises(ConfigError) as error:
        TrainStageConfig(alarms={"readings": 0}, optim={"lr": True})
    assert len(error.value.problems) == 2
    TrainStageConfig(model={"eos": 99_999}, fim_fraction=0.5, fim_domains=("code",), fim_tokens=("a", "b", "c"))


def test_passes_over_the_phase_are_counted(source: ArrayTokenSource, tokenizer: Path) -> None:
    for steps, expected in ((5, 0.4), (40, 3.2)):
        plan = train_plan(TrainStageConfig(preset="ci", rows=8, steps=steps), source, tokenizer, None)
        assert passes(plan, source) == pytest.approx(expected)
