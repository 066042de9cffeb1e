"""Hub folders: config.json both ways, weights both ways bit for bit, and what is wrong with a folder said at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moe
from core.errors import ConfigError, StageError
from moe import hub, hub_config
from moe.config import ModelConfig, RopeScaling, TrainConfig
from moe.data import TokenSource
from moe.files import TEMPORARY
from moe.flops import STEP_35_FLASH
from moe.hub_config import from_hub, to_hub
from moe.model import Decoder
from moe.presets import preset
from moe.trainer import train
from tests.moe.step_oracle import SMALL, greatest, oracle, perturbed, their_logits, tokens

WITH_HEADS = replace(SMALL, mtp_heads=2, routed_clip=(0, 0, 0, 0, 0, 7.0), shared_clip=(0, 0, 0, 0, 0, 16.0))
# The released config.json: values that specify the shape, as published (48 entries a list, a comma string).
PATTERN = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 12
RELEASED: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "num_hidden_layers": 45,
    "vocab_size": 128896,
    "max_seq_len": 262144,
    "max_position_embeddings": 262144,
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "head_dim": 128,
    "use_qk_norm": True,
    "layer_types": PATTERN,
    "sliding_window": 512,
    "rope_theta": [5e6 if kind == "full_attention" else 1e4 for kind in PATTERN],
    "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in PATTERN],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 131072,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": ["full_attention"],
    "use_rope_layers": [],
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
        "true_head_dim": 128,
    },
    "use_moe": True,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_intermediate_size": 1280,
    "share_expert_dim": 1280,
    "moe_layers_enum": ",".join(map(str, range(3, 45))),
    "moe_layer_offset": 0,
    "moe_every_n_layer": 1,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "att_impl_type": "GQA",
    "use_head_wise_attn_gate": True,
    "sink": False,
    "zero_centered": True,
    "swiglu_limits": [7.0 if i in (43, 44) else 0.0 for i in range(48)],
    "swiglu_limits_shared": [16.0 if i == 44 else 0.0 for i in range(48)],
    "num_nextn_predict_layers": 3,
    "tie_word_embeddings": False,
    "eos_token_id": [1, 2, 128007],
}


def test_released_config_is_read() -> None:
    scaling = RopeScaling(factor=2.0, original_context=131_072, low_frequency_factor=1.0, high_frequency_factor=32.0)
    assert from_hub(RELEASED) == replace(STEP_35_FLASH, rope_scaling=scaling)
    assert from_hub(RELEASED, context=4096).context == 4096


def test_released_config_is_written() -> None:
    written = to_hub(from_hub(RELEASED))
    assert {key: written.get(key) for key in RELEASED} == RELEASED | {"eos_token_id": 1}


@given(
    st.builds(
        replace,
        st.just(SMALL),
        layers=st.integers(4, 9),
        full_every=st.sampled_from([1, 2, 3, 4]),
        dense_layers=st.integers(0, 4),
        mtp_heads=st.integers(0, 3),
        gate=st.booleans(),
        window=st.integers(1, 512),
        routed_scale=st.floats(0.5, 4),
        rotary_fraction=st.sampled_from([0.25, 0.5, 1.0]),
        rope_theta=st.sampled_from([1e4, 1e6, 5e6]),
        rope_scaling=st.none() | st.builds(RopeScaling, factor=st.floats(1, 8)),
        router_dtype=st.sampled_from(["float32", "bfloat16"]),
        norm_eps=st.sampled_from([1e-5, 1e-6]),
    ),
    st.data(),
)
def test_config_comes_back(config: ModelConfig, data: st.DataObject) -> None:
    clip = st.just(()) | st.tuples(*[st.sampled_from([0.0, 7.0, 16.0])] * config.layers).filter(any)
    config = replace(config, routed_clip=data.draw(clip), shared_clip=data.draw(clip))
    # Through JSON text, as a folder holds it.
    assert from_hub(json.loads(json.dumps(to_hub(config)))) == config


def test_presets_come_back() -> None:
    for name in ("ci", "tiny", "30m", "1b", "3b"):
        config = preset(name, vocab_size=300, eos=7)
        assert from_hub(to_hub(config)) == config


def test_everything_that_cannot_be_computed_is_listed() -> None:
    wrong = {
        "norm_expert_weight": False,
        "moe_router_activation": "softmax",
        "sink": True,
        "tie_word_embeddings": True,
        "zero_centered": False,
        "moe_every_n_layer": 2,
        "sliding_window": [512, 256],
        "hidden_act": "gelu",
        "quantization_config": {"quant_method": "fp8"},
    }
    with pytest.raises(ConfigError) as error:
        from_hub(RELEASED | wrong)
    assert {problem.split()[2] for problem in error.value.problems} == wrong.keys()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sliding_window": [512, 256]}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types"),
        ({"layer_types": PATTERN[:45] + ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": PATTERN[:40]}, "layer_types"),
        ({"layer_types": ["full_attention", *["linear_attention"] * 47]}, "layer_types"),
        ({"rope_theta": [float(i) for i in range(1, 49)]}, "rope_theta"),
        ({"partial_rotary_factors": [0.5] * 48}, "partial_rotary_factors"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"moe_layers_enum": "3,5,7"}, "moe_layers_enum"),
        ({"moe_layers_enum": None}, "moe_layers_enum"),
        ({"moe_layers_enum": "3, four"}, "moe_layers_enum"),
        ({"swiglu_limits_shared": [16.0] * 48}, "swiglu_limits_shared"),
        ({"attention_other_setting": {"num_attention_groups": 4}}, "attention_other_setting.num_attention_groups"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": [64, 96]}, "num_attention_heads"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    ],
)
def test_what_a_key_may_not_say(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json (has no )?{key.replace('.', '[.]')}[ ,]"):
        from_hub(RELEASED | values)


def test_names_and_shapes_are_the_released_ones() -> None:
    shapes = hub_config.shapes(STEP_35_FLASH)
    for name, shape in {
        "model.embed_tokens.weight": (128896, 4096),
        "lm_head.weight": (128896, 4096),
        "model.norm.weight": (4096,),
        "model.layers.0.self_attn.q_proj.weight": (8192, 4096),
        "model.layers.1.self_attn.q_proj.weight": (12288, 4096),
        "model.layers.1.self_attn.k_proj.weight": (1024, 4096),
        "model.layers.4.self_attn.g_proj.weight": (64, 4096),
        "model.layers.47.self_attn.g_proj.weight": (96, 4096),
        "model.layers.5.self_attn.o_proj.weight": (4096, 12288),
        "model.layers.5.self_attn.k_norm.weight": (128,),
        "model.layers.2.mlp.down_proj.weight": (4096, 11264),
        "model.layers.46.mlp.up_proj.weight": (11264, 4096),
        "model.layers.3.moe.gate.weight": (288, 4096),
        "model.layers.44.moe.router_bias": (288,),
        "model.layers.44.moe.gate_proj.weight": (288, 1280, 4096),
        "model.layers.44.moe.down_proj.weight": (288, 4096, 1280),
        "model.layers.44.share_expert.up_proj.weight": (1280, 4096),
        "model.layers.45.enorm.weight": (4096,),
        "model.layers.45.eh_proj.weight": (4096, 8192),
        "model.layers.47.transformer.shared_head.norm.weight": (4096,),
        "model.layers.47.transformer.shared_head.output.weight": (128896, 4096),
    }.items():
        assert shapes.pop(name) == shape
    assert not [n for n in shapes if n.startswith(("model.layers.2.moe.", "model.layers.45.moe.", "model.layers.48."))]


@pytest.mark.parametrize("config", [WITH_HEADS, replace(SMALL, gate=False), preset("ci", vocab_size=64, eos=0)])
def test_tensors_of_the_model_are_those_of_the_table(config: ModelConfig) -> None:
    named = hub.named_tensors(Decoder(config))
    assert {name: tuple(t.shape) for name, t in named.items()} == hub_config.shapes(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = perturbed(WITH_HEADS).to(dtype)
    folder = hub.export(model, tmp_path / "hub", max_shard_bytes=50_000)
    back = hub.load(folder, dtype=dtype)
    assert not back.training
    assert back.config == WITH_HEADS
    assert _bits(back) == _bits(model)
    hub.export(back, tmp_path / "again", max_shard_bytes=50_000)
    files = sorted(p.name for p in folder.iterdir())
    assert len(files) > 6
    assert [p for p in files if (folder / p).read_bytes() != (tmp_path / "again" / p).read_bytes()] == []


def test_bfloat16_keeps_router_biases_exact(tmp_path: Path) -> None:
    model = perturbed(WITH_HEADS)
    hub.export(model, tmp_path / "hub", dtype=torch.bfloat16)
    tensors = load_file(next((tmp_path / "hub").glob("*.safetensors")))
    for name, tensor in hub.named_tensors(model).items():
        kept = name.endswith("router_bias")
        assert tensors[name].dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(tensors[name], tensor if kept else tensor.bfloat16())
    # Read as float32 the numbers are bfloat16's.
    back = hub.load(tmp_path / "hub")
    assert back.lm_head.weight.dtype == torch.float32
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert json.loads((tmp_path / "hub/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_are_bounded_and_the_index_is_right(tmp_path: Path) -> None:
    model, limit = perturbed(WITH_HEADS), 60_000
    folder = hub.export(model, tmp_path / "hub", max_shard_bytes=limit)
    index = json.loads((folder / hub.INDEX).read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert {index["weight_map"].pop(name) for name in tensors} == {shard.name}
        total += size
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}


def test_transformers_reads_what_is_exported(tmp_path: Path) -> None:
    model = perturbed(WITH_HEADS)
    theirs = oracle(hub.export(model, tmp_path / "hub", max_shard_bytes=60_000))
    with torch.no_grad():
        assert greatest(model(tokens(2, 30)), their_logits(theirs, tokens(2, 30))) < 1e-5


@pytest.mark.parametrize("clips", [{}, {"routed_clip": (0, 0, 0, 0, 0.5, 0.3), "shared_clip": (0.4, 0, 0, 0, 0, 0.6)}])
def test_what_transformers_saves_is_read(clips: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL, rope_theta=5e6, rope_scaling=RopeScaling(original_context=16), **clips)
    model = perturbed(config)
    theirs = oracle(hub.export(model, tmp_path / "hub"))
    theirs.save_pretrained(tmp_path / "saved")
    back = moe.load(tmp_path / "saved")
    assert back.config == config
    assert _bits(back) == _bits(model)


def test_heads_that_transformers_dropped_are_missed_with_advice(tmp_path: Path) -> None:
    oracle(hub.export(perturbed(WITH_HEADS), tmp_path / "hub")).save_pretrained(tmp_path / "saved")
    with pytest.raises(StageError, match="set num_nextn_predict_layers to 0"):
        hub.load(tmp_path / "saved")
    values = json.loads((tmp_path / "saved/config.json").read_text())
    values["text_config"]["num_nextn_predict_layers"] = 0
    (tmp_path / "saved/config.json").write_text(json.dumps(values))
    assert hub.load(tmp_path / "saved").config == replace(WITH_HEADS, mtp_heads=0)


def _missing(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _unexpected(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({"model.layers.3.moe.gate_proj.weight_scale_inv": torch.ones(2)}))


def _misshapen(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 2)}))


def _truncated(folder: Path) -> None:
    path = folder / hub.SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def _no_header(folder: Path) -> None:
    (folder / hub.SINGLE).write_bytes(b"<html>not here</html>")


def _absent(folder: Path) -> None:
    (folder / hub.SINGLE).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, r"model\.norm\.weight: got nothing, expected \(48,\)"),
        (_unexpected, r"weight_scale_inv: got \(2,\), expected no such tensor"),
        (_misshapen, r"lm_head\.weight: got \(3, 2\), expected \(97, 48\)"),
        (_truncated, "model.safetensors is truncated or damaged"),
        (_no_header, "model.safetensors is truncated or damaged"),
        (_absent, "no weights here"),
    ],
)
def test_damaged_weights_are_told(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = _single(hub.export(perturbed(SMALL), tmp_path / "hub"))
    assert _bits(hub.load(folder)) == _bits(perturbed(SMALL))
    damage(folder)
    with pytest.raises(StageError, match=message):
        hub.load(folder)


def test_all_that_differs_is_told_at_once(tmp_path: Path) -> None:
    folder = _single(hub.export(perturbed(SMALL), tmp_path / "hub"))
    for damage in (_missing, _unexpected, _misshapen):
        damage(folder)
    with pytest.raises(StageError, match=r"(?s)lm_head.*weight_scale_inv") as error:
        hub.load(folder)
    assert "model.norm.weight" in str(error.value)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = hub.export(perturbed(SMALL), tmp_path / "hub", max_shard_bytes=60_000)
    index = json.loads((folder / hub.INDEX).read_text())
    # Its shard holds other tensors too, so the file is still read.
    first = index["weight_map"].pop("model.norm.weight")
    assert first in index["weight_map"].values()
    (folder / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(StageError, match=r"index\.json and the files differ, got model\.norm\.weight"):
        hub.load(folder)
    (folder / first).unlink()
    with pytest.raises(StageError, match=f"{first} is missing"):
        hub.load(folder)
    for file in ("../model.safetensors", "/model.safetensors", "a/b", "..", 3):
        (folder / hub.INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"lm_head.weight": file}}))
        with pytest.raises(StageError, match="names without a folder"):
            hub.load(folder)
    (folder / hub.INDEX).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        hub.load(folder)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    hub.export(perturbed(SMALL), folder)  # an empty folder is no obstacle
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="in the way"):
        hub.export(perturbed(SMALL, seed=5), folder)
    assert (folder / "mine.txt").read_text() == "precious"
    assert _bits(hub.load(folder)) == _bits(perturbed(SMALL))
    hub.export(perturbed(SMALL, seed=5), folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert _bits(hub.load(folder)) == _bits(perturbed(SMALL, seed=5))
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_leftovers_of_a_killed_export_are_replaced(tmp_path: Path) -> None:
    half = tmp_path / ("hub" + TEMPORARY)
    half.mkdir()
    (half / "model-00001-of-00009.safetensors").write_bytes(b"half")
    folder = hub.export(perturbed(SMALL), tmp_path / "hub")
    assert _bits(hub.load(folder)) == _bits(perturbed(SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]
    old = tmp_path / ("hub" + hub.REPLACED)
    old.mkdir()
    (old / "config.json").write_text("{}")
    hub.export(perturbed(SMALL, seed=5), folder, overwrite=True)
    assert _bits(hub.load(folder)) == _bits(perturbed(SMALL, seed=5))
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<eos>"])
    made.save(str(tmp_path / "tokenizer.json"))
    folder = hub.export(perturbed(SMALL), tmp_path / "hub", tokenizer=tmp_path / "tokenizer.json")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    read = PreTrainedTokenizerFast.from_pretrained(folder)
    assert (read.eos_token_id, read.model_max_length) == (0, SMALL.context)
    assert read("a b a")["input_ids"] == [1, 2, 1]
    assert json.loads((folder / hub.GENERATION).read_text())["eos_token_id"] == 0
    with pytest.raises(ConfigError, match="no special token of id 9"):
        hub.export(perturbed(replace(SMALL, eos=9)), tmp_path / "other", tokenizer=tmp_path / "tokenizer.json")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob("other*")), "told before a shard is written"


def test_stop_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    assert hub.stop_tokens(tmp_path) == ()
    (tmp_path / hub.CONFIG).write_text(json.dumps(RELEASED))
    assert hub.stop_tokens(tmp_path) == (1, 2, 128007)
    (tmp_path / hub.GENERATION).write_text(json.dumps({"eos_token_id": 128007}))
    assert hub.stop_tokens(tmp_path) == (128007, 1, 2)
    (tmp_path / hub.GENERATION).write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(ConfigError, match="eos_token_id that is none"):
        hub.stop_tokens(tmp_path)


def test_a_run_is_exported_with_its_tokenizer(train_config: TrainConfig, source: TokenSource, tmp_path: Path) -> None:
    """The newest checkpoint of a run folder; then both folders hold the same model."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    made.add_special_tokens(["<eos>"])
    made.save(str(tmp_path / "tokenizer.json"))
    config = replace(train_config, steps=2, tokenizer=str(tmp_path / "tokenizer.json"))
    train(config, source, tmp_path / "run")
    folder = hub.export(tmp_path / "run", tmp_path / "hub")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    trained, exported = moe.load(tmp_path / "run"), moe.load(folder)
    assert _bits(exported) == _bits(trained)
    assert _bits(exported) != _bits(Decoder(exported.config))
    with torch.no_grad():
        assert torch.equal(exported(tokens(1, 9, vocab_size=64)), trained(tokens(1, 9, vocab_size=64)))


def test_only_hub_folders_are_taken_for_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"dim": 8}}))
    assert not hub.is_hub_folder(tmp_path)
    with pytest.raises(ConfigError, match="no model here"):
        hub.load(tmp_path / "nowhere")
    assert hub.is_hub_folder(hub.export(perturbed(SMALL), tmp_path / "hub"))


def _bits(model: Decoder) -> dict[str, bytes]:
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()}


def _single(folder: Path) -> Path:
    """Puts the weights into one file without an index."""
    tensors = {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items()}
    for path in (*folder.glob("*.safetensors"), folder / hub.INDEX):
        path.unlink()
    save_file(tensors, folder / hub.SINGLE)
    return folder


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / hub.SINGLE)
    change(tensors)
    save_file(tensors, folder / hub.SINGLE)
