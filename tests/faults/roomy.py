"""The command `pipelines` on disks smaller than those it agrees to begin on."""

import pipelines.preflight
from pipelines.cli import main

if __name__ == "__main__":  # workers import this file too
    pipelines.preflight.FREE_BYTES = 0
    main()
