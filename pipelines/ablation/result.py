"""What an ablation found: from the trials' losses to comparisons, a table on the terminal, and a page.

In: `losses.parquet` of every trial. Out: the `comparisons`, `bits_per_byte` and rules of `result.json`; rich's table; with
`pipelines.report.ablation` the page `ablations/NAME/report.html`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from core.errors import StageError
from core.statistics import ALPHA, POWER
from core.storage import Root
from mixtures.compare import LEAST_DOCS, Losses, compare
from moe.metrics import finite
from pipelines.ablation.config import AA
from pipelines.ablation.trials import Trial, TrialsConfig, result_name

HEAD = (
    "arm",
    "domain",
    "docs",
    "baseline",
    "arm's",
    "difference",
    "95% interval",
    "least effect",
    "p (Holm)",
    "verdict",
)
PAGE = "report.html"


def comparisons(root: Root, config: TrialsConfig, trials: Sequence[Trial]) -> dict[str, Any]:
    """Every arm beside the baseline, the bits per byte of every trial, and the domains that were too small to say."""
    losses = read_losses(root, config, trials)
    docs = np.bincount(losses.domain, minlength=len(losses.domains))
    text_bytes = np.bincount(losses.domain, losses.bytes, len(losses.domains))
    bits = {
        arm: {
            name: [float(seed[losses.domain == d].sum() / text_bytes[d]) for seed in by_seed]
            for d, name in enumerate(losses.domains)
            if text_bytes[d]
        }
        for arm, by_seed in losses.bits.items()
    }
    return {
        "alpha": ALPHA,
        "power": POWER,
        "bits_per_byte": bits,
        # arms without noise have infinitely many degrees of freedom
        "comparisons": [finite(asdict(c)) for c in compare(losses)],
        "too_few_docs": {name: int(n) for name, n in zip(losses.domains, docs, strict=True) if n < LEAST_DOCS},
    }


def read_losses(root: Root, config: TrialsConfig, trials: Sequence[Trial]) -> Losses:
    """The losses of all trials, which must be over the same documents."""
    tables = {(t.arm, t.seed): root.read_table(t.losses) for t in trials}
    first = next(iter(tables.values()))
    for (arm, seed), table in tables.items():
        if not table.select(["domain", "bytes", "tokens"]).equals(first.select(["domain", "bytes", "tokens"])):
            raise StageError(
                f"ablation: {arm}/seed-{seed} was judged on other documents than the baseline; remove its folder below "
                "ablations/ and run again"
            )
    domains = first.column("domain").unique().sort().to_pylist()
    place = {name: i for i, name in enumerate(domains)}
    bits = {
        arm: np.stack([tables[arm, seed].column("bits").to_numpy() for seed in config.seeds]) for arm in config.arms
    }
    return Losses(
        bits=bits,
        bytes=first.column("bytes").to_numpy(),
        domain=np.array([place[name] for name in first.column("domain").to_pylist()]),
        domains=domains,
        baseline=config.control,
        aa=AA if config.aa else None,
    )


def read_result(root: Root, name: str) -> dict[str, Any]:
    result: dict[str, Any] = root.read_json(result_name(name))
    return result


def cells(c: Mapping[str, Any]) -> tuple[str, ...]:
    """One comparison as text, in the order of HEAD."""
    least = c["least_effect"]
    return (
        "A/A" if c["arm"] == AA else c["arm"],
        c["domain"],
        f"{c['docs']:,}",
        f"{c['baseline_bpb']:.4f}",
        f"{c['arm_bpb']:.4f}",
        f"{c['effect']:+.4f}",
        f"{c['low']:+.4f} to {c['high']:+.4f}",
        f"{least:.4f}" if least is not None else "",
        "" if c["arm"] == AA else f"{c['p_holm']:.3f}",
        c["verdict"],
    )


def about(result: Mapping[str, Any]) -> list[str]:
    """What a reader needs beside the table, one sentence a line."""
    runs = len(result["arms"]) * len(result["seeds"])
    lines = [
        f"{runs} trials of {result['tokens']:,} tokens in {result['steps']} updates each, {result['parameters']:,} parameters, "
        f"phase {result['phase']}, seeds {', '.join(map(str, result['seeds']))}; baseline {result['baseline']}.",
        f"Bits per byte on {result['held_out']['docs']} held-out documents; a difference below zero is better."
        + (
            " Arms are compared with the mean of the baseline and the A/A arm, which is the baseline again."
            if result["aa"]
            else ""
        ),
    ]
    lines += [
        f"Domain {name} has {n} held-out documents, too few to compare." for name, n in result["too_few_docs"].items()
    ]
    lines += [
        f"Arm {arm}: {a['untokenised_docs']} documents that it keeps have no tokens."
        for arm, a in result["arms"].items()
        if a["untokenised_docs"]
    ]
    return lines


def print_result(result: Mapping[str, Any]) -> None:
    """The table on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)  # piped output has no width of its own
    table = Table(title=f"ablation {result['name']}", title_justify="left")
    for i, name in enumerate(HEAD):
        table.add_column(name, justify="left" if i < 2 or name == "verdict" else "right", no_wrap=True)
    for c in result["comparisons"]:
        table.add_row(*cells(c), style=None if c["verdict"] == "tie" else "bold")
    console.print(table)
    for line in about(result):
        console.print(line, highlight=False)
