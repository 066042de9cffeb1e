"""The forward pass of a small BERT encoder in numpy: what distilling a vocabulary needs, without torch or onnxruntime.

In: a folder with `config.json`, `model.safetensors` and `tokenizer.json` as the `transformers` library writes them for
`BertModel` (Devlin et al. 2019, arXiv 1810.04805: post-norm, absolute positions, GELU by erf). Out: float32 hidden states.

Sequences of one batch have equal length, so there is no padding and no mask. Run with one BLAS thread: the sums are then in the
same order wherever the batch is computed. MiniLM-L6 (22.7 M parameters) reads some 300 sequences of three tokens a second
and core.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from core.errors import ConfigError

FILES = ("config.json", "model.safetensors", "tokenizer.json")
PREFIXES = ("", "bert.")  # BertModel saved alone, or inside a model with a head


@dataclass(frozen=True)
class Bert:
    """Weights by name, without prefix; T tokens, D hidden, H heads below."""

    weights: dict[str, np.ndarray]
    layers: int
    heads: int
    epsilon: float

    @property
    def vocab_size(self) -> int:
        return len(self.weights["embeddings.word_embeddings.weight"])

    @property
    def hidden(self) -> int:
        return self.weights["embeddings.word_embeddings.weight"].shape[1]

    def encode(self, ids_BT: np.ndarray, layers: int | None = None) -> np.ndarray:
        """Hidden states after `layers` layers (None: all), float32 [B, T, D], of token ids int64 [B, T]."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids_BT]
        x = x + w["embeddings.position_embeddings.weight"][: ids_BT.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(self.layers if layers is None else min(layers, self.layers)):
            x = self._layer(x, f"encoder.layer.{i}")
        return x

    def _layer(self, x_BTD: np.ndarray, name: str) -> np.ndarray:
        from scipy.special import erf

        attended = self._linear(self._attend(x_BTD, f"{name}.attention.self"), f"{name}.attention.output.dense")
        x = self._norm(x_BTD + attended, f"{name}.attention.output.LayerNorm")
        inner = self._linear(x, f"{name}.intermediate.dense")
        inner *= np.float32(0.5) * (1 + erf(inner * np.float32(0.5**0.5)))
        return self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _attend(self, x_BTD: np.ndarray, name: str) -> np.ndarray:
        b, t, d = x_BTD.shape

        def split(part: str) -> np.ndarray:  # [B, H, T, D / H]
            return self._linear(x_BTD, f"{name}.{part}").reshape(b, t, self.heads, d // self.heads).swapaxes(1, 2)

        scores = split("query") @ split("key").swapaxes(2, 3) / np.float32((d // self.heads) ** 0.5)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ split("value")
        return mixed.swapaxes(1, 2).reshape(b, t, d)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.epsilon))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


@lru_cache(maxsize=1)
def load_bert(folder: str) -> Bert:
    """The model in `folder`. ConfigError if it is no BertModel, or holds a number that is not finite."""
    from safetensors.numpy import load_file

    try:
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        stored = load_file(Path(folder, "model.safetensors"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"embedder: cannot read {folder}: {e}; expected {', '.join(FILES)} of a BertModel") from e
    prefix = next((p for p in PREFIXES if f"{p}embeddings.word_embeddings.weight" in stored), None)
    if prefix is None or config.get("model_type") != "bert":
        raise ConfigError(
            f"embedder: {folder} holds a model of type {config.get('model_type')!r}, expected 'bert'; name another folder"
        )
    weights = {n.removeprefix(prefix): w.astype(np.float32) for n, w in _floats(stored) if n.startswith(prefix)}
    if bad := [name for name, w in weights.items() if not np.isfinite(w).all()]:
        raise ConfigError(f"embedder: {bad[0]} in {folder} holds NaN or infinity; get the file anew")
    return Bert(weights, config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"])


def _floats(stored: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that are weights; `position_ids` of older files is an integer range."""
    return ((name, w) for name, w in stored.items() if w.dtype.kind == "f")
