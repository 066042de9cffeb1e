"""What stands around the run of an ablation: before it what would run and how long that takes, after it the page."""

from collections.abc import Iterator

from core.manifest import read_manifest
from core.storage import Root
from mixtures.mix import phase_path
from mixtures.reader import MixtureSource
from pipelines.ablation.config import Ablation
from pipelines.ablation.design import derived, mix_instance, trials_config, trials_instance
from pipelines.ablation.result import PAGE, read_result
from pipelines.plan import plan


def write_page(root: Root, name: str) -> str:
    """`ablations/NAME/report.html`; returns where it lies."""
    from pipelines.report.ablation import page

    file = f"ablations/{name}/{PAGE}"
    root.write_bytes(file, page(read_result(root, name)).encode())
    return f"{root.url}/{file}"


def dry_run(ablation: Ablation, root: Root) -> Iterator[str]:
    """The plan, the trials, and how long they will take by what was measured here."""
    pipeline = derived(ablation)
    todo = [p for p in plan(pipeline, root) if p.run]
    for p in todo:
        yield f"run   {p.step.name:<36}{'; '.join(p.why)}"
    if not todo:
        yield "nothing would run: all trials are there"
    trials = trials_config(ablation)
    count = len(trials.arms) * len(trials.seeds)
    tokens = count * trials.tokens
    yield f"{count} trials: {', '.join(trials.arms)} x seeds {', '.join(map(str, trials.seeds))}"
    yield f"tokens: {trials.tokens:,} a trial, {tokens:,} in all"
    yield from _mixed(ablation, root)
    rate, measured = _measured_rate(ablation, root)
    yield (
        f"time: about {tokens / rate:,.0f} s at {rate:,.0f} tokens/s ({measured})"
        if rate
        else "time: nothing measured yet"
    )


def _mixed(ablation: Ablation, root: Root) -> Iterator[str]:
    """Tokens in each arm's mixture, where it is made already."""
    for arm in ablation.arms:
        name = phase_path(mix_instance(ablation, arm), ablation.config.phase)
        if root.exists(f"mixtures/{name}/index.parquet"):
            yield f"mixture {name}: {int(MixtureSource(root, name).lengths().sum()):,} tokens"


def _measured_rate(ablation: Ablation, root: Root) -> tuple[float | None, str]:
    """Training tokens a second of the whole machine: of this ablation's last run, else of the base's model."""
    for instance, what in (
        (trials_instance(ablation), "its last run"),
        ("train", "the base's `train`, another thread count"),
    ):
        manifest = read_manifest(root, instance, None)
        if manifest is None:
            continue
        observed, accounts = manifest.observed, manifest.accounts
        if instance == "train" and observed.get("tokens_per_s"):
            return float(observed["tokens_per_s"]), what
        if instance != "train" and not observed.get("resumed_units"):
            return accounts["trials"] * accounts["tokens_each"] / observed["seconds"], what
    return None, ""
