"""Progress on a terminal: one bar a verb with docs/s, MB/s and time left. Nothing is drawn where stderr is no terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int, int, int], None]  # (docs, bytes, units) since the last call


class Display:
    """Draws bars if `live`, else only counts."""

    def __init__(self, live: bool) -> None:
        self.live = live

    @contextlib.contextmanager
    def task(self, label: str, units: int, size: int) -> Iterator[Advance]:
        """A bar for `units` pieces of work of `size` bytes together (0: unknown)."""
        if not self.live:
            yield lambda docs, bytes, units: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(label, total=units, rate="")
            done = [0, 0]

            def advance(docs: int, bytes: int, units: int) -> None:
                done[0] += docs
                done[1] += bytes
                seconds = max(bars.tasks[0].elapsed or 0.0, 1e-3)
                bars.update(
                    bar, advance=units, rate=f"{done[0] / seconds:,.0f} docs/s {done[1] / seconds / 1e6:,.1f} MB/s"
                )

            yield advance


def quiet() -> Display:
    """A display that draws nothing."""
    return Display(live=False)


def terminal() -> Display:
    """Bars when a person is watching."""
    return Display(live=sys.stderr.isatty())
