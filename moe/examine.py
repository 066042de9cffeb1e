"""Ask a model the questions of files, alone or beside another.

    python -m moe.examine models/a --questions arc_easy.jsonl.gz lambada_openai.jsonl.gz
    python -m moe.examine models/b --against models/a --questions arc_easy.jsonl.gz
    python -m moe.examine models/a --problems gsm8k_test.jsonl.gz --examples gsm8k_train.jsonl.gz --shots 4

In: a run folder or hub folder, files that `moe.choices` and `moe.solve` read. Out: one JSON object on the last line of standard
output, and a line a file above it for people. Reads local files only; a problem costs a generated answer. The stage `evaluate`
of a pipeline asks the same way (`ask`, `pose`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, StepwellError
from moe.use import Use, add_options

if TYPE_CHECKING:
    from moe.choices import Layout
    from moe.model import Decoder

SHOTS, MAX_TOKENS = 4, 256  # of problems; chosen: what a context of 2,048 tokens holds of GSM8K


@dataclass(frozen=True)
class Asked:
    """Who is asked; `tokenizer` is a `tokenizers.Tokenizer`."""

    model: "Decoder"
    tokenizer: Any


def ask(
    who: Asked, other: Asked | None, path: Path, layout: "Layout | None" = None, limit: int | None = None
) -> dict[str, Any]:
    """Figures over a file's questions; with another model asked too, `less_than_other` is the paired difference to it."""
    from moe.choices import answer, difference, read_questions, summary

    questions = read_questions(path, layout)[:limit]
    answered = [answer(a.model, a.tokenizer, questions) for a in (who, other) if a is not None]
    figures = asdict(summary(answered[0]))
    return figures | ({"less_than_other": asdict(difference(answered[1], answered[0]))} if len(answered) == 2 else {})


def pose(
    who: Asked,
    other: Asked | None,
    path: Path,
    examples: Path | None = None,
    *,
    shots: int = SHOTS,
    max_tokens: int = MAX_TOKENS,
    limit: int | None = None,
) -> dict[str, Any]:
    """The same over a file's problems, which are answered by generation."""
    from moe.solve import difference, read_problems, share, solve

    problems = read_problems(path)[:limit]
    shown = read_problems(examples)[:shots] if examples else []
    solved = [solve(a.model, a.tokenizer, problems, shown, max_tokens) for a in (who, other) if a is not None]
    figures = asdict(share(solved[0]))
    return figures | ({"less_than_other": asdict(difference(solved[1], solved[0]))} if len(solved) == 2 else {})


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Figures by file: its name, or its path where another has that name too."""
    from moe.generate import load_tokenizer
    from moe.memory import memory_named

    with memory_named("examine: out of memory", "choose --device with more of it, or a smaller model"):
        use = Use.of(args)
        asked = [Asked(use.load(f), load_tokenizer(f)) for f in (args.folder, args.against) if f is not None]
        who, other = asked[0], asked[1] if len(asked) == 2 else None
        found = {_key(path, args): ask(who, other, path, limit=args.limit) for path in args.questions}
        if args.problems is not None:
            key = _key(args.problems, args) + (" (generated)" if args.problems in args.questions else "")
            found[key] = pose(
                who, other, args.problems, args.examples, shots=args.shots, max_tokens=args.max_tokens, limit=args.limit
            )
    return found


def _key(path: Path, args: argparse.Namespace) -> str:
    paths = {*args.questions, args.problems} - {None}
    return path.name if sum(p.name == path.name for p in paths) == 1 else str(path)


def lines(found: dict[str, Any]) -> list[str]:
    """What people read."""
    out = []
    for name, figures in found.items():
        other = figures.get("less_than_other")
        if "gold_bpb" not in figures:
            share = f"{figures['right']} of {figures['questions']} right"
            text = f"{name}: {share} ({figures['low']:.1%} to {figures['high']:.1%})"
            out.append(text + (_less(other, "") if other else ""))
            continue
        text = f"{name}: {figures['gold_bpb']:.4f} bits per byte of the right answer"
        if figures["gold_bpb_error"] is not None:
            text += f" (error {figures['gold_bpb_error']:.4f})"
        if figures["accuracy"] is not None:
            text += f", {figures['accuracy']:.1%} preferred ({figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%}, "
            text += f"blind {figures['chance']:.1%})"
        out.append(text + (_less(other["gold_bpb"], " in bits per byte") if other else ""))
    return out


def _less(paired: dict[str, float], what: str) -> str:
    interval = f"({paired['low']:+.4f} to {paired['high']:+.4f}, detectable {paired['least_effect']:.4f})"
    return f"; less the other{what} {paired['effect']:+.4f} {interval}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe.examine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run, a checkpoint or a hub folder")
    parser.add_argument(
        "--questions", type=Path, nargs="+", default=[], metavar="FILE", help="questions with their answers, JSONL"
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another model, for paired differences")
    parser.add_argument("--problems", type=Path, metavar="FILE", help="word problems, answered by generation")
    parser.add_argument("--examples", type=Path, metavar="FILE", help="solved problems to show before each")
    parser.add_argument("--shots", type=int, default=SHOTS, help=f"how many of them (default {SHOTS})")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of an answer to a problem (default 256)")
    parser.add_argument("--limit", type=int, help="questions of each file (default: all)")
    add_options(parser, ("device", "dtype"))
    args = parser.parse_args(argv)
    if not args.questions and args.problems is None:
        parser.error("nothing to ask: give --questions or --problems")
    if args.shots < 0:
        parser.error(f"--shots is too small: got {args.shots}, expected 0 or more")
    least = 1 if args.against is None else 2  # a difference has an error from two questions on
    if args.limit is not None and args.limit < least:
        parser.error(f"--limit is too small: got {args.limit}, expected {least} or more")
    try:
        found = examine(args)
    except StepwellError as e:
        print(f"examine: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    print(*lines(found), json.dumps(found, default=str, allow_nan=False), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
