"""Ways to run one pipeline that must not change what comes out, chosen so that every two settings meet somewhere."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.contract import Engine, Frame, Report, Unit
from core.engines.spill import partitions_for
from core.progress import quiet
from core.stage import Resources
from pipelines.runner import Runner, make_engine

SETTINGS: dict[str, tuple[Any, ...]] = {
    "engine": ("local", "ray", "spark"),
    "workers": (1, 2, 5),
    "partition_mb": (128.0, 0.02, 0.002),  # one partition everywhere; a handful; up to a hundred
    "order": (0, 1),  # of files as they are created, and of units as an engine gets them
    "batch_mb": (64.0, 0.01),
}


@dataclass(frozen=True)
class Arrangement:
    """One value of each setting. `soak`: left to `make soak`."""

    engine: str
    workers: int
    partition_mb: float
    order: int
    batch_mb: float
    soak: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.workers}-{self.partition_mb:g}-{self.order}-{self.batch_mb:g}"

    def pairs(self) -> set[tuple[str, Any, str, Any]]:
        """The pairs of settings that meet here."""
        return {(a, getattr(self, a), b, getattr(self, b)) for a, b in combinations(SETTINGS, 2)}


REFERENCE = Arrangement("local", 1, 128.0, 0, 64.0)
ARRANGEMENTS = (
    REFERENCE,
    Arrangement("local", 2, 0.02, 1, 0.01),
    Arrangement("local", 5, 0.002, 0, 64.0),
    Arrangement("ray", 2, 0.002, 1, 64.0),
    Arrangement("spark", 2, 0.02, 1, 0.01),
    Arrangement("ray", 1, 0.02, 0, 0.01, soak=True),
    Arrangement("ray", 5, 128.0, 1, 0.01, soak=True),
    Arrangement("spark", 1, 0.002, 1, 0.01, soak=True),
    Arrangement("spark", 5, 0.02, 0, 64.0, soak=True),
    Arrangement("spark", 2, 128.0, 0, 64.0, soak=True),
)


def promised() -> set[tuple[str, Any, str, Any]]:
    """Every pair of values of two settings."""
    return {(a, x, b, y) for a, b in combinations(SETTINGS, 2) for x, y in product(SETTINGS[a], SETTINGS[b])}


class Permuted:
    """An engine that is handed its units in another order, and tells how many partitions its shuffles had."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.inner, self.seed = engine, seed
        self.partitions: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run_units(
        self,
        fn: Callable[..., Report],
        units: Sequence[Unit],
        label: str,
        stall_s: float = 600.0,
        resources: Resources | None = None,
    ) -> list[Report]:
        order = self._order(len(units))
        reports = self.inner.run_units(fn, [units[i] for i in order], label, stall_s, resources)
        return [reports[i] for i in np.argsort(order)]

    def scan(
        self, fn: Callable[[Unit], Iterable[pa.RecordBatch]], units: Sequence[Unit], schema: pa.Schema, label: str
    ) -> Frame:
        return self.inner.scan(fn, [units[i] for i in self._order(len(units))], schema, label)

    def shuffle(self, frames: Any, *arguments: Any, label: str = "shuffle", **knobs: Any) -> Frame:
        given = frames if isinstance(frames, list | tuple) else [frames]
        if all(hasattr(frame, "bytes") for frame in given):
            size = sum(frame.bytes for frame in given)
            self.partitions[label] = partitions_for(size, self.inner.partition_bytes)
        return self.inner.shuffle(frames, *arguments, label=label, **knobs)

    def _order(self, n: int) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(n) if self.seed else np.arange(n)


class Arranged(Runner):
    """A run whose engine takes its units as the arrangement says."""

    order = 0

    @property
    def engine(self) -> Any:
        if self._engine is None:
            made = make_engine(self.pipeline.engine, self._scratch, quiet())
            self._engine = Permuted(made, self.order)  # type: ignore[assignment]
        return self._engine
