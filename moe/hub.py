"""Folders as the hub has them: `config.json` with `step3p5` keys, safetensors with the released checkpoint's tensor names.

    FOLDER/config.json                        moe/hub_config.py
    FOLDER/model-00001-of-00002.safetensors   and so on; one file `model.safetensors` is read too
    FOLDER/model.safetensors.index.json       {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
    FOLDER/tokenizer.json                     with tokenizer_config.json, where the run has a tokenizer
    FOLDER/generation_config.json             ids of special tokens

In: a decoder, or a folder of training. Out: such a folder, and the decoder back from it, with equal bits where the types
are equal. MTP head h lies at `model.layers.{layers + h}`, its norm and output at `transformer.shared_head` below that.
A folder is written beside its place and renamed, one shard in memory at a time; it is read one tensor at a time.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import ConfigError, StageError
from moe.config import ModelConfig
from moe.files import TEMPORARY, sync, sync_folder, write_json
from moe.hub_config import ROUTER_BIAS, from_hub, shapes, to_hub

if TYPE_CHECKING:
    from moe.model import Decoder

CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers wrote shards of this size for years; hubs take files of up to 50 GB
REPLACED = ".replaced"
# Of Step 3.7, whose text trunk is this decoder; by the hub's names and by transformers' own.
OTHER_TOWERS = ("vision_model.", "vit_large_projector.", "model.vision_model.", "model.multi_modal_projector.")
MTP_NAMES = {"shared_head_norm.": "transformer.shared_head.norm.", "output.": "transformer.shared_head.output."}
LISTED_PROBLEMS = 20


def hub_name(name: str, layers: int) -> str:
    """The hub's name of a parameter or buffer of a decoder with that many layers."""
    if not name.startswith("mtp."):
        return name
    _, head, rest = name.split(".", 2)
    for ours, theirs in MTP_NAMES.items():
        if rest.startswith(ours):
            rest = theirs + rest.removeprefix(ours)
    return f"model.layers.{layers + int(head)}.{rest}"


def named_tensors(model: "Decoder") -> dict[str, Tensor]:
    """The decoder's parameters and router biases by their hub names, in order, as views of its memory."""
    from moe.experts import halves

    parts = {n: view for name, tensor in model.state_dict().items() for n, view in halves(name, tensor).items()}
    return {hub_name(name, model.config.layers): tensor for name, tensor in parts.items()}


def export(
    source: "Decoder | str | Path",
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a hub folder of a decoder, or of the newest checkpoint of a folder (then with that run's tokenizer).

    `dtype` None keeps each tensor's own. A folder with something in it is a `ConfigError` unless `overwrite`. A kill
    leaves what was there, or the new folder; between the two renames of an overwrite the old one is FOLDER.replaced.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(
            f"hub: {folder} is in the way, got a file or a folder with files, expected a new or empty folder; "
            "choose another or pass overwrite"
        )
    model, tokenizer = (source, tokenizer) if not isinstance(source, str | Path) else _of_run(Path(source), tokenizer)
    special = None if tokenizer is None else _tokenizer_config(Path(tokenizer), model)
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_shards(temporary, named_tensors(model), dtype, max_shard_bytes)
    write_json(temporary / CONFIG, to_hub(model.config) | {"torch_dtype": _dtype_name(model, dtype)})
    ids: dict[str, Any] = {f"{kind}_token_id": model.config.eos for kind in ("bos", "eos", "pad")}
    if model.prefix:
        ids["bos_token_id"] = model.prefix[0]
    if others := [token for token in model.stop_tokens if token != model.config.eos]:
        ids["eos_token_id"] = [model.config.eos, *others]
    write_json(temporary / GENERATION, ids)
    if tokenizer is not None and special is not None:
        shutil.copyfile(tokenizer, temporary / TOKENIZER)
        write_json(temporary / TOKENIZER_CONFIG, special)
    _commit(temporary, folder)
    return folder


def load(folder: str | Path, *, context: int | None = None, dtype: torch.dtype = torch.float32) -> "Decoder":
    """The decoder of a hub folder, in evaluation mode, its parameters of type `dtype`.

    `context` replaces the file's. A tensor that is missing, misshapen or of no use here is a `StageError` that lists
    them all; it comes before the weights are allocated.
    """
    from moe.model import Decoder

    folder = Path(folder)
    config = read_config(folder, context)
    stored = _Stored(folder)
    stored.check(shapes(config))
    model = Decoder(config).to(dtype)
    for name, tensor in named_tensors(model).items():
        tensor.copy_(stored.read(name))
    model.prefix, model.stop_tokens = prefix(folder, config), stop_tokens(folder)
    return model.eval()


def prefix(folder: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """Ids that begin every prompt: those that the folder's tokenizer puts before a text, none if it says so.

    `add_bos_token` of tokenizer_config.json goes before what tokenizer.json does. Where neither says anything it is EOS
    if that is the BOS too, as in training here, and nothing otherwise; without these files EOS.
    """
    from tokenizers import Tokenizer

    path, told = Path(folder) / TOKENIZER, Path(folder) / TOKENIZER_CONFIG
    if not path.is_file():
        return (config.eos,)
    tokenizer, values = Tokenizer.from_file(str(path)), _read_json(told) if told.is_file() else {}
    bos, adds = values.get("bos_token"), values.get("add_bos_token")
    begin = None if bos is None else tokenizer.token_to_id(str(bos["content"] if isinstance(bos, dict) else bos))
    found: tuple[int, ...] = ()
    if adds:
        if begin is None:
            raise ConfigError(
                f"hub: {told} adds a bos_token that {TOKENIZER} does not have, got {bos!r}; mend either file"
            )
        found = _leading(tokenizer) or (begin,)
    elif adds is None:
        found = _leading(tokenizer) or ((config.eos,) if not values or begin == config.eos else ())
    if any(i >= config.vocab_size for i in found):
        raise ConfigError(
            f"hub: {path} begins texts with {found}, expected ids below {config.vocab_size}; mend the file"
        )
    return found


def _leading(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text."""
    encoded = tokenizer.encode("a")
    own = next((i for i, special in enumerate(encoded.special_tokens_mask) if not special), 0)
    return tuple(encoded.ids[:own])


def stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, then of config.json, each once.

    The first of config.json is the model's own `eos`. A folder without the hub's config has none of its own: empty.
    """
    folder = Path(folder)
    if not is_hub_folder(folder):
        return ()
    values = _read_json(folder / CONFIG)
    text = values.get("text_config") or {}
    generation = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    found: list[int] = []
    for listed in (part.get("eos_token_id") for part in (generation, values, text)):
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise ConfigError(f"hub: {folder} has an eos_token_id that is none, got {ids}, expected ids; mend the file")
        found += ids
    return tuple(dict.fromkeys(found))


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder's `config.json` is the hub's; a checkpoint's has no `model_type`."""
    path = folder / CONFIG
    return path.is_file() and "model_type" in _read_json(path)


def read_config(folder: Path, context: int | None = None) -> ModelConfig:
    """The config of a hub folder."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"hub: no model here, got {folder} without {CONFIG}, expected a folder of the hub")
    return from_hub(_read_json(folder / CONFIG), context)


class _Stored:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise StageError(f"hub: {index} is damaged, got no weight_map; restore it from where it came")
            if outside := [
                f for f in listed.values() if not isinstance(f, str) or f in ("", "..") or Path(f).name != f
            ]:
                raise StageError(
                    f"hub: {index} is damaged, got {outside[0]!r} as a file, expected names without a folder; "
                    "fetch it from a place that you trust"
                )
            files = sorted(set(listed.values()))
        elif (folder / SINGLE).is_file():
            listed, files = None, [SINGLE]
        else:
            raise StageError(f"hub: no weights here, got {folder} without {INDEX} and {SINGLE}; fetch them too")
        self.files = {file: self._open(file) for file in files}
        self.where = {name: file for file, handle in self.files.items() for name in handle.keys()}  # noqa: SIM118
        if listed is not None and (wrong := sorted(dict(listed).items() ^ self.where.items())):
            raise StageError(
                f"hub: {INDEX} and the files differ, got {wrong[0][0]} said or found in {wrong[0][1]} and "
                f"{len(wrong) - 1} more, expected each tensor where the index says; fetch the folder again"
            )

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise StageError(f"hub: {file} is missing, got {self.folder} without it; fetch it too")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise StageError(
                f"hub: {file} is truncated or damaged, got {error} in {path.stat().st_size} bytes; fetch it again"
            ) from error

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises with every name and shape that differs."""
        got = {n: tuple(self._slice(n).get_shape()) for n in self.where if not n.startswith(OTHER_TOWERS)}
        problems = [
            f"{name}: got {got.get(name, 'nothing')}, expected {wanted.get(name, 'no such tensor')}"
            for name in [*wanted, *sorted(got.keys() - wanted.keys())]
            if got.get(name) != wanted.get(name)
        ]
        if not problems:
            return
        heads = {name for name in wanted if "enorm" in name}
        advice = "use the config that belongs to it"
        if heads and not heads & got.keys():
            advice += "; transformers drops MTP heads, for such a folder set num_nextn_predict_layers to 0"
        more = [f"and {len(problems) - LISTED_PROBLEMS} more"] if len(problems) > LISTED_PROBLEMS else []
        raise StageError(
            f"hub: {self.folder.name} holds another model than its {CONFIG}; {advice}\n"
            + "\n".join([*problems[:LISTED_PROBLEMS], *more])
        )

    def _slice(self, name: str) -> Any:
        return self.files[self.where[name]].get_slice(name)

    def read(self, name: str) -> Tensor:
        return self.files[self.where[name]].get_tensor(name)


def _of_run(folder: Path, tokenizer: str | Path | None) -> "tuple[Decoder, str | Path | None]":
    """The decoder of a checkpoint, and the tokenizer of its run."""
    from moe import checkpoint

    path = checkpoint.find(folder)
    beside = next((p / TOKENIZER for p in (folder, path.parent.parent) if (p / TOKENIZER).is_file()), None)
    return checkpoint.load(folder), tokenizer or beside


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int) -> None:
    """The tensors in order, in files of at most `max_bytes` (or one tensor), and the index."""
    plan = list(_plan(tensors, dtype, max_bytes))
    where: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        part = {name: tensors[name].detach().to("cpu", _stored_type(name, tensors[name], dtype)) for name in names}
        save_file({name: t.contiguous() for name, t in part.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = sum(_bytes(name, tensor, dtype) for name, tensor in tensors.items())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _plan(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        more = _bytes(name, tensor, dtype)
        if names and size + more > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _stored_type(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None or name.endswith(ROUTER_BIAS) else dtype


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_type(name, tensor, dtype).itemsize


def _dtype_name(model: "Decoder", dtype: torch.dtype | None) -> str:
    return str(dtype or model.lm_head.weight.dtype).removeprefix("torch.")


def _tokenizer_config(tokenizer: Path, model: "Decoder") -> dict[str, Any]:
    """What says to others how long inputs are, and which tokens begin and end them; a `ConfigError` where one is unknown."""
    known = {t["id"]: t["content"] for t in _read_json(tokenizer).get("added_tokens", [])}
    eos, bos = model.config.eos, (*model.prefix, model.config.eos)[0]
    if missing := {eos, bos} - known.keys():
        raise ConfigError(
            f"hub: {tokenizer} does not fit the model, got no special token of id {min(missing)}, expected the eos of "
            "training; pass the tokenizer that made its tokens"
        )
    special = {
        "bos_token": known[bos],
        "add_bos_token": bool(model.prefix),
        "eos_token": known[eos],
        "pad_token": known[eos],
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context} | special


def _commit(temporary: Path, folder: Path) -> None:
    sync_folder(temporary)
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.is_dir() and any(folder.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)  # of a killed overwrite; a folder in its place is whole
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"hub: {path} cannot be read, got {error}, expected JSON; fetch it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"hub: {path} is no object, got {type(values).__name__}; fetch it again")
    return values
