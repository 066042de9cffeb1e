"""A driver in a process that does not listen for signals: `python interrupted.py FOLDER STRIKES`.

STRIKES are numbers with commas between: at so many instructions of the pool, and of what it uses of the standard library, after
the one before, Ctrl-C strikes. One run has ended and one has lost a worker before two units hang for good, so a driver that
loses its Ctrl-C does not end.
"""

import faulthandler
import os
import signal
import sys
from typing import Any

from core.engines.contract import Unit
from core.engines.local import LocalEngine
from tests.core.kernels import faulty, squared

STRUCK = ("/core/engines/", "/core/stopping.py", "/multiprocessing/", "/selectors.py", "/contextlib.py")
UNTIL_THEY_HANG = 26_000  # instructions on a fast machine, a slow one waits in a few thousand more: counted


class Strikes:
    """A trace function that counts instructions and sends this process a SIGINT before those with the numbers it is given."""

    def __init__(self, gaps: list[int]) -> None:
        self.gaps, self.left = gaps, gaps[0]

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in STRUCK):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and self.gaps:
            self.left -= 1
            if self.left <= 0:
                del self.gaps[0]
                self.left = self.gaps[0] if self.gaps else 0
                at = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.stderr.write(f"struck in {at}\n")
                os.kill(os.getpid(), signal.SIGINT)
        return self


def drive(folder: str) -> None:
    engine = LocalEngine(folder, 2)
    engine.run_units(squared, [Unit(str(i), i) for i in range(4)], "square")
    dies = {"folder": folder, "fault": "die", "times": 1}
    engine.run_units(faulty, [Unit("dies", dies), Unit("lives", {"folder": folder})], "die")
    engine.close()
    engine = LocalEngine(folder, 2)
    hangs = {"folder": folder, "fault": "hang", "times": 99}
    engine.run_units(faulty, [Unit("a", hangs), Unit("b", hangs)], "hang")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell without job control has it ignored in the background
    sys.settrace(Strikes([int(gap) for gap in sys.argv[2].split(",")]))
    drive(sys.argv[1])
