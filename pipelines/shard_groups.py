"""Annotate steps in parts, for schedulers: ranges of a dataset's shards, and locks under which the parts run side by side.

A part (`run stage NAME --dataset D --shards A:B`) commits its shards and writes no manifest. A whole run of the step
(`--finish`, or neither option) finds what the parts have committed, computes what they have not, and writes the manifest: that of
a run without parts, but for `observed`. A and B count the shards in the order of their names, as the documents manifest does.

Locks: a part holds `locks/DATASET.STAGE.shards/A-B.json`, a whole run `locks/DATASET.STAGE.json`. Each takes its own first and
looks for the others' then, so of two that exclude one another never both go on. A part is refused by a whole run and by a part
that shares a shard with it, a whole run by every part. What a dead process left is removed; a run re-enters what bears its id.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from core.dataset import Dataset
from core.errors import ConfigError
from core.lock import held
from core.manifest import read_manifest
from core.stage import Kind
from core.storage import Root
from pipelines.config import Pipeline, StageEntry
from pipelines.plan import Planned, plan_step
from pipelines.scope import Step, dataset_at


def ranges(shards: int, groups: int) -> list[str]:
    """`A:B` for each of at most `groups` parts that cover the shards in order; their sizes differ by one at most."""
    parts = min(shards, groups)
    edges = [i * shards // parts for i in range(parts + 1)] if parts else []
    return [f"{first}:{last}" for first, last in pairwise(edges)]


def parts_to_run(pipeline: Pipeline, root: Root, stage: str, name: str, groups: int) -> list[str]:
    """The ranges of one step that a run would have to compute; none where the step is up to date."""
    entry = pipeline.entry(stage)
    if entry.stage.kind is not Kind.ANNOTATE:
        raise ConfigError(
            f"{stage}: works on whole datasets, {entry.stage.kind.value}; only annotate stages have parts"
        )
    dataset = dataset_at(pipeline, root, name)
    if dataset is None:
        raise ConfigError(f"{stage}: dataset {name!r} has no documents yet; run the stage that makes it first")
    return ranges(len(dataset.shards), groups) if plan_step(pipeline, root, Step(entry, name)).run else []


def check_options(entry: StageEntry, shards: tuple[int, int] | None, finish: bool, force: bool) -> None:
    """Refuse what has no meaning together: a part of what has no parts, a part that is the whole, a part of what is removed."""
    if (shards or finish) and entry.stage.kind is not Kind.ANNOTATE:
        raise ConfigError(
            f"{entry.instance}: --shards and --finish are for annotate stages, got kind {entry.stage.kind.value}; run it whole"
        )
    if shards and finish:
        raise ConfigError("--finish collects every shard; leave out --shards")
    if (shards or finish) and force:
        raise ConfigError("--force removes every shard of the stage; leave out --shards and --finish, or --force")


def ran(root: Root, planned: Iterable[Planned], run_id: str) -> bool:
    """Whether this run, be it in an earlier try that was killed after its last write, did any of the steps."""
    for p in planned:
        manifest = None if p.run else read_manifest(root, p.step.manifest, p.step.dataset)
        if manifest is None or manifest.observed.get("run_id") == run_id:
            return True
    return False


@contextlib.contextmanager
def step_lock(root: Root, name: str, shards: tuple[int, int] | None, run_id: str) -> Iterator[None]:
    """Hold the lock `name` of a step, or with `shards` that of a part. StageError names a run that excludes this one."""
    own = name if shards is None else f"{name}.shards/{shards[0]}-{shards[1]}"
    with held(root, own, run_id):
        for rival in _rivals(root, name, shards):
            with held(root, rival, run_id):  # refused while its run lives; else it is ours, and gone on leaving
                pass
        yield


def part_of(dataset: Dataset, shards: tuple[int, int] | None) -> Dataset:
    """The shards A:B of a dataset, those that it has; None: all. ConfigError where it has none of them."""
    if shards is None:
        return dataset
    first, last = shards
    if first >= len(dataset.shards):
        raise ConfigError(
            f"--shards: got {first}:{last}, expected a range that begins below {len(dataset.shards)}, the number of shards of "
            f"{dataset.name}; `pipelines shards STAGE --dataset {dataset.name}` prints the ranges there are"
        )
    return replace(dataset, shards=dataset.shards[first:last])


def part_summary(part: Dataset, dataset: Dataset, figures: dict[str, Any]) -> str:
    """One line for a person about a part that has ended."""
    before = f", {figures['resumed_units']} of them before" if figures["resumed_units"] else ""
    return f"{len(part.shards)} of {len(dataset.shards)} shards are committed{before}; `--finish` writes the manifest"


def _rivals(root: Root, name: str, shards: tuple[int, int] | None) -> list[str]:
    """Locks there are that exclude this one."""
    files = root.names(f"locks/{name}.shards")
    parts = [file.removesuffix(".json") for file in files if file.endswith(".json")]
    if shards is None:
        return [f"{name}.shards/{part}" for part in parts]
    shared = [f"{name}.shards/{part}" for part in parts if _shares(shards, _numbers(part))]
    return [*shared, *([name] if root.exists(f"locks/{name}.json") else [])]


def _shares(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two parts have a shard in common and are not the same part."""
    return one != other and one[0] < other[1] and other[0] < one[1]


def _numbers(part: str) -> tuple[int, int]:
    first, _, last = part.partition("-")
    return int(first), int(last)
