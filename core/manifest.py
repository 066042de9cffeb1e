"""A manifest: what one stage did to one dataset (or to the whole root), and by which inputs, config and code.

`identity` holds what decides the output and is compared; `observed` holds what happened (seconds, hosts) and never is. The
manifest is written last: without it the stage has not happened, with it every file it names is there.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from core.errors import ConfigError
from core.hashing import digest
from core.storage import Root

FORMAT = 1
ABSENT = "absent"


@dataclass(frozen=True)
class Identity:
    """What the output is a function of. Two equal digests: the same bytes, so the stage is skipped."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]  # what was read -> digest of its content
    artifacts: dict[str, str] = field(default_factory=dict)  # models, tokenizers, benchmarks -> fingerprint
    libraries: dict[str, str] = field(default_factory=dict)  # distribution -> version

    def digest(self) -> str:
        return digest(asdict(self))

    def differences(self, other: "Identity") -> list[str]:
        """One line for each part that differs, as `part: old -> new`, `self` being the old one."""
        lines = []
        for part in ("stage", "version", "config", "inputs", "artifacts", "libraries"):
            old, new = getattr(self, part), getattr(other, part)
            if digest(old) == digest(new):
                continue
            if not isinstance(old, dict):
                lines.append(f"{part}: {old} -> {new}")
                continue
            for key in sorted(set(old) | set(new)):
                before, after = old.get(key, ABSENT), new.get(key, ABSENT)
                if digest(before) != digest(after):  # as the identity sees it: 1 and 1.0 differ
                    lines.append(f"{part}.{key}: {_short(before)} -> {_short(after)}")
        return lines


@dataclass
class Manifest:
    """One committed run of a stage. `outputs` maps a file or shard name to at least its `content` hash and `rows`."""

    instance: str
    dataset: str | None  # None: the stage works on the whole root
    identity: Identity
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    accounts: dict[str, int] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)  # ingest: what became of each unit of input
    format: int = FORMAT

    def content(self) -> str:
        """Digest of everything this stage put out, for the identity of its readers."""
        return digest({name: out["content"] for name, out in self.outputs.items()})


def manifest_name(instance: str, dataset: str | None) -> str:
    return f"datasets/{dataset}/manifests/{instance}.json" if dataset else f"manifests/{instance}.json"


def write_manifest(root: Root, manifest: Manifest) -> None:
    root.write_json(manifest_name(manifest.instance, manifest.dataset), asdict(manifest))


def read_manifest(root: Root, instance: str, dataset: str | None) -> Manifest | None:
    """The committed manifest, or None. One from a newer version of this project is refused, not guessed at."""
    name = manifest_name(instance, dataset)
    try:
        stored = root.read_json(name)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"{name}: not a manifest ({e}); remove the file to run {instance} again") from e
    if not isinstance(stored, dict) or "format" not in stored:
        raise ConfigError(f"{name}: not a manifest (no `format`); remove the file to run {instance} again")
    if stored["format"] != FORMAT:
        raise ConfigError(
            f"{name}: written in format {stored['format']}, expected {FORMAT}; upgrade stepwell or use another root"
        )
    return Manifest(**{**stored, "identity": Identity(**stored["identity"])})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 48 else text[:45] + "..."
