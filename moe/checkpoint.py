"""Checkpoints on a local disk: written whole or not at all, checked before use.

    RUN/tokenizer.json                      copy of the tokenizer that made the tokens, when the run was given one
    RUN/special.json                        ids that begin a prompt and end an answer, where they are not EOS alone
    RUN/latest                              name of the newest complete checkpoint
    RUN/checkpoints/step-00000100/          model.safetensors, optimizer.safetensors, config.json, state.json

In: weights and optimiser state by parameter name, `TrainConfig` and the step. Out: the same, bit for bit. All tensors are whole,
so no file depends on the number of ranks, and no file names a path of the machine: `tokenizer` of config.json is the file's hash
there. A checkpoint is written under a temporary
name, synced, renamed, and only then named by `latest`, so a kill at any moment leaves the one before it in force.
`state.json` holds the step, the fingerprints of mixture and tokenizer, and the hash of each file; a file that differs
is a `StageError` and nothing is changed. There is no generator state: training draws no random number after
initialisation, and batches are a function of the step.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import ConfigError, StageError
from core.hashing import file_digest
from moe.config import TrainConfig, from_json, to_json
from moe.files import TEMPORARY, replace_text, sync, sync_folder, write_json
from moe.model import Decoder

WEIGHTS, OPTIMIZER, CONFIG, STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
TOKENIZER, SPECIAL, LATEST, CHECKPOINTS = "tokenizer.json", "special.json", "latest", "checkpoints"
GIB = 2**30
OURS = re.compile(r"step-\d{8}(\.writing)?")


@dataclass(frozen=True)
class State:
    """What `state.json` says. `mixture` is `PackedRows.fingerprint`, `tokenizer` the hash of tokenizer.json or None."""

    step: int
    mixture: str
    tokenizer: str | None
    files: Mapping[str, str]


def save(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    config: TrainConfig,
    mixture: str,
    tokenizer: str | None,
) -> Path:
    """Commits a checkpoint of `step` and removes all but the newest `config.keep`. Returns its folder.

    `weights` are the model's parameters and buffers, `moments` the optimiser's state, both whole and by name. Weights that are
    not finite, or a disk that takes no more, are a `StageError`, and the checkpoint before this one stays in force.
    """
    name = _name(step)
    if broken := not_finite(weights):
        raise StageError(
            f"checkpoint: weights after update {step} are not finite, got {broken}, expected numbers; {_stands(folder)}, lower "
            "optim.lr and use a new folder"
        )
    temporary = folder / CHECKPOINTS / (name + TEMPORARY)
    # The tokenizer's path is this machine's; its content is what the run was given.
    stored = to_json(replace(config, tokenizer=tokenizer))
    try:
        _write(temporary, {WEIGHTS: weights, OPTIMIZER: moments}, stored, State(step, mixture, tokenizer, {}))
        final = _commit(folder, temporary, name)
        remove_old(folder, name, config.keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(
            f"checkpoint: {name} cannot be written, got {error}, expected to write into {folder}; {_stands(folder)}, free "
            f"{shutil.disk_usage(folder).free / GIB:.1f} GiB; make room and run the same command"
        ) from error
    return final


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """Which weights hold a number that is not finite, in words; empty where none does."""
    names = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    return f"{names[0]} and {len(names) - 1} more" if names else ""


def _write(
    temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], state: State
) -> None:
    """The files of a checkpoint, synced, `state` with their hashes."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in tensors.items():
        save_file(_plain(content), temporary / name)
    write_json(temporary / CONFIG, config)
    files = {n: file_digest(temporary / n) for n in (*tensors, CONFIG)}
    write_json(temporary / STATE, vars(replace(state, files=files)))
    sync_folder(temporary)


def _commit(folder: Path, temporary: Path, name: str) -> Path:
    """Gives a written checkpoint its name, and then names it in `latest`."""
    final = folder / CHECKPOINTS / name
    # Present only after a kill between this rename and the pointer, or when a step is written again after a fall-back.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(folder / CHECKPOINTS)
    replace_text(folder / LATEST, name + "\n")
    return final


def find(folder: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself if it is a checkpoint."""
    if (folder / LATEST).is_file():
        name, below = (folder / LATEST).read_text(errors="replace").strip(), folder / CHECKPOINTS
        if name == ".." or (below / name).parent != below or not (below / name).is_dir():
            raise StageError(
                f"checkpoint: {folder / LATEST} names no checkpoint, got {name!r}, expected a folder of {below}; "
                f"{_fall_back(below / LATEST)}"
            )
        return below / name
    if (folder / STATE).is_file():
        return folder
    raise ConfigError(f"moe: no checkpoint here, got {folder}, expected a folder that training wrote; train first")


def weights_digest(folder: Path) -> str:
    """Hash of the newest checkpoint's weights: what `TrainConfig.init` names."""
    return file_digest(find(folder) / WEIGHTS)


def begun_from(folder: Path, start: Path) -> str:
    """What `TrainConfig.init` is for a run that begins from `start`: as its own checkpoint says, if `folder` has one.

    A run that goes on needs nothing of `start`, which may have changed since, or be gone.
    """
    if (folder / LATEST).is_file():
        own = find(folder) / CONFIG
        try:
            init = json.loads(own.read_text())["init"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"checkpoint: {own} cannot be read, got {error}, expected the file that training wrote; "
                f"{_fall_back(own.parent)}"
            ) from error
        if init is not None:
            return str(init)
    return weights_digest(start)


def lock(folder: Path) -> int | None:
    """Takes a run folder, made if need be, for this process: a file descriptor that holds it until it is closed, or dies with us.

    The lock is on the folder itself, so that no file of it is part of the run. None where the file system has no such locks
    (some network ones). A folder that another process holds is a `StageError` with its id, where Linux tells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(os.fstat(fd))
        os.close(fd)
        raise StageError(
            f"train: another process trains in {folder}, got a lock of {holder}, expected none; wait for it, stop it, or "
            "use a new folder"
        ) from error
    except OSError:
        os.close(fd)
        return None
    return fd


def _holder(found: os.stat_result) -> str:
    """The process that has locked a file, from the kernel's table `id: FLOCK ADVISORY WRITE pid major:minor:inode first last`."""
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    table = Path("/proc/locks")
    for line in table.read_text().splitlines() if table.is_file() else ():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
            return f"process {words[4]}"
    return "a process that cannot be told from here"


def check_empty(folder: Path) -> None:
    """Raises where checkpoints lie without a `latest`; a kill in the first `save` may leave that for step 0 alone."""
    names = sorted(p.name for p in (folder / CHECKPOINTS).glob("step-*"))
    if names and not names[-1].startswith(_name(0)):
        raise StageError(
            f"checkpoint: {folder / LATEST} is missing, got {names[-1]} beside it, expected a file that names it; "
            "write its name into that file, or use a new folder"
        )


def load(folder: Path) -> Decoder:
    """The model of `find(folder)`, in evaluation mode."""
    path = find(folder)
    config, _ = read(path)
    model = Decoder(config.model)
    put_weights(path.name, model, load_file(path / WEIGHTS))
    special = _run_of(path) / SPECIAL
    if special.is_file():
        try:
            values = json.loads(special.read_text())
            model.prefix, model.stop_tokens = tuple(values["prefix"]), tuple(values["stop_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"checkpoint: {special} cannot be read, got {error!r}, expected the file that training wrote; restore it"
            ) from error
    return model.eval()


def write_special(folder: Path, model: Decoder) -> None:
    """Keeps for a run folder what begins a prompt and ends an answer of the model that it starts from."""
    eos = model.config.eos
    if {*model.prefix, *model.stop_tokens} != {eos} or model.prefix != (eos,):
        values = {"prefix": model.prefix, "stop_tokens": model.stop_tokens}
        replace_text(folder / SPECIAL, json.dumps(values) + "\n")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's weights and moments by name, on the CPU; `read` has been called and its config compared."""
    return load_file(path / WEIGHTS), load_file(path / OPTIMIZER)


def put_weights(name: str, model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copies weights into a model; other names or shapes than its own are a `StageError`, and nothing is copied."""
    wanted = model.state_dict()
    problems = [
        f"{key} {tuple(tensors[key].shape) if key in tensors else 'absent'} instead of "
        f"{tuple(wanted[key].shape) if key in wanted else 'nothing'}"
        for key in sorted(wanted.keys() | tensors.keys())
        if key not in wanted or key not in tensors or wanted[key].shape != tensors[key].shape
    ]
    if problems:
        raise StageError(
            f"checkpoint: {name} holds another model, got {problems[0]} and {len(problems) - 1} more, "
            "expected the shapes of its config; use the config that it was trained with"
        )
    model.load_state_dict(dict(tensors))


def read(path: Path) -> tuple[TrainConfig, State]:
    """A checkpoint's config and state, after its files' hashes were checked."""
    try:
        values = json.loads((path / STATE).read_text())
        state = State(**values)
    except (OSError, ValueError, TypeError) as error:
        raise StageError(
            f"checkpoint: {path.name}/{STATE} cannot be read, got {error}, expected the file that training wrote; "
            f"{_fall_back(path)}"
        ) from error
    for name, expected in state.files.items():
        got = file_digest(path / name) if (path / name).is_file() else "no file"
        if got != expected:
            raise StageError(
                f"checkpoint: {path.name}/{name} is damaged, got {got}, expected {expected}; {_fall_back(path)}"
            )
    return from_json(json.loads((path / CONFIG).read_text())), state


def load_tokenizer(folder: Path) -> Any:
    """The run folder's `tokenizers.Tokenizer`, after its hash was compared with the one training saw."""
    from tokenizers import Tokenizer

    path = find(folder)
    _, state = read(path)
    run = _run_of(path)
    if state.tokenizer is None or not (run / TOKENIZER).is_file():
        raise ConfigError(
            f"moe: the run has no tokenizer, got {run} without {TOKENIZER}; set train.tokenizer or pass token ids"
        )
    got = file_digest(run / TOKENIZER)
    if got != state.tokenizer:
        raise ConfigError(
            f"moe: {TOKENIZER} is not the one of training, got {got}, expected {state.tokenizer}; put it back"
        )
    return Tokenizer.from_file(str(run / TOKENIZER))


def remove_old(folder: Path, newest: str, keep: int) -> None:
    """Keeps `newest` and the `keep - 1` before it. Later ones are leftovers of a run that fell back, and go too.

    Looks only at folders that `save` may have made: what else a person keeps there stays.
    """
    made = (p for p in (folder / CHECKPOINTS).iterdir() if OURS.fullmatch(p.name) and p.is_dir() and not p.is_symlink())
    names = sorted(p.name for p in made)
    stay = [n for n in names if n <= newest and not n.endswith(TEMPORARY)][-keep:]
    for name in names:
        if name not in stay:
            shutil.rmtree(folder / CHECKPOINTS / name)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _run_of(path: Path) -> Path:
    """The run folder of a checkpoint."""
    return path.parent.parent


def _stands(folder: Path) -> str:
    return f"{find(folder).name if (folder / LATEST).is_file() else 'nothing'} stands"


def _fall_back(path: Path) -> str:
    others = sorted(p.name for p in path.parent.glob("step-*") if p != path and not p.name.endswith(TEMPORARY))
    if others:
        return f"restore it from a backup, or write {others[-1]} into {path.parent.parent / LATEST}"
    return "restore it from a backup, or train into a new folder"
