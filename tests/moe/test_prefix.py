"""What begins every prompt: EOS for models of training here, and what its own tokenizer says for a folder of the hub."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

import moe
from core.errors import ConfigError, StageError
from moe import checkpoint, hub
from moe.batching import Batcher
from moe.config import ModelConfig
from moe.data import ArrayTokenSource
from moe.evaluate import document_losses
from moe.generate import generate_batch
from moe.metrics import read_metrics
from moe.model import Decoder
from moe.presets import preset
from moe.rl.trainer import TIMES, reinforce
from moe.sampling import Sampling
from moe.score import score_continuations
from moe.server.service import Service
from tests.moe.copying import CONFIG, copying_tasks, start_run
from tests.moe.texts import tokenizer_of

GREEDY = Sampling(temperature=0, max_tokens=5)
BEGIN, EOS = 300, 0  # ids of <s> and <eos>


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = tokenizer_of(f"{a}>{b} the whole of the text" * 3 for a in range(40) for b in range(40))
    for n in range(made.get_vocab_size(), BEGIN):
        made.add_tokens([f"<{n}>"])
    made.add_special_tokens(["<s>"])
    assert made.token_to_id("<s>") == BEGIN
    return made


@pytest.fixture
def model(tokenizer: Tokenizer) -> Decoder:
    """Random weights that never end a document by themselves."""
    config = preset("ci", vocab_size=tokenizer.get_vocab_size(), eos=EOS)
    made = Decoder(ModelConfig(**{**vars(config), "context": 32}), seed=3).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
        made.lm_head.weight[EOS] = 0
    return made


def written(folder: Path, model: Decoder, tokenizer: Tokenizer, said: dict[str, Any] | None) -> Path:
    """A hub folder with that tokenizer and that tokenizer_config.json."""
    tokenizer.save(str(folder / "made.json"))
    hub.export(model, folder / "hub", tokenizer=folder / "made.json", overwrite=True)
    if said is None:
        (folder / "hub/tokenizer_config.json").unlink()
    else:
        (folder / "hub/tokenizer_config.json").write_text(json.dumps(said))
    return folder / "hub"


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        ("<s> $A", {}, (BEGIN,)),
        ("<s> <eos> $A <eos>", {}, (BEGIN, EOS)),
        ("<s> $A", None, (BEGIN,)),
        ("<s> $A", {"add_bos_token": False, "bos_token": "<s>"}, ()),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, (BEGIN,)),
        (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, (BEGIN,)),
        (None, {"bos_token": "<s>", "eos_token": "<eos>"}, ()),
        (None, {"bos_token": None, "eos_token": "<eos>"}, ()),
        (None, {"bos_token": "<eos>", "eos_token": "<eos>"}, (EOS,)),
        (None, None, (EOS,)),
    ],
)
def test_a_hub_folder_says_what_begins_a_prompt(
    template: str | None,
    said: dict[str, Any] | None,
    expected: tuple[int, ...],
    tokenizer: Tokenizer,
    model: Decoder,
    tmp_path: Path,
) -> None:
    if template is not None:
        named = [("<s>", BEGIN), ("<eos>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    folder = written(tmp_path, model, tokenizer, said)
    assert moe.load(folder).prefix == expected
    copied = hub.export(hub.load(folder), tmp_path / "copy", tokenizer=folder / "tokenizer.json")
    assert hub.load(copied).prefix == expected, "an exported copy says the same"


def test_a_begin_that_cannot_be_is_refused(tokenizer: Tokenizer, model: Decoder, tmp_path: Path) -> None:
    folder = written(tmp_path, model, tokenizer, {"add_bos_token": True, "bos_token": "<begin>"})
    with pytest.raises(ConfigError, match=r"adds a bos_token that tokenizer\.json does not have, got '<begin>'"):
        moe.load(folder)
    tokenizer.add_special_tokens(["<begin>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"begins texts with \(301,\), expected ids below 301"):
        moe.load(folder)
    (folder / "tokenizer.json").unlink()
    assert moe.load(folder).prefix == (EOS,), "token ids alone"


@pytest.mark.parametrize("prefix", [(BEGIN,), (), (BEGIN, 7)])
def test_generation_scores_and_evaluation_follow_it(prefix: tuple[int, ...], model: Decoder) -> None:
    """Against one full forward a token, behind what the model says."""
    model.prefix = prefix
    prompt = [5, 6, 7, 8]
    tokens = [*prefix, *prompt]
    with torch.inference_mode():
        for _ in range(5):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        log_p = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    made = tokens[-5:]
    assert list(generate_batch(model, [prompt], GREEDY)[0].tokens) == made
    wanted = [float(log_p[t - 1, tokens[t]]) for t in range(len(prefix) + 4, len(tokens))]
    (found,) = score_continuations(model, [(prompt, made)])
    assert found.nats == pytest.approx(-sum(wanted), rel=1e-5)
    assert found.greedy

    document = [*prompt, *made, EOS]
    start = list(prefix) or [EOS]  # the first token must be read behind something
    with torch.inference_mode():
        log_p = model(torch.tensor([[*start, *document]]))[0].double().log_softmax(-1)
    each = [float(log_p[len(start) - 1 + t, token]) for t, token in enumerate(document)]
    source = ArrayTokenSource([np.array(document)], vocab_size=301, eos=EOS, text_bytes=[9])
    assert document_losses(model, source).bits[0] == pytest.approx(-sum(each) / math.log(2), rel=1e-5)
    scored = Service(Batcher(model, slots=1))._score(document, 1)
    assert scored.chosen == pytest.approx(each, abs=1e-4)


def test_the_longest_prompt_fits_with_what_begins_it(model: Decoder) -> None:
    model.prefix = (BEGIN, 7)
    longest = [5] * (32 - 2 - 4)
    assert len(generate_batch(model, [longest], GREEDY)[0].tokens) == 5
    with pytest.raises(ConfigError, match="exceed the context"):
        generate_batch(model, [[5, *longest]], GREEDY)
    model.prefix = ()
    with pytest.raises(ConfigError, match="nothing to continue"):
        generate_batch(model, [[]], GREEDY)


def test_a_diverged_model_has_no_bits_per_byte(model: Decoder) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    source = ArrayTokenSource([np.array([5, 6, EOS])], vocab_size=301, eos=EOS, text_bytes=[2])
    with pytest.raises(StageError, match="the model gives no likelihoods"):
        document_losses(model, source)


def test_reinforcement_learning_keeps_what_begins_and_ends(tmp_path: Path) -> None:
    """From a hub folder, in the run's first process and in the one that goes on; and so for whoever uses the run."""
    start = start_run(tmp_path, steps=2)
    made = moe.load(start)
    begin, end = 5, 6
    made.prefix, made.stop_tokens = (begin,), (EOS, end)
    values = json.loads((start / "tokenizer.json").read_text())
    content = next(token for token, number in values["model"]["vocab"].items() if number == begin)
    values["added_tokens"].append({**values["added_tokens"][0], "id": begin, "content": content})
    (tmp_path / "both.json").write_text(json.dumps(values))
    folder = hub.export(made, tmp_path / "hub", tokenizer=tmp_path / "both.json")
    assert moe.load(folder).prefix == (begin,)

    tasks, _ = copying_tasks(folder)
    config = dataclasses.replace(CONFIG, steps=2, max_tokens=9, equal_groups="keep")

    def reward(task: int, text: str) -> float:
        return float(len(text))

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    reinforce(config, tasks, reward, tmp_path / "whole", folder)
    with pytest.raises(KeyboardInterrupt):
        reinforce(config, tasks, reward, tmp_path / "run", folder, stop)
    assert reinforce(config, tasks, reward, tmp_path / "run", folder).resumed_step == 1
    whole, resumed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "run")
    )
    assert resumed == whole
    assert whole[0]["mismatch"]["max"] < 1e-4, "what samples and what trains read the same tokens"
    for place in (tmp_path / "run", checkpoint.find(tmp_path / "run")):
        kept = moe.load(place)
        assert (kept.prefix, kept.stop_tokens) == ((begin,), (EOS, end))
    exported = hub.export(tmp_path / "run", tmp_path / "again", tokenizer=tmp_path / "both.json")
    assert (hub.load(exported).prefix, hub.load(exported).stop_tokens) == ((begin,), (EOS, end))
