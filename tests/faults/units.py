"""Units that the tests of stopping hand to workers."""

import time
from pathlib import Path

from core.engines.contract import Note, Report, Unit


def lingers(unit: Unit, note: Note) -> Report:
    """Holds a temporary file in the folder `unit.payload` until `go` is there, then commits it, as every writer does."""
    temporary = Path(unit.payload, f"{unit.name}.tmp")
    temporary.touch()
    try:
        while not Path(unit.payload, "go").exists():
            note()
            time.sleep(0.02)
        temporary.rename(Path(unit.payload, f"{unit.name}.done"))
    finally:
        temporary.unlink(missing_ok=True)
    return Report(unit.name)
