"""A model of ours in lm-evaluation-harness.

    python -m moe.harness models/a --tasks arc_easy,hellaswag --limit 100
    python -m moe.harness models/a --include my_tasks --tasks my_task --output results.json

In: a run folder or a hub folder. Out: the harness's own table, and its results as JSON with `--output`. The harness fetches its
tasks from the network unless they are in its cache, and says so; nothing of ours does. `--include` names a folder of tasks whose
files lie here (`dataset_path: json`, `data_files: ...`): they need no network. Likelihoods come in padded batches of some 8,192
tokens, answers `--slots` at once. Other code passes `Harness(folder)` to `lm_eval.simple_evaluate(model=...)`. A context or
prompt that does not fit loses its beginning, as the harness does with other models; a continuation that does not fit is scored
whole, in pieces. At most half the context is generated, whatever a task asks.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

from core.errors import ConfigError, StepwellError
from moe.evaluate import windows
from moe.generate import generate_batch, load_tokenizer, token_ids
from moe.metrics import finite
from moe.sampling import Sampling
from moe.score import behind, score, score_continuations
from moe.use import Use, add_options


class Harness(TemplateLM):
    """What the harness asks of a model: likelihoods of continuations, of whole texts, and generated text."""

    def __init__(self, folder: str | Path, use: Use | None = None, slots: int = 8) -> None:
        super().__init__()
        self.use, self.slots = use or Use(), slots
        self.model = self.use.load(Path(folder))
        self.tokenizer = load_tokenizer(Path(folder))

    @property
    def eot_token_id(self) -> int:
        return int(self.model.config.eos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return token_ids(self.tokenizer, string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The harness's own looks at the first token of a continuation, which an empty one lacks."""
        pairs = []
        for context, text in (request.args for request in requests):
            before, tokens = self._encode_pair(context, text) if context else ([], self.tok_encode(text))
            pairs.append(((context, text), before, tokens))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(context, tokens) for _, context, tokens in requests]
        return [(-found.nats, found.greedy) for found in score_continuations(self.model, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, EOS not counted."""
        import numpy as np

        start, spans, owner = behind(self.model, []), [], []
        for i, request in enumerate(requests):
            tokens = np.array(self.tok_encode(request.args[0]), dtype=np.int64)
            new = list(windows(tokens, self.model.config.context, start))
            spans += new
            owner += [i] * len(new)
        total = [0.0] * len(requests)
        for i, found in zip(owner, score(self.model, spans), strict=True):
            total[i] -= found.nats
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless the task says otherwise; the text ends before the first stop string."""
        half = max(1, self.model.config.context // 2)
        asked = [_sampling(request.args[1], half) for request in requests]
        prompts = [self._prompt(r.args[0], s) for r, s in zip(requests, asked, strict=True)]
        written = generate_batch(
            self.model, prompts, asked, tokenizer=self.tokenizer, speculate=self.use.speculate, slots=self.slots
        )
        return [answer.text for answer in written]

    def _prompt(self, text: str, sampling: Sampling) -> list[int]:
        taken = len(self.model.prefix) + (sampling.max_tokens or 0) - 1  # the last new token is not read
        ids, room = self.tok_encode(text), self.model.config.context - taken
        return ids[-room:] if room > 0 else []


def _sampling(options: dict[str, Any], most: int) -> Sampling:
    """The harness's settings in ours, with at most `most` new tokens."""
    until = options.get("until") or []
    stops = tuple(s for s in ((until,) if isinstance(until, str) else until) if s)
    greedy = not options.get("do_sample") or not options.get("temperature")
    return Sampling(
        temperature=0.0 if greedy else float(options["temperature"]),
        top_p=float(options.get("top_p") or 1.0),
        stop=stops,
        max_tokens=min(int(options.get("max_gen_toks") or 256), most),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe.harness", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run, a checkpoint or a hub folder")
    parser.add_argument("--tasks", required=True, help="names of the harness, with commas between")
    parser.add_argument("--limit", type=int, help="questions a task (default: all)")
    parser.add_argument("--shots", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument(
        "--include", type=Path, metavar="FOLDER", help="tasks of your own, as YAML files of the harness"
    )
    parser.add_argument("--slots", type=int, default=8, help="answers that are written at once (default 8)")
    add_options(parser, ("device", "dtype", "speculate"))
    parser.add_argument("--output", type=Path, help="write all results here as JSON")
    args = parser.parse_args(argv)
    try:
        _evaluate(args)
    except ConfigError as e:
        print(f"harness: {e}", file=sys.stderr)
        return 2
    except StepwellError as e:
        print(f"harness: {e}", file=sys.stderr)
        return 1
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    if args.include is not None and not args.include.is_dir():
        raise ConfigError(f"--include: no folder, got {args.include}, expected one with YAML files of tasks")
    if args.output is not None and not args.output.parent.is_dir():  # told before hours of work, not behind them
        raise ConfigError(
            f"--output: no folder, got {args.output.parent}, expected one to write {args.output.name} into"
        )
    tasks = args.tasks.split(",")
    known, model = _known(tasks, args.include), Harness(args.folder, Use.of(args), args.slots)
    found = simple_evaluate(model=model, tasks=tasks, limit=args.limit, num_fewshot=args.shots, task_manager=known)
    print(make_table(found))
    if args.output is not None:
        args.output.write_text(json.dumps(finite(found["results"]), indent=1, default=str) + "\n")


def _known(tasks: Sequence[str], include: Path | None) -> Any:
    """The tasks' definitions. Where a folder of one's own has all of them, the harness's thousands of files are not read."""
    from lm_eval.tasks import TaskManager

    unknown: list[str] = []
    for defaults in (True,) if include is None else (False, True):
        known = TaskManager(include_path=include, include_defaults=defaults)
        unknown = [task for task in tasks if not known.match_tasks([task])]
        if not unknown:
            return known
    raise ConfigError(f"--tasks: unknown, got {', '.join(unknown)}, expected names of the harness or of --include")


if __name__ == "__main__":
    sys.exit(main())
