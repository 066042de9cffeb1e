"""What the stage `answers` would send and cost at most. Nothing is sent.

    python -m pipelines.estimate -c p.yaml

In: a pipeline whose stage `passages` has run, and the log of answers so far. Out: a line for each stage `answers`. Tokens of
prompts are estimated from bytes (too high rather than too low), answers count with the longest that is allowed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, StepwellError
from core.storage import Root
from pipelines.config import load_pipeline


def lines(config: Path) -> list[str]:
    """One line for each stage `answers` of a pipeline."""
    from mixtures.augment.answers import estimate, folder_name
    from mixtures.augment.log import known_keys
    from mixtures.augment.passages import passages_name

    pipeline = load_pipeline(config)
    root = Root(pipeline.root)
    out = []
    for entry in pipeline.stages:
        if entry.stage.name != "answers":
            continue
        name = passages_name(entry.config.passages)  # type: ignore[attr-defined]
        if not root.exists(name):
            raise ConfigError(f"{entry.instance}: no {name} below {root.url}; run stage `passages` first")
        known = known_keys(root, folder_name(entry.instance))
        e = estimate(entry.config, root.read_table(name), known)  # type: ignore[arg-type]
        out.append(
            f"{entry.instance}: {e.requests:,} requests, {e.logged:,} in the log, {e.requests - e.logged:,} to send: about "
            f"{e.prompt_tokens:,} prompt tokens, at most {e.completion_tokens:,} completion tokens, cost at most {e.cost:,.4f}"
        )
    return out or [f"{config}: no stage `answers` in this pipeline"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", type=Path, required=True, help="the pipeline's YAML file")
    try:
        print("\n".join(lines(parser.parse_args(arguments).config)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StepwellError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
