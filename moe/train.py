"""`python -m moe.train -c FILE`, and the same under torchrun: trains as a run file says (moe/run_file.py).

Out: the run's folder, a live line on a terminal, and the summary as one line of JSON on stdout. Exit codes: 0 done, 1 the run
stopped (an alarm, a loss that is not finite, a damaged checkpoint), 2 usage or config.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from core.errors import ConfigError, StepwellError

EXAMPLES = """examples:
  python -m moe.train -c run.yaml                                one process, on a GPU if there is one
  python -m moe.train -c run.yaml --plan                         shapes, memory, steps and hours; trains nothing
  python -m moe.train -c run.yaml --set steps=20 --set optim.lr=0.001 --set device=cpu
  torchrun --nproc-per-node 2 -m moe.train -c run.yaml           two ranks of one run
The same command goes on from the newest checkpoint, also after kill -9 and on another number of ranks. A stopped run exits
with 1, a wrong config with 2."""


def parser(name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """The options that every command over a run file has."""
    out = argparse.ArgumentParser(
        prog=name, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the run file, YAML or JSON")
    out.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a value over the file's; may be repeated"
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser("python -m moe.train", "Train a decoder on token files.", EXAMPLES)
    options.add_argument("--plan", action="store_true", help="say what the run would be, and train nothing")
    options.add_argument("--ranks", type=int, default=1, help="of the plan; torchrun says how many ranks train")
    given = options.parse_args(arguments)
    try:
        return _plan(given) if given.plan else _train(given)
    except ConfigError as error:
        return failed(error, 2)
    except StepwellError as error:
        return failed(error, 1)


def failed(error: StepwellError, code: int) -> int:
    """Says what went wrong on stderr."""
    sys.stderr.write(f"{error}\n")
    return code


def _plan(given: argparse.Namespace) -> int:
    from moe.plan import plan, text
    from moe.run_file import read_run

    run = read_run(given.config, given.set)
    sys.stdout.write(text(plan(run.config, run.source, given.ranks)))
    return 0


def _train(given: argparse.Namespace) -> int:
    from moe.device import device_of
    from moe.parallel import World
    from moe.progress import live
    from moe.run_file import read_run
    from moe.trainer import train

    run = read_run(given.config, given.set)
    device_of(run.config.device)
    world = World.from_env(expert_ranks=run.config.expert_ranks, device=run.config.device)
    try:
        with live(run.config.steps) if world.rank == 0 else nullcontext() as on_step:
            summary = train(run.config, run.source, run.folder, on_step, run.start, world, limits=run.limits)
    finally:
        world.close()
    if world.rank == 0:
        sys.stdout.write(json.dumps(asdict(summary), default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
