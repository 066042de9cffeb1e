"""The live line of a run on a terminal: updates, loss, tokens/s, share of the device's peak, load of the experts.

In: rows of `metrics.jsonl` as they are made. Out: two lines on stderr that are drawn over; nothing where stderr is no terminal,
or `rich` is not installed, but a warning for each alarm when it begins.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

BLOCKS = "▁▂▃▄▅▆▇█"
FULL_LOAD = 2.0  # times the mean: a whole block; more looks the same

OnStep = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def live(steps: int, stream: TextIO | None = None, label: str = "") -> Iterator[OnStep]:
    """Gives an `on_step` for `moe.trainer.train`; `label` names the run in front of the line."""
    out = stream or sys.stderr
    begun: set[str] = set()

    def warn(row: Mapping[str, Any]) -> None:
        names = {alarm["name"] for alarm in row.get("alarms", [])}
        for alarm in row.get("alarms", []):
            if alarm["name"] not in begun:
                out.write(f"update {row['step']}: alarm {alarm['name']}: {alarm['found']}\n")
        begun.clear()
        begun.update(names)

    if not out.isatty():
        yield warn
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # a machine that only trains may have none
        yield warn
        return

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.description}"))
    first = f"{label}: " if label else ""
    with Progress(*columns, console=Console(file=out), transient=True) as bars:
        bar = bars.add_task("", total=steps)
        loads = [""]

        def show(row: dict[str, Any]) -> None:
            warn(row)
            if "experts" in row:
                loads[0] = load_line(row["experts"].get("load", []))
            bars.update(bar, completed=row["step"], description=first + line(row) + loads[0])

        yield show


def line(row: Mapping[str, Any]) -> str:
    """What one row says in a few words."""
    parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_s']:,.0f} tokens/s"]
    if "reward_mean" in row:  # of reinforcement learning
        parts[0] = f"reward {row['reward_mean']:.3f}"
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * row['mfu']:.1f} %")
    parts.append(f"|g| {row['grad_norm']:.2g}")
    return ", ".join(parts)


def load_line(loads: list[list[float]]) -> str:
    """A block an expert of the least balanced layer, a half one at the mean load. Loads are shares of a layer's tokens."""
    if not loads:
        return ""
    layer, shares = max(enumerate(loads), key=lambda pair: max(pair[1]))
    heights = [min(share * len(shares) / FULL_LOAD, 1.0) for share in shares]
    blocks = "".join(BLOCKS[min(int(h * len(BLOCKS)), len(BLOCKS) - 1)] for h in heights)
    return f"\nload of routed layer {layer}: {blocks}"
