"""The command `pipelines` with a `signals` whose native code crashes on documents that say so.

Workers import this file under another name than the driver and take the patch; in the driver the stage must stay what can be
pickled by name.
"""

import ctypes

import classifiers.signals
from pipelines.cli import main

MARK = "crash the native code"
whole = classifiers.signals.signals


def signals(state, batch):
    if any(MARK in text for text in batch.column("text").to_pylist()):
        ctypes.string_at(0)  # SIGSEGV
    return whole(state, batch)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a worker that multiprocessing spawned
    classifiers.signals.signals = signals
