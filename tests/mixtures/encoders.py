"""A tiny BERT encoder on disk, with random weights and a vocabulary of a dozen words."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[unused0]", "a", "b", "##c", "the", "river", "stone", "bridge", "cat", "##s",
    "water", "under", "seven", "captain", "##ed",
)  # fmt: skip
HIDDEN, INNER, HEADS, LAYERS = 16, 24, 2, 2


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by the names that BertModel gives them."""
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    out = {
        "embeddings.word_embeddings.weight": some(len(VOCABULARY), HIDDEN),
        "embeddings.position_embeddings.weight": some(8, HIDDEN),
        "embeddings.token_type_embeddings.weight": some(2, HIDDEN),
        "embeddings.LayerNorm.weight": some(HIDDEN),
        "embeddings.LayerNorm.bias": some(HIDDEN),
    }
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", INNER, HIDDEN),
            ("output.dense", HIDDEN, INNER),
        ):
            out[f"encoder.layer.{i}.{name}.weight"] = some(rows, columns)
            out[f"encoder.layer.{i}.{name}.bias"] = some(rows)
        for name in ("attention.output", "output"):
            out[f"encoder.layer.{i}.{name}.LayerNorm.weight"] = some(HIDDEN)
            out[f"encoder.layer.{i}.{name}.LayerNorm.bias"] = some(HIDDEN)
    return out


def tokenizer(padded: bool = True) -> Tokenizer:
    """WordPiece over VOCABULARY; `padded` as sentence encoders are saved, with all inputs filled up to one length."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    if padded:
        made.enable_padding(length=8)
        made.enable_truncation(8)
    return made


def write_encoder(folder: Path, tensors: dict[str, np.ndarray] | None = None, prefix: str = "") -> Path:
    """A folder as `transformers` leaves it."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "bert",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    tensors = weights() if tensors is None else tensors
    save_file({prefix + name: w for name, w in tensors.items()}, folder / "model.safetensors")
    return folder
