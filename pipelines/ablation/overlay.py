"""A base config with parts of another file laid over it: merged data, and for every value the file and line where it stands."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.yaml_lines import Lines, Path


def laid_over(base: Any, over: Any) -> Any:
    """Mappings are merged key by key; anything else in `over` takes the place of what is in `base`."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: laid_over(base.get(key), value) for key, value in over.items()}}


class OverlaidLines(Lines):
    """Where each value of the merged data stands. `places` maps a path of the merged data to its path in the file on top."""

    def __init__(self, base: Lines, over: Lines, places: Mapping[Path, Path]) -> None:
        super().__init__(base.name)
        self._base, self._over, self._places = base, over, places

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line` of `path`, or of the nearest parent that exists in either file."""
        parts = tuple(path)
        while parts:
            for place, source in self._places.items():
                here = (*source, *parts[len(place) :])
                if parts[: len(place)] == place and here in self._over.at:
                    return self._over.where(here)
            if parts in self._base.at:
                return self._base.where(parts)
            parts = parts[:-1]
        return self._base.where(())
