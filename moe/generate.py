"""Continues prompts: one or many, whole or as they come, by plain decoding or with the model's own drafts.

In: a decoder and token ids, or a folder and a text. Out: new token ids without EOS, or the new text. A prompt starts
behind EOS like every document, or behind what a hub folder's tokenizer puts there. Same model, prompt, settings and seed:
same output, whatever prompts stand beside it (moe/batching.py says how far that holds in floating point).

    python -m moe.generate FOLDER --prompt "Once upon" --max-tokens 50 --temperature 0.8

FOLDER is a run, a checkpoint or a hub folder.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, StageError, StepwellError
from moe import checkpoint
from moe.batching import Batcher
from moe.events import Event, Finish, TokenLogprobs
from moe.memory import memory_named
from moe.model import Decoder
from moe.sampling import Sampling
from moe.speculative import Acceptance
from moe.use import HELP, Use, add_options

EXAMPLES = """examples:
  python -m moe.generate models/a --prompt "Once upon" --max-tokens 50 --temperature 0.8
  python -m moe.generate models/a --prompt - --dtype bfloat16 < question.txt
Nothing is fetched or written. The first tokens wait for kernels to compile on a GPU, and with --compiled for minutes."""
SLOTS = 16  # prompts of a batch that are decoded at once
# Fields of `Sampling` that the command line takes as they are.
SETTINGS = {
    "max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float, "seed": int,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The continuation of one prompt. `text` is empty without a tokenizer."""

    tokens: tuple[int, ...]
    text: str
    finished: Finish | None
    logprobs: tuple[TokenLogprobs, ...] | None
    acceptance: Acceptance | None  # None where no draft was made


def generate_text(folder: Path, prompt: str, sampling: Sampling | None = None, use: Use | None = None) -> str:
    """The continuation of `prompt` by the folder's model, without it."""
    return "".join(event.text for event in _continued(Path(folder), prompt, sampling, use or Use()))


def generate(
    model: Decoder, prompt: Sequence[int], sampling: Sampling | None = None, *, speculate: int = 0
) -> Iterator[int]:
    """Yields new tokens until one that ends the answer. What begins a prompt, it and new tokens must fit the context."""
    events = _whole(stream(model, [prompt], sampling, speculate=speculate))
    return (token for event in events for token in event.tokens)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Any = None,
    speculate: int = 0,
    slots: int = SLOTS,
    fused: bool | None = None,
) -> list[Answer]:
    """The prompts' continuations, in their order; `sampling` for all of them, or one each. `fused` is that of `Decode`.

    A prompt whose logits are no numbers is a `StageError`.
    """
    events: list[list[Event]] = [[] for _ in prompts]
    answers = stream(model, prompts, sampling, tokenizer=tokenizer, speculate=speculate, slots=slots, fused=fused)
    for event in _whole(answers):
        events[event.id].append(event)
    return [_answer(part) for part in events]


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Any = None,
    speculate: int = 0,
    compiled: bool = False,
    slots: int = SLOTS,
    fused: bool | None = None,
) -> Iterator[Event]:
    """Events of all prompts as they come; an event's `id` is the prompt's index. Settings are checked at once.

    A prompt that fails has an event that says so, and the others go on.
    """
    each = [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
    slots, context = max(1, min(slots, len(prompts))), _context(model, prompts, each)
    with memory_named(*_memory(slots, context)):
        batcher = Batcher(
            model, tokenizer, slots=slots, speculate=speculate, queue=max(1, len(prompts)), context=context,
            compiled=compiled, fused=fused,
        )  # fmt: skip
    for prompt, settings in zip(prompts, each, strict=True):
        batcher.submit(prompt, settings)
    return _drain(batcher)


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a run, or the tokenizer.json of a hub folder."""
    hub = folder / checkpoint.TOKENIZER
    if hub.is_file() and not (folder / checkpoint.LATEST).is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(hub))
    return checkpoint.load_tokenizer(folder)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without those that the tokenizer puts around it.

    Lone surrogates, which JSON and command lines may bring, are no text, and the tokenizer fails on them: each reads as `?`.
    """
    ids: list[int] = tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
    return ids


def _context(model: Decoder, prompts: Sequence[Sequence[int]], each: Sequence[Sampling]) -> int:
    """No more than these prompts can fill: every step reads the whole capacity of the cache."""
    context, start = model.config.context, len(model.prefix)
    needs = (
        context if s.max_tokens is None else start + len(p) + s.max_tokens - 1  # the last new token is not read
        for p, s in zip(prompts, each, strict=True)
    )
    return max(1, min(context, max(needs, default=context)))


def _drain(batcher: Batcher) -> Iterator[Event]:
    while not batcher.idle:
        with memory_named(*_memory(batcher.slots, batcher.limit)):
            events = batcher.step()
        yield from events


def _memory(slots: int, context: int) -> tuple[str, str]:
    """What is said where a batch does not fit."""
    return (
        f"generate: out of memory with {slots} prompts at once of up to {context} tokens each",
        "lower max_tokens or slots, decode without drafts, or in bfloat16",
    )


def _whole(events: Iterator[Event]) -> Iterator[Event]:
    """The events of prompts that are all wanted: a failed one ends them."""
    for event in events:
        if event.error is not None:
            raise StageError(event.error)
        yield event


def _continued(folder: Path, prompt: str, sampling: Sampling | None, use: Use) -> Iterator[Event]:
    """Events of one text."""
    tokenizer = load_tokenizer(folder)
    ids = token_ids(tokenizer, prompt)
    model = use.load(folder)
    events = stream(
        model,
        [ids],
        sampling,
        tokenizer=tokenizer,
        speculate=use.speculate,
        compiled=use.compiled,
        slots=1,
        fused=use.fused,
    )
    return _whole(events)


def _answer(events: list[Event]) -> Answer:
    logprobs = [lp for e in events for lp in (e.logprobs or ())[: len(e.tokens)]]
    return Answer(
        tokens=tuple(t for e in events for t in e.tokens),
        text="".join(e.text for e in events),
        finished=events[-1].finished,
        logprobs=tuple(logprobs) if any(e.logprobs is not None for e in events) else None,
        acceptance=events[-1].acceptance,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.generate",
        description="Continues a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a run, a checkpoint or a hub folder")
    parser.add_argument("--prompt", default="", help="the text to continue; -: standard input")
    for name, kind in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Sampling, name), help=HELP[name])
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=HELP["stop"])
    add_options(parser, ("device", "dtype", "speculate", "compiled", "fused"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; texts go to standard output as they come, figures to standard error."""
    args = _parser().parse_args(arguments)
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        sampling = Sampling(stop=tuple(args.stop), **{name: getattr(args, name) for name in SETTINGS})
        write(args.folder, prompt, sampling, Use.of(args))
    except StepwellError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def write(folder: Path, prompt: str, sampling: Sampling, use: Use) -> None:
    """Writes the continuation to standard output as it comes, and how drafts fared to standard error."""
    last = None
    for last in _continued(folder, prompt, sampling, use):
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if last is not None and (drafts := last.acceptance) is not None:
        stood = ", ".join(f"{share:.0%}" for share in drafts.fractions)
        sys.stderr.write(
            f"{drafts.length:.2f} tokens a round over {drafts.rounds} rounds; drafts that stood: {stood}\n"
        )


if __name__ == "__main__":
    sys.exit(main())
