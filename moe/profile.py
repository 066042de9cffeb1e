"""`python -m moe.profile -c FILE`: where the time of an update goes.

In: a run file (moe/run_file.py). Out: torch's profiler table of a few updates on stdout, by the device's own time, and with
`--trace` a trace for chrome://tracing or Perfetto. The run's folder is neither read nor written; weights are fresh.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, StepwellError
from moe.config import TrainConfig
from moe.data import TokenSource
from moe.train import failed, parser

EXAMPLES = """examples:
  python -m moe.profile -c run.yaml
  python -m moe.profile -c run.yaml --set compile=true --steps 5 --trace trace.json
The last line on stdout is JSON: seconds and tokens/s of the profiled updates, which the profiler slows a little."""
WARM_UP = 3  # updates before: compiling, first allocations, kernels chosen


def profile(config: TrainConfig, source: TokenSource, steps: int, lines: int, trace: Path | None) -> tuple[str, float]:
    """The table, and the seconds that the profiled updates took."""
    import time

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    from moe.data import training_rows
    from moe.device import device_of, repeatable
    from moe.model import Decoder
    from moe.optim import build
    from moe.parallel import World
    from moe.update import Updater, placed

    world = World.alone(device_of(config.device))
    gpu = world.device.type == "cuda"
    rows = training_rows(config, source)
    model = placed(Decoder(config.model, config.seed), config, world)
    updater = Updater(
        config, model, build(model, config.optim, world, compiled=config.compile and gpu), world, ("all",)
    )
    batch = rows.batch(0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with repeatable(config.deterministic, world.device):
        for step in range(WARM_UP):
            updater.run(batch, step, watch=False).read()
        began = time.perf_counter()
        with recorded(activities=activities) as found:
            for step in range(WARM_UP, WARM_UP + steps):
                updater.run(batch, step, watch=False).read()
        seconds = time.perf_counter() - began
    if trace is not None:
        found.export_chrome_trace(str(trace))
    by = "self_device_time_total" if gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=lines), seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser("python -m moe.profile", "Profile a few updates of a run.", EXAMPLES)
    options.add_argument("--steps", type=int, default=3, help="profiled updates")
    options.add_argument("--lines", type=int, default=30, help="of the table")
    options.add_argument("--trace", type=Path, help="file for a Chrome trace")
    given = options.parse_args(arguments)
    try:
        return _profile(given)
    except ConfigError as error:
        return failed(error, 2)
    except StepwellError as error:
        return failed(error, 1)


def _profile(given: argparse.Namespace) -> int:
    from moe.run_file import read_run

    run = read_run(given.config, given.set)
    if given.steps < 1:
        raise ConfigError(f"profile: --steps must be positive, got {given.steps}")
    table, seconds = profile(run.config, run.source, given.steps, given.lines, given.trace)
    tokens = given.steps * run.config.rows * run.config.model.context
    figures = {"updates": given.steps, "seconds": seconds, "tokens_per_s": tokens / seconds}
    sys.stdout.write(table + "\n" + json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
