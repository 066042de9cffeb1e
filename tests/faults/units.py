"""Units that the tests of stopping hand to workers."""

import signal
import threading
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


def turns_deaf(unit: Unit, note: Note) -> Report:
    """Ends, but its process will not: a thread that nobody stops stays, and SIGTERM is not heard."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(3600,)).start()
    return Report(unit.name)
