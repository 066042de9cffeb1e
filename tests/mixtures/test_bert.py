"""The encoder in numpy beside torch's own layer, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from mixtures.bert import load_bert
from tests.mixtures.encoders import HEADS, HIDDEN, INNER, LAYERS, weights, write_encoder


def torch_layer(tensors, number):
    """The same layer by torch: post-norm, GELU by erf."""
    layer = torch.nn.TransformerEncoderLayer(
        HIDDEN, HEADS, INNER, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )
    name = f"encoder.layer.{number}."

    def of(part, kind):
        return torch.from_numpy(tensors[f"{name}{part}.{kind}"])

    state = layer.state_dict()
    for kind in ("weight", "bias"):
        parts = [of(f"attention.self.{p}", kind) for p in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        for theirs, ours in (
            ("self_attn.out_proj", "attention.output.dense"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("norm2", "output.LayerNorm"),
        ):
            state[f"{theirs}.{kind}"] = of(ours, kind)
    layer.load_state_dict(state)
    return layer.eval()


@pytest.mark.parametrize("layers", [0, 1, None])
def test_hidden_states_are_those_of_torch(tmp_path, layers):
    bert = load_bert(str(write_encoder(tmp_path / "model")))
    tensors = weights()
    ids = np.array([[2, 9, 3], [2, 12, 3], [2, 7, 3], [5, 5, 5]])
    x = torch.from_numpy(tensors["embeddings.word_embeddings.weight"][ids])
    x = x + torch.from_numpy(tensors["embeddings.position_embeddings.weight"][:3])
    x = x + torch.from_numpy(tensors["embeddings.token_type_embeddings.weight"][0])
    norm = (torch.from_numpy(tensors[f"embeddings.LayerNorm.{k}"]) for k in ("weight", "bias"))
    x = torch.nn.functional.layer_norm(x, (HIDDEN,), *norm, eps=1e-12)
    with torch.no_grad():
        for i in range(LAYERS if layers is None else layers):
            x = torch_layer(tensors, i)(x)
    np.testing.assert_allclose(bert.encode(ids, layers), x.numpy(), rtol=2e-4, atol=2e-4)


def test_a_model_saved_inside_another_is_found(tmp_path):
    ids = np.array([[2, 9, 3]])
    alone = load_bert(str(write_encoder(tmp_path / "alone"))).encode(ids)
    inside = load_bert(str(write_encoder(tmp_path / "inside", prefix="bert."))).encode(ids)
    np.testing.assert_array_equal(alone, inside)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    broken = weights()
    broken["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
    with pytest.raises(ConfigError, match=r"encoder\.layer\.1\.output\.dense\.weight .* NaN"):
        load_bert(str(write_encoder(tmp_path / "model", broken)))


def test_other_models_and_broken_files_are_refused(tmp_path):
    other = write_encoder(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="type 't5', expected 'bert'"):
        load_bert(str(other))
    torn = write_encoder(tmp_path / "torn")
    (torn / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        load_bert(str(torn))
