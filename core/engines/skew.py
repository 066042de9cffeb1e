"""The largest key that a worker had to hold whole, by label: for the log at once, for the manifest when the stage ends."""

import logging
from collections.abc import Iterable

from core.engines.contract import Skew

log = logging.getLogger("stepwell")


class Skews:
    """What the verbs of one stage found. A key of which `combine` or a cap left little is no skew."""

    def __init__(self) -> None:
        self._by_label: dict[str, Skew] = {}

    def add(self, label: str, found: Iterable[Skew | None], expected_bytes: int) -> None:
        """Remember and tell the largest of `found`; None is a partition without a large key."""
        largest = max((s for s in found if s is not None), key=lambda s: s.bytes, default=None)
        if largest is None:
            return
        self._by_label[label] = max(largest, self._by_label.get(label, largest), key=lambda s: s.bytes)
        log.warning(
            "%s: one key, %s, has %s rows of %.1f MB, which a worker held whole, expected at most %.1f MB; if memory runs out, "
            "give the engine more memory_gb or fewer workers",
            label,
            list(largest.key),
            f"{largest.rows:,}",
            largest.bytes / 1e6,
            expected_bytes / 1e6,
        )

    def by_label(self) -> dict[str, Skew]:
        return dict(self._by_label)
