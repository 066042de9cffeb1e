"""Ask a model the questions of files, alone or beside another: `python -m moe.examine FOLDER --questions FILE ...`

    python -m moe.examine models/a --questions arc_easy.jsonl.gz lambada_openai.jsonl.gz
    python -m moe.examine models/b --against models/a --questions arc_easy.jsonl.gz
    python -m moe.examine models/a --problems gsm8k_test.jsonl.gz --examples gsm8k_train.jsonl.gz --shots 4

In: a run folder or hub folder, files that `moe.choices` and `moe.solve` read. Out: one JSON object on the last line of standard
output, and a line a file above it for people.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.errors import ConfigError, StepwellError


def examine(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures by file: its name, or its path where another has that name too."""
    from moe.memory import memory_named

    with memory_named("examine: out of memory", "choose --device with more of it, or a smaller model"):
        return _examined(folder, args)


def _examined(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import moe
    from moe.choices import answer, difference, read_questions, summary
    from moe.generate import load_tokenizer
    from moe.solve import read_problems, share, solve

    models = [(moe.load(f).to(args.device), load_tokenizer(f)) for f in (folder, args.against) if f is not None]
    found: dict[str, Any] = {}
    for path in args.questions:
        questions = read_questions(path)[: args.limit]
        answered = [answer(model, tokenizer, questions) for model, tokenizer in models]
        figures = found[_key(path, args)] = asdict(summary(answered[0]))
        if len(answered) == 2:
            figures["less_than_other"] = asdict(difference(answered[1], answered[0]))
    if args.problems is not None:
        problems = read_problems(args.problems)[: args.limit]
        examples = read_problems(args.examples)[: args.shots] if args.examples else []
        model, tokenizer = models[0]
        key = _key(args.problems, args) + (" (generated)" if args.problems in args.questions else "")
        found[key] = asdict(share(solve(model, tokenizer, problems, examples, args.max_tokens)))
    return found


def _key(path: Path, args: argparse.Namespace) -> str:
    paths = {*args.questions, args.problems} - {None}
    return path.name if sum(p.name == path.name for p in paths) == 1 else str(path)


def lines(found: dict[str, Any]) -> list[str]:
    """What people read."""
    out = []
    for name, figures in found.items():
        if "gold_bpb" not in figures:
            share = f"{figures['right']} of {figures['questions']} right"
            out.append(f"{name}: {share} ({figures['low']:.1%} to {figures['high']:.1%})")
            continue
        text = f"{name}: {figures['gold_bpb']:.4f} bits per byte of the right answer (error {figures['gold_bpb_error']:.4f})"
        if figures["accuracy"] is not None:
            text += f", {figures['accuracy']:.1%} preferred ({figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%}, "
            text += f"blind {figures['chance']:.1%})"
        other = figures.get("less_than_other")
        if other:
            text += f"; less the other {other['gold_bpb']:+.4f} ({other['low']:+.4f} to {other['high']:+.4f}, "
            text += f"detectable {other['least_effect']:.4f})"
        out.append(text)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moe.examine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another model, for paired differences")
    parser.add_argument("--problems", type=Path, metavar="FILE", help="word problems, answered by generation")
    parser.add_argument("--examples", type=Path, metavar="FILE", help="solved problems to show first")
    parser.add_argument("--shots", type=int, default=4, help="how many of them (default 4)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer to a problem (default 256)")
    parser.add_argument("--limit", type=int, help="questions of each file (default: all)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if not args.questions and args.problems is None:
        parser.error("nothing to ask: give --questions or --problems")
    least = 1 if args.against is None else 2  # a difference has an error from two questions on
    if args.limit is not None and args.limit < least:
        parser.error(f"--limit is too small: got {args.limit}, expected {least} or more")
    try:
        found = examine(args.folder, args)
    except (ConfigError, StepwellError) as e:
        print(f"examine: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    print(*lines(found), json.dumps(found, default=str), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
