"""Options of use: one definition for every command line, and the model where and as they say."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from core.errors import ConfigError, StageError
from moe import examine, generate, hub
from moe.generate import generate_batch, stream
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling
from moe.server import __main__ as server
from moe.use import Use, add_options
from pipelines.cli import app
from tests.moe.texts import tokenizer_of, uniform

GREEDY = Sampling(temperature=0, max_tokens=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A hub folder in bfloat16 whose model writes tokens 7 and 8 for ever."""
    tokenizer = tokenizer_of(["What is red?\nAnswer: an apple"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = uniform(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[7] = 1
        model.lm_head.weight[8] = -1  # whatever the sign of what the last norm gives, one of the two is likeliest
    return hub.export(model, tmp_path / "hub", dtype=torch.bfloat16, tokenizer=tmp_path / "tokenizer.json")


def test_the_type_is_what_the_folder_holds_or_what_was_said(folder: Path, tmp_path: Path) -> None:
    assert Use(device="cpu").load(folder).lm_head.weight.dtype == torch.bfloat16
    assert Use(device="cpu", dtype="float32").load(folder).lm_head.weight.dtype == torch.float32
    wide = hub.export(hub.load(folder), tmp_path / "wide")
    assert Use(device="cpu").load(wide).lm_head.weight.dtype == torch.float32
    assert Use(device="cpu", dtype="bfloat16").load(wide).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["tpu:x", "meta", "cuda:99"])
def test_a_device_that_is_not_here(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="--device: "):
        Use(device=device).load(folder)


def test_every_command_line_has_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ("device", "dtype", "speculate", "compiled"))
    assert Use.of(parser.parse_args([])) == Use()
    said = ["--device", "cuda:1", "--dtype", "bfloat16", "--speculate", "2", "--compiled"]
    assert Use.of(parser.parse_args(said)) == Use("cuda:1", "bfloat16", 2, True)
    assert Use.of(parser.parse_args([*said, "--no-compiled"])).compiled is False
    with pytest.raises(ConfigError, match="--dtype: unknown, got 'float8'"):
        Use(dtype="float8")
    with pytest.raises(ConfigError, match="--speculate: must not be negative, got -1"):
        Use(speculate=-1)
    for main, options in ((generate.main, said), (server.main, said), (examine.main, said[:4])):
        with pytest.raises(SystemExit):
            main(["--help"])
        told = capsys.readouterr().out
        assert [o for o in options if o.startswith("--") and o not in told] == []
    for command in ("generate", "serve"):
        told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
        assert [o for o in said if o.startswith("--") and o not in told] == []


def test_options_reach_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `pipelines generate` to the batcher; from `pipelines serve` to the server."""
    seen: list[object] = []
    monkeypatch.setattr(generate, "write", lambda *given: seen.append(given))
    monkeypatch.setattr(server, "serve", seen.append)
    options = ["--device", "cpu", "--dtype", "float32", "--speculate", "3", "--compiled"]
    ran = CliRunner().invoke(
        app, ["generate", "--checkpoint", str(folder), "--prompt", "x", "--top-k", "3", "--stop", "a", *options]
    )
    assert ran.exit_code == 0, ran.output
    use = Use("cpu", "float32", 3, True)
    sampling = Sampling(max_tokens=64, temperature=0.8, top_p=0.95, top_k=3, stop=("a",))
    assert CliRunner().invoke(app, ["serve", str(folder), "--slots", "2", *options]).exit_code == 0
    assert server.main([str(folder), "--slots", "2", *options]) == 0
    wanted = server.Options(folder, slots=2, use=use)
    assert seen == [(folder, "x", sampling, use), wanted, wanted]


def test_a_hub_model_stops_at_its_own_end_tokens(folder: Path, tmp_path: Path) -> None:
    """Those of generation_config.json too, wherever the model is used; and an exported copy keeps them."""
    free = generate_batch(hub.load(folder), [[5]], GREEDY)[0]
    assert (set(free.tokens) <= {7, 8}, free.finished) == (True, "length")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7, 8]}')
    stopped = generate_batch(Use(device="cpu").load(folder), [[5]], GREEDY)[0]
    assert (stopped.tokens, stopped.finished) == ((), "stop")
    copied = hub.load(hub.export(hub.load(folder), tmp_path / "copy"))
    assert generate_batch(copied, [[5]], GREEDY)[0].finished == "stop"
    assert hub.stop_tokens(tmp_path / "copy") == (0, 7, 8)


def test_a_diverged_model_is_a_stage_error_and_other_prompts_go_on() -> None:
    model = Decoder(preset("ci", vocab_size=64, eos=0), seed=1).eval()
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    bad = next(t for t in range(6, 64) if t not in generate_batch(model, [[5]], GREEDY)[0].tokens)
    with torch.no_grad():
        model.model["embed_tokens"].weight[bad] = math.nan
    with pytest.raises(StageError, match=r"got logits that are not finite behind 2 \+ 0 tokens"):
        generate_batch(model, [[5], [bad]], GREEDY)
    with pytest.raises(StageError, match="not finite"):
        list(generate.generate(model, [bad], GREEDY))
    last = {event.id: event for event in stream(model, [[5], [bad]], GREEDY)}
    assert [last[i].finished for i in (0, 1)] == ["length", "failed"]


def test_the_command_says_that_a_model_has_diverged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hub.load(folder)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    lost = hub.export(model, tmp_path / "lost", tokenizer=tmp_path / "tokenizer.json")
    assert generate.main([str(lost), "--prompt", "red", "--max-tokens", "3"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("generate: the model gives no next token")
    assert told.count("\n") == 1
    (tmp_path / "q.jsonl").write_text('{"query": "What is red?", "choices": ["an apple", "grass"], "gold": 0}\n')
    assert examine.main([str(lost), "--questions", str(tmp_path / "q.jsonl")]) == 1, "0 of NaN would be its answer"
    assert "the model gives no likelihoods" in capsys.readouterr().err
